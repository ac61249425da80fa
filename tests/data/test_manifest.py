"""A corpus as a table: accepted columns and spellings, and refused rows with their place."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import soundfile

from cvrunner.data.utterance import Corpus
from cvrunner.errors import CorpusError
from tests.corpora import (
    DIMENSIONS,
    SCALE,
    Row,
    csv_text,
    json_lines,
    load_manifest,
    manifest_rows,
    write_bytes,
    write_manifest,
    write_noise,
)


def load(path: Path, dimensions: Sequence[str] = DIMENSIONS, resample: bool = False) -> Corpus:
    return load_manifest(path, SCALE, dimensions, resample)


def problems(path: Path, dimensions: Sequence[str] = DIMENSIONS) -> list[str]:
    with pytest.raises(CorpusError) as caught:
        load(path, dimensions)
    return caught.value.problems


def changed(folder: Path, index: int, **cells: object) -> Path:
    """Return a manifest in which cells of one row are replaced."""
    rows = manifest_rows(folder)
    rows[index] |= cells
    return write_manifest(folder / "corpus.csv", rows)


def test_reads_every_column(tmp_path: Path) -> None:
    rows = manifest_rows(tmp_path)
    for row in rows:
        row |= {"dominance": 3.5, "gender": "F", "scenario": "impro01", "split": "train"}
    loaded = load(write_manifest(tmp_path / "mine.csv", rows), ("valence", "dominance"))
    u = loaded.utterances[1]
    assert (u.id, u.speaker, u.gender, u.session, u.dialogue, u.turn) == ("s1t1", "s1b", "F", "1", "d1", 1)
    assert (u.valence, u.arousal, u.dominance, u.scenario, u.part) == (2.5, 2.5, 3.5, "impro01", "train")
    assert (u.samples, u.path, u.improvised) == (3200, tmp_path / "audio" / "s1t1.wav", None)
    assert (loaded.name, loaded.labels, loaded.warnings) == ("mine", "manifest", ())


def test_optional_columns_may_be_missing_or_empty(tmp_path: Path) -> None:
    u = load(changed(tmp_path, 0, gender="", scenario="", dominance="")).utterances[0]
    assert (u.gender, u.scenario, u.dominance, u.part) == (None, None, None, None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", lambda rows: csv_text(rows).encode()),
        ("a.csv", lambda rows: csv_text(rows, ";").encode()),
        ("a.csv", lambda rows: csv_text(rows).encode("utf-8-sig")),
        ("a.csv", lambda rows: csv_text(rows, ";").replace("\n", "\r\n").encode("utf-8-sig")),
        ("a.csv", lambda rows: csv_text(rows, ",", list(rows[0])[::-1]).encode()),
        ("a.csv", lambda rows: csv_text(rows).replace("path,", " Path ,", 1).encode()),
        ("a.csv", lambda rows: csv_text(rows).replace("\n", "\n\n").encode()),
        ("a.jsonl", lambda rows: json_lines(rows).encode()),
        ("a.JSONL", lambda rows: json_lines(rows).replace("\n", "\r\n\r\n").encode("utf-8-sig")),
        ("a.txt", lambda rows: json_lines(rows).encode()),
        ("a.jsonl", lambda rows: json_lines([row | {"gender": None} for row in rows]).encode()),
        ("a.jsonl", lambda rows: json_lines([{k: str(v) for k, v in row.items()} for row in rows]).encode()),
    ],
)
def test_all_spellings_give_the_same_corpus(tmp_path: Path, name: str, content: Callable[[list[Row]], bytes]) -> None:
    rows = manifest_rows(tmp_path)
    plain = load(write_manifest(tmp_path / "plain.csv", rows))
    write_bytes(tmp_path / name, content(rows))
    assert load(tmp_path / name).digest == plain.digest


@pytest.mark.parametrize(("given", "gender"), [("F", "F"), ("f", "F"), ("Female", "F"), ("MALE", "M"), ("m", "M")])
def test_gender_in_any_spelling(tmp_path: Path, given: str, gender: str) -> None:
    assert load(changed(tmp_path, 0, gender=given)).utterances[0].gender == gender


def test_turns_are_ranked_by_any_number(tmp_path: Path) -> None:
    loaded = load(changed(tmp_path, 0, turn=17.25))
    assert [(u.id, u.turn) for u in loaded.utterances[:2]] == [("s1t1", 0), ("s1t0", 1)]


def test_absolute_audio_paths_are_allowed(tmp_path: Path) -> None:
    write_noise(tmp_path / "elsewhere" / "x.wav", 7)
    path = changed(tmp_path / "corpus", 0, path=str(tmp_path / "elsewhere" / "x.wav"))
    assert load(path).utterances[0].path == tmp_path / "elsewhere" / "x.wav"


def test_a_path_may_go_up_and_down_inside_the_folder(tmp_path: Path) -> None:
    assert len(load(changed(tmp_path, 0, path="audio/../audio/s1t0.wav")).utterances) == 6


def test_quoted_cells_may_hold_the_delimiter(tmp_path: Path) -> None:
    path = changed(tmp_path, 0, scenario='"lost, and found"')
    assert load(path).utterances[0].scenario == "lost, and found"


def test_resampling_is_a_choice(tmp_path: Path) -> None:
    path = changed(tmp_path, 0)
    write_noise(tmp_path / "audio" / "s1t0.wav", 5, rate_hz=44_100, channels=2)
    assert "44100 Hz with 2 channels" in problems(path)[0]
    assert load(path, resample=True).utterances[0].samples == 3200


def test_both_ends_of_the_scale_are_valid(tmp_path: Path) -> None:
    assert load(changed(tmp_path, 0, valence=1, arousal=5)).utterances[0].valence == 1


def test_unknown_columns_are_a_counted_warning(tmp_path: Path) -> None:
    loaded = load(changed(tmp_path, 0, emotion="neutral", text="hello"))
    assert loaded.warnings == ("columns that cvrunner does not know, ignored: 2 (first: 'emotion')",)


# --- refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("valence", "valance"), ("utterance", "utterence"), ("scenario", "scenarios"), ("split", "Splits")],
)
def test_a_misspelt_column_gets_a_suggestion(tmp_path: Path, right: str, wrong: str) -> None:
    rows = [{(wrong if k == right else k): v for k, v in row.items()} for row in manifest_rows(tmp_path)]
    if right not in rows[0]:
        rows = [row | {wrong: "x"} for row in rows]
    assert problems(write_manifest(tmp_path / "corpus.csv", rows)) == [
        f"corpus.csv: unknown column {wrong.lower()!r}; did you mean {right!r}?"
    ]


def test_missing_columns_are_all_named(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k not in ("turn", "path")} for row in manifest_rows(tmp_path)]
    found = problems(write_manifest(tmp_path / "corpus.csv", rows))
    assert [problem.partition(";")[0] for problem in found] == [
        "corpus.csv: column 'path' is missing",
        "corpus.csv: column 'turn' is missing",
    ]


BAD_CELLS = [
    ({"valence": 5.5}, "s2t0: valence is 5.5, outside corpus.scale 1..5"),
    ({"arousal": 0.99}, "s2t0: arousal is 0.99, outside corpus.scale 1..5"),
    ({"valence": ""}, "s2t0: valence is missing"),
    ({"valence": "nan"}, "s2t0: valence is nan, must be a finite number"),
    ({"arousal": "-inf"}, "s2t0: arousal is -inf, must be a finite number"),
    ({"valence": "high"}, "s2t0: valence 'high' is not a number"),
    ({"turn": "first"}, "s2t0: turn 'first' is not a number"),
    ({"turn": "nan"}, "s2t0: turn 'nan' is not a finite number"),
    ({"turn": 1}, "s2t1: duplicate turn 1 of dialogue d2; the first is at corpus.csv line 4"),
    ({"utterance": ""}, "?: utterance is empty"),
    ({"speaker": " "}, "s2t0: speaker is empty"),
    ({"session": ""}, "s2t0: session is empty"),
    ({"dialogue": ""}, "s2t0: dialogue is empty"),
    ({"path": ""}, "s2t0: path is empty"),
    ({"path": "../other.wav"}, "s2t0: path '../other.wav' leaves the manifest's folder"),
    ({"path": "audio/../../other.wav"}, "s2t0: path 'audio/../../other.wav' leaves the manifest's folder"),
    ({"path": "audio/none.wav"}, "s2t0: {folder}/audio/none.wav: is missing: there is no such audio file"),
    ({"path": "audio"}, "s2t0: {folder}/audio: is not a file but a folder"),
    ({"utterance": "s1t1"}, "s1t1: duplicate utterance; the first is at corpus.csv line 3"),
    ({"gender": "woman"}, "s2t0: gender 'woman' must be one of F, M, female or male"),
    (
        {"speaker": "s1a"},
        "s1a: speaker s1a is in more than one session: 1 (corpus.csv line 2), 2 (corpus.csv line 4)",
    ),
    (
        {"dialogue": "d1"},
        "s2t0: dialogue d1 is in more than one session: 1 (corpus.csv line 2), 2 (corpus.csv line 4)",
    ),
]


@pytest.mark.parametrize(("cells", "message"), BAD_CELLS, ids=[str(cells) for cells, _ in BAD_CELLS])
def test_a_bad_cell_is_reported_with_its_line(tmp_path: Path, cells: Row, message: str) -> None:
    (found,) = problems(changed(tmp_path, 2, **cells))
    line = 5 if message.startswith("s2t1") else 4
    expected = message.replace("s1a: speaker", "s2t0: speaker").format(folder=tmp_path)
    assert found.startswith(f"corpus.csv line {line}: {expected}")


def test_a_speaker_has_one_gender(tmp_path: Path) -> None:
    rows = manifest_rows(tmp_path)
    rows[0] |= {"gender": "F"}
    rows[1] |= {"gender": "M", "speaker": "s1a"}
    assert problems(write_manifest(tmp_path / "corpus.csv", rows)) == [
        "corpus.csv line 3: s1t1: speaker s1a is M here and F at corpus.csv line 2"
    ]


@pytest.mark.parametrize(("given", "message"), [("", "split is empty"), ("dev", "split 'dev' must be one of train")])
def test_split_must_be_known_in_every_row(tmp_path: Path, given: str, message: str) -> None:
    rows = manifest_rows(tmp_path)
    for row in rows:
        row["split"] = "train"
    rows[3]["split"] = given
    found = problems(write_manifest(tmp_path / "corpus.csv", rows))
    assert found[0].startswith(f"corpus.csv line 5: s2t1: {message}")


def test_with_a_split_a_speaker_may_have_several_sessions(tmp_path: Path) -> None:
    rows = manifest_rows(tmp_path)
    for row in rows:
        row |= {"split": "train", "speaker": "everyone"}
    assert len(load(write_manifest(tmp_path / "corpus.csv", rows)).utterances) == 6


def test_a_predicted_dimension_is_required(tmp_path: Path) -> None:
    found = problems(changed(tmp_path, 0), ("dominance",))
    assert len(found) == 6
    assert found[0] == "corpus.csv line 2: s1t0: dominance is missing"


def test_all_problems_of_all_kinds_are_reported_at_once(tmp_path: Path) -> None:
    rows = manifest_rows(tmp_path, sessions=4)
    rows[0]["valence"] = 9
    rows[1]["valence"] = "x"
    rows[2]["path"] = "audio/none.wav"
    rows[3]["utterance"] = "s1t0"
    rows[4]["speaker"] = ""
    path = write_manifest(tmp_path / "corpus.jsonl", rows)
    found = problems(path)
    assert sorted(problem.partition(":")[0] for problem in found) == [f"corpus.jsonl line {n}" for n in range(1, 6)]
    with pytest.raises(CorpusError, match="5 problems"):
        load(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"path,utterance,speaker,session,dialogue,turn,valence,arousal\n", "has no rows"),
        ("a.csv", "path\xe9\n".encode("latin-1"), "is not UTF-8 text (byte 4, line 1)"),
        ("a.csv", b"path,utterance\na\n", "a.csv line 2: has 1 cells, must have 2 like the first line"),
        ("a.csv", b"path,Path\na,b\n", "a.csv line 1: duplicate column 'path'"),
        ("a.csv", b'path,utterance\n"a,b\n', "a.csv line 2: is not CSV: unexpected end of data"),
        ("a.jsonl", b"{\n", "a.jsonl line 1: is not a JSON row: Expecting"),
        ("a.jsonl", b"[1]\n", "a.jsonl line 1: is not a JSON row: must be an object"),
        (
            "a.jsonl",
            b'{"path": ["a"]}\n',
            'a.jsonl line 1: is not a JSON row: path must be text or a number, not ["a"]',
        ),
        (
            "a.jsonl",
            b'{"path": true}\n',
            "a.jsonl line 1: is not a JSON row: path must be text or a number, not true",
        ),
    ],
)
def test_a_file_that_is_not_a_table_is_reported(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_bytes(tmp_path / name, content)
    assert problems(tmp_path / name)[0].startswith(message)


def test_a_decimal_comma_is_explained(tmp_path: Path) -> None:
    rows = manifest_rows(tmp_path)
    rows[0]["valence"] = "2,5"
    write_bytes(tmp_path / "corpus.csv", csv_text(rows, ";").encode())
    assert problems(tmp_path / "corpus.csv") == [
        "corpus.csv line 2: s1t0: valence '2,5' is not a number (write 2.5, not 2,5)"
    ]


def test_a_folder_is_not_a_manifest(tmp_path: Path) -> None:
    assert problems(tmp_path)[0].startswith("corpus.root cannot be read as a manifest")


def test_json_line_numbers_survive_line_separators_in_text(tmp_path: Path) -> None:
    rows = manifest_rows(tmp_path)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines[0] = json.dumps(rows[0] | {"scenario": "a\u2028b"}, ensure_ascii=False)
    lines[1] = "oops"
    write_bytes(tmp_path / "corpus.jsonl", "\n".join(lines).encode())
    assert problems(tmp_path / "corpus.jsonl")[0].startswith("corpus.jsonl line 2: is not a JSON row")


# --- single ratings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_single_ratings_become_raters_and_their_mean_a_label_that_is_not_given(tmp_path: Path, name: str) -> None:
    rows = manifest_rows(tmp_path)
    for turn, row in enumerate(rows):
        del row["valence"]
        row |= {"valence_1": 1 + turn % 2, "valence_2": 4, "valence_10": 2.5, "arousal_2": 3}
    rows[0] |= {"valence_2": "", "arousal": ""}
    loaded = load(write_manifest(tmp_path / name, rows))
    first, second = loaded.utterances[:2]
    assert first.raters == {"E1": (1, None, None), "E2": (None, 3, None), "E10": (2.5, None, None)}
    assert (first.valence, first.arousal) == (1.75, 3)
    assert second.raters == {"E1": (2, None, None), "E2": (4, 3, None), "E10": (2.5, None, None)}
    assert second.valence == pytest.approx(8.5 / 3)


def test_a_label_that_is_not_the_mean_of_its_ratings_is_kept_and_counted_unless_it_is_rounded(tmp_path: Path) -> None:
    rows = manifest_rows(tmp_path)
    for row in rows:
        row |= {"valence": "2.33", "valence_1": 1, "valence_2": 3, "valence_3": 3}
    rows[1]["valence"] = "2.32"
    loaded = load(write_manifest(tmp_path / "a.csv", rows))
    assert [u.valence for u in loaded.utterances[:2]] == [2.33, 2.32]
    assert (
        "valence labels that differ from the mean of their ratings by more than rounding, kept as given: 1 "
        "(first: a.csv line 3: s1t1 2.32, mean 2.33333)"
    ) in loaded.warnings


@pytest.mark.parametrize(
    ("cell", "rule"),
    [
        ("x", "valence_2 'x' is not a number"),
        ("2,5", "valence_2 '2,5' is not a number (write 2.5, not 2,5)"),
        ("5.5", "valence_2 is 5.5, must be a number within corpus.scale 1..5"),
        ("nan", "valence_2 is nan, must be a number within corpus.scale 1..5"),
    ],
)
def test_a_wrong_rating_is_a_problem_with_its_row(tmp_path: Path, cell: str, rule: str) -> None:
    rows = manifest_rows(tmp_path)
    for row in rows:
        row |= {"valence_1": 2, "valence_2": 3}
    rows[2]["valence_2"] = cell
    assert problems(write_manifest(tmp_path / "a.jsonl", rows)) == [f"a.jsonl line 3: s2t0: {rule}"]


def test_a_label_with_an_absurd_exponent_is_no_crash(tmp_path: Path) -> None:
    rows = manifest_rows(tmp_path)
    for row in rows:
        row |= {"valence_1": 2}
    rows[0]["valence"] = "1e999999999"
    rows[1]["valence"] = "0e999999999"
    found = problems(write_manifest(tmp_path / "a.csv", rows))
    assert found[0] == "a.csv line 2: s1t0: valence is inf, must be a finite number"
    assert found[1].startswith("a.csv line 3: s1t1: valence is 0, outside corpus.scale")


def test_without_label_and_ratings_the_label_is_missing(tmp_path: Path) -> None:
    rows = manifest_rows(tmp_path)
    for row in rows:
        row |= {"valence": "", "valence_1": 2}
    rows[1]["valence_1"] = ""
    assert problems(write_manifest(tmp_path / "a.csv", rows)) == ["a.csv line 3: s1t1: valence is missing"]


# --- names, numbers, splits and twins ---------------------------------------------------------------------------------


def in_column(folder: Path, column: str, one: object, other: object, suffix: str = "csv") -> Path:
    """Return a manifest whose first two rows have these values in a column."""
    rows = manifest_rows(folder)
    rows[0][column], rows[1][column] = one, other
    return write_manifest(folder / f"corpus.{suffix}", rows)


ALIKE = [
    ("7", "7.0"),
    ("7.", "7.00"),
    ("Zo\u00eb", "Zoe\u0308"),
    ("Anna", "An\u200bna"),
    ("Anna", "Anna\u2060"),
    ("Anna", "\ufeffAnna"),
    ("Anna B", "Anna\u00a0B"),
    ("Anna B", "Anna\u2009B"),
    ("Anna B", "Anna  B"),
    ("Anna-B", "Anna\u2011B"),
    ("Anna-B", "Anna\u2013B"),
    ("A1", "\uff211"),
    ("Anna", "A\u00adnna"),
]


@pytest.mark.parametrize("column", ["speaker", "session", "dialogue", "scenario", "utterance"])
@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_two_spellings_of_one_name_are_refused_with_both_rows(
    tmp_path: Path, column: str, one: str, other: str
) -> None:
    found = problems(in_column(tmp_path, column, one, other))
    rule = f"{column} {other!a} looks like {one!a} at corpus.csv line 2; write one name in one way"
    assert any(line.startswith("corpus.csv line 3: ") and line.endswith(rule) for line in found), found


@pytest.mark.parametrize(("one", "other"), [("anna", "Anna"), ("7", "07"), ("s1-x", "S01-X"), ("7.0", "007")])
def test_names_that_differ_in_case_or_leading_zeros_are_a_counted_warning(tmp_path: Path, one: str, other: str) -> None:
    (found,) = load(in_column(tmp_path, "speaker", one, other)).warnings
    kind = "speaker names that differ only in case or leading zeros, taken for different ones"
    assert found == f"{kind}: 1 (first: {other} at corpus.csv line 3 and {one} at corpus.csv line 2)"


@pytest.mark.parametrize("name", ["Zoë", "声", "a_b", "10", "1.5", "Ses01F_impro01", "हिन्दी"])
def test_one_spelling_throughout_is_fine(tmp_path: Path, name: str) -> None:
    loaded = load(in_column(tmp_path, "speaker", name, name))
    assert (loaded.utterances[0].speaker, loaded.warnings) == (name, ())


NO_NAMES = ["nan", "NaN", "None", "<NA>", "NaT", "null", "N/A", "#N/A", "\u200b", "\u00a0", "\u3164"]


@pytest.mark.parametrize("text", NO_NAMES)
@pytest.mark.parametrize("column", ["path", "utterance", "speaker", "session", "dialogue"])
def test_what_stands_for_nothing_is_no_name(tmp_path: Path, column: str, text: str) -> None:
    (found,) = problems(in_column(tmp_path, column, text, manifest_rows(tmp_path)[1][column]))
    assert found.endswith(f"{column} is empty")


@pytest.mark.parametrize("text", NO_NAMES)
def test_an_optional_name_may_stand_for_nothing(tmp_path: Path, text: str) -> None:
    assert load(in_column(tmp_path, "scenario", text, "garden")).utterances[0].scenario is None


@pytest.mark.parametrize("column", ["path", "utterance", "speaker", "session", "dialogue", "turn", "valence"])
@pytest.mark.parametrize("value", [float("nan"), None])
def test_nan_and_null_in_json_are_empty(tmp_path: Path, column: str, value: object) -> None:
    (found,) = problems(in_column(tmp_path, column, value, manifest_rows(tmp_path)[1][column], "jsonl"))
    assert found.endswith((f"{column} is empty", f"{column} is missing"))


@pytest.mark.parametrize(
    ("pair", "rule"),
    [
        ('"valence": 1, "valence": 2', "key 'valence' stands twice"),
        ('"speaker": "a", "speaker": "a"', "key 'speaker' stands twice"),
        ('"Valence": 1, "valence": 2', "keys 'Valence' and 'valence' are the same column"),
        ('" turn": 1, "turn": 2', "keys ' turn' and 'turn' are the same column"),
    ],
)
def test_a_json_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path, pair: str, rule: str) -> None:
    text = json_lines(manifest_rows(tmp_path)) + f"{{{pair}}}\n"
    write_bytes(tmp_path / "corpus.jsonl", text.encode())
    assert problems(tmp_path / "corpus.jsonl") == [f"corpus.jsonl line 7: is not a JSON row: {rule}"]


@pytest.mark.parametrize("column", ["turn", "valence", "arousal", "dominance"])
@pytest.mark.parametrize(
    "text",
    ["1_10", "3_5", "2_.5", "2,5", "85%", "85 %", "\u0663", "\uff13", "0x3", "1e_1", "3 5", "\u22123", "3\u20442"],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_numbers_are_in_plain_decimal_notation(tmp_path: Path, column: str, text: str, suffix: str) -> None:
    shown = f'"{text}"' if suffix == "csv" else text
    found = problems(in_column(tmp_path, column, shown, 2, suffix))
    assert any(f"{column} {text!r} is not a number" in problem for problem in found), found


@pytest.mark.parametrize("text", ["3", "3.", "+3", ".3e1", "30e-1", "3.0E+0", "03"])
def test_every_plain_notation_of_a_number_is_read(tmp_path: Path, text: str) -> None:
    assert load(in_column(tmp_path, "valence", text, 2)).utterances[0].valence == 3


@pytest.mark.parametrize("scale", [(0.0, 100.0), (0.0, 20.0), (-10.0, 10.0)])
def test_labels_within_a_small_part_of_the_scale_are_a_counted_warning(
    tmp_path: Path, scale: tuple[float, float]
) -> None:
    path = write_manifest(tmp_path / "corpus.csv", manifest_rows(tmp_path))
    kind = f"labels that cover a small part of corpus.scale {scale[0]:g}..{scale[1]:g} (is it right?)"
    assert load_manifest(path, scale, DIMENSIONS, False).warnings == (
        f"valence {kind}: 6 (first: all within 1.5..2.5)",
        f"arousal {kind}: 6 (first: all within 2.5..3.5)",
    )


def split_rows(folder: Path) -> Path:
    parts = ("train", "train", "validation", "validation", "test", "test")
    rows = [row | {"split": part} for row, part in zip(manifest_rows(folder), parts, strict=True)]
    return write_manifest(folder / "corpus.csv", rows)


def test_a_split_that_nobody_asked_to_ignore_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as caught:
        load_manifest(split_rows(tmp_path), SCALE, DIMENSIONS, False, None)
    (found,) = caught.value.problems
    assert found.startswith("corpus.csv line 2: s1t0: split is 'train', as in 6 rows, but folds.scheme is not set")


def test_a_split_that_is_ignored_on_purpose_is_a_warning_and_one_that_is_used_is_none(tmp_path: Path) -> None:
    path = split_rows(tmp_path)
    assert load_manifest(path, SCALE, DIMENSIONS, False, "leave_one_session_out").warnings == (
        "rows with a split that folds.scheme leave_one_session_out ignores: 6 (first: corpus.csv line 2: s1t0)",
    )
    assert load_manifest(path, SCALE, DIMENSIONS, False, "manifest_split").warnings == ()


@pytest.mark.parametrize(("valence", "kind"), [(1.5, "equal"), (4, "different")])
@pytest.mark.parametrize("copied", [False, True])
def test_the_same_recording_in_two_rows_is_a_warning_with_both(
    tmp_path: Path, valence: float, kind: str, copied: bool
) -> None:
    rows = manifest_rows(tmp_path)
    rows[1] |= {"path": rows[0]["path"], "valence": valence, "arousal": rows[0]["arousal"]}
    if copied:
        rows[1]["path"] = "audio/copy.wav"
        write_bytes(tmp_path / "audio" / "copy.wav", (tmp_path / "audio" / "s1t0.wav").read_bytes())
    assert load(write_manifest(tmp_path / "corpus.csv", rows)).warnings == (
        f"recordings in several rows, with {kind} labels: 1 "
        "(first: corpus.csv line 2: s1t0 and corpus.csv line 3: s1t1)",
    )


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_file_names_are_compared_after_composition(tmp_path: Path, form: Literal["NFC", "NFD"]) -> None:
    other: Literal["NFC", "NFD"] = "NFD" if form == "NFC" else "NFC"
    rows = manifest_rows(tmp_path)
    (tmp_path / "audio" / "s1t0.wav").rename(tmp_path / "audio" / unicodedata.normalize(other, "Zoë.wav"))
    (tmp_path / "audio").rename(tmp_path / unicodedata.normalize(other, "äudio"))
    for row in rows:
        row["path"] = unicodedata.normalize(form, str(row["path"]).replace("audio", "äudio").replace("s1t0", "Zoë"))
    path = write_manifest(tmp_path / "corpus.csv", rows)
    assert len(load(path).utterances) == 6
    rows[1]["path"] = unicodedata.normalize(other, str(rows[0]["path"]))
    assert "looks like" in problems(write_manifest(tmp_path / "corpus.csv", rows))[0]


def test_warnings_about_audio_name_the_row_and_are_counted(tmp_path: Path) -> None:
    rows = manifest_rows(tmp_path)
    for name, level in (("s1t0", 1e-4), ("s2t1", 2e-4)):
        noise = np.random.default_rng(1).normal(0, level, 3200)
        soundfile.write(tmp_path / "audio" / f"{name}.wav", noise, 16_000, subtype="FLOAT")
    (found,) = load(write_manifest(tmp_path / "corpus.csv", rows)).warnings
    assert re.fullmatch(r"audio below -60 dBFS: 2 \(first: corpus\.csv line 2: s1t0, channel 1 -\d\d\.\d dBFS\)", found)
