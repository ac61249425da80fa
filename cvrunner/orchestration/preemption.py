"""Decide which running trial frees its slot for a waiting one, so that all GPUs stay busy to the end of a run. Pure.

Whole trials, longest first, leave GPUs idle at the end if their number does not fit: ten long ones on eight GPUs take
as long as sixteen. A trial has a checkpoint after every epoch, so pausing it there costs only a new start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from cvrunner.orchestration.eta import Eta, longest_without_pause_s, makespan_without_pauses_s
from cvrunner.orchestration.failures import Decision, Failure
from cvrunner.records.results import EpochRecord
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from cvrunner.training.fold_trainer import Event

MIN_LEAD_EPOCHS = 5
"""A waiting trial must have this many epochs more left than the running one, since a pause costs a new start."""
LAST_SHARE = 0.1
"""No trial is paused in this last share of its epochs: it would hold its checkpoint for a few epochs more."""
MIN_TRAINED_S = 60.0
"""A trial trains at least this long between two pauses."""


class Preemption(Eta):
    """Decides from the remaining time of each trial whether one must pause."""

    def __init__(self, trials: Sequence[Trial], slots: int) -> None:
        super().__init__(trials, slots)
        self._trained_s: dict[str, float] = {}
        """Seconds that each paused trial has trained since its last pause."""

    def event(self, trial: Trial, event: Event) -> None:
        super().event(trial, event)
        if isinstance(event, EpochRecord) and trial.name in self._trained_s:
            self._trained_s[trial.name] += event.train_s + event.validation_s

    def failed(self, trial: Trial, failure: Failure, decision: Decision) -> None:
        super().failed(trial, failure, decision)
        if decision is Decision.PAUSE:
            self._trained_s[trial.name] = 0.0

    def remaining_training_s(self, name: str) -> float:
        """Seconds of training left of a trial; 0 before the first measured epoch of the run."""
        return self.trial_remaining_s(name) or 0.0

    def should_pause(
        self, trial: str, running: Collection[str], waiting: Collection[str], asked: Collection[str]
    ) -> bool:
        """Whether `trial`, which has just finished an epoch, must pause; `asked`: trials already asked to."""
        progress, means_s = self.trials[trial], self.epoch_means_s()
        if trial in asked or self._trained_s.get(trial, MIN_TRAINED_S) < MIN_TRAINED_S:
            return False
        if progress.epochs - progress.epoch <= LAST_SHARE * progress.epochs:
            return False
        # How long an epoch of a condition takes is not guessed: nothing is paused for a condition without a measured
        # one, nor while it is unknown how long a running trial will take.
        waiting = [name for name in waiting if self.trials[name].condition in means_s]
        if any(self.trials[name].condition not in means_s for name in running):
            return False
        names = (*running, *waiting)
        remaining_s = {name: self.remaining_training_s(name) for name in names}
        epoch_s = {name: means_s[self.trials[name].condition] for name in names}
        # Each trial already asked to pause frees one slot; the longest waiting trials get those, so only the rest
        # count here.
        others = sorted(waiting, key=remaining_s.__getitem__, reverse=True)[len(asked) :]
        # `running` is a set: sorted, its sum does not depend on the order of hashes.
        return pause_ends_run_earlier(trial, sorted(running), others, remaining_s, epoch_s)


def pause_ends_run_earlier(
    trial: str,
    running: Sequence[str],
    waiting: Sequence[str],
    remaining_s: Mapping[str, float],
    epoch_s: Mapping[str, float],
) -> bool:
    """Whether the run ends earlier if `trial`, one of the `running`, resumes only after the longest of the `waiting`.

    `remaining_s`: seconds of training left of each trial; `epoch_s`: seconds of one of its epochs.
    """
    if not waiting or not remaining_s[trial]:
        return False
    longest = max(waiting, key=remaining_s.__getitem__)
    if remaining_s[longest] <= remaining_s[trial] + MIN_LEAD_EPOCHS * epoch_s[longest]:
        return False
    running_s, waiting_s = [remaining_s[name] for name in running], [remaining_s[name] for name in waiting]
    whole_s = makespan_without_pauses_s(running_s, waiting_s)
    return whole_s > longest_without_pause_s([*running_s, *waiting_s], len(running))
