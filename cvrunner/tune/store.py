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

from pydantic import model_validator

from cvrunner.records import legacy
from cvrunner.records.results import Ccc, Provenance, Record, RunStatus
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.run.prepare import Experiment
from cvrunner.run.store import RecordStore, choose_folder, provenance
from cvrunner.text import format_score
from cvrunner.training.trial import Trial
from cvrunner.verdict.ccc import mean_if_all

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
    """One setting of one condition and its progress."""

    condition: str
    values: dict[str, Any]
    """By key; the first setting of a condition has the values of the configuration itself."""
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
        return self.score_in(None)

    def score_in(self, fold: int | None) -> float | None:
        """Return the CCC-Avg of one fold after the last epoch; None as a fold: the mean over the folds."""
        if not self.epochs:
            return None
        last = self.epochs[-1]
        return last.score if fold is None else last.folds[fold]["avg"]


class SweepRecord(Provenance):
    """sweep.json."""

    renames = legacy.SWEEP
    conditions: list[str]
    """Those that were searched."""
    folds: list[int]
    seed: int
    """Seed of training."""
    epochs: dict[str, int]
    """By condition: number of epochs of a setting that is not stopped early."""
    nested: bool = False
    """Whether each fold has a setting of its own."""
    searched: list[str]
    """Keys."""
    settings: dict[str, SettingState]

    @model_validator(mode="before")
    @classmethod
    def _of_one_condition(cls, data: Any) -> Any:
        """Return the record of an earlier version, which searched a single condition, in the form of this one."""
        if not isinstance(data, dict) or "condition" not in data:
            return data
        condition = data["condition"]
        settings = {name: state | {"condition": condition} for name, state in data["settings"].items()}
        return data | {"conditions": [condition], "epochs": {condition: data["epochs"]}, "settings": settings}

    def settings_of(self, condition: str) -> dict[str, SettingState]:
        """Return the settings of one condition; the first is as configured."""
        return {name: state for name, state in self.settings.items() if state.condition == condition}

    def ranked(self, condition: str, fold: int | None = None) -> list[str]:
        """Return a condition's settings by their score in one fold, or by the mean over the folds.

        Those that were trained to the end come first, best first, then those stopped early, then those that failed.
        """

        def rank(name: str) -> tuple[int, int, float]:
            state, score = self.settings[name], comparable(self.settings[name].score_in(fold))
            if state.status == "DONE":
                # Early stopping may have ended it: it has trained to the end, however few its epochs are.
                return 0, 0, -score
            return 1 + (state.status == "FAILED"), -len(state.epochs), -score

        return sorted(self.settings_of(condition), key=rank)

    def best(self, condition: str, fold: int | None = None) -> str | None:
        """Best setting of those that were trained to the end; None if there is none, or none has a score."""
        done = [name for name in self.ranked(condition, fold) if self.settings[name].status == "DONE"]
        if not done or self.settings[done[0]].score_in(fold) is None:
            return None
        return done[0]

    def chosen(self, condition: str) -> dict[int | None, str]:
        """Return the chosen setting by fold if the search is nested, else one for all folds under None; empty if one is
        missing."""
        folds = self.folds if self.nested else [None]
        found = {fold: self.best(condition, fold) for fold in folds}
        return {fold: name for fold, name in found.items() if name is not None and None not in found.values()}

    def score(self, condition: str) -> float | None:
        """Return the mean validation CCC-Avg of a condition with its chosen settings."""
        chosen = self.chosen(condition)
        return mean_if_all(self.settings[name].score_in(fold) for fold, name in chosen.items())

    @property
    def is_decided(self) -> bool:
        """Whether every condition has its settings."""
        return all(self.chosen(condition) for condition in self.conditions)

    @property
    def sentence(self) -> str:
        """The outcome in one sentence, and what it does not prove."""
        data = ", on synthetic data" if self.synthetic else ""
        if not self.is_decided:
            return f"no setting is trained to the end yet{data}"
        found = []
        for condition in self.conditions:
            chosen, settings = dict.fromkeys(self.chosen(condition).values()), self.settings_of(condition)
            first, count = next(iter(settings)), len(settings)
            score, configured = format_score(self.score(condition)), format_score(settings[first].score)
            text = f"of {count} settings none is better than the configuration as it is, {score}"
            if list(chosen) != [first]:
                best = ", ".join(chosen)
                which = "is the best"
                if self.nested:
                    which = "are the best per fold"
                text = f"{best} {which} of {count}: mean validation CCC-Avg {score}, as configured {configured}"
            found.append(f"{condition}: {text}")
        return f"{'; '.join(found)}{data}; a setting was chosen by this value, which is therefore too optimistic"


class SweepDirectory:
    """The files of one sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.sweep_file = path / "sweep.json"
        self.config = path / "config.yaml"
        self.split = path / "split.json"
        self.tuned = path / f"tuned-{self.name}.yaml"
        """The configuration with the chosen settings."""
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
        experiment: Experiment,
        key: str,
        settings: Mapping[str, Mapping[str, Any]],
        trials: Mapping[str, Sequence[Trial]],
        command: list[str],
        new: bool,
    ) -> SweepStore:
        """Continue the sweep of this key, or begin one; `new`: begin one in any case. Raises ResultsError."""
        path, fresh = choose_folder(experiment.results_root, f"{experiment.name}-tune", key, "sweep.json", new)
        directory = SweepDirectory(path)
        if not fresh:
            return cls(directory, directory.read())
        first, config = next(iter(trials.values())), experiment.config
        record = SweepRecord(
            **provenance(directory.name, key, config, experiment.corpus, first[0], command),
            conditions=list(dict.fromkeys(some[0].condition for some in trials.values())),
            folds=[trial.fold.number for trial in first],
            seed=first[0].seed,
            epochs={some[0].condition: some[0].config.train.epochs for some in trials.values()},
            nested=config.tune.nested,
            searched=[key for key in config.tune.search_space if any(key in values for values in settings.values())],
            settings={
                name: SettingState(condition=trials[name][0].condition, values=dict(values))
                for name, values in settings.items()
            },
        )
        store = cls(directory, record, fresh=True)
        store.create_folder(config, experiment.folds)
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
        if epoch.epoch >= self.record.epochs[self.record.settings[setting].condition]:
            status = "DONE"
        self._set(setting, epochs=(*self.record.settings[setting].epochs, epoch), status=status)

    def end_setting(self, setting: str, error: str | None = None) -> None:
        """Write that a setting has failed with `error`, or else that it has trained to the end."""
        self._set(setting, status="FAILED" if error else "DONE", error=error)

    def end(self, stopped: bool) -> RunStatus:
        """Set and return the final status: COMPLETE if every setting has ended, though some may have failed."""
        self._remove_checkpoints()
        return self._end(not self.pending and self.record.is_decided, stopped)

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
