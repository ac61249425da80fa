"""The command `doctor`: all checks in reading order, as text or JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cvrunner import paths
from cvrunner.config.reading import load_config
from cvrunner.config.schema import Config
from cvrunner.doctor.access import check_access
from cvrunner.doctor.checks import check_capacity, check_disks, check_gpus, check_machine, check_packages, check_storage
from cvrunner.doctor.facts import Facts, Finding, collect_facts
from cvrunner.errors import ClusterError
from cvrunner.text import line_printer, plural

if TYPE_CHECKING:
    from rich.console import Console


def doctor(config_path: Path | None, overrides: Sequence[str], as_json: bool, console: Console) -> int:
    """Print what is wrong with this machine for a configuration, and what to type. Exit code 1 for problems, else 0."""
    config = load_config(config_path or paths.default_config(), overrides)
    findings = diagnose(collect_facts(config))
    if as_json:
        text = json.dumps([asdict(finding) for finding in findings], indent=1, ensure_ascii=False)
    else:
        text = findings_as_text(findings)
    line_printer(console)(text)
    return exit_code(findings)


def refuse_problems(config: Config) -> None:
    """Raise ClusterError for what would end every trial of a new run; cheap, and before the run has a folder."""
    facts = collect_facts(config, alone=True)
    findings = list(check_disks(facts))
    # A cluster is asked when it is joined.
    if os.environ.get("RAY_ADDRESS", "local") in ("", "local"):
        findings += [check_gpus(facts), check_capacity(facts)]
    if problems := [finding for finding in findings if finding.level == "problem"]:
        raise ClusterError("\n".join(f"{one.subject}: {one.what}; {one.do}" for one in problems))


def diagnose(facts: Facts) -> list[Finding]:
    """Return every finding, including those that are fine."""
    return [*check_packages(facts.packages), *check_access(facts), *check_machine(facts), *check_storage(facts)]


def findings_as_text(findings: Sequence[Finding]) -> str:
    """Return a line for each finding, what to type below it, and the number of problems and warnings at the end."""
    width = max((len(finding.subject) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<7}  {finding.subject:<{width}}  {finding.what}")
        if finding.do:
            lines.append(f"{'':<7}  {'':<{width}}  -> {finding.do}")
    problems = sum(finding.level == "problem" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    summary = "no problems"
    if problems:
        summary = plural(problems, "problem")
    if warnings:
        summary += f", {plural(warnings, 'warning')}"
    return "\n".join([*lines, summary])


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 if there is a problem, else 0."""
    return int(any(finding.level == "problem" for finding in findings))
