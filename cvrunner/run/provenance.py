"""The record of a run or a sweep, kept up to date on disk, and how its folder begins."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

import cvrunner
from cvrunner.config.schema import Config
from cvrunner.data.folds import Fold, split_table
from cvrunner.data.utterance import Corpus, natural_order
from cvrunner.errors import ResultsError
from cvrunner.files import write_atomically
from cvrunner.records.results import Provenance, RunStatus
from cvrunner.training.trial import Trial

RecordT = TypeVar("RecordT", bound=Provenance)


class RecordStore(Generic[RecordT]):
    """The record of a run or a sweep in its folder. Only the driver writes it."""

    def __init__(self, file: Path, record: RecordT, fresh: bool = False) -> None:
        self.file = file
        self.record = record
        self.fresh = fresh
        """Whether nothing was trained in this folder yet."""

    def discard(self) -> None:
        """Remove the folder of a run that could not begin."""
        if self.fresh:
            shutil.rmtree(self.file.parent, ignore_errors=True)

    def create_folder(self, config: Config, folds: Sequence[Fold]) -> None:
        """Write config.yaml, split.json and the record. Raises ResultsError."""
        folder = self.file.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
            write_atomically(folder / "split.json", json.dumps(split_table(folds), indent=1) + "\n")
            # The record comes last: a folder without it is not taken for a run.
            self._write()
        except OSError as error:
            raise ResultsError(f"results.root: {folder} cannot be written: {error.strerror}") from None

    def _end(self, complete: bool, stopped: bool, **changes: Any) -> RunStatus:
        """Set and return the final status, together with other changes."""
        status: RunStatus = "STOPPED" if stopped else "INCOMPLETE"
        if complete:
            status = "COMPLETE"
        self._write(status=status, finished_at=now(), **changes)
        return status

    def _write(self, **changes: Any) -> None:
        self.record = self.record.model_copy(update=changes)
        write_atomically(self.file, self.record.to_json())


def choose_folder(root: Path, prefix: str, key: str, record_file: str, new: bool) -> tuple[Path, bool]:
    """Return the folder to continue and False, or a free one and True.

    The one to continue is the newest `<prefix>-<key>` or `<prefix>-<key>-<n>` whose record has this key, if any; `new`:
    take a free one in any case. Raises ResultsError for a record that cannot be read.
    """
    base = root / f"{prefix}-{key[:8]}"
    files = [] if new else root.glob(f"{base.name}*/{record_file}")
    same = [file.parent for file in files if Provenance.from_json(file.read_bytes(), str(file)).key == key]
    if same:
        # By number, not by date, because clocks can be wrong.
        return max(same, key=lambda folder: natural_order(folder.name)), False
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder, True


def provenance(name: str, key: str, config: Config, corpus: Corpus, trial: Trial, command: list[str]) -> dict[str, Any]:
    """Return the fields of `Provenance`. `trial` may be any, because all have the same corpus and split."""
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


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
