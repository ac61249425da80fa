"""A corpus as one table: CSV (`,` or `;`) or JSON lines, in UTF-8, one row per utterance.

Required columns: path, utterance, speaker, session, dialogue, turn, valence, arousal. Optional: dominance,
gender (F, M, female, male), scenario, split (train, validation, test). `turn` is any number that sorts the
turns of a dialogue. Single ratings may follow as valence_1, valence_2, ..., and so for the other dimensions: rater 1,
rater 2. A label that is not given is then the mean of its ratings.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from cvrunner.data.checks import NAMES, Entry, Findings, Rules, check_spellings, parse_number, utterances_of
from cvrunner.data.folds import Scheme
from cvrunner.data.rows import RATING, Row, read_rows
from cvrunner.data.utterance import DIMENSIONS, PARTS, SHORTEST_SAMPLES, Corpus, Rater

REQUIRED = ("path", "utterance", "speaker", "session", "dialogue", "turn", "valence", "arousal")
OPTIONAL = ("dominance", "gender", "scenario", "split")
LONGEST_NAME = 200
SHOWN = 60
"""Maximum number of characters of a wrong cell in a message."""
HINTS = {
    ",": " (write 2.5, not 2,5)",
    "_": " (digits only, no _)",
    "%": " (write 85, not 85 %, and set corpus.scale, such as [0, 100])",
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_GENDERS = {"f": "F", "female": "F", "m": "M", "male": "M"}


@dataclass(frozen=True)
class LabelTable:
    """The rows of a corpus in a manifest's columns, wherever they come from."""

    rows: Sequence[Row]
    source: Path
    """File or folder, for messages."""
    folder: Path
    """Relative audio paths start here and stay inside it."""
    name: str
    """Name of the corpus."""
    labels: str
    """The label variant."""


def load_table(
    table: LabelTable,
    findings: Findings,
    scale: tuple[float, float],
    dimensions: Sequence[str],
    resample: bool,
    scheme: Scheme | None = "manifest_split",
    shortest: int = SHORTEST_SAMPLES,
) -> Corpus:
    """Return the corpus of a table's rows; `findings` has what reading it found.

    With a `split` column a speaker may have several sessions (`check_leaks` keeps the parts apart), otherwise only
    one. `scheme`: None if the configuration does not choose one; a split that would be ignored is then a problem.
    `shortest`: minimum number of samples at 16 kHz. Raises CorpusError with every problem, each with its row. An
    unknown column is a warning, or a problem if it looks like a misspelling of a known one.
    """
    columns = {column: None for row in table.rows for column in row.cells}
    _check_columns(columns, table.source.name, findings)
    findings.stop_if_any(str(table.source))
    has_split = "split" in columns
    entries = [entry for row in table.rows if (entry := _entry(table.folder, row, has_split, scale, findings))]
    # Before they are found on the disk, where two spellings may be one file.
    check_spellings(entries, "path", findings)
    entries = _with_paths_as_on_disk(entries)
    _check_turns(entries, findings)
    _check_split(entries, scheme, findings)
    rules = Rules(dimensions, scale, resample, "problem", not has_split, shortest)
    utterances = utterances_of(entries, rules, findings)
    findings.stop_if_any(str(table.source))
    return Corpus(utterances, table.name, table.labels, warnings=findings.warnings)


def read_columns(path: Path) -> dict[str, list[str]]:
    """Return the cells of a manifest by column, empty ones too, without looking at audio or labels.

    Raises CorpusError for a file that is no table, and for required columns that are missing.
    """
    findings = Findings()
    rows = read_rows(path, findings)
    columns = {column: [row.cells.get(column, "") for row in rows] for row in rows for column in row.cells}
    _check_columns(columns, path.name, findings)
    findings.stop_if_any(str(path))
    return columns


# --- columns ---------------------------------------------------------------------------------------


