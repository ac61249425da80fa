"""IEMOCAP with all its irregularities, and the errors in it that are refused."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from cvrunner.data.iemocap import PUBLISHED_TURNS, load_iemocap, published_dialogues, side
from cvrunner.data.utterance import Corpus, Utterance, audio_digest, read_audio
from cvrunner.errors import CorpusError
from tests.corpora import (
    DIMENSIONS,
    SCALE,
    TURNS,
    Turn,
    label_file,
    label_text,
    wav_file,
    write_bytes,
    write_iemocap,
    write_noise,
)

RATED = Turn(
    "M001",
    4.0,
    "3.0000, 2.0000",
    (
        "C-F1:\tAnger;\t()",
        "A-E1:\tval 2; act 3; dom  4;\t()",
        "A-E2:\tval 3; act 4; dom  ;\t(tired)",
        "A-E4:\tval  ; act 5;\t()",
        "A-F1:\tval 5; act 1; dom  1;\t()",
        "A-M1:\tval 5; act 2; dom  2;\t()",
    ),
)


def load(root: Path, labels: Any = "header", dimensions: Sequence[str] = DIMENSIONS) -> Corpus:
    return load_iemocap(root, labels, SCALE, dimensions, False)


def by_id(loaded: Corpus) -> dict[str, Utterance]:
    return {u.id: u for u in loaded.utterances}


def problems(root: Path, **how: Any) -> list[str]:
    with pytest.raises(CorpusError) as caught:
        load(root, **how)
    return caught.value.problems


def with_dialogue(root: Path, name: str, *turns: Turn) -> Path:
    return write_iemocap(root, dialogues={name: turns})


def test_reads_names_labels_and_audio_of_a_turn(tmp_path: Path) -> None:
    loaded = load(write_iemocap(tmp_path))
    u = by_id(loaded)["Ses02F_impro01_M000"]
    assert (u.speaker, u.gender, u.session, u.dialogue, u.turn) == ("02M", "M", "Ses02", "Ses02F_impro01", 1)
    assert (u.scenario, u.improvised, u.part) == ("impro01", True, None)
    assert (u.valence, u.arousal, u.dominance) == (4.0, 2.0, 3.0)
    assert (u.samples, u.audio_digest) == (3200, audio_digest(read_audio(u.path)))
    assert (loaded.name, loaded.labels, loaded.synthetic, loaded.warnings) == ("IEMOCAP", "header", False, ())
    assert loaded.sessions == ("Ses01", "Ses02", "Ses03")


def test_speaker_is_the_last_letter_not_the_motion_capture_side(tmp_path: Path) -> None:
    speakers = {u.id: u.speaker for u in load(write_iemocap(tmp_path)).utterances}
    assert speakers["Ses01F_impro01_M000"] == "01M"
    assert speakers["Ses01M_script01_1_F000"] == "01F"


@pytest.mark.parametrize(
    ("name", "scenario", "improvised"),
    [
        ("F_impro05a", "impro05", True),
        ("M_impro08", "impro08", True),
        ("F_script01_1", "script01_1", False),
        ("M_script01_1b", "script01_1", False),
        ("M_script03_2", "script03_2", False),
    ],
)
def test_scenario_is_the_dialogue_without_side_and_trailing_letter(
    tmp_path: Path, name: str, scenario: str, improvised: bool
) -> None:
    loaded = load(with_dialogue(tmp_path, name, *TURNS))
    assert {(u.scenario, u.improvised) for u in loaded.utterances} == {(scenario, improvised)}
    assert side(f"Ses01{name}") == name[0]


def test_side_of_other_names_is_none() -> None:
    assert side("dialogue 7") is None


def test_header_times_sort_the_turns_and_names_break_ties(tmp_path: Path) -> None:
    turns = (Turn("M000", 9.5), Turn("F002", 10.25), Turn("F001", 10.25), Turn("F000", 0.5))
    loaded = load(with_dialogue(tmp_path, "F_impro01", *turns))
    order = [u.id[-4:] for u in loaded.utterances if u.session == "Ses01"]
    assert order == ["F000", "M000", "F001", "F002"]
    assert [u.turn for u in loaded.utterances if u.session == "Ses01"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("variant", "valence", "arousal", "dominance"),
    [("header", 3.0, 2.0, None), ("observers", 2.5, 4.0, 4.0), ("all_raters", 3.75, 3.0, 7 / 3)],
)
def test_label_variants_average_over_the_raters_who_gave_a_value(
    tmp_path: Path, variant: str, valence: float, arousal: float, dominance: float | None
) -> None:
    loaded = load(with_dialogue(tmp_path, "F_impro01", RATED), variant)
    u = loaded.utterances[0]
    assert (u.valence, u.arousal) == (valence, arousal)
    assert u.dominance == pytest.approx(dominance)
    assert loaded.labels == variant


def test_raters_need_valence_and_arousal(tmp_path: Path) -> None:
    u = load(with_dialogue(tmp_path, "F_impro01", RATED)).utterances[0]
    assert u.raters == {"E1": (2, 3, 4), "E2": (3, 4, None), "F1": (5, 1, 1), "M1": (5, 2, 2)}


def test_second_rating_by_the_same_rater_is_counted_and_ignored(tmp_path: Path) -> None:
    turn = Turn("F000", 1.0, raters=("A-E1:\tval 2; act 3; dom 4;\t()", "A-E1:\tval 4; act 3; dom 4;\t()"))
    loaded = load(with_dialogue(tmp_path, "F_impro01", turn), "observers")
    assert loaded.utterances[0].valence == 2
    assert loaded.warnings == (
        "second ratings of a turn by the same rater, ignored: 3 (first: "
        "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt line 6: Ses01F_impro01_F000 E1)",
    )


def test_hidden_files_and_subfolders_are_ignored(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path)
    labels = label_file(root, "Ses01F_impro01").parent
    write_bytes(labels / "._Ses01F_impro01.txt", b"\x00\x05\x16\x07[garbage")
    write_bytes(labels / ".hidden.txt", b"[1.0")
    write_bytes(labels / "Categorical" / "Ses01F_impro01_e2_cat.txt", b"[1.0")
    write_bytes(wav_file(root, "Ses01F_impro01_F000").with_name("._Ses01F_impro01_F000.wav"), b"\x00")
    write_bytes(root / "Session1" / "sentences" / "wav" / ".trash" / "x.wav", b"\x00")
    loaded = load(root)
    assert (len(loaded.utterances), loaded.warnings) == (12, ())


def test_windows_line_ends_and_foreign_bytes_in_comments_change_nothing(tmp_path: Path) -> None:
    plain = load(with_dialogue(tmp_path / "a", "F_impro01", RATED), "observers")
    root = write_iemocap(tmp_path / "b", dialogues={"F_impro01": (RATED,)}, line_end="\r\n")
    path = label_file(root, "Ses01F_impro01")
    path.write_bytes(path.read_bytes().replace(b"tired", b"fatigu\xe9"))
    assert load(root, "observers").digest == plain.digest


def test_wav_without_label_line_is_a_counted_warning(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path)
    write_noise(wav_file(root, "Ses01F_impro01_F009"), 90)
    write_noise(wav_file(root, "Ses02F_impro01_F009"), 91)
    assert load(root).warnings == (
        "wav files without a label line, ignored: 2 (first: "
        "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F009.wav)",
    )


def test_labels_outside_the_scale_are_counted_and_kept(tmp_path: Path) -> None:
    loaded = load(with_dialogue(tmp_path, "F_impro01", Turn("F000", 1.0, "5.5000, 0.5000, 9.0000")))
    assert {(u.valence, u.arousal) for u in loaded.utterances} == {(5.5, 0.5)}
    assert loaded.warnings[0] == (
        "valence labels outside corpus.scale 1..5, kept as they are: 3 (first: "
        "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt line 3: Ses01F_impro01_F000 5.5)"
    )
    assert [warning.partition(" ")[0] for warning in loaded.warnings] == ["valence", "arousal"]


def test_dominance_is_required_only_if_it_is_predicted(tmp_path: Path) -> None:
    root = with_dialogue(tmp_path, "F_impro01", Turn("F000", 1.0, "2.0, 3.0"))
    assert load(root).utterances[0].dominance is None
    found = problems(root, dimensions=("valence", "dominance"))
    assert found[0] == (
        "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt line 3: Ses01F_impro01_F000: dominance is missing"
    )


def test_a_synthetic_tree_is_recognised(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path)
    write_bytes(root / "SYNTHETIC.json", b"{}")
    loaded = load(root)
    assert (loaded.synthetic, loaded.name) == (True, "demo")


def test_sessions_sort_by_number(tmp_path: Path) -> None:
    loaded = load(write_iemocap(tmp_path, sessions=11, dialogues={"F_impro01": TURNS[:1]}))
    assert loaded.sessions[1:3] == ("Ses02", "Ses03")
    assert loaded.sessions[-1] == "Ses11"


# --- refused -----------------------------------------------------------------------------------------

BAD_TURNS = [
    (Turn("F000", 1.0, "nan, 2.0, 3.0"), "Ses01F_impro01_F000: valence is nan, must be a finite number"),
    (Turn("F000", 1.0, ", 2.0, 3.0"), "Ses01F_impro01_F000: valence is missing"),
    (Turn("F000", 1.0, "high, 2.0, 3.0"), "a turn must look like"),
    (Turn("F000", 1.0, "2.0"), "a turn must look like"),
    (Turn("F000", 1.0, "2.0, 2.0, 2.0, 2.0"), "a turn must look like"),
    (
        Turn("X000", 1.0),
        "Ses01F_impro01_X000: the turn must be named Ses01F_impro01_F000 or Ses01F_impro01_M000",
    ),
]


@pytest.mark.parametrize(("turn", "message"), BAD_TURNS)
def test_a_bad_turn_is_reported_with_file_and_line(tmp_path: Path, turn: Turn, message: str) -> None:
    found = problems(with_dialogue(tmp_path, "F_impro01", turn))
    assert len(found) == 3
    assert found[0].startswith(f"Session1/dialog/EmoEvaluation/Ses01F_impro01.txt line 3: {message}")


def test_a_bad_rating_is_reported_with_file_and_line(tmp_path: Path) -> None:
    turn = Turn("F000", 1.0, raters=("A-E1:\tval x; act 3; dom 4;\t()",))
    found = problems(with_dialogue(tmp_path, "F_impro01", turn))
    place = "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt line 5"
    assert found[0].startswith(f"{place}: a rating must look like `A-E1: val 3; act 2; dom 2;`, not 'A-E1")


def test_observers_without_any_rater_are_missing_labels(tmp_path: Path) -> None:
    found = problems(write_iemocap(tmp_path), labels="observers")
    assert len(found) == 24
    assert found[0].endswith("Ses01F_impro01_F000: valence is missing")


def test_names_must_match_folder_and_file(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path)
    folder = label_file(root, "Ses01F_impro01").parent
    write_bytes(folder / "Ses02F_impro02.txt", label_text("Ses02F_impro02", TURNS[:1]).encode())
    write_bytes(folder / "notes.txt", label_text("Ses01F_impro03", TURNS[:1]).encode())
    write_bytes(folder / "Ses01F_impro04.txt", label_text("Ses01F_impro01", TURNS[:1]).encode())
    found = "\n".join(problems(root))
    assert "Ses02F_impro02.txt line 3: Ses02F_impro02_F000: the dialogue Ses02F_impro02 is not of Session1" in found
    assert "notes.txt line 3: Ses01F_impro03_F000: the dialogue notes must be named like Ses01F_impro01" in found
    assert "Ses01F_impro04.txt line 3: Ses01F_impro01_F000: the turn must be named Ses01F_impro04_F000" in found


def test_a_duplicate_turn_is_reported_with_both_lines(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path)
    text = label_text("Ses01F_impro01", (*TURNS, TURNS[0]))
    write_bytes(label_file(root, "Ses01F_impro01"), text.encode())
    place = "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt line"
    assert problems(root) == [f"{place} 9: Ses01F_impro01_F000: duplicate utterance; the first is at {place} 3"]


def test_every_audio_problem_is_reported_in_one_pass(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path)
    missing, short, silent, stereo, broken = (
        wav_file(root, name)
        for name in (
            "Ses01F_impro01_F000",
            "Ses01F_impro01_M000",
            "Ses02F_impro01_F000",
            "Ses02F_impro01_M000",
            "Ses03F_impro01_F000",
        )
    )
    missing.unlink()
    write_noise(short, 1, duration_s=399 / 16_000)
    soundfile.write(silent, np.zeros(3200, np.float32), 16_000)
    write_noise(stereo, 2, channels=2)
    broken.write_bytes(b"no audio at all")
    label = label_file(root, "Ses03M_script01_1")
    label.write_text(label.read_text().replace("[2.5000, ", "[nan, "))
    found = problems(root)
    assert len(found) == 6
    text = "\n".join(found)
    assert f"line 3: Ses01F_impro01_F000: {missing}: is missing: there is no such audio file" in text
    assert f"line 6: Ses01F_impro01_M000: {short}: has 399 samples at 16 kHz, must have 400 or more" in text
    assert f"{silent}: is silent" in text
    assert f"{stereo}: 16000 Hz with 2 channels, must be 16000 Hz mono" in text
    assert f"{broken}: cannot be read as audio" in text
    assert "Ses03M_script01_1_F000: valence is nan" in text


def test_audio_of_one_frame_is_enough(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path)
    write_noise(wav_file(root, "Ses01F_impro01_F000"), 1, duration_s=400 / 16_000)
    assert load(root).utterances[0].samples == 400


def test_audio_above_40_s_is_a_counted_warning(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path)
    write_noise(wav_file(root, "Ses01F_impro01_F000"), 1, duration_s=40.5)
    assert load(root).warnings == (
        "utterances longer than 40 s: 1 (first: Session1/dialog/EmoEvaluation/Ses01F_impro01.txt line 3: "
        "Ses01F_impro01_F000, 40.5 s)",
    )


def test_a_folder_without_sessions_names_the_key_and_the_nested_folder(tmp_path: Path) -> None:
    write_iemocap(tmp_path / "IEMOCAP_full_release")
    (found,) = problems(tmp_path)
    assert found.startswith("corpus.root must be the folder that holds Session1")
    assert found.endswith(f"did you mean {tmp_path / 'IEMOCAP_full_release'}?")


def test_a_session_without_label_files_is_refused(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path)
    shutil.rmtree(root / "Session2" / "dialog")
    assert problems(root) == ["Session2/dialog/EmoEvaluation: there is no label file (*.txt)"]


def test_label_files_without_any_turn_are_refused(tmp_path: Path) -> None:
    root = tmp_path
    write_bytes(label_file(root, "Ses01F_impro01"), b"% nothing\n")
    assert problems(root) == ["no utterances"]


# --- compared with the published corpus -------------------------------------------------------------------------------


def compared(root: Path, partial: bool = False) -> Corpus:
    return load_iemocap(root, "header", SCALE, DIMENSIONS, False, partial)


def whole(root: Path) -> Path:
    """Write a tree with every published dialogue, of one turn each."""
    seed = 0
    for session in range(1, 6):
        for dialogue in published_dialogues(session):
            seed += 1
            write_bytes(label_file(root, dialogue), label_text(dialogue, TURNS[:1]).encode())
            write_noise(wav_file(root, f"{dialogue}_F000"), seed, 0.05)
    return root


def test_there_are_151_published_dialogues_and_10039_turns() -> None:
    assert [len(published_dialogues(session)) for session in range(1, 6)] == [28, 30, 32, 30, 31]
    assert len({name for session in range(1, 6) for name in published_dialogues(session)}) == 151
    assert sum(PUBLISHED_TURNS.values()) == 10_039


@pytest.mark.parametrize("gone", [1, 3, 5])
def test_a_missing_session_is_refused_unless_the_corpus_is_partial(tmp_path: Path, gone: int) -> None:
    root = write_iemocap(tmp_path, 5)
    shutil.rmtree(root / f"Session{gone}")
    with pytest.raises(CorpusError) as caught:
        compared(root)
    (found,) = caught.value.problems
    assert found.startswith(f"Session{gone}: is missing, with {PUBLISHED_TURNS[f'Session{gone}']} of the 10,039")
    assert f"sessions that are missing: 1 (first: Session{gone})" in compared(root, partial=True).warnings


@pytest.mark.parametrize("name", ["session2", "SESSION2", "Session 2", "Session_2", "Ses02"])
def test_a_session_under_another_name_is_refused(tmp_path: Path, name: str) -> None:
    root = write_iemocap(tmp_path, 5)
    (root / "Session2").rename(root / name)
    with pytest.raises(CorpusError) as caught:
        compared(root, partial=True)
    assert caught.value.problems == [
        f"{name}: looks like a session but is not read; sessions must be named Session1 ... Session5"
    ]


def test_missing_dialogues_label_files_and_turns_are_named(tmp_path: Path) -> None:
    root = whole(tmp_path)
    turns = "sessions with another number of turns than published: 5 (first: Session1 28 of 1819)"
    assert compared(root).warnings == (turns,)
    place = "Session3/dialog/EmoEvaluation/Ses03M_impro05b.txt"
    (root / place).unlink()
    missing = f"dialogues of the published corpus that are missing: 1 (first: {place})"
    wav = "wav files without a label line, ignored: 1 (first: Session3/sentences/wav/Ses03M_impro05b/"
    assert set(compared(root).warnings) == {f"{wav}Ses03M_impro05b_F000.wav)", turns, missing}
    shutil.rmtree(root / "Session3" / "sentences" / "wav" / "Ses03M_impro05b")
    assert set(compared(root).warnings) == {turns, missing}


def test_a_synthetic_tree_may_have_any_size(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path)
    write_bytes(root / "SYNTHETIC.json", b"{}")
    assert compared(root).warnings == ()


@pytest.mark.parametrize("space", [" ", "\t", "\u00a0 "])
def test_lines_may_begin_with_spaces(tmp_path: Path, space: str) -> None:
    plain = by_id(load(with_dialogue(tmp_path / "a", "F_impro01", RATED)))
    root = with_dialogue(tmp_path / "b", "F_impro01", RATED)
    for session in (1, 2, 3):
        path = label_file(root, f"Ses{session:02}F_impro01")
        path.write_text("\n".join(space + line for line in path.read_text().split("\n")))
    found = by_id(load(root))
    assert {name: (u.raters, u.valence) for name, u in found.items()} == {
        name: (u.raters, u.valence) for name, u in plain.items()
    }


@pytest.mark.parametrize("number", ["3_5", "2_.5", "\u0663", "0x2"])
def test_numbers_of_labels_are_in_plain_decimal_notation(tmp_path: Path, number: str) -> None:
    found = problems(with_dialogue(tmp_path, "F_impro01", Turn("F000", 1.0, f"{number}, 2.0, 3.0")))
    assert "a turn must look like" in found[0]
