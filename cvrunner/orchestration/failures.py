"""How an attempt at a trial can fail, and what follows from it: one pure decision."""

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
    "disk_full",
    "permanent",
    "configuration",
    "stopped",
]
KINDS: tuple[FailureKind, ...] = get_args(FailureKind)


@dataclass(frozen=True)
class Failure:
    """The end of an attempt without a result."""

    kind: FailureKind
    """preempted: its node is gone; worker_died: its process is gone; host_memory: killed by Ray's memory monitor;
    gpu_memory: out of GPU memory outside of an update; gpu: a device error; io: a disk or network error that may pass;
    non_finite: the loss or a gradient is not finite; bug: an unexpected exception; disk_full: no space, or no quota,
    is left; permanent: training failed in a way that would only repeat itself;
    configuration: wrong configuration, corpus or encoder; stopped: saved on request."""
    message: str
    details: str = ""
    """Traceback, if it helps."""
    place: str = ""
    """Files and lines of the traceback, innermost last: two failures at the same place are the same bug."""


class Decision(enum.Enum):
    """What the scheduler does after an event of a trial."""

    CONTINUE = "continue"
    FINISHED = "finished"
    PREEMPT = "preempt"
    """Ask the trial to save and free its slot for a longer one."""
    RETRY = "retry"
    PAUSE = "pause"
    """The preempted trial has saved; it resumes later."""
    FAIL = "fail"
    """Give up this trial; the others continue."""
    STOP = "stop"
    ABORT = "abort"
    """End the run: every other trial would fail in the same way."""


STATUS: dict[Decision, TrialStatus] = {
    Decision.RETRY: "WAITING",
    Decision.PAUSE: "WAITING",
    Decision.FAIL: "FAILED",
    Decision.ABORT: "FAILED",
    Decision.STOP: "STOPPED",
}
"""Status of a trial after each decision about a failure."""


def decide(failure: Failure, earlier: Sequence[Failure], retries: RetriesConfig) -> Decision:
    """Decide what follows from a failure. `earlier`: the trial's failures since it last finished an epoch.

    | kind | decision |
    |---|---|
    | stopped | stop |
    | configuration | abort |
    | disk_full, permanent | fail |
    | preempted | retry, without limit |
    | bug | fail if it occurred at the same place before, else as below |
    | all others | retry as often as `cluster.retries` allows for the kind, then fail |
    """
    match failure.kind:
        case "stopped":
            return Decision.STOP
        case "configuration":
            return Decision.ABORT
        case "disk_full" | "permanent":
            return Decision.FAIL
        case "preempted":
            return Decision.RETRY
        case "bug" if any(other.place == failure.place for other in earlier):
            return Decision.FAIL
        case kind:
            allowed: int = getattr(retries, kind)
            used = sum(other.kind == kind for other in earlier)
            return Decision.RETRY if used < allowed else Decision.FAIL
