"""The protocol in a report: its hash and date, later changes, and looks at test scores."""

from __future__ import annotations

from cvrunner.report.report import Report
from cvrunner.text import Table, plural
from cvrunner.verdict.ledger import LEDGER
from cvrunner.verdict.protocol import written_text


def protocol_table(report: Report) -> Table:
    """Return when the protocol was written and what changed since; empty for runs of earlier versions."""
    columns, file, looks = ["protocol", ""], report.protocol, report.run.looks_before
    if file is None:
        return Table("Protocol", columns, [])
    first, *later = file.versions
    rows = [["SHA-256", first.sha256], ["written", written_text(first)], ["question", first.protocol.question]]
    rows += [[f"changed {written_text(version)}", "; ".join(version.changes)] for version in later]
    if not later:
        rows.append(["later changes", "none"])
    if added := file.added_after_look:
        rows.append(["added after test scores of the same comparison had been seen", ", ".join(added)])
    if looks is not None:
        text = f"test scores of this corpus were looked at {plural(looks, 'time')} in this results folder before"
        rows.append(["looks", text])
    note = f"The protocol is in protocol.json, every look at test scores in {LEDGER} of the results folder."
    return Table("Protocol", columns, rows, note)
