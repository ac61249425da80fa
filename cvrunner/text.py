"""Text for people: numbers, durations, sizes and tables, formatted in one way everywhere."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

DASH = "–"
"""Stands for a value that is undefined or unknown."""
NUMERIC_STARTS = "0123456789+-" + DASH


def format_score(value: float | None, signed: bool = False) -> str:
    """Return a CCC, a difference or a p value with four decimals; a dash if it is undefined."""
    if value is None:
        return DASH
    return f"{value:+.4f}" if signed else f"{value:.4f}"


def format_duration(seconds: float) -> str:
    """Return a duration in seconds up to 90 s, in minutes up to 90 min, and in hours beyond."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def format_bytes(count: float) -> str:
    """Return a size in MB (10^6) or GB (10^9), with one decimal below 10."""
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB")
    value = count / unit
    return f"{value:.1f} {name}" if value < 10 else f"{value:.0f} {name}"


def plural(count: int, word: str) -> str:
    """Return `1 fold` or `5 folds`."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def timed(text: str) -> str:
    """Return a line of a log: the time of day, two spaces, and the text."""
    return f"{time.strftime('%H:%M:%S')}  {text}"


def line_printer(console: Console) -> Callable[[str], None]:
    """Return a function that prints one plain line: no markup, no wrapping."""

    def print_line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    return print_line


class LastingOutput:
    """Standard output that stays usable after its reader, such as `head -1`, has gone: the command continues."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._until_closed():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._until_closed():
            self._stream.flush()

    @contextlib.contextmanager
    def _until_closed(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # What the stream still holds is written there, too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            print("the reader of standard output is gone; the command goes on", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Table:
    """A heading, columns, rows of text, and a note on how to read them.

    Built once; the terminal, comparison.md and report.html show the same rows.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def is_numeric(self, column: int) -> bool:
        """Whether every cell of a column begins like a number or is the dash of an undefined one."""
        return bool(self.rows) and all(row[column] and row[column][0] in NUMERIC_STARTS for row in self.rows)

    def as_markdown(self) -> str:
        """Return the table below its heading, and its note, as Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        text = "\n".join(f"| {' | '.join(map(markdown_cell, line))} |" for line in lines)
        note = f"\n\n{self.note}" if self.note else ""
        return f"## {self.title}\n\n{text}{note}"

    def as_html(self) -> str:
        """Return the table below its heading, and its note, as HTML for a notebook."""
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        title, note = (f"<p>{escape(text)}</p>" if text else "" for text in (self.title, self.note))
        return f"{title}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def markdown_cell(text: str) -> str:
    """Escape text so that it cannot end its cell in a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def tables_as_text(tables: Sequence[Table], width: int, last: str | None = None) -> str:
    """Return tables without their notes for a terminal of `width` columns, then one line that is never wrapped."""
    # rich takes 0.1 s to import; `--help` and Tab completion must not pay for it.
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    written = io.StringIO()
    console = Console(file=written, width=max(width, 40), color_system=None, highlight=False)
    for table in tables:
        if table.title:
            # As rich's own title, it would be wrapped to the width of a narrow table.
            console.print(table.title, soft_wrap=True, markup=False)
        # Two spaces between columns instead of three: a comparison fits 100 columns.
        shown = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if table.is_numeric(index) else "left", overflow="fold")
        for row in table.rows:
            # As Text, because rich would take `[a]` in a plain string for markup and drop it.
            shown.add_row(*map(Text, row))
        console.print(shown)
    if last is not None:
        console.print(last, soft_wrap=True, markup=False)
    return written.getvalue()
