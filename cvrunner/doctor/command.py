"""The command `doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cvrunner import paths
from cvrunner.config.reading import load_config
from cvrunner.doctor import diagnose
from cvrunner.doctor.collect import collect_facts

if TYPE_CHECKING:
    from rich.console import Console


def doctor(config_path: Path | None, overrides: Sequence[str], as_json: bool, console: Console) -> int:
    """What is wrong with this machine for this configuration, and what to type. Exit code 1 with problems."""
    config = load_config(config_path or paths.default_config(), overrides)
    findings = diagnose.diagnose(collect_facts(config))
    text = diagnose.as_json(findings) if as_json else diagnose.as_text(findings)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return diagnose.exit_code(findings)
