"""The record and the folder of a sweep, kept up to date by the driver alone.

<root>/<sweep>/
    sweep.json  config.yaml  split.json  tuned-<sweep>.yaml  tune/ (Ray Tune's own files)
    settings/<setting>/fold-<k>/
        journal.jsonl  checkpoint/ (while the setting is trained)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cvrunner.config.schema import Config
from cvrunner.data.folds import Fold
from cvrunner.data.utterance import Corpus
from cvrunner.records import legacy
from cvrunner.records.results import Ccc, Provenance, Record, RunStatus
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.run.store import RecordStore, choose_folder, provenance
from cvrunner.text import format_score
from cvrunner.training.trial import Trial

SettingStatus = Literal["WAITING", "DONE", "PRUNED", "FAILED"]

UNDEFINED_SCORE = -1.0
"""Stands for an undefined CCC if a number is required, to compare scores and in MLflow: the lowest CCC possible."""


def comparable(score: float | None) -> float:
    """Return a score as a number, also if it is undefined."""
    return UNDEFINED_SCORE if score is None else score


class SettingEpoch(Record):
    """An epoch that all folds of a setting have finished, and the decision after it."""

    epoch: int
    folds: dict[int, Ccc]
    """Per fold: validation CCC of its best epoch so far, which is the one that training keeps."""
    score: float | None
    """Mean of the folds' CCC-Avg; None if one of them is undefined."""
    stops: bool = False
    """Whether the setting was stopped after this epoch."""


class SettingState(Record):
    """One setting and its progress."""

    values: dict[str, Any]
    """By key; the first setting has the values of the configuration itself."""
    status: SettingStatus = "WAITING"
    """PRUNED: stopped early because others were better; FAILED: a fold cannot be trained with it."""
    epochs: tuple[SettingEpoch, ...] = ()
    error: str | None = None

    @property
    def ended(self) -> bool:
        return self.status != "WAITING"

    @property
    def score(self) -> float | None:
        """Score after the last epoch; None also if there is no epoch yet."""
        if not self.epochs:
            return None
        return self.epochs[-1].score


class SweepRecord(Provenance):
    """sweep.json."""

    renames = legacy.SWEEP
    condition: str
    folds: list[int]
    seed: int
    """Seed of training."""
    epochs: int
    """Number of epochs of a setting that is not stopped early."""
    searched: list[str]
    """Keys."""
    settings: dict[str, SettingState]

    @property
    def ranked(self) -> list[str]:
        """Settings that were trained to the end, best first, then those stopped early, then those that failed."""

        def rank(name: str) -> tuple[int, int, float]:
            state, score = self.settings[name], comparable(self.settings[name].score)
            if state.status == "DONE":
                # Early stopping may have ended it: it has trained to the end, however few its epochs are.
                return 0, 0, -score
            return 1 + (state.status == "FAILED"), -len(state.epochs), -score

        return sorted(self.settings, key=rank)

    @property
    def best(self) -> str | None:
        """Best setting of those that were trained to the end; None if there is none, or none has a score."""
        done = [name for name in self.ranked if self.settings[name].status == "DONE"]
        if not done or self.settings[done[0]].score is None:
            return None
        return done[0]

    @property
    def sentence(self) -> str:
        """The outcome in one sentence, and what it does not prove."""
        data = ", on synthetic data" if self.synthetic else ""
        if self.best is None:
            return f"no setting is trained to the end yet{data}"
        first, count = next(iter(self.settings)), len(self.settings)
        score, configured = (format_score(self.settings[name].score) for name in (self.best, first))
        if self.best == first:
            return f"of {count} settings none is better than the configuration as it is, {score}{data}"
        return (
            f"{self.best} is the best of {count}: mean validation CCC-Avg {score}, as configured {configured}{data}; "
            "it was chosen by this value, which is therefore too optimistic"
        )


