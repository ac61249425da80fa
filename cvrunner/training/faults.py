"""Damage on purpose, so that users can see on their own data what a failure costs: `--chaos kill=0.1,oom=0.05`.

Drawn anew in every attempt from the system's randomness, so no training depends on it.
"""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass, fields
from typing import Literal

from cvrunner.errors import UsageError

Fault = Literal["kill", "oom"]


@dataclass(frozen=True)
class Chaos:
    """Probabilities, 0..1."""

    kill: float = 0.0
    """Of SIGKILL to a trial's process, per epoch, at a random update."""
    oom: float = 0.0
    """Of running out of memory, per epoch, at a random update; only while the micro-batch can still be halved."""
    tracker: float = 0.0
    """Of a failure of MLflow, per thing written."""

    def harms(self, updates: int) -> dict[int, Fault]:
        """What happens in an epoch of so many updates, by update (from 0)."""
        drawn: list[tuple[Fault, float]] = [("oom", self.oom), ("kill", self.kill)]
        return {draw.randrange(updates): harm for harm, probability in drawn if draw.random() < probability}

    def breaks_tracker(self) -> bool:
        """Whether what is about to be written fails."""
        return draw.random() < self.tracker


NONE = Chaos()
draw = random.SystemRandom()


def parse_chaos(text: str) -> Chaos:
    """`kill=0.1,oom=0.05,tracker=0.1`. Raises UsageError."""
    known = [field.name for field in fields(Chaos)]
    values = {}
    for item in text.split(","):
        name, _, value = item.strip().partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            values[name] = -1.0
        if name not in known or not 0 <= values[name] <= 1:
            raise UsageError(f"--chaos {item}: must be {', '.join(known)}, each with a probability, such as kill=0.1")
    return Chaos(**values)


def die() -> None:
    """End this process as the system would: at once, without a word."""
    os.kill(os.getpid(), signal.SIGKILL)
