"""Running the trials: a loop that carries out what `failures.decide` says.

It knows executors only by their protocol, so it is the same on Ray, in this process, and in tests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from cvrunner.config.sections import RetriesConfig
from cvrunner.orchestration.failures import Decision, Failure, decide
from cvrunner.orchestration.preemption import Preemption
from cvrunner.records.results import EpochRecord, TrainingFinished, TrialResult
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from cvrunner.training.fold_trainer import Event  # and torch with it, which the driver does without


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
        """What has happened, waiting at most so long; a TrialResult, Trained or a Failure ends the attempt."""
        ...

    def pause(self, trial: Trial) -> None:
        """Ask a running trial to save and end."""
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
    retries: RetriesConfig,
    should_stop: Callable[[], bool] = lambda: False,
    preemption: Preemption | None = None,
) -> Failure | None:
    """Run trials in order until each has a result, has failed or was stopped; a failed one leaves the others alone.

    With `preemption`, trials give way to one another at the ends of epochs where that ends the run earlier. Returns
    the failure that ended the run for all of them, where there was one.
    """
    observers = [*observers, preemption] if preemption else observers
    waiting = deque(trials)
    running: set[str] = set()
    attempts: dict[str, int] = {}
    failures: dict[str, list[Failure]] = {}  # of each trial, since it last finished an epoch
    most = len(trials)
    stopping, aborted = False, None
    while running or (waiting and not stopping):
        if not stopping and (aborted or should_stop()):
            stopping = True
            executor.stop()
        while waiting and not stopping and len(running) < min(executor.slots, most):
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
                if isinstance(event, (TrialResult, TrainingFinished)):
                    running.discard(trial.name)
                elif isinstance(event, EpochRecord):
                    failures.pop(trial.name, None)
                    if preemption and preemption.pauses(trial.name, running, [t.name for t in waiting]):
                        executor.pause(trial)
                continue
            running.discard(trial.name)
            earlier = failures.setdefault(trial.name, [])
            paused = preemption and trial.name in preemption.paused and event.kind == "stopped" and not stopping
            decision = Decision.PAUSE if paused else decide(event, earlier, retries)
            earlier.append(event)
            for observer in observers:
                observer.failed(trial, event, decision)
            if decision is Decision.RETRY:
                waiting.appendleft(trial)
            if preemption and decision is Decision.PAUSE:
                attempts[trial.name] -= 1
                waiting = deque(sorted([*waiting, trial], key=lambda t: -preemption.left_s(t.name)))
            if decision is Decision.ABORT:
                aborted = aborted or event
            if event.kind == "host_memory":
                most = max(1, len(running))
    return aborted
