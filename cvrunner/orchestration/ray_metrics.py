"""A run's metrics and their newest values, exported to Ray's metrics port for Prometheus and Grafana.

The driver exports them, since it outlives the actors. Ray puts `ray_` before each name.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
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
EXPORT_EVERY_S = 5.0


@dataclass(frozen=True)
class Metric:
    """A gauge; its name ends in its unit, if it has one."""

    name: str
    title: str
    """Title of its panel."""
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
    """An observer that keeps the newest value of each metric; another thread reads them."""

    def __init__(self, run: str, trials: Sequence[Trial], pending: Sequence[Trial], slots: int) -> None:
        """`trials`: all trials of the run; `pending`: those without a result."""
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
        """Return the values by metric and labels; unknown ones are absent."""
        with self.lock:
            values: dict[Metric, dict[Labels, float]] = {metric: {} for metric in METRICS}
            states = Counter({**dict.fromkeys(STATES, 0), "done": self.done_before})
            for progress in self.eta.trials.values():
                # Other states, such as `conv 3/12`, are steps of a running trial.
                states[progress.state if progress.state in STATES else "running"] += 1
            values[TRIALS] = {(self.run, state): count for state, count in states.items()}
            values[RETRIES] = {(self.run, kind): count for kind, count in self.retries.items()}
            if (remaining_s := self.eta.remaining_s()) is not None:
                values[RUN_ETA][self.run,] = remaining_s
            for name, trial in self.trials.items():
                labels = (self.run, trial.condition, str(trial.fold.number), str(trial.seed))
                progress = self.eta.trials[name]
                values[EPOCH][labels], values[EPOCHS][labels] = progress.epoch, progress.epochs
                if (remaining_s := self.eta.trial_remaining_s(name)) is not None:
                    values[ETA][labels] = remaining_s
                if (record := self.last.get(name)) is None:
                    continue
                values[TRAIN_LOSS][labels] = record.train_loss
                values[SPEED][labels] = record.utterances_per_s
                values[MEMORY][labels] = record.peak_memory_mib
                for dimension, value in record.validation_ccc.items():
                    if value is not None:
                        values[VALIDATION_CCC][*labels, dimension] = value
            return values


@contextlib.contextmanager
def exported(gauges: Gauges) -> Iterator[None]:
    """Export the gauges to Ray until the end of the context; Ray must be connected."""
    # Imported here because `fold` uses the gauges without Ray, which takes a second to import.
    from ray.util.metrics import Gauge

    ended = threading.Event()
    by_metric = {metric: Gauge(metric.name, description=metric.help, tag_keys=metric.labels) for metric in METRICS}

    def export() -> None:
        for metric, values in gauges.values().items():
            for labels, value in values.items():
                by_metric[metric].set(value, tags=dict(zip(metric.labels, labels, strict=True)))

    def export_repeatedly() -> None:
        # Ray reports a value once and forgets it: what is not set again within two report intervals (10 s each by
        # default) disappears from the port.
        while not ended.is_set():
            export()
            ended.wait(EXPORT_EVERY_S)

    thread = threading.Thread(target=export_repeatedly, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        export()