class SweepDirectory:
    """The files of one sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.sweep_file = path / "sweep.json"
        self.config = path / "config.yaml"
        self.split = path / "split.json"
        self.tuned = path / f"tuned-{self.name}.yaml"
        """The configuration with the best setting."""
        self.tune = path / "tune"
        """Ray Tune's own files, which every invocation replaces."""

    def fold(self, setting: str, fold: int) -> TrialDirectory:
        return TrialDirectory(self.path / "settings" / setting / f"fold-{fold}")

    def read(self) -> SweepRecord:
        """Read sweep.json. Raises ResultsError."""
        return SweepRecord.from_json(self.sweep_file.read_bytes(), str(self.sweep_file))


Listener = Callable[[SweepRecord, str], object]
"""Called with the record and the setting that has changed."""


class SweepStore(RecordStore[SweepRecord]):
    """The record of a sweep on disk: every decision is written before it takes effect."""

    def __init__(self, directory: SweepDirectory, record: SweepRecord, fresh: bool = False) -> None:
        super().__init__(directory.sweep_file, record, fresh)
        self.directory = directory
        self.listeners: list[Listener] = []

    @classmethod
    def open(
        cls,
        root: Path,
        name: str,
        key: str,
        config: Config,
        corpus: Corpus,
        folds: Sequence[Fold],
        settings: Mapping[str, Mapping[str, Any]],
        trials: Mapping[str, Sequence[Trial]],
        command: list[str],
        new: bool,
    ) -> SweepStore:
        """Continue the sweep of this key, or begin one; `new`: begin one in any case. Raises ResultsError."""
        path, fresh = choose_folder(root, f"{name}-tune", key, "sweep.json", new)
        directory = SweepDirectory(path)
        if not fresh:
            return cls(directory, directory.read())
        first = next(iter(trials.values()))
        record = SweepRecord(
            **provenance(directory.name, key, config, corpus, first[0], command),
            condition=first[0].condition,
            folds=[trial.fold.number for trial in first],
            seed=first[0].seed,
            epochs=first[0].config.train.epochs,
            searched=list(next(iter(settings.values()))),
            settings={name: SettingState(values=dict(values)) for name, values in settings.items()},
        )
        store = cls(directory, record, fresh=True)
        store.create_folder(config, folds)
        return store

    @property
    def pending(self) -> list[str]:
        """Settings that have not ended."""
        return [name for name, state in self.record.settings.items() if not state.ended]

    def begin(self) -> None:
        """Mark the sweep as RUNNING; settings that failed are tried again."""
        settings = dict(self.record.settings)
        for name, state in settings.items():
            if state.status == "FAILED":
                settings[name] = state.model_copy(update={"status": "WAITING", "error": None})
        self._write(settings=settings, status="RUNNING", finished_at=None)

    def decide(self, setting: str, epoch: SettingEpoch) -> None:
        """Write an epoch and the decision after it."""
        status: SettingStatus = "PRUNED" if epoch.stops else "WAITING"
        if epoch.epoch >= self.record.epochs:
            status = "DONE"
        self._set(setting, epochs=(*self.record.settings[setting].epochs, epoch), status=status)

    def end_setting(self, setting: str, error: str | None = None) -> None:
        """Write that a setting has failed with `error`, or else that it has trained to the end."""
        self._set(setting, status="FAILED" if error else "DONE", error=error)

    def end(self, stopped: bool) -> RunStatus:
        """Set and return the final status: COMPLETE if every setting has ended, though some may have failed."""
        self._remove_checkpoints()
        return self._end(not self.pending and self.record.best is not None, stopped)

    def _remove_checkpoints(self) -> None:
        """Remove the checkpoints of settings that have ended."""
        for name, state in self.record.settings.items():
            if state.ended:
                for fold in self.record.folds:
                    shutil.rmtree(self.directory.fold(name, fold).checkpoint, ignore_errors=True)

    def _set(self, setting: str, **changes: Any) -> None:
        changed = self.record.settings[setting].model_copy(update=changes)
        self._write(settings={**self.record.settings, setting: changed})
        if changed.ended:
            self._remove_checkpoints()
        # Last: nothing is reported that a kill could still undo.
        for listener in self.listeners:
            listener(self.record, setting)
