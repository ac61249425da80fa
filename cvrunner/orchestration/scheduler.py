"""Run trials on an executor: `TrialQueue` decides, `run_trials` carries the decisions out.

The queue does no I/O and reads no clock, and the loop knows executors only by their protocol, so both work the same on
Ray, in this process and in tests.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from cvrunner.config.sections import RetriesConfig
from cvrunner.orchestration.failures import Decision, Failure, decide
from cvrunner.orchestration.preemption import Preemption
from cvrunner.records.results import Ending, EpochRecord
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from cvrunner.training.fold_trainer import Event  # imports torch, which the driver does not need

POLL_S = 0.5


class Executor(Protocol):
    """Where trials run."""

    @property
    def slots(self) -> int:
        """Number of trials that run at a time."""

    def start(self, trial: Trial, directory: TrialDirectory) -> None:
        """Begin an attempt; called only while fewer than `slots` are running."""

    def poll(self, timeout_s: float) -> list[tuple[Trial, Event | Failure]]:
        """Return new events, waiting for at most `timeout_s`.

        An attempt ends with an Ending or a Failure.
        """

    def pause(self, trial: Trial) -> None:
        """Ask a running trial to save and end."""

    def stop(self) -> None:
        """Ask every running trial to save and end."""

    def close(self) -> None:
        """Release all resources."""


class Observer(Protocol):
    """Follows the trials: screen, run.json, tracking."""

    def attempt(self, trial: Trial, number: int) -> None:
        """An attempt begins; numbers count from 1."""

    def event(self, trial: Trial, event: Event) -> None: ...

    def failed(self, trial: Trial, failure: Failure, decision: Decision) -> None: ...


class TrialQueue:
    """The trials that wait or run, and the decision after each event. Pure.

    Trials start in the order given. A failed one leaves the others alone. With `preemption`, a running trial may free
    its slot for a longer one at the end of an epoch.
    """

    def __init__(self, trials: Sequence[Trial], retries: RetriesConfig, preemption: Preemption | None = None) -> None:
        self.retries = retries
        self.preemption = preemption
        self.waiting = deque(trials)
        self.running: set[str] = set()
        self.attempts: Counter[str] = Counter()
        self.failures: dict[str, list[Failure]] = {}
        """Failures of each trial since it last finished an epoch."""
        self.limit = len(trials)
        """Most trials at a time; reduced when the host runs out of memory."""
        self.stopping = False
        """Start no more trials."""
        self.asked_to_pause: set[str] = set()
        """Running trials that were asked to free their slots."""
        self.aborted: Failure | None = None
        """The failure that ends the run for all trials."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing runs and nothing will be started."""
        return not self.running and (self.stopping or not self.waiting)

    def start(self, slots: int) -> tuple[Trial, int] | None:
        """Take the next trial, which now counts as running, with the number of its attempt; None: start nothing."""
        if self.stopping or not self.waiting or len(self.running) >= min(slots, self.limit):
            return None
        trial = self.waiting.popleft()
        self.running.add(trial.name)
        self.attempts[trial.name] += 1
        if self.preemption:
            self.preemption.attempt(trial, self.attempts[trial.name])
        return trial, self.attempts[trial.name]

    def handle(self, trial: Trial, event: Event | Failure) -> Decision:
        """Take note of an event of a running trial and decide what follows from it."""
        if isinstance(event, Failure):
            return self._handle_failure(trial, event)
        if self.preemption:
            self.preemption.event(trial, event)
        if isinstance(event, Ending):
            self.running.discard(trial.name)
            self.asked_to_pause.discard(trial.name)
            return Decision.FINISHED
        if isinstance(event, EpochRecord):
            # An epoch was saved, so the next failure cannot repeat the earlier ones without progress.
            self.failures.pop(trial.name, None)
            waiting = [other.name for other in self.waiting]
            asked = self.asked_to_pause
            if self.preemption and self.preemption.should_pause(trial.name, self.running, waiting, asked):
                asked.add(trial.name)
                return Decision.PREEMPT
        return Decision.CONTINUE

    def _handle_failure(self, trial: Trial, failure: Failure) -> Decision:
        earlier = self.failures.setdefault(trial.name, [])
        decision = decide(failure, earlier, self.retries)
        earlier.append(failure)
        # A preempted trial ends like a stopped one. In a run that is stopping, it does not resume either.
        if decision is Decision.STOP and trial.name in self.asked_to_pause and not self.stopping:
            decision = Decision.PAUSE
        self.running.discard(trial.name)
        self.asked_to_pause.discard(trial.name)
        if preemption := self.preemption:
            preemption.failed(trial, failure, decision)
            if decision is Decision.PAUSE:
                self.attempts[trial.name] -= 1  # it resumes the same attempt
                # The free slot must go to the trial that it was freed for, the one with the most time left.
                by_time_left = sorted([*self.waiting, trial], key=lambda t: -preemption.remaining_training_s(t.name))
                self.waiting = deque(by_time_left)
        if decision is Decision.RETRY:
            self.waiting.appendleft(trial)  # its place in the order: it began before all that wait
        elif decision is Decision.ABORT:
            self.aborted = self.aborted or failure
        if failure.kind == "host_memory":
            # As many trials as still run did fit; one more would end in the same way.
            self.limit = max(1, len(self.running))
        return decision


def run_trials(
    trials: Sequence[Trial],
    directory: Callable[[Trial], TrialDirectory],
    executor: Executor,
    observers: Sequence[Observer],
    retries: RetriesConfig,
    should_stop: Callable[[], bool] = lambda: False,
    preemption: Preemption | None = None,
) -> Failure | None:
    """Run trials until each has a result, has failed or was stopped. See TrialQueue.

    Returns the failure that ended the run for all of them, if there was one.
    """
    queue = TrialQueue(trials, retries, preemption)
    while not queue.is_finished:
        if not queue.stopping and (queue.aborted or should_stop()):
            queue.stopping = True
            executor.stop()
        while started := queue.start(executor.slots):
            for observer in observers:
                observer.attempt(*started)
            executor.start(started[0], directory(started[0]))
        for trial, event in executor.poll(POLL_S):
            decision = queue.handle(trial, event)
            for observer in observers:
                if isinstance(event, Failure):
                    observer.failed(trial, event, decision)
                else:
                    observer.event(trial, event)
            if decision is Decision.PREEMPT:
                executor.pause(trial)
    return queue.aborted
