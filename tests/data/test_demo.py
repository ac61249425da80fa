"""The synthetic IEMOCAP has the layout, the syntax and the statistics of a corpus worth practising on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import audmetric
import numpy as np
import pytest
import soundfile

from cvrunner.data import demo, speech_synthesis
from cvrunner.data.demo import SCENARIOS, write_demo_corpus
from cvrunner.data.speech_synthesis import Timbre, Voice, remove_stale_voices
from cvrunner.errors import ConfigError

pytest.importorskip("espeakng_loader")

HEADER = re.compile(
    r"\[(\d+\.\d{4}) - (\d+\.\d{4})\]\t(Ses(\d\d)([FM])_(\w+?)_([FM])(\d{3}))\t(\w{3})"
    r"\t\[(\d\.\d{4}), (\d\.\d{4}), (\d\.\d{4})\]"
)
CATEGORY = re.compile(r"C-E\d:\t\w+;\t\(\)")
RATING = re.compile(r"A-(([EFM])\d):\tval (\d); act (\d); dom  (\d?);\t\(\)")


@dataclass
class Turn:
    id: str
    session: int
    side: str
    scenario: str
    speaker: str
    start_s: float
    end_s: float
    label: tuple[float, float, float]
    audio: Path
    ratings: list[tuple[str, str, str, str]] = field(default_factory=list)


def read(root: Path) -> list[Turn]:
    """Parse all label files; every line must have a known form."""
    turns: list[Turn] = []
    for file in sorted(root.glob("Session*/dialog/EmoEvaluation/*.txt")):
        first, *lines = file.read_text().splitlines()
        assert first == "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]"
        for line in filter(None, lines):
            if header := HEADER.fullmatch(line):
                turns.append(turn_of(root, file.stem, header))
            elif rating := RATING.fullmatch(line):
                turns[-1].ratings.append((rating[2], rating[3], rating[4], rating[5]))
            else:
                assert CATEGORY.fullmatch(line), line
    return turns


def turn_of(root: Path, dialogue: str, header: re.Match[str]) -> Turn:
    assert header[3].startswith(dialogue)
    audio = root / f"Session{int(header[4])}" / "sentences" / "wav" / dialogue / f"{header[3]}.wav"
    scenario = header[6].rstrip("abc")
    label = (float(header[10]), float(header[11]), float(header[12]))
    start_s, end_s = float(header[1]), float(header[2])
    return Turn(header[3], int(header[4]), header[5], scenario, header[7], start_s, end_s, label, audio)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "corpus"
    write_demo_corpus(root, utterances=320)
    return root


@pytest.fixture(scope="module")
def turns(root: Path) -> list[Turn]:
    return read(root)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    write_demo_corpus(tmp_path / "a", seed=3, utterances=50)
    write_demo_corpus(tmp_path / "other", seed=4, utterances=50)
    write_demo_corpus(tmp_path / "b", seed=3, utterances=50)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "other"]


def test_every_label_has_its_audio_and_the_other_way_round(root: Path, turns: list[Turn]) -> None:
    assert len({turn.id for turn in turns}) == len(turns) == 320
    assert {turn.audio for turn in turns} == set(root.glob("Session*/sentences/wav/*/*.wav"))
    assert [sum(turn.session == n for turn in turns) for n in range(1, 6)] == [64] * 5


def test_audio_is_16_khz_mono_pcm_of_one_to_eight_seconds_and_as_long_as_the_header_says(
    turns: list[Turn],
) -> None:
    durations_s = []
    for turn in turns:
        info = soundfile.info(turn.audio)
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert turn.end_s - turn.start_s == pytest.approx(info.duration, abs=2e-4)
        durations_s.append(info.duration)
    assert min(durations_s) >= 1
    assert max(durations_s) <= 8
    assert 2.4 <= np.mean(durations_s) <= 3.1


def test_audio_is_neither_clipped_nor_nearly_silent(turns: list[Turn]) -> None:
    peaks = [float(np.abs(soundfile.read(turn.audio)[0]).max()) for turn in turns]
    assert max(peaks) < 0.999
    assert min(peaks) > 0.02


def test_the_header_is_the_mean_of_the_observers(turns: list[Turn]) -> None:
    for turn in turns:
        observers = [scores for kind, *scores in turn.ratings if kind == "E"]
        assert len(observers) == 3
        for dimension, mean in enumerate(turn.label):
            given = [int(scores[dimension]) for scores in observers if scores[dimension]]
            assert mean == pytest.approx(np.mean(given), abs=6e-5)


def test_some_ratings_are_by_the_actors_and_some_have_no_dominance(turns: list[Turn]) -> None:
    own = [(turn.speaker, kind) for turn in turns for kind, *_ in turn.ratings if kind != "E"]
    assert len(own) > 40
    assert all(speaker == kind for speaker, kind in own)
    assert 3 < sum(not dominance for turn in turns for *_, dominance in turn.ratings) < 100


def test_every_session_plays_the_same_scenarios(turns: list[Turn]) -> None:
    played = defaultdict(set)
    for turn in turns:
        played[turn.session].add(turn.scenario)
    assert set(played) == {1, 2, 3, 4, 5}
    assert all(scenarios == {scenario.name for scenario in SCENARIOS} for scenarios in played.values())


def test_the_side_is_not_the_speaker_in_about_half_of_the_turns(turns: list[Turn]) -> None:
    assert 0.4 < np.mean([turn.side != turn.speaker for turn in turns]) < 0.6


def test_some_dialogues_have_a_trailing_letter_and_are_scripted(root: Path) -> None:
    names = {file.stem for file in root.glob("Session*/dialog/EmoEvaluation/*.txt")}
    assert any(re.fullmatch(r"Ses03[FM]_impro05a", name) for name in names)
    assert any(re.fullmatch(r"Ses05[FM]_script01_1b", name) for name in names)


def test_turns_of_a_dialogue_follow_one_another_by_both_speakers(turns: list[Turn]) -> None:
    dialogues = defaultdict(list)
    for turn in turns:
        dialogues[turn.audio.parent].append(turn)
    for inside in dialogues.values():
        inside.sort(key=lambda turn: turn.start_s)
        for before, after in pairwise(inside):
            assert before.end_s < after.start_s
            assert before.speaker != after.speaker


def test_a_large_corpus_has_each_scenario_on_both_sides(tmp_path: Path) -> None:
    write_demo_corpus(tmp_path / "large", utterances=700)
    turns = read(tmp_path / "large")
    assert len({turn.id for turn in turns}) == 700
    assert len({turn.audio.parent for turn in turns}) == 2 * 5 * len(SCENARIOS)


def test_the_scenario_predicts_some_valence_without_listening(turns: list[Turn]) -> None:
    valence = [floor(turns, session, dimension=0) for session in range(1, 6)]
    arousal = [floor(turns, session, dimension=1) for session in range(1, 6)]
    assert 0.3 < np.mean(valence) < 0.6
    assert 0.05 < np.mean(arousal) < 0.35


def floor(turns: list[Turn], session: int, dimension: int) -> float:
    """CCC of predicting a session by the other sessions' mean of the scenario."""
    elsewhere = defaultdict(list)
    for turn in turns:
        if turn.session != session:
            elsewhere[turn.scenario].append(turn.label[dimension])
    test = [turn for turn in turns if turn.session == session]
    predicted = [float(np.mean(elsewhere[turn.scenario])) for turn in test]
    return float(audmetric.concordance_cc([turn.label[dimension] for turn in test], predicted))


