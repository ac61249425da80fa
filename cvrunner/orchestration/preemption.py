"""Which trial gives its GPU to a waiting one at the end of an epoch, so that all GPUs are busy to the end. Pure.

Whole trials, longest first, leave GPUs idle at the end where their number does not fit: ten long ones on eight GPUs
take as long as sixteen. A trial has a checkpoint after every epoch, so going on later costs only a start.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from cvrunner.orchestration.eta import Eta, epoch_means_s
from cvrunner.orchestration.failures import Decision, Failure
from cvrunner.records.results import TrialResult
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from cvrunner.training.fold_trainer import Event

LEAD_EPOCHS = 5
"""By so many epochs of its own a waiting trial must have more left, for changing over costs a start."""
GAIN = 0.02
"""And whole trials must take longer than the lower bound by this share ..."""
GAIN_S = 3.0
"""... and by so much: an actor that is there begins the next trial within a second or a few."""


class Preemption(Eta):
    """An observer that knows what each trial has left, and which ones were asked to give way."""

    def __init__(self, trials: Sequence[Trial], slots: int) -> None:
        super().__init__(trials, slots)
        self.paused: set[str] = set()

    def event(self, trial: Trial, event: Event) -> None:
        super().event(trial, event)
        if isinstance(event, TrialResult):
            self.paused.discard(trial.name)

    def failed(self, trial: Trial, failure: Failure, decision: Decision) -> None:
        super().failed(trial, failure, decision)
        self.paused.discard(trial.name)

    def left_s(self, name: str) -> float:
        """Seconds of training that a trial has before it; 0 where no epoch of the run was measured yet."""
        return self.trial_remaining_s(name) or 0.0

    def pauses(self, trial: str, running: Collection[str], waiting: Collection[str]) -> bool:
        """Whether `trial`, which has just ended an epoch, is to give way now; it is then among the `paused`."""
        names = (*running, *waiting)
        left_s = {name: self.left_s(name) for name in names}
        means = epoch_means_s(list(self.rows.values()))
        epoch_s = {name: means.get(self.rows[name].condition, max(means.values())) for name in names}
        # The longest of those that wait have a place already, that of the trials that were asked before.
        placeless = sorted(waiting, key=left_s.__getitem__, reverse=True)[len(self.paused) :]
        gives_way = trial not in self.paused and gain(trial, sorted(running), placeless, left_s, epoch_s)
        self.paused |= {trial} if gives_way else set()
        return gives_way


def gain(
    trial: str,
    running: Sequence[str],
    waiting: Sequence[str],
    left_s: Mapping[str, float],
    epoch_s: Mapping[str, float],
) -> bool:
    """Whether the run ends earlier when `trial`, one of the `running`, goes on after the longest of the `waiting`.

    `left_s`: seconds of training that each has before it; `epoch_s`: of each one's epoch.
    """
    if not waiting or not left_s[trial]:
        return False
    longest = max(waiting, key=left_s.__getitem__)
    if left_s[longest] <= left_s[trial] + LEAD_EPOCHS * epoch_s[longest]:
        return False
    before, after = [left_s[name] for name in running], [left_s[name] for name in waiting]
    at_best = max(sum(before + after) / len(running), *before, *after)
    return whole_trials_s(before, after) > max((1 + GAIN) * at_best, at_best + GAIN_S)


def whole_trials_s(running: Sequence[float], waiting: Sequence[float]) -> float:
    """Seconds until all have ended, when the waiting ones begin longest first and none is interrupted."""
    ends = list(running)
    heapq.heapify(ends)
    for seconds in sorted(waiting, reverse=True):
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)
