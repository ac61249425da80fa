"""Label files of the field as rows of a manifest: MSP-Podcast, audformat, and long tables of individual ratings.

Everything that a manifest's rows must keep is checked there (`manifest.py`); here is only what these files mean.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from cvrunner.config.sections import AudformatConfig
from cvrunner.data.checks import Findings, parse_number
from cvrunner.data.rows import RATING, Row, cell_text, read_rows
from cvrunner.data.utterance import DIMENSIONS, natural_order
from cvrunner.errors import ConfigError, CorpusError

MOST_RATERS = 100
"""With more people, a column does not stand for a person but for a place in the list of who rated an utterance: crowds
have thousands, and what is attainable is computed without one column at a time."""
PARTS = {"train": "train", "development": "validation", "test1": "test"}
MSP_COLUMNS = {"valence": "emoval", "arousal": "emoact", "dominance": "emodom"}
MSP_FILE = re.compile(r"(MSP-PODCAST_(\d+)_(\d+(?:_\d+)?))\.wav", re.IGNORECASE)
MSP_DETAIL = re.compile(r"(?:^|;)\s*([VAD]):([^;]*)")
"""Rating in the text of a detailed label, by the first letter of its dimension."""
SPLITS = {"train": "train", "dev": "validation", "test": "test"}
"""Part of a fold by type of split (audformat.define.SplitType)."""


# --- long tables of ratings -------------------------------------------------------------------------------------------


def read_ratings(path: Path, findings: Findings) -> list[Row]:
    """Return the rows of a long table: one rating of one utterance by one rater each (`utterance`, `rater`, `valence`,
    ...), in CSV or JSON lines. Raises CorpusError if it cannot be read or lacks a column."""
    rows = read_rows(path, findings, "corpus.ratings cannot be read as a table")
    given = {column for row in rows for column in row.cells}
    if missing := [column for column in ("utterance", "rater") if column not in given]:
        findings.problem(path.name, f"column {missing[0]!r} is missing; required are utterance, rater and a dimension")
    elif not given & set(DIMENSIONS):
        findings.problem(path.name, f"has none of the columns {', '.join(DIMENSIONS)}")
    findings.stop_if_any(str(path))
    for column in sorted(given - {"utterance", "rater", *DIMENSIONS}):
        findings.count("columns of the ratings that cvrunner does not know, ignored", repr(column))
    return rows


def with_ratings(
    rows: Sequence[Row], ratings: Sequence[Row], scale: tuple[float, float], findings: Findings
) -> list[Row]:
    """Return the rows with the columns `valence_1`, `arousal_1`, ... of those ratings.

    The raters' numbers follow the order of their names; with more than `MOST_RATERS`, their order within the utterance.
    """
    if taken := sorted({column for row in rows for column in row.cells if RATING.fullmatch(column)}):
        findings.problem(rows[0].where, f"has a column {taken[0]!r}, but ratings come from corpus.ratings; remove one")
        return list(rows)
    known = {row.cells.get("utterance", "") for row in rows}
    given: dict[str, dict[str, Row]] = {}
    for rating in ratings:
        name, rater = rating.cells.get("utterance", ""), rating.cells.get("rater", "")
        wrong = [f"{column} is empty" for column in ("utterance", "rater") if not rating.cells.get(column)]
        wrong += [rule for dimension in DIMENSIONS if (rule := _rating_rule(dimension, rating.cells, scale))]
        for rule in wrong:
            findings.problem(f"{rating.where}: {name or '?'}", rule)
        if wrong:
            continue
        if name not in known:
            findings.count("ratings of utterances that are not in the corpus, ignored", f"{rating.where}: {name}")
        elif rater in given.setdefault(name, {}):
            kind = "further ratings of an utterance by the same rater, ignored"
            findings.count(kind, f"{rating.where}: {name} by {rater}, first at {given[name][rater].where}")
        else:
            given[name][rater] = rating
    names = sorted({rater for of in given.values() for rater in of}, key=natural_order)
    numbers = {rater: number for number, rater in enumerate(names, 1)} if len(names) <= MOST_RATERS else {}
    merged = []
    for row in rows:
        cells = dict(row.cells)
        of = given.get(row.cells.get("utterance", ""), {})
        for place, rater in enumerate(sorted(of, key=natural_order), 1):
            number = numbers.get(rater, place)
            cells |= {f"{dimension}_{number}": of[rater].cells.get(dimension, "") for dimension in DIMENSIONS}
        merged.append(replace(row, cells=cells))
    return merged


def _rating_rule(dimension: str, cells: Mapping[str, str], scale: tuple[float, float]) -> str | None:
    """Return what is wrong with a rating; None if it is fine or not given."""
    text = cells.get(dimension, "")
    try:
        value = parse_number(text) if text else None
    except ValueError:
        return f"{dimension} {text[:60]!r} is not a number"
    if value is None or scale[0] <= value <= scale[1]:
        return None
    return f"{dimension} is {value:g}, must be a number within corpus.scale {scale[0]:g}..{scale[1]:g}"


# --- MSP-Podcast ------------------------------------------------------------------------------------------------------


def msp_podcast_rows(root: Path, findings: Findings) -> tuple[list[Row], list[Row]]:
    """Return the utterances of MSP-Podcast and their ratings, from `Labels` and `Audios` in the corpus's folder.

    `labels_consensus.csv` has FileName, EmoAct, EmoVal, EmoDom, SpkrID, Gender and Split_Set, `labels_detailed.csv`, if
    it is there, one rating a row: in columns Workers, EmoAct, EmoVal and EmoDom, or as text in a column EmoDetail,
    `WORKER1; Neutral; ; A:4; V:4; D:4;` (readme of the corpus; Lotfian and Busso 2019, doi 10.1109/TAFFC.2017.2736999).

    Train, Development and Test1 are kept. The test set stays complete; validation shares no speaker and no podcast with
    it, training none with either; utterances of unknown speakers are left out. All of these are counted.
    """
    path = root / "Labels" / "labels_consensus.csv"
    labels = read_rows(path, findings, "corpus.root must hold MSP-Podcast's Labels/labels_consensus.csv, and that")
    given = {column for row in labels for column in row.cells}
    for column in ("FileName", "EmoAct", "EmoVal", "EmoDom", "SpkrID", "Gender", "Split_Set"):
        if column.lower() not in given:
            findings.problem(path.name, f"column {column!r} is missing")
    findings.stop_if_any(str(path))
    rows = [row for label in labels if (row := _msp_row(label, findings))]
    for part, others in (("validation", ["test"]), ("train", ["test", "validation"])):
        taken = {(k, row.cells[k]) for row in rows for k in ("speaker", "dialogue") if row.cells["split"] in others}
        kept = []
        for row in rows:
            if row.cells["split"] == part and taken & {(k, row.cells[k]) for k in ("speaker", "dialogue")}:
                kind = f"{part} utterances that share a speaker or a podcast with {' or '.join(others)}, left out"
                findings.count(kind, f"{row.where}: {row.cells['utterance']}")
            else:
                kept.append(row)
        rows = kept
    detailed = root / "Labels" / "labels_detailed.csv"
    if not detailed.exists():
        return rows, []
    return rows, list(_msp_ratings(detailed, findings))


def _msp_row(label: Row, findings: Findings) -> Row | None:
    cells = label.cells
    name = MSP_FILE.fullmatch(cells["filename"])
    if name is None:
        findings.problem(label.where, f"FileName {cells['filename'][:60]!r} must look like MSP-PODCAST_0001_0008.wav")
        return None
    where = f"{label.where}: {name[1]}"
    part = PARTS.get(cells["split_set"].lower())
    if part is None:
        findings.count("utterances of other sets than Train, Development and Test1, left out", where)
        return None
    if cells["spkrid"].lower() in ("", "unknown"):
        findings.count("utterances of unknown speakers, who may be in the test set, left out", where)
        return None
    gender = cells["gender"]
    if gender.lower() not in ("female", "male"):
        gender = ""
    known = {"path": f"Audios/{cells['filename']}", "utterance": name[1], "speaker": cells["spkrid"], "split": part}
    place = {"session": cells["split_set"], "dialogue": name[2], "turn": name[3].replace("_", "."), "gender": gender}
    return Row(label.where, known | place | {dimension: cells[column] for dimension, column in MSP_COLUMNS.items()})


def _msp_ratings(path: Path, findings: Findings) -> Iterator[Row]:
    for row in read_rows(path, findings, "labels_detailed.csv cannot be read"):
        utterance = row.cells.get("filename", "").removesuffix(".wav")
        if "emodetail" not in row.cells:
            rater = next((row.cells[column] for column in ("workers", "worker") if column in row.cells), "")
            given = {dimension: row.cells.get(column, "") for dimension, column in MSP_COLUMNS.items()}
            yield Row(row.where, {"utterance": utterance, "rater": rater} | given)
            continue
        detail = row.cells["emodetail"]
        given = {name: text.strip() for name, text in MSP_DETAIL.findall(detail)}
        if not given:
            findings.problem(row.where, f"EmoDetail {detail[:60]!r} must be like 'WORKER1; Neutral; A:4; V:4; D:4;'")
        ratings = {dimension: given.get(dimension[0].upper(), "") for dimension in DIMENSIONS}
        yield Row(row.where, {"utterance": utterance, "rater": detail.partition(";")[0].strip()} | ratings)


# --- audformat --------------------------------------------------------------------------------------------------------


def audformat_rows(root: Path, config: AudformatConfig, findings: Findings) -> list[Row]:
    """Return the files of tables of a database in audformat: `db.yaml` and a CSV or Parquet file per table.

    Format: https://audeering.github.io/audformat/data-format.html. Pickled tables, which audformat prefers, are not
    read. Raises ConfigError if the library is missing or a key names nothing, CorpusError if the files are damaged.
    """
    try:
        # An extra, and it takes a second to import.
        import audformat
    except ImportError:
        raise ConfigError(
            "corpus.format audformat: the library is missing; pip install 'cvrunner[audformat]'"
        ) from None
    if not (root / "db.yaml").is_file():
        raise CorpusError(str(root), ["has no db.yaml; set corpus.root to the folder of a database in audformat"])
    with TemporaryDirectory() as folder:
        for file in [*root.glob("db.*.csv"), *root.glob("db.*.parquet")]:
            (Path(folder) / file.name).symlink_to(file.absolute())
        try:
            header = (root / "db.yaml").read_text(encoding="utf-8")
            # audformat's own loader would run what a tag such as !!python/object names.
            yaml.safe_load(header)
            (Path(folder) / "db.yaml").write_text(header, encoding="utf-8")
            with warnings.catch_warnings(action="ignore"):
                return _audformat_rows(audformat.Database.load(folder), config, findings)
        except (ConfigError, CorpusError):
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0].replace(folder, str(root))
            raise CorpusError(str(root), [f"cannot be read as a database in audformat: {reason}"]) from None


def _audformat_rows(database: Any, config: AudformatConfig, findings: Findings) -> list[Row]:
    tables = list(database.tables)
    if not config.tables or not set(config.tables) <= set(tables):
        wrong = sorted(set(config.tables) - set(tables))[:1]
        rule = f"has no table {wrong[0]!r}" if wrong else "corpus.audformat.tables is empty"
        raise ConfigError(f"corpus.audformat.tables: {rule}; the database has {', '.join(tables) or 'none'}")
    if missing := [column for column in ("speaker", "valence", "arousal") if column not in config.columns]:
        raise ConfigError(f"corpus.audformat.columns.{missing[0]}: is not set; it says which column has it")
    rows: list[Row] = []
    for name in config.tables:
        table = database[name]
        if table.is_segmented:
            findings.problem(f"table {name}", "has segments of files; cvrunner reads whole files, so cut them first")
            continue
        cells = {key: _column(database, name, spec, key) for key, spec in config.columns.items()}
        split = database.splits[table.split_id].type if table.split_id else None
        for number, file in enumerate(table.index, 1):
            own = {key: cell_text(key, of.get(file, "")) for key, of in cells.items()}
            utterance = str(Path(file).with_suffix(""))
            given = {"path": file, "utterance": utterance, "dialogue": own["speaker"], "turn": str(len(rows) + 1)}
            if split is not None:
                given |= {"split": SPLITS.get(split, split), "session": split}
            rows.append(Row(f"table {name} row {number}", given | own))
    return rows


def _column(database: Any, table: str, spec: str, key: str) -> dict[str, str]:
    """Return a column as text by file.

    `spec`: `column`, or `table.column` of another table; then maybe `:field` of its labels.
    """
    where, _, field = spec.partition(":")
    if where not in database[table].columns:
        table, _, where = where.rpartition(".")
    if table not in database.tables or where not in database[table].columns:
        raise ConfigError(f"corpus.audformat.columns.{key}: there is no column {spec!r} in the tables of the database")
    series = database[table][where].get(map=field or None)
    if not series.index.is_unique:
        raise CorpusError(f"table {table}", [f"has a file twice, so {where} is not one value per file"])
    texts = ("" if missing else str(value) for value, missing in zip(series, series.isna(), strict=True))
    return dict(zip(map(str, series.index), texts, strict=True))
