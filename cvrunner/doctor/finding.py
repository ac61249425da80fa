"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    subject: str
    level: Level
    """problem: the run will fail, or somebody else can reach it; warning: it may, or will be slow."""
    what: str
    do: str = ""
    """What to type, or to change; empty where all is well."""


def ok(subject: str, what: str) -> Finding:
    """Nothing to do."""
    return Finding(subject, "ok", what)


def warning(subject: str, what: str, do: str) -> Finding:
    """Worth a look; the exit code stays 0."""
    return Finding(subject, "warning", what, do)


def problem(subject: str, what: str, do: str) -> Finding:
    """To be mended first; the exit code is 1."""
    return Finding(subject, "problem", what, do)


def short(path: Path) -> str:
    """The path with ~ for the home folder."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) and path != home else str(path)


def amount(count: int) -> str:
    """Bytes as MiB or GiB, below 10 with one digit after the point."""
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    value = count / unit
    return f"{value:.1f} {name}" if value < 10 else f"{value:.0f} {name}"
