"""Tells the tracker what the scheduler sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cvrunner.orchestration.failures import STATUS, Decision, Failure
from cvrunner.records.results import EpochRecord, TrialResult
from cvrunner.tracking.tracker import Tracker
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from cvrunner.training.fold_trainer import Event


class TrackingObserver:
    """An observer of trials that passes on what a tracker keeps."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def attempt(self, trial: Trial, number: int) -> None:
        self.tracker.trial_started(trial.name)

    def event(self, trial: Trial, event: Event) -> None:
        if isinstance(event, EpochRecord):
            self.tracker.epoch(trial.name, event)
        elif isinstance(event, TrialResult):
            self.tracker.trial_finished(trial.name, event, "DONE")

    def failed(self, trial: Trial, failure: Failure, decision: Decision) -> None:
        if not decision.comes_back:
            self.tracker.trial_finished(trial.name, None, STATUS[decision], failure.message)
