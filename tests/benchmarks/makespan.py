"""The makespan of a run on 8 GPUs in virtual time: cvrunner's order, loop and decisions, with simulated durations.

An executor stands in for Ray. It simulates each attempt as epochs of noisy length, 12 minutes unfrozen and 5 frozen.
Some attempts lose their process in the middle of an epoch. The next attempt continues at the end of the last epoch,
after the time an actor takes to start; so does a paused trial. No schedule at all is shorter than the lower bound.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from cvrunner.config.schema import validate
from cvrunner.config.sections import RetriesConfig
from cvrunner.data.folds import make_folds
from cvrunner.orchestration.failures import Failure
from cvrunner.orchestration.preemption import Preemption
from cvrunner.orchestration.scheduler import run_trials
from cvrunner.orchestration.trials import plan_trials
from cvrunner.records.results import EpochRecord, TrialResult
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.training.trial import Trial
from tests.benchmarks.table import Options, Row
from tests.corpora import corpus

GPUS = 8
EPOCHS = 20
EPOCH_MINUTES = {"frozen": 5.0, "unfrozen": 12.0}
TRIAL_NOISE = 0.1
EPOCH_NOISE = 0.05
START_MINUTES = 0.2
LOSS_SHARE = 0.2
"""Share of trials that lose their process once, if failures are simulated."""


def makespan(options: Options) -> list[Row]:
    """10 to 60 trials, many draws of the noise, without and with lost processes."""
    draws = 5 if options.quick else 100
    rows = []
    for loss_share in (0.0, LOSS_SHARE):
        for seeds in (1, 6) if options.quick else (1, 2, 3, 4, 5, 6):
            trials = plan(seeds)
            played = [play(trials, random.Random(f"{loss_share} {seeds} {draw}"), loss_share) for draw in range(draws)]
            rows.append(_row(len(trials), loss_share, played))
    return rows


@dataclass(frozen=True)
class Played:
    """One run in virtual time, in minutes."""

    makespan: float
    work: tuple[float, ...]
    """Minutes of each trial, all attempts together."""

    pauses: int
    """Number of pauses of all trials."""

    @property
    def lower_bound(self) -> float:
        """All work spread evenly, or the longest trial if that is longer; each trial starts once."""
        return max(sum(self.work) / GPUS, *self.work)


@dataclass
class VirtualGpus:
    """An executor whose attempts take simulated time."""

    chance: random.Random
    loss_share: float
    slots: int = GPUS
    now: float = 0.0
    work: dict[str, float] = field(default_factory=dict)
    agenda: list[tuple[float, int, Trial, Any]] = field(default_factory=list)
    """A heap of future events: time, sequence number, trial, event."""
    numbers: Iterator[int] = field(default_factory=itertools.count)
    left: dict[str, list[float]] = field(default_factory=dict)
    """Minutes of each trial's epochs that are left."""
    pauses: int = 0
    since: dict[str, float] = field(default_factory=dict)
    """When each trial's attempt began."""

    def start(self, trial: Trial, directory: TrialDirectory) -> None:
        first = trial.name not in self.left
        epochs = self.left.setdefault(trial.name, self._epochs(trial))
        lost_in = self.chance.randrange(len(epochs)) if first and self.chance.random() < self.loss_share else None
        at = self.now + START_MINUTES
        total = trial.config.train.epochs
        for number, minutes in enumerate(epochs):
            if number == lost_in:
                self._plan(at + self.chance.random() * minutes, trial, Failure("worker_died", "its process is gone"))
                break
            at += minutes
            self._plan(at, trial, _epoch(total - len(epochs) + number + 1, total, minutes))
        else:
            self._plan(at, trial, TrialResult.model_construct(test_ccc={}, train_s=0.0, total_s=0.0))
        self.since[trial.name] = self.now

    def pause(self, trial: Trial) -> None:
        self.agenda = [one for one in self.agenda if one[2] is not trial]
        heapq.heapify(self.agenda)
        self._plan(self.now, trial, Failure("stopped", "stopped"))
        self.pauses += 1
        self.work[trial.name] = self.work.get(trial.name, 0.0) - START_MINUTES  # the bound knows one start

    def poll(self, timeout_s: float) -> list[tuple[Trial, Any]]:
        self.now, _, trial, event = heapq.heappop(self.agenda)
        if isinstance(event, EpochRecord):
            self.left[trial.name] = self.left[trial.name][1:]
        else:
            self.work[trial.name] = self.work.get(trial.name, 0.0) + self.now - self.since[trial.name]
        return [(trial, event)]

    def stop(self) -> None: ...

    def close(self) -> None: ...

    def _plan(self, at: float, trial: Trial, event: Any) -> None:
        heapq.heappush(self.agenda, (at, next(self.numbers), trial, event))

    def _epochs(self, trial: Trial) -> list[float]:
        mean = EPOCH_MINUTES[trial.condition] * self.chance.lognormvariate(0, TRIAL_NOISE)
        return [mean * self.chance.lognormvariate(0, EPOCH_NOISE) for _ in range(trial.config.train.epochs)]


def plan(seeds: int) -> list[Trial]:
    """Return the trials of two conditions x five folds x `seeds` seeds, in cvrunner's order."""
    config = validate({"train": {"seeds": list(range(seeds)), "epochs": EPOCHS}}, "makespan")
    spoken = corpus(sessions=5)
    return plan_trials(config, spoken, make_folds(spoken, "leave_one_session_out"))


def play(trials: Sequence[Trial], chance: random.Random, loss_share: float) -> Played:
    """One run of cvrunner's loop."""
    gpus = VirtualGpus(chance, loss_share)
    directory, preemption = lambda trial: TrialDirectory(Path(trial.name)), Preemption(trials, GPUS)
    run_trials(trials, directory, gpus, [], RetriesConfig(), preemption=preemption)
    return Played(gpus.now, tuple(gpus.work.values()), gpus.pauses)


def _epoch(number: int, of: int, minutes: float) -> EpochRecord:
    return EpochRecord.model_construct(epoch=number, epochs=of, validation_ccc={}, train_s=60 * minutes, validation_s=0)


def _row(trials: int, loss_share: float, played: Sequence[Played]) -> Row:
    failures = f", {loss_share:.0%} of the trials lose their process" if loss_share else ""
    return Row(
        f"makespan of {trials} trials on {GPUS} GPUs{failures}",
        f"{median(run.makespan for run in played) / 60:.1f} h, "
        f"bound {median(run.lower_bound for run in played) / 60:.1f} h",
        [run.makespan / run.lower_bound for run in played],
        1.05,
        at_least=False,
        note=f"simulated, {len(played)} draws; {median(run.pauses for run in played):.0f} pauses",
    )
