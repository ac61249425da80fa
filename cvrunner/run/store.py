"""run.json and the run's folder, kept up to date by the driver alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvrunner.config.schema import Config
from cvrunner.data.folds import Fold
from cvrunner.data.utterance import Corpus
from cvrunner.files import write_atomically
from cvrunner.orchestration.failures import STATUS, Decision, Failure
from cvrunner.orchestration.trials import run_key
from cvrunner.records.results import (
    FloorRecord,
    RunRecord,
    RunStatus,
    TrialResult,
    TrialState,
    TrialStatus,
    WorkerStarted,
)
from cvrunner.records.run_directory import RunDirectory, TrialDirectory
from cvrunner.run.provenance import RecordStore, choose_folder, provenance
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from cvrunner.training.fold_trainer import Event


class RunStore(RecordStore[RunRecord]):
    """The record of a run on disk; an observer of its trials."""

    def __init__(self, directory: RunDirectory, record: RunRecord, fresh: bool = False) -> None:
        super().__init__(directory.run_file, record, fresh)
        self.directory = directory

    @classmethod
    def open(
        cls,
        root: Path,
        name: str,
        config: Config,
        corpus: Corpus,
        folds: Sequence[Fold],
        trials: Sequence[Trial],
        floor: FloorRecord,
        command: list[str],
        new: bool,
    ) -> RunStore:
        """Continue the run of these trials, or begin one; `new`: begin one in any case."""
        key = run_key(trials)
        path, fresh = choose_folder(root, name, key, "run.json", new)
        directory = RunDirectory(path)
        if not fresh:
            return cls(directory, directory.read_run())
        record = RunRecord(
            **provenance(directory.name, key, config, corpus, trials[0], command),
            conditions=list(config.conditions),
            folds=[fold.number for fold in folds],
            seeds=list(config.train.seeds),
            floor=floor,
            trials={t.name: _state(t) for t in sorted(trials, key=lambda t: (t.condition, t.fold.number, t.seed))},
        )
        store = cls(directory, record, fresh=True)
        store.create_folder(config, folds)
        return store

    def trial_directory(self, trial: Trial) -> TrialDirectory:
        return self.directory.trial(trial.condition, trial.fold.number, trial.seed)

    def result(self, trial: Trial) -> TrialResult | None:
        """Return the trial's result, or None if it has none yet."""
        return self.trial_directory(trial).result(trial.key)

    def begin(self) -> None:
        """Mark the run as RUNNING; a trial is DONE if its result is on disk, and waits otherwise."""
        states = {}
        for name, state in self.record.trials.items():
            trial = self.directory.trial(state.condition, state.fold, state.seed)
            status: TrialStatus = "WAITING"
            if trial.result(state.key) is not None:
                status = "DONE"
                # A process killed after it wrote the result has left its checkpoint.
                shutil.rmtree(trial.checkpoint, ignore_errors=True)
            states[name] = state.model_copy(update={"status": status, "error": None})
        self._write(trials=states, status="RUNNING", finished_at=None)

    def end(self, stopped: bool) -> RunStatus:
        """Set and return the final status: COMPLETE only if every trial has its result."""
        states = dict(self.record.trials)
        for name, state in states.items():
            if state.status == "RUNNING":
                states[name] = state.model_copy(update={"status": "STOPPED"})
        return self._end(all(state.status == "DONE" for state in states.values()), stopped, trials=states)

    def note(self, **changes: Any) -> None:
        """Change further fields of run.json: the floor, the links."""
        self._write(**changes)

    def attempt(self, trial: Trial, number: int) -> None:
        attempts = self.record.trials[trial.name].attempts + 1
        self._set(trial, status="RUNNING", attempts=attempts)

    def event(self, trial: Trial, event: Event) -> None:
        if isinstance(event, WorkerStarted):
            self._set(trial, node=event.node)
        if isinstance(event, TrialResult):
            self._set(trial, status="DONE", error=None)

    def failed(self, trial: Trial, failure: Failure, decision: Decision) -> None:
        state = self.record.trials[trial.name]
        if decision is Decision.PAUSE:
            # A paused trial resumes the same attempt, which `attempt` will count again.
            self._set(trial, status=STATUS[decision], attempts=state.attempts - 1)
            return
        failures = dict(state.failures)
        failures[failure.kind] = failures.get(failure.kind, 0) + 1
        self._set(trial, status=STATUS[decision], error=failure.message, failures=failures)
        if failure.details:
            write_atomically(self.trial_directory(trial).path / "error.txt", failure.details)

    def _set(self, trial: Trial, **changes: Any) -> None:
        state = self.record.trials[trial.name].model_copy(update=changes)
        self._write(trials={**self.record.trials, trial.name: state})


def _state(trial: Trial) -> TrialState:
    return TrialState(key=trial.key, condition=trial.condition, fold=trial.fold.number, seed=trial.seed)
