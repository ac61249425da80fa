"""Running the trials: a pure decision about each failure, and a loop that carries it out.

The loop knows executors only by their protocol, so it is the same on Ray, in this process, and in tests.
"""

from __future__ import annotations

import enum
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cvrunner.errors import CvrunnerError, Stopped, TrialError
from cvrunner.records.results import TrialResult
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.training.fold_trainer import Event
from cvrunner.training.trial import Trial

FailureKind = Literal["lost", "trial", "user", "bug", "stopped"]


@dataclass(frozen=True)
class Failure:
    """How an attempt at a trial ended, when not with a result."""

    kind: FailureKind
    """lost: its process or node went away; trial: training went wrong; user: configuration, corpus or encoder; bug: an
    exception of ours; stopped: told to, and saved."""
    message: str
    details: str = ""
    """Traceback, where it helps."""


class Decision(enum.Enum):
    """What to do after a failure."""

    RETRY = "retry"
    FAIL = "fail"
    STOP = "stop"


def decide(failure: Failure, attempts: int, max_attempts: int) -> Decision:
    """Pure: a lost process is tried again (from its checkpoint); what would only happen again is not."""
    if failure.kind == "stopped":
        return Decision.STOP
    if failure.kind == "lost" and attempts < max_attempts:
        return Decision.RETRY
    return Decision.FAIL


def classify(error: BaseException) -> Failure:
    """A Failure from an exception raised by a trial, by its type."""
    message = str(error) or type(error).__name__
    if isinstance(error, Stopped):
        return Failure("stopped", message)
    if isinstance(error, TrialError):
        return Failure("trial", message)
    if isinstance(error, CvrunnerError):
        return Failure("user", message)
    return Failure("bug", f"{type(error).__name__}: {message}", "".join(traceback.format_exception(error)))


class Executor(Protocol):
    """Where trials run."""

    @property
    def slots(self) -> int:
        """How many trials run at a time."""
        ...

    def start(self, trial: Trial, directory: TrialDirectory) -> None:
        """Begin an attempt; called only while fewer than `slots` are running."""
        ...

    def poll(self, timeout_s: float) -> list[tuple[Trial, Event | Failure]]:
        """What has happened, waiting at most so long; a TrialResult or a Failure ends the attempt."""
        ...

    def stop(self) -> None:
        """Ask every running trial to save and end."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Observer(Protocol):
    """Who wants to know: screen, run.json, tracking."""

    def attempt(self, trial: Trial, number: int) -> None:
        """An attempt begins; numbers count from 1."""
        ...

    def event(self, trial: Trial, event: Event) -> None: ...

    def failed(self, trial: Trial, failure: Failure, decision: Decision) -> None: ...


def run_trials(
    trials: Sequence[Trial],
    directory: Callable[[Trial], TrialDirectory],
    executor: Executor,
    observers: Sequence[Observer],
    max_attempts: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Run trials in order until each has a result, has failed or was stopped; a failure leaves the others alone."""
    waiting = deque(trials)
    running: set[str] = set()
    attempts: dict[str, int] = {}
    stopping = False
    while running or (waiting and not stopping):
        if should_stop() and not stopping:
            stopping = True
            executor.stop()
        while waiting and not stopping and len(running) < executor.slots:
            trial = waiting.popleft()
            attempts[trial.name] = attempts.get(trial.name, 0) + 1
            running.add(trial.name)
            for observer in observers:
                observer.attempt(trial, attempts[trial.name])
            executor.start(trial, directory(trial))
        for trial, event in executor.poll(timeout_s=0.5):
            if not isinstance(event, Failure):
                for observer in observers:
                    observer.event(trial, event)
                if isinstance(event, TrialResult):
                    running.discard(trial.name)
                continue
            running.discard(trial.name)
            decision = decide(event, attempts[trial.name], max_attempts)
            for observer in observers:
                observer.failed(trial, event, decision)
            if decision is Decision.RETRY:
                waiting.appendleft(trial)
