"""What the shell offers after Tab: names of runs, keys of the configuration, conditions. Quick, and raises nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cvrunner import paths
from cvrunner.errors import CvrunnerError

CONDITIONS = ("frozen", "unfrozen")
"""Those of the configurations that come with cvrunner."""


def runs(incomplete: str) -> list[str]:
    """Names of the runs in the results folder; the shell adds files and folders of its own where there are none."""
    return _starting(run_names(), incomplete)


def settings(incomplete: str) -> list[str]:
    """`train.lr=` and all other keys that hold a value."""
    from cvrunner.config.schema import valid_keys

    keys = valid_keys()
    sections = {key.rpartition(".")[0] for key in keys}
    return _starting((f"{key}=" for key in keys if key not in sections), incomplete)


def conditions(incomplete: str) -> list[str]:
    return _starting(CONDITIONS, incomplete)


def run_names() -> list[str]:
    """In the results folder, the newest first."""
    try:
        files = list(paths.lasting("results", "results.root").glob("*/run.json"))
        return [file.parent.name for file in sorted(files, key=_changed, reverse=True)]
    except (CvrunnerError, OSError):
        return []


def _changed(file: Path) -> float:
    return file.stat().st_mtime


def _starting(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]