def test_the_previous_turn_adds_information_beyond_the_scenario(turns: list[Turn]) -> None:
    arousal = defaultdict(list)
    for turn in sorted(turns, key=lambda turn: turn.start_s):
        arousal[turn.audio.parent].append(turn.label[1])
    pairs = [pair for inside in arousal.values() for pair in pairwise(inside)]
    assert np.corrcoef(np.array(pairs).T)[0, 1] > 0.2


def test_the_tree_is_marked_as_synthetic(root: Path) -> None:
    assert json.loads((root / "SYNTHETIC.json").read_text())["synthetic"] is True
    assert "synthetic" in (root / "README.txt").read_text()


def test_a_second_call_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_demo_corpus(tmp_path / "corpus", utterances=40)
    monkeypatch.setattr(speech_synthesis.Synthesizer, "speak", None)
    write_demo_corpus(tmp_path / "corpus", utterances=40)


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    write_demo_corpus(tmp_path, utterances=40)
    assert len(read(tmp_path)) == 40


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not a demo corpus"):
        write_demo_corpus(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_demo_corpus_of_another_seed_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="seed 0, utterances 320"):
        write_demo_corpus(root, seed=1, utterances=320)


def test_a_demo_corpus_with_a_lost_file_is_refused(tmp_path: Path) -> None:
    write_demo_corpus(tmp_path / "corpus", utterances=40)
    next((tmp_path / "corpus").rglob("*.wav")).unlink()
    with pytest.raises(ConfigError, match="39 of 40 utterances"):
        write_demo_corpus(tmp_path / "corpus", utterances=40)


def test_too_few_utterances_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="utterances: 39"):
        write_demo_corpus(tmp_path / "corpus", utterances=39)


def test_without_the_wheel_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(demo, "synthesizer", speech_synthesis.Synthesizer)
    with pytest.raises(ConfigError, match=re.escape("pip install 'cvrunner[demo]'")):
        write_demo_corpus(tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_speech_does_not_depend_on_the_previous_sentence() -> None:
    voice = Voice("en-us", Timbre(120, 180), pitch_range=80)
    speaker = speech_synthesis.synthesizer()
    first = speaker.speak("Really, a very rare and early train.", voice)
    speaker.speak("Eine andere Sache.", Voice("de", Timbre(80, 120, (95, 95, 95))))
    assert np.array_equal(first, speaker.speak("Really, a very rare and early train.", voice))
    assert first.dtype == np.float32
    assert np.abs(first).max() <= 1


def test_an_unknown_language_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no language 'klingonese'"):
        speech_synthesis.synthesizer().speak("Hello.", Voice("klingonese", Timbre(120, 180)))


def test_the_voices_of_a_killed_process_are_removed_and_those_in_use_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = """import sys, time
from cvrunner.data.speech_synthesis import synthesizer
synthesizer(); print("ready", flush=True); time.sleep(60)"""
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        remove_stale_voices()
        assert len(list(tmp_path.glob("cvrunner-voices-*"))) == 1
        process.kill()
    remove_stale_voices()
    assert list(tmp_path.iterdir()) == []
