"""Progress of a run's trials and the time left, from their events so far. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cvrunner.orchestration.failures import STATUS, Decision, Failure
from cvrunner.records.results import Ccc, EpochRecord, FeatureProgress, TrialResult, TrialStarted, Waiting
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from cvrunner.training.fold_trainer import Event


ENDED = ("done", "failed", "stopped")
"""States of a trial that does not train any more."""


@dataclass
class TrialProgress:
    """Progress of one trial."""

    condition: str
    epochs: int
    state: str = "waiting"
    epoch: int = 0
    """Last finished epoch."""
    ccc: Ccc = field(default_factory=dict)
    """Validation CCC of the last epoch; test CCC of a finished trial."""
    epoch_s: list[float] = field(default_factory=list)
    """Seconds of each epoch since the last failure."""

    def remaining_s(self, means_s: Mapping[str, float]) -> float:
        """Seconds of training left, from the mean epoch of each condition, of which there must be one."""
        if self.state in ENDED:
            return 0.0
        # A condition without a finished epoch counts as slow as the slowest one.
        return (self.epochs - self.epoch) * means_s.get(self.condition, max(means_s.values()))


class Eta:
    """An observer that keeps the progress of each trial."""

    def __init__(self, trials: Sequence[Trial], slots: int) -> None:
        self.trials = {t.name: TrialProgress(t.condition, t.config.train.epochs) for t in trials}
        self.slots = slots

    def attempt(self, trial: Trial, number: int) -> None:
        self.trials[trial.name].state = "starting"

    def event(self, trial: Trial, event: Event) -> None:
        progress = self.trials[trial.name]
        if isinstance(event, Waiting):
            progress.state = "waiting"
        elif isinstance(event, FeatureProgress):
            progress.state = f"{event.kind} {event.done}/{event.shards}"
        elif isinstance(event, TrialStarted):
            progress.state = "training"
        elif isinstance(event, EpochRecord):
            progress.epoch, progress.ccc = event.epoch, event.validation_ccc
            progress.epoch_s.append(event.train_s + event.validation_s)
        elif isinstance(event, TrialResult):
            progress.state, progress.ccc = "done", event.test_ccc

    def failed(self, trial: Trial, failure: Failure, decision: Decision) -> None:
        progress = self.trials[trial.name]
        progress.state = STATUS[decision].lower()
        # A paused trial resumes at the same speed; after a failure it may run on another node.
        if decision is not Decision.PAUSE:
            progress.epoch_s = []

    @property
    def epochs_done(self) -> int:
        """Number of finished epochs; those skipped by early stopping count as finished."""
        return sum(p.epochs if p.state == "done" else p.epoch for p in self.trials.values())

    @property
    def epochs(self) -> int:
        """Number of epochs of all trials."""
        return sum(progress.epochs for progress in self.trials.values())

    def epoch_means_s(self) -> dict[str, float]:
        """Mean seconds of an epoch per condition; conditions without a finished epoch are missing."""
        measured: dict[str, list[float]] = {}
        for progress in self.trials.values():
            measured.setdefault(progress.condition, []).extend(progress.epoch_s)
        return {condition: sum(s) / len(s) for condition, s in measured.items() if s}

    def trial_remaining_s(self, name: str) -> float | None:
        """Seconds of training left of a trial, without its waiting; None before the first epoch of the run."""
        progress, means_s = self.trials[name], self.epoch_means_s()
        if not means_s and progress.state not in ENDED:
            return None
        return progress.remaining_s(means_s)

    def remaining_s(self) -> float | None:
        """Seconds until the last trial ends, from the mean epoch of each condition; None before the first epoch."""
        means_s = self.epoch_means_s()
        if not means_s:
            return None
        work_s = [progress.remaining_s(means_s) for progress in self.trials.values()]
        return max(sum(work_s) / self.slots, max(work_s, default=0.0))