def _check_columns(columns: Iterable[str], name: str, findings: Findings) -> None:
    given = list(columns)
    rated = {column.rpartition("_")[0] for column in given if RATING.fullmatch(column)}
    unknown = [column for column in given if column not in REQUIRED + OPTIONAL and not RATING.fullmatch(column)]
    # The mean of its ratings stands in for a label.
    absent = [column for column in REQUIRED + OPTIONAL if column not in given and column not in rated]
    for column in unknown:
        if match := difflib.get_close_matches(column, absent, n=1, cutoff=0.7):
            findings.problem(name, f"unknown column {column!r}; did you mean {match[0]!r}?")
            absent.remove(match[0])
        else:
            findings.count("columns that cvrunner does not know, ignored", repr(column))
    if given and set(REQUIRED) <= set(absent):
        # Most likely the first line is data, or cells are separated by tabs.
        rule = f"has none of the columns {', '.join(REQUIRED)}"
        where = "in CSV the first line names them, separated by commas or semicolons"
        found = ", ".join(repr(column[:SHOWN]) for column in given[: len(REQUIRED)])
        findings.problem(name, f"{rule} ({where}), but {found}")
        return
    for column in absent:
        if column in REQUIRED and given:
            findings.problem(name, f"column {column!r} is missing; required are {', '.join(REQUIRED)}")


# --- one row --------------------------------------------------------------------------------------


def _entry(folder: Path, row: Row, has_split: bool, scale: tuple[float, float], findings: Findings) -> Entry | None:
    """Return the entry of a row; if a cell is wrong, None, and add a problem for every wrong cell."""
    cells = row.cells
    wrong = [f"{column} is empty" for column in REQUIRED[:6] if not cells.get(column)]
    wrong += [rule for column in (*NAMES, "path") if (rule := _name_rule(column, cells.get(column, "")))]
    audio = cells.get("path", "")
    if not os.path.isabs(audio) and os.path.normpath(audio).split(os.sep)[0] == os.pardir:
        wrong.append(f"path {audio!r} leaves the manifest's folder; use a path inside it, or an absolute one")
    turn = _number("turn", cells, wrong)
    labels = {dimension: _number(dimension, cells, wrong) for dimension in DIMENSIONS}
    raters = _raters(cells, scale, wrong)
    for k, dimension in enumerate(DIMENSIONS):
        ratings = [value for rating in raters.values() if (value := rating[k]) is not None]
        label, mean = labels[dimension], math.fsum(ratings) / max(1, len(ratings))
        if ratings and label is None:
            labels[dimension] = mean
        # Half a unit of the last written digit is rounding; a larger difference may be a weighted mean.
        elif ratings and label is not None and abs(label - mean) > _half_a_digit(cells[dimension]) + 1e-9:
            what = f"{dimension} labels that differ from the mean of their ratings by more than rounding, kept as given"
            findings.count(what, f"{row.where}: {cells.get('utterance')} {label:g}, mean {mean:g}")
    gender = _choice("gender", cells, _GENDERS, "F, M, female or male", wrong)
    part = _choice("split", cells, {name: name for name in PARTS}, ", ".join(PARTS), wrong)
    if has_split and not cells.get("split"):
        wrong.append(f"split is empty, must be one of {', '.join(PARTS)}")
    name = cells.get("utterance", "")
    if not name or _name_rule("utterance", name):
        name = "?"
    for rule in wrong:
        findings.problem(f"{row.where}: {name}", rule)
    if wrong or turn is None:
        return None
    return Entry(
        where=row.where,
        id=cells["utterance"],
        path=folder / audio,  # an absolute path replaces the folder
        speaker=cells["speaker"],
        gender=gender,
        session=cells["session"],
        dialogue=cells["dialogue"],
        time=turn,
        scenario=cells.get("scenario") or None,
        improvised=None,
        labels=labels,
        raters=raters,
        part=part,
    )


def _raters(cells: dict[str, str], scale: tuple[float, float], wrong: list[str]) -> dict[str, Rater]:
    """Return the ratings by rater: `E1` for `valence_1`, `arousal_1`, `dominance_1`; only raters who gave any."""
    low, high = scale
    ratings: dict[str, dict[str, float]] = {}
    for column in cells:
        match = RATING.fullmatch(column)
        if match is None or (value := _number(column, cells, wrong)) is None:
            continue
        if not low <= value <= high:
            wrong.append(f"{column} is {value:g}, must be a number within corpus.scale {low:g}..{high:g}")
        ratings.setdefault(f"E{match[2]}", {})[match[1]] = value
    valence, arousal, dominance = DIMENSIONS
    return {rater: (of.get(valence), of.get(arousal), of.get(dominance)) for rater, of in ratings.items()}


