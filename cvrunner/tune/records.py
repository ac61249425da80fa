"""The record and the folder of a sweep.

<root>/<sweep>/
    sweep.json  config.yaml  split.json  tuned-<sweep>.yaml  tune/ (Ray Tune's own)
    settings/<setting>/fold-<k>/
        journal.jsonl  checkpoint/ (while the setting is trained)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cvrunner.files import write_atomically
from cvrunner.records import legacy
from cvrunner.records.results import Ccc, Provenance, Record
from cvrunner.records.run_directory import TrialDirectory

SettingStatus = Literal["WAITING", "DONE", "PRUNED", "FAILED"]


class SettingEpoch(Record):
    """An epoch that all folds of a setting have finished, and what was decided after it."""

    epoch: int
    folds: dict[int, Ccc]
    """By fold: validation CCC of its best epoch so far, which is the one that training keeps."""
    score: float | None
    """Mean of the folds' CCC-Avg; None where one is undefined."""
    stops: bool = False
    """Whether the setting was stopped for it."""


class SettingState(Record):
    """One setting, and how far it is."""

    values: dict[str, Any]
    """By key; of the first setting those of the configuration itself."""
    status: SettingStatus = "WAITING"
    """PRUNED: stopped early, since others were better; FAILED: a fold cannot be trained with it."""
    epochs: tuple[SettingEpoch, ...] = ()
    error: str | None = None

    @property
    def ended(self) -> bool:
        return self.status != "WAITING"

    @property
    def score(self) -> float | None:
        """After its last epoch."""
        return self.epochs[-1].score if self.epochs else None


class SweepRecord(Provenance):
    """sweep.json."""

    renames = legacy.SWEEP
    condition: str
    folds: list[int]
    seed: int
    """Of training."""
    epochs: int
    """Of a setting that is not stopped early."""
    searched: list[str]
    """Keys."""
    settings: dict[str, SettingState]

    @property
    def ranked(self) -> list[str]:
        """The settings that were trained to the end, best first, then those stopped early, then the others."""

        def rank(name: str) -> tuple[bool, int, float]:
            state = self.settings[name]
            failed = state.status == "FAILED"
            reached = self.epochs if state.status == "DONE" else len(state.epochs) - self.epochs
            return failed, -reached, -(-2.0 if state.score is None else state.score)

        return sorted(self.settings, key=rank)

    @property
    def best(self) -> str | None:
        """The best setting of those that were trained to the end; None where there is none, or none has a score."""
        done = [name for name in self.ranked if self.settings[name].status == "DONE"]
        return done[0] if done and self.settings[done[0]].score is not None else None


@dataclass(frozen=True)
class SweepDirectory:
    """The files of one sweep."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def sweep_file(self) -> Path:
        return self.path / "sweep.json"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def split(self) -> Path:
        return self.path / "split.json"

    @property
    def tuned(self) -> Path:
        """The configuration with the best setting."""
        return self.path / f"tuned-{self.name}.yaml"

    @property
    def tune(self) -> Path:
        """Ray Tune's own files, made anew by each invocation."""
        return self.path / "tune"

    def fold(self, setting: str, fold: int) -> TrialDirectory:
        return TrialDirectory(self.path / "settings" / setting / f"fold-{fold}")

    def read(self) -> SweepRecord:
        """sweep.json. Raises ResultsError."""
        return SweepRecord.from_json(self.sweep_file.read_bytes(), str(self.sweep_file))

    def write(self, record: SweepRecord) -> None:
        write_atomically(self.sweep_file, record.to_json())
