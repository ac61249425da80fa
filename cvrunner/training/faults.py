"""Fault injection: failures on purpose, to see on your own data what they cost: `--chaos kill=0.1,oom=0.05`.

Faults are drawn in every attempt from the system's randomness, so no training depends on them.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

from cvrunner.errors import UsageError

Fault = Literal["kill", "oom"]
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Chaos:
    """Probabilities of faults, 0..1."""

    kill: float = 0.0
    """SIGKILL to a trial's process, per epoch, at a random update."""
    oom: float = 0.0
    """Out of memory, per epoch, at a random update; only while the micro-batch can still be halved."""
    tracker: float = 0.0
    """Failure of MLflow, per write."""

    def draw_faults(self, updates: int) -> dict[int, Fault]:
        """Draw the faults of an epoch with `updates` updates: the fault by update, from 0."""
        possible: list[tuple[Fault, float]] = [("oom", self.oom), ("kill", self.kill)]
        return {draw.randrange(updates): fault for fault, probability in possible if draw.random() < probability}

    def breaks_tracker(self) -> bool:
        """Whether the next write to MLflow fails."""
        return draw.random() < self.tracker


NONE = Chaos()
draw = random.SystemRandom()


def parse_chaos(text: str) -> Chaos:
    """Parse `kill=0.1,oom=0.05,tracker=0.1`. Raises UsageError."""
    known = [field.name for field in fields(Chaos)]
    values = {}
    for item in text.split(","):
        name, _, value = item.strip().partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            values[name] = -1.0
        if name not in known or not 0 <= values[name] <= 1:
            raise UsageError(f"chaos {item}: must be {', '.join(known)}, each with a probability, such as kill=0.1")
    return Chaos(**values)


def with_faults(
    take_update: Callable[..., Outcome], faults: dict[int, Fault], out_of_memory: Callable[[], None]
) -> Callable[..., Outcome]:
    """Wrap an update function so that `faults` happen before the updates that they were drawn for.

    The position of the update is the second argument of `take_update`. `out_of_memory` raises the error of a full
    device, or does nothing if micro-batches cannot get smaller. A fault happens once, even if its update is repeated.
    """

    def update(batch: object, position: tuple[int, int, int], *following: object) -> Outcome:
        fault = faults.pop(position[1], None)
        if fault == "kill":
            # As the system would: at once, without a word.
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "oom":
            out_of_memory()
        return take_update(batch, position, *following)

    return update