def _half_a_digit(number: str) -> float:
    """Return half a unit of the last digit of a decimal number as it is written: .005 for `2.67`."""
    exponent = Decimal(number).as_tuple().exponent
    # As text, because a power of ten out of range would raise; NaN and infinity have no digits.
    return float(f"0.5e{exponent}") if isinstance(exponent, int) else 0.0


def _name_rule(column: str, text: str) -> str | None:
    """Return what is wrong with a name; None if it is fine."""
    if _CONTROL.search(text):
        return f"{column} {text[:SHOWN]!r} holds a line end or another control character"
    if column in NAMES and len(text) > LONGEST_NAME:
        return f"{column} {text[:SHOWN]!r}... has {len(text)} characters, must have at most {LONGEST_NAME}"
    return None


def _number(column: str, cells: dict[str, str], wrong: list[str]) -> float | None:
    text = cells.get(column, "")
    if not text:
        return None
    try:
        value = parse_number(text)
    except ValueError:
        hint = next((hint for sign, hint in HINTS.items() if sign in text), "")
        wrong.append(f"{column} {text[:SHOWN]!r} is not a number{hint}")
        return None
    # Labels may be NaN here: the checks for all corpora refuse them.
    if column == "turn" and not math.isfinite(value):
        wrong.append(f"turn {text!r} is not a finite number")
    return value


def _choice(column: str, cells: dict[str, str], choices: dict[str, str], shown: str, wrong: list[str]) -> str | None:
    text = cells.get(column, "")
    if text and text.lower() not in choices:
        wrong.append(f"{column} {text[:SHOWN]!r} must be one of {shown}")
    return choices.get(text.lower())


def _check_turns(entries: Sequence[Entry], findings: Findings) -> None:
    first: dict[tuple[str, str, float], Entry] = {}
    for entry in entries:
        before = first.setdefault((entry.session, entry.dialogue, entry.time), entry)
        if before is not entry:
            rule = f"duplicate turn {entry.time:g} of dialogue {entry.dialogue}; the first is at {before.where}"
            findings.problem(entry.name, rule)


def _check_split(entries: Sequence[Entry], scheme: Scheme | None, findings: Findings) -> None:
    """Report a split that the folds would not use: as a problem unless the configuration chose so."""
    split = [entry for entry in entries if entry.part]
    if split and scheme is None:
        findings.problem(
            split[0].name,
            f"split is {split[0].part!r}, as in {len(split)} rows, but folds.scheme is not set and its default, "
            "leave_one_session_out, would ignore the split; set folds.scheme to manifest_split to use it, or to "
            "leave_one_session_out to ignore it",
        )
    elif scheme == "leave_one_session_out":
        for entry in split:
            findings.count("rows with a split that folds.scheme leave_one_session_out ignores", entry.name)


def _with_paths_as_on_disk(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries with each path spelled as on the disk, if that differs in the composition of letters alone.

    macOS writes letters and accents as separate characters (NFD), most other programs as one (NFC).
    """
    names: dict[Path, dict[str, list[str]]] = {}
    found = []
    for entry in entries:
        path = entry.path
        if not str(path).isascii() and not os.path.lexists(path):
            path = Path(path.parts[0])
            for part in entry.path.parts[1:]:
                if not os.path.lexists(path / part):
                    if path not in names:
                        names[path] = {}
                        for name in os.listdir(path) if os.path.isdir(path) and os.access(path, os.R_OK) else ():
                            names[path].setdefault(unicodedata.normalize("NFC", name), []).append(name)
                    same = names[path].get(unicodedata.normalize("NFC", part), [])
                    if len(same) == 1:
                        part = same[0]
                path /= part
        found.append(replace(entry, path=path))
    return found
