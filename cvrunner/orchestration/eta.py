"""How far the trials of a run are, and when they will be done, from the events that came so far. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cvrunner.orchestration.failures import Decision, Failure
from cvrunner.records.results import Ccc, EpochRecord, FeatureProgress, TrialResult, TrialStarted, Waiting
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from cvrunner.training.fold_trainer import Event

STATE = {
    Decision.RETRY: "waiting",
    Decision.PAUSE: "waiting",
    Decision.FAIL: "failed",
    Decision.ABORT: "failed",
    Decision.STOP: "stopped",
}
"""Of a trial after a failure, by what was decided."""
OVER = ("done", "failed", "stopped")


@dataclass
class TrialProgress:
    """How far one trial is."""

    condition: str
    epochs: int
    state: str = "waiting"
    epoch: int = 0
    """The last that has ended."""
    ccc: Ccc = field(default_factory=dict)
    """Validation, in the end test."""
    epoch_s: list[float] = field(default_factory=list)
    """Of each epoch of this attempt."""

    @property
    def over(self) -> bool:
        return self.state in OVER

    @property
    def epochs_left(self) -> int:
        return 0 if self.over else self.epochs - self.epoch


class Eta:
    """An observer that keeps how far each trial is."""

    def __init__(self, trials: Sequence[Trial], slots: int) -> None:
        self.rows = {t.name: TrialProgress(t.condition, t.config.train.epochs) for t in trials}
        self.slots = slots

    def attempt(self, trial: Trial, number: int) -> None:
        self.rows[trial.name].state = "starting"

    def event(self, trial: Trial, event: Event) -> None:
        row = self.rows[trial.name]
        if isinstance(event, Waiting):
            row.state = "waiting"
        elif isinstance(event, FeatureProgress):
            row.state = f"{event.kind} {event.done}/{event.shards}"
        elif isinstance(event, TrialStarted):
            row.state = "training"
        elif isinstance(event, EpochRecord):
            row.epoch, row.ccc = event.epoch, event.validation_ccc
            row.epoch_s.append(event.train_s + event.validation_s)
        elif isinstance(event, TrialResult):
            row.state, row.ccc = "done", event.test_ccc

    def failed(self, trial: Trial, failure: Failure, decision: Decision) -> None:
        row = self.rows[trial.name]
        row.state = STATE[decision]
        if decision is not Decision.PAUSE:
            row.epoch_s = []

    @property
    def epochs_done(self) -> int:
        """Of all trials; those that an early stop spares count as done."""
        return sum(row.epochs if row.state == "done" else row.epoch for row in self.rows.values())

    @property
    def epochs(self) -> int:
        """Of all trials."""
        return sum(row.epochs for row in self.rows.values())

    def trial_remaining_s(self, name: str) -> float | None:
        """Seconds of training that a trial has before it, without its waiting; None before any epoch of the run."""
        means, row = epoch_means_s(list(self.rows.values())), self.rows[name]
        return 0.0 if row.over else _work_s(row, means) if means else None

    def remaining_s(self) -> float | None:
        """Seconds until the last trial ends; None before the first epoch."""
        return remaining_s(list(self.rows.values()), self.slots)


def epoch_means_s(rows: Sequence[TrialProgress]) -> dict[str, float]:
    """By condition, of those that have had an epoch."""
    measured: dict[str, list[float]] = {}
    for row in rows:
        measured.setdefault(row.condition, []).extend(row.epoch_s)
    return {condition: sum(s) / len(s) for condition, s in measured.items() if s}


def remaining_s(rows: Sequence[TrialProgress], slots: int) -> float | None:
    """Seconds until the last trial ends, from the mean epoch of each condition; None before the first epoch."""
    means = epoch_means_s(rows)
    if not means:
        return None
    work = [_work_s(row, means) for row in rows]
    return max(sum(work) / slots, max(work, default=0.0))


def _work_s(row: TrialProgress, means: dict[str, float]) -> float:
    """A condition without an epoch yet is taken to be as slow as the slowest one."""
    return row.epochs_left * means.get(row.condition, max(means.values()))
