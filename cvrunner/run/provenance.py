"""How the folder of a run, or of a sweep, begins: where it is, where it came from, and its first files."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import yaml

import cvrunner
from cvrunner.config.schema import Config
from cvrunner.data.folds import Fold, split_table
from cvrunner.data.utterance import Corpus
from cvrunner.errors import ResultsError
from cvrunner.files import write_atomically
from cvrunner.training.trial import Trial


class Folder(Protocol):
    """Of a run or a sweep."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> Path: ...

    @property
    def split(self) -> Path: ...


def free_folder(base: Path) -> Path:
    """One that is not there yet: `base`, `base`-2 and so on."""
    number = 1
    while (path := base if number == 1 else base.with_name(f"{base.name}-{number}")).exists():
        number += 1
    return path


def provenance(name: str, key: str, config: Config, corpus: Corpus, trial: Trial, command: list[str]) -> dict[str, Any]:
    """The fields of `Provenance`. `trial`: any one, since all have the corpus and the split in common."""
    return {
        "run": name,
        "key": key,
        "status": "RUNNING",
        "started_at": now(),
        "command": command,
        "host": socket.gethostname(),
        "cvrunner_version": cvrunner.__version__,
        "corpus": corpus.describe(),
        "split_digest": trial.split_digest,
        "corpus_digest": trial.corpus_digest,
        "synthetic": corpus.synthetic,
        "dimensions": list(config.corpus.dimensions),
        "protocol": config.model.protocol,
    }


def begin_folder(folder: Folder, config: Config, folds: Sequence[Fold], write_record: Callable[[], object]) -> None:
    """Configuration, split and record, in this order. Raises ResultsError."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_atomically(folder.config, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        write_atomically(folder.split, json.dumps(split_table(folds), indent=1) + "\n")
        write_record()
    except OSError as error:
        raise ResultsError(f"results.root: {folder.path} cannot be written: {error.strerror}") from None


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
