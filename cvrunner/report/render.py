"""comparison.md and the terminal's tables: the sentence, then the same rows in two dresses."""

from __future__ import annotations

import io
from collections.abc import Sequence

from cvrunner.report.evidence import evidence_tables, facts
from cvrunner.report.report import Report
from cvrunner.report.tables import Table, comparison_tables, markdown_cell


def render_markdown(report: Report) -> str:
    """comparison.md."""
    parts = [f"# {report.run.run}", f"**{report.summary.verdict}**"]
    parts += [_markdown_table(table) for table in (*comparison_tables(report), *evidence_tables(report))]
    parts.append("## What was run\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts(report)))
    parts.append("Written by `cvrunner report` from the files in this folder; do not edit.")
    return "\n\n".join(parts) + "\n"


def render_text(report: Report, width: int = 120) -> str:
    """The comparing tables and the sentence for a terminal of `width` columns, without colours."""
    return tables_as_text(comparison_tables(report), report.summary.verdict, width)


def tables_as_text(tables: Sequence[Table], last: str, width: int) -> str:
    """Tables without their notes, and a last line that is as long as it is."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=max(width, 40), color_system=None, highlight=False)
    for table in tables:
        _print_table(console, table)
    console.print(last, soft_wrap=True, markup=False)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def _print_table(console: object, table: Table) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    assert isinstance(console, Console)
    shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for index, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if table.is_numeric(index) else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    console.print(shown)


def _markdown_table(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    text = "\n".join(f"| {' | '.join(map(markdown_cell, line))} |" for line in lines)
    note = f"\n\n{table.note}" if table.note else ""
    return f"## {table.title}\n\n{text}{note}"
