"""How an attempt at a trial can end badly, and what follows from it: one pure decision."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cvrunner.config.sections import RetriesConfig
from cvrunner.records.results import TrialStatus

FailureKind = Literal[
    "preempted",
    "worker_died",
    "host_memory",
    "gpu_memory",
    "gpu",
    "io",
    "non_finite",
    "bug",
    "permanent",
    "configuration",
    "stopped",
]
KINDS: tuple[FailureKind, ...] = get_args(FailureKind)


@dataclass(frozen=True)
class Failure:
    """How an attempt at a trial ended, when not with a result."""

    kind: FailureKind
    """preempted: its node went away; lost: its process died; host_memory: ended by Ray's memory monitor; gpu_memory:
    no GPU memory outside of an update; gpu: an error of the device; io: a disk or network error that may pass; numbers:
    loss or gradient not finite; bug: an exception of ours; trial: training went wrong in a way that would only repeat
    itself; user: configuration, corpus or encoder; stopped: told to, and saved."""
    message: str
    details: str = ""
    """Traceback, where it helps."""
    place: str = ""
    """File and line that raised it, innermost last: two failures of the same place are the same bug."""


class Decision(enum.Enum):
    """What to do after a failure."""

    RETRY = "retry"
    PAUSE = "pause"
    """It gives its GPU to another trial and goes on later."""
    FAIL = "fail"
    """This trial; the others go on."""
    STOP = "stop"
    ABORT = "abort"
    """All trials: every other one would meet the same."""

    @property
    def comes_back(self) -> bool:
        """The trial is started again in this run."""
        return self in (Decision.RETRY, Decision.PAUSE)


STATUS: dict[Decision, TrialStatus] = {
    Decision.RETRY: "WAITING",
    Decision.PAUSE: "WAITING",
    Decision.FAIL: "FAILED",
    Decision.ABORT: "FAILED",
    Decision.STOP: "STOPPED",
}


def decide(failure: Failure, earlier: Sequence[Failure], retries: RetriesConfig) -> Decision:
    """Pure. `earlier`: the trial's failures before this one since it last finished an epoch.

    | kind | decision |
    |---|---|
    | stopped | stop |
    | user | abort |
    | trial | fail |
    | preempted | retry, without limit |
    | bug | fail where the same place failed before, else as below |
    | all others | retry as often as `cluster.retries` says for the kind, then fail |
    """
    match failure.kind:
        case "stopped":
            return Decision.STOP
        case "configuration":
            return Decision.ABORT
        case "permanent":
            return Decision.FAIL
        case "preempted":
            return Decision.RETRY
        case "bug" if any(other.place == failure.place for other in earlier):
            return Decision.FAIL
        case kind:
            allowed: int = getattr(retries, kind)
            used = sum(other.kind == kind for other in earlier)
            return Decision.RETRY if used < allowed else Decision.FAIL
