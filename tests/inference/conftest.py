"""The finished run that the tests of this folder read, as the API gives it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cvrunner.api import Run, load_run
from tests.end_to_end.programs import FinishedRun

OVERRIDES = {"train.epochs": 2}
"""The overrides in docs/api.md; the finished run has the same."""


@pytest.fixture(scope="session")
def home(finished: FinishedRun) -> Path:
    """A working directory whose configs/demo.yaml is a smaller demo, trained already."""
    return finished.folder


@pytest.fixture(scope="session")
def run(finished: FinishedRun) -> Run:
    """The finished run."""
    return load_run(finished.directory.path)


@pytest.fixture(scope="session")
def audio(home: Path) -> dict[str, Path]:
    """The files of the corpus by the names of their utterances."""
    return {path.stem: path for path in sorted((home / "corpus").rglob("*.wav"))}
