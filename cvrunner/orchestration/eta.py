"""Progress of a run's trials and the time left, from their events so far. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from cvrunner.orchestration.failures import STATUS, Decision, Failure
from cvrunner.records.results import Ccc, EpochRecord, FeatureProgress, TrialResult, TrialStarted, Waiting
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from cvrunner.training.fold_trainer import Event


ENDED = ("done", "failed", "stopped")
"""States of a trial that does not train any more."""
MIN_GAIN = 0.02
"""Trials are paused only if the run would otherwise take longer than its lower bound by this share ..."""
MIN_GAIN_S = 3.0
"""... and by this much: an idle actor starts the next trial within a few seconds."""


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
        self.pauses = bool(trials) and trials[0].config.cluster.pauses_trials
        self.overhead_s: list[float] = []
        """Seconds of each finished trial outside its epochs: loading, features, saving and test."""

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
            # Training counts all attempts and the total only the last, so a resumed trial does not count.
            if event.total_s > event.train_s:
                self.overhead_s.append(event.total_s - event.train_s)

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

    @property
    def all_measured(self) -> bool:
        """Whether every condition that still trains has a finished epoch. If not, the time left is too long rather than
        too short, since the slowest trials start first."""
        return {p.condition for p in self.trials.values() if p.state not in ENDED} <= set(self.epoch_means_s())

    def trial_remaining_s(self, name: str) -> float | None:
        """Seconds of training left of a trial, without its waiting; None before the first epoch of the run."""
        progress, means_s = self.trials[name], self.epoch_means_s()
        if not means_s and progress.state not in ENDED:
            return None
        return progress.remaining_s(means_s)

    def remaining_s(self) -> float | None:
        """Seconds until the last trial ends, from the mean epoch of each condition and what the trials so far took
        besides; None before the first epoch."""
        means_s = self.epoch_means_s()
        if not means_s:
            return None
        overhead_s = median(self.overhead_s or [0.0])
        running = [p.remaining_s(means_s) for p in self.trials.values() if p.state not in ("waiting", *ENDED)]
        waiting = [p.remaining_s(means_s) + overhead_s for p in self.trials.values() if p.state == "waiting"]
        free = [0.0] * max(0, self.slots - len(running))
        whole_s = makespan_without_pauses_s([*running, *free], waiting)
        if not self.pauses:
            return whole_s
        return min(whole_s, longest_without_pause_s([*running, *waiting], self.slots))


def makespan_without_pauses_s(running: Sequence[float], waiting: Sequence[float]) -> float:
    """Seconds until all trials have ended if the waiting ones start longest first and none is interrupted."""
    ends = list(running)
    heapq.heapify(ends)
    for seconds in sorted(waiting, reverse=True):
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


def longest_without_pause_s(trials_s: Sequence[float], slots: int) -> float:
    """Longest run of these trials for which none is paused: hardly longer than its lower bound.

    A run that would take longer pauses trials, so it takes about as long as this; `plan` and the ETA both count on it.
    """
    # No schedule is shorter than all work spread evenly, or than the longest trial.
    lower_bound_s = max(sum(trials_s) / slots, *trials_s, 0.0)
    return max((1 + MIN_GAIN) * lower_bound_s, lower_bound_s + MIN_GAIN_S)
