"""All checks in reading order, and the report as text or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from cvrunner.doctor.access import check_access
from cvrunner.doctor.facts import Facts
from cvrunner.doctor.finding import Finding
from cvrunner.doctor.machine import check_machine, check_packages
from cvrunner.doctor.storage import check_storage


def diagnose(facts: Facts) -> list[Finding]:
    """Every finding, also that something is as it should be."""
    return [*check_packages(facts.packages), *check_access(facts), *check_machine(facts), *check_storage(facts)]


def as_text(findings: Sequence[Finding]) -> str:
    """A line a finding, what to type below it, the count at the end."""
    width = max((len(finding.subject) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<7}  {finding.subject:<{width}}  {finding.what}")
        if finding.do:
            lines.append(f"{'':<7}  {'':<{width}}  -> {finding.do}")
    return "\n".join([*lines, verdict(findings)])


def as_json(findings: Sequence[Finding]) -> str:
    """A list of objects with subject, level, what, do."""
    return json.dumps([asdict(finding) for finding in findings], indent=1, ensure_ascii=False)


def verdict(findings: Sequence[Finding]) -> str:
    """`no problems`, or how many; warnings where there are some."""
    counts = {level: sum(finding.level == level for finding in findings) for level in ("problem", "warning")}
    parts = [f"{count} {level}{'s' * (count != 1)}" for level, count in counts.items() if count]
    if not counts["problem"]:
        parts = ["no problems", *parts]
    return ", ".join(parts)


def exit_code(findings: Sequence[Finding]) -> int:
    """1 where there is a problem, else 0."""
    return int(any(finding.level == "problem" for finding in findings))
