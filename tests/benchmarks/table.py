"""What a measurement says: rows of ratios with their range over the rounds, beside their target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Options:
    """How to measure."""

    quick: bool
    """Small sizes: does it run, and roughly what comes out."""
    rounds: int
    """Every rival is measured once a round, in turn."""
    threads: int
    """Cores in use, shared by all processes of a rival."""
    folder: Path
    """Corpora, encoders, caches."""
    cpu_clock: bool = False
    """Where one process is timed, count its seconds of CPU."""
    emotale: str = ""
    """Manifest of EmoTale."""
    whisper: str = ""
    """Folder of Whisper tiny."""


@dataclass(frozen=True)
class Row:
    """A figure of every round and what it should be."""

    what: str
    seconds: str
    """What was timed, in words."""
    figures: Sequence[float]
    target: float | None
    """None: the figure is reported, and nothing is asked of it."""
    at_least: bool
    unit: str = "x"
    note: str = ""

    def judged(self) -> tuple[str, str]:
        """The target, and whether the median meets it, in words."""
        if self.target is None:
            return "", ""
        met = median(self.figures) >= self.target if self.at_least else median(self.figures) <= self.target
        return f"{'>=' if self.at_least else '<='} {self.target:g} {self.unit}", "yes" if met else "no"

    def cells(self) -> list[str]:
        low, middle, high = min(self.figures), median(self.figures), max(self.figures)
        found = f"{middle:.3g} {self.unit}" + (f" ({low:.3g}-{high:.3g})" if len(self.figures) > 1 else "")
        return [self.what, self.seconds, found, *self.judged(), self.note]


def faster(
    what: str, ours: Sequence[float], rival: str, theirs: Sequence[float], target: float | None, note: str = ""
) -> Row:
    """How many times faster than a rival."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return Row(f"{what}: faster than {rival}", _pair(ours, rival, theirs), ratios, target, True, note=note)


def share_of_limit(
    what: str, ours: Sequence[float], limit: Sequence[float], target: float | None, note: str = ""
) -> Row:
    """Which share of the limit's speed is reached."""
    ratios = [b / a for a, b in zip(ours, limit, strict=True)]
    return Row(f"{what}: speed against the limit", _pair(ours, "limit", limit), ratios, target, True, note=note)


def slower(what: str, ours: Sequence[float], rival: str, theirs: Sequence[float], target: float, note: str = "") -> Row:
    """How many times the time of something else."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Row(f"{what}: time against {rival}", _pair(ours, rival, theirs), ratios, target, False, note=note)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    header = ["measured", "medians", "ratio (range over rounds)", "target", "met", "remarks"]
    lines = [header, ["---"] * len(header), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _pair(ours: Sequence[float], rival: str, theirs: Sequence[float]) -> str:
    return f"cvrunner {median(ours):.3g} s, {rival} {median(theirs):.3g} s"
