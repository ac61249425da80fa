"""Rows of a table: CSV (`,` or `;`) or JSON lines, in UTF-8, as text by column, each with its place in the file."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cvrunner.data.checks import Findings, same_name
from cvrunner.data.utterance import DIMENSIONS
from cvrunner.errors import CorpusError

NUMBERS = ("turn", *DIMENSIONS)
EMPTY = {"nan", "-nan", "none", "null", "<na>", "na", "n/a", "#n/a", "#na", "nat"}
"""What other programs write for an empty cell; never a name."""
RATING = re.compile(rf"({'|'.join(DIMENSIONS)})_([0-9]+)")
"""Column of the ratings of one rater, such as `valence_1`."""


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    where: str
    cells: dict[str, str]
    """Text by column; empty if not given."""


def read_rows(path: Path, findings: Findings, trouble: str = "corpus.root cannot be read as a manifest") -> list[Row]:
    """Return the rows of a file; a row that is not one adds a problem.

    Raises CorpusError, which begins with `trouble` if the file cannot be opened, or if it is of another kind or empty.
    """
    text = _read_text(path, trouble)
    if path.suffix.lower() in (".jsonl", ".ndjson") or text.lstrip().startswith("{"):
        rows = _read_json_lines(text, path.name, findings)
    elif text.lstrip().startswith("["):
        raise CorpusError(str(path), ["is a JSON list; must have one JSON object per line (JSONL), or be CSV"])
    else:
        rows = _read_csv(text, path.name, findings)
    if not rows and not findings.problems:
        raise CorpusError(str(path), ["has no rows; each utterance is one, below a line with the column names"])
    return rows


def _read_text(path: Path, trouble: str) -> str:
    # Reading a pipe would wait for ever.
    if not os.path.isfile(path):
        reason = "it is not a file but a folder, a pipe or a device" if os.path.exists(path) else "it does not exist"
        raise CorpusError(str(path), [f"{trouble}: {reason}"])
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        rule = f"is not UTF-8 text (byte {error.start}, line {line}); save it as UTF-8"
        raise CorpusError(str(path), [rule]) from None
    except OSError as error:
        raise CorpusError(str(path), [f"{trouble}: {error.strerror}"]) from None
    if "\0" in text:
        line = text.partition("\0")[0].count("\n") + 1
        raise CorpusError(str(path), [f"holds a NUL character (line {line}); save it as UTF-8 text"])
    return text


def _read_csv(text: str, name: str, findings: Findings) -> list[Row]:
    first = text.partition("\n")[0]
    delimiter = ";" if first.count(";") > first.count(",") else ","
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        columns = [cell.strip().lower() for cell in next(reader, [])]
        for column in sorted({column for column in columns if columns.count(column) > 1}):
            findings.problem(f"{name} line 1", f"duplicate column {column!r}")
        for cells in reader:
            where = f"{name} line {reader.line_num}"
            if len(cells) == len(columns):
                named = zip(columns, cells, strict=True)
                rows.append(Row(where, {column: cell_text(column, cell) for column, cell in named}))
            elif cells:
                findings.problem(where, f"has {len(cells)} cells, must have {len(columns)} like the first line")
    except csv.Error as error:
        findings.problem(f"{name} line {reader.line_num}", f"is not CSV: {error}")
    return rows


def _read_json_lines(text: str, name: str, findings: Findings) -> list[Row]:
    rows: list[Row] = []
    # Not splitlines: it would also split at U+2028, which JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            data = json.loads(line, object_pairs_hook=_unique)
            if not isinstance(data, dict):
                raise ValueError("must be an object")
            rows.append(Row(where, {key: cell_text(key, _cell(key, value)) for key, value in data.items()}))
        except json.JSONDecodeError as error:
            findings.problem(where, f"is not a JSON row: {error.msg} at character {error.colno}")
        except (ValueError, RecursionError) as error:
            findings.problem(where, f"is not a JSON row: {error}")
    return rows


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the keys of a JSON object as column names. Raises ValueError if two are the same: JSON takes the last."""
    columns: dict[str, object] = {}
    spelled: dict[str, str] = {}
    for key, value in pairs:
        column = key.strip().lower()
        if column in columns:
            rule = f"key {key!r} stands twice"
            if spelled[column] != key:
                rule = f"keys {spelled[column]!r} and {key!r} are the same column"
            raise ValueError(rule)
        columns[column], spelled[column] = value, key
    return columns


def _cell(key: str, value: object) -> str:
    # Python's JSON has NaN, which pandas writes for an empty cell.
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{key} must be text or a number, not {json.dumps(value)}")
    return str(value)


def cell_text(column: str, cell: str) -> str:
    """Return the text of a cell; nothing for a name that stands for an empty cell or that nobody can see."""
    cell = cell.strip()
    if column not in NUMBERS and not RATING.fullmatch(column) and (cell.lower() in EMPTY or not same_name(cell)):
        return ""
    return cell
