"""What a run's dashboards show: the metrics, and an observer that keeps their newest values. Pure.

`ray_metrics.py` hands them to Ray, which puts `ray_` before each name.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cvrunner.orchestration.eta import Eta
from cvrunner.orchestration.failures import Decision, Failure
from cvrunner.records.results import EpochRecord
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from cvrunner.training.fold_trainer import Event

RUN = ("run",)
TRIAL = ("run", "condition", "fold", "seed")
STATES = ("waiting", "running", "done", "failed", "stopped")


@dataclass(frozen=True)
class Metric:
    """A gauge; the name ends in its unit, where it has one."""

    name: str
    title: str
    """Of its panel."""
    help: str
    labels: tuple[str, ...]


TRIALS = Metric("cvrunner_trials", "Trials", "Trials of the run, by state.", (*RUN, "state"))
RUN_ETA = Metric("cvrunner_run_eta_seconds", "Time left", "Until the last trial ends, from the epochs so far.", RUN)
RETRIES = Metric("cvrunner_retries", "Retries", "Attempts that failed and were repeated.", (*RUN, "kind"))
EPOCH = Metric("cvrunner_epoch", "Epoch", "The last epoch that has ended.", TRIAL)
EPOCHS = Metric("cvrunner_epochs", "Epochs to train", "The most epochs; training may stop early.", TRIAL)
VALIDATION_CCC = Metric(
    "cvrunner_validation_ccc", "Validation CCC", "Of the last epoch; absent where undefined.", (*TRIAL, "dimension")
)
TRAIN_LOSS = Metric("cvrunner_train_loss", "Training loss", "Mean over the last epoch's updates.", TRIAL)
ETA = Metric(
    "cvrunner_eta_seconds", "Time left of each trial", "Training that is left, without the wait for a GPU.", TRIAL
)
SPEED = Metric("cvrunner_utterances_per_second", "Speed", "Utterances trained a second, in the last epoch.", TRIAL)
MEMORY = Metric("cvrunner_peak_memory_mib", "Peak memory", "Of the GPU; on a CPU of the process.", TRIAL)
METRICS = (TRIALS, RUN_ETA, RETRIES, VALIDATION_CCC, TRAIN_LOSS, EPOCH, EPOCHS, ETA, SPEED, MEMORY)

Labels = tuple[str, ...]
"""Values of a metric's labels, in their order."""


class Gauges:
    """An observer that keeps the newest value of each metric; read by another thread."""

    def __init__(self, run: str, trials: Sequence[Trial], pending: Sequence[Trial], slots: int) -> None:
        """`trials`: all of the run; `todo`: those without a result."""
        self.run = run
        self.eta = Eta(pending, slots)
        self.done_before = len(trials) - len(pending)
        self.trials = {trial.name: trial for trial in pending}
        self.last: dict[str, EpochRecord] = {}
        self.retries: Counter[str] = Counter()
        self.lock = threading.Lock()

    def attempt(self, trial: Trial, number: int) -> None:
        with self.lock:
            self.eta.attempt(trial, number)

    def event(self, trial: Trial, event: Event) -> None:
        with self.lock:
            self.eta.event(trial, event)
            if isinstance(event, EpochRecord):
                self.last[trial.name] = event

    def failed(self, trial: Trial, failure: Failure, decision: Decision) -> None:
        with self.lock:
            self.eta.failed(trial, failure, decision)
            self.retries[failure.kind] += decision is Decision.RETRY

    def values(self) -> dict[Metric, dict[Labels, float]]:
        """By metric and labels; what is not known yet is absent."""
        with self.lock:
            found: dict[Metric, dict[Labels, float]] = {metric: {} for metric in METRICS}
            for state, count in self._states().items():
                found[TRIALS][self.run, state] = count
            for kind, count in self.retries.items():
                found[RETRIES][self.run, kind] = count
            if (left_s := self.eta.remaining_s()) is not None:
                found[RUN_ETA][self.run,] = left_s
            for name, trial in self.trials.items():
                self._add_trial(found, name, (self.run, trial.condition, str(trial.fold.number), str(trial.seed)))
            return found

    def _states(self) -> Counter[str]:
        states = Counter(dict.fromkeys(STATES, 0))
        states["done"] = self.done_before
        for row in self.eta.rows.values():
            states[row.state if row.state in STATES else "running"] += 1
        return states

    def _add_trial(self, found: dict[Metric, dict[Labels, float]], name: str, labels: Labels) -> None:
        row = self.eta.rows[name]
        found[EPOCH][labels], found[EPOCHS][labels] = row.epoch, row.epochs
        if (left_s := self.eta.trial_remaining_s(name)) is not None:
            found[ETA][labels] = left_s
        if (record := self.last.get(name)) is None:
            return
        found[TRAIN_LOSS][labels] = record.train_loss
        found[SPEED][labels] = record.utterances_per_s
        found[MEMORY][labels] = record.peak_memory_mib
        for dimension, value in record.validation_ccc.items():
            if value is not None:
                found[VALIDATION_CCC][*labels, dimension] = value
