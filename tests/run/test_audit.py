"""The audit of a corpus: its numbers, and the text they come out as."""

from __future__ import annotations

from dataclasses import replace

from cvrunner.config.schema import Config
from cvrunner.data.folds import make_folds, split_digest
from cvrunner.data.utterance import Corpus
from cvrunner.run.audit import AuditReport, audit, render
from cvrunner.text import DASH
from tests.corpora import corpus, utterance

CONFIG = Config()


def audited(some: Corpus) -> AuditReport:
    return audit(some, make_folds(some, "leave_one_session_out"), CONFIG)


def test_sizes_by_session() -> None:
    first = audited(corpus(samples=48_000)).sessions[0]
    assert (first.session, first.utterances, first.minutes, first.dialogues) == ("Ses01", 8, 0.4, 2)
    assert (first.speakers, first.improvised, first.scripted) == ({"F": 1, "M": 1}, 4, 4)


def test_speakers_without_gender_are_counted_as_such() -> None:
    unnamed = audited(corpus(gender=None, improvised=None))
    assert unnamed.sessions[0].speakers == {"?": 2}
    text = render(unnamed)
    assert "?" not in text
    assert "improvised" not in text


def test_label_means_and_values_outside_the_scale() -> None:
    some = corpus(valence=2.0)
    labels = audited(replace(some, utterances=(replace(some.utterances[0], valence=5.5), *some.utterances[1:]))).labels[
        0
    ]
    assert (labels.dimension, labels.outside_scale) == ("valence", 1)
    assert labels.mean == 2 + 3.5 / 40
    assert round(labels.std, 4) == 0.5534


def test_durations() -> None:
    lengths = [8_000, 16_000, 32_000, 250_000]
    some = [replace(u, samples=lengths[i % 4]) for i, u in enumerate(corpus(3, ("F_impro01",), 4).utterances)]
    durations = audited(Corpus(tuple(some), "tiny", "header")).durations
    assert (durations.shortest_s, durations.median_s, durations.longest_s) == (0.5, 1.5, 15.625)
    assert (durations.below_1_s, durations.above_15_s) == (3, 3)


def test_folds_and_digest() -> None:
    some = corpus()
    report = audited(some)
    assert report.split_digest == split_digest(make_folds(some, "leave_one_session_out"))
    assert report.folds[4].sessions["validation"] == ("Ses01",)
    assert report.folds[4].utterances == {"train": 24, "validation": 8, "test": 8}


def test_text_shows_every_section() -> None:
    text = render(audited(replace(corpus(), warnings=("something: 3 (first: here)",))))
    assert text.startswith("tiny (40 utterances")
    rows = [line.split() for line in text.splitlines()]
    assert ["session", "utterances", "minutes", "speakers", "dialogues", "improvised", "scripted"] in rows
    assert ["Ses01", "8", "0.1", "1F", "1M", "2", "4", "4"] in rows
    assert ["1", "24", "(Ses03", "Ses04", "Ses05)", "8", "(Ses02)", "8", "(Ses01)"] in rows
    lines = [line.strip() for line in text.splitlines()]
    assert "something: 3 (first: here)" in lines
    assert any(line.startswith("Leaks: none") for line in lines)
    assert "No-audio floor by scenario (CCC)" in lines
    assert "No-audio floor by scenario+gender+side (stretched) (CCC)" in lines
    assert text.endswith("\n")


def test_text_lists_leaks() -> None:
    some = corpus(3)
    leaky = (replace(some.utterances[0], speaker="03F"), *some.utterances[1:])
    text = render(audited(replace(some, utterances=leaky)))
    assert "LEAKS: 3\n  fold 1: speaker 03F is in train and in test" in text


def test_text_says_why_there_is_no_floor() -> None:
    text = render(audited(corpus(scenario=None)))
    assert "No-audio floor: none, the corpus names no scenarios" in text


def test_text_shows_a_dash_for_an_undefined_score() -> None:
    some = [utterance(f"Ses0{session}F_impro01_F000", valence=1.0 + session, arousal=2.0) for session in range(1, 4)]
    text = render(audited(Corpus(tuple(some), "one each", "header")))
    assert any(line.split()[:2] == ["fold", "1"] and DASH in line for line in text.splitlines())


def test_a_session_with_few_clusters_is_a_warning() -> None:
    few = audited(corpus(sessions=3, turns=6))
    assert any(line.startswith("sessions with fewer than 5 dialogues: Ses01 2, Ses02 2") for line in few.warnings)
    many = corpus(sessions=3, turns=6)
    spread = [replace(u, dialogue=f"{u.session}-{i % 6}") for i, u in enumerate(many.utterances)]
    assert not any("fewer than 5" in line for line in audited(replace(many, utterances=tuple(spread))).warnings)
