"""Leave-one-session-out for any corpus, the split of a manifest, the digest, and leaks."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import LeaveOneGroupOut

from cvrunner.data.folds import Fold, Scheme, check_leaks, find_leaks, make_folds, split_digest, split_table
from cvrunner.data.utterance import Corpus, Utterance
from cvrunner.errors import CorpusError, LeakError
from tests.corpora import corpus, utterance

LOSO: Scheme = "leave_one_session_out"
property_of = settings(max_examples=60, deadline=None)


@st.composite
def corpora(draw: st.DrawFn) -> Corpus:
    """3 to 12 sessions of uneven size, in any order."""
    found = [
        utterance(f"Ses{session:02}F_impro{dialogue:02}_{draw(st.sampled_from('FM'))}{turn:03}")
        for session in draw(st.sets(st.integers(1, 99), min_size=3, max_size=12))
        for dialogue in range(1, draw(st.integers(1, 3)) + 1)
        for turn in range(draw(st.integers(1, 4)))
    ]
    return Corpus(tuple(draw(st.permutations(found))), "any", "header")


@property_of
@given(corpora())
def test_every_utterance_is_tested_exactly_once(some: Corpus) -> None:
    tested = sorted(u.id for fold in make_folds(some, LOSO) for u in fold.test)
    assert tested == sorted(u.id for u in some.utterances)


@property_of
@given(corpora())
def test_parts_are_disjoint_and_hold_everyone(some: Corpus) -> None:
    folds = make_folds(some, LOSO)
    check_leaks(folds)
    for fold in folds:
        assert sum(map(len, fold.parts.values())) == len(some.utterances)
        for one, other in combinations(fold.parts.values(), 2):
            for what in ("session", "speaker", "dialogue", "id"):
                assert not {getattr(u, what) for u in one} & {getattr(u, what) for u in other}


@property_of
@given(corpora())
def test_validation_is_the_next_session_in_a_circle(some: Corpus) -> None:
    folds, sessions = make_folds(some, LOSO), some.sessions
    assert [fold.number for fold in folds] == list(range(1, len(sessions) + 1))
    for index, fold in enumerate(folds):
        assert fold.sessions["test"] == (sessions[index],)
        assert fold.sessions["validation"] == (sessions[(index + 1) % len(sessions)],)
        assert set(fold.sessions["train"]) == set(sessions) - {*fold.sessions["test"], *fold.sessions["validation"]}


@property_of
@given(corpora())
def test_test_parts_equal_those_of_scikit_learn(some: Corpus) -> None:
    groups = [u.session for u in some.utterances]
    theirs = LeaveOneGroupOut().split(np.zeros(len(groups)), groups=groups)
    for fold, (_, test) in zip(make_folds(some, LOSO), theirs, strict=True):
        assert fold.test == tuple(some.utterances[index] for index in test)


@property_of
@given(corpora(), st.randoms(use_true_random=False))
def test_digest_ignores_the_order_of_utterances(some: Corpus, order: random.Random) -> None:
    shuffled = order.sample(some.utterances, len(some.utterances))
    again = make_folds(replace(some, utterances=tuple(shuffled)), LOSO)
    assert split_digest(again) == split_digest(make_folds(some, LOSO))


@property_of
@given(corpora(), st.data())
def test_digest_changes_with_any_move(some: Corpus, data: st.DataObject) -> None:
    folds = list(make_folds(some, LOSO))
    before = split_digest(folds)
    index = data.draw(st.integers(0, len(folds) - 1))
    source, target = data.draw(st.permutations(["train", "validation", "test"]))[:2]
    fold = folds[index]
    moved = data.draw(st.sampled_from(fold.parts[source]))
    folds[index] = _with_parts(
        fold,
        **{
            source: tuple(u for u in fold.parts[source] if u is not moved),
            target: (*fold.parts[target], moved),
        },
    )
    assert split_digest(folds) != before


def _with_parts(fold: Fold, **parts: tuple[Utterance, ...]) -> Fold:
    merged = {**fold.parts, **parts}
    return Fold(fold.number, merged["train"], merged["validation"], merged["test"])


def test_digest_changes_when_an_utterance_is_left_out() -> None:
    some = corpus()
    fewer = replace(some, utterances=some.utterances[1:])
    assert split_digest(make_folds(some, LOSO)) != split_digest(make_folds(fewer, LOSO))


def test_sessions_are_numbered_by_value() -> None:
    some = Corpus(tuple(utterance(f"Ses0{n}F_impro01_F000", session=str(n + 7)) for n in range(1, 5)), "four", "header")
    assert [fold.sessions["test"] for fold in make_folds(some, LOSO)] == [("8",), ("9",), ("10",), ("11",)]


@pytest.mark.parametrize(("sessions", "count"), [(0, "0 sessions"), (1, "1 session "), (2, "2 sessions")])
def test_fewer_than_three_sessions_are_refused(sessions: int, count: str) -> None:
    with pytest.raises(CorpusError, match=rf"has {count}.* needs three or more"):
        make_folds(corpus(sessions), LOSO)


def test_manifest_split_is_one_fold_with_the_parts_of_the_corpus() -> None:
    parts = ("train", "train", "train", "validation", "test")
    some = corpus()
    own = [replace(u, part=parts[int(u.session[3:]) - 1]) for u in some.utterances]
    (fold,) = make_folds(replace(some, utterances=tuple(own)), "manifest_split")
    assert (fold.number, len(fold.train), len(fold.validation), len(fold.test)) == (1, 24, 8, 8)
    assert fold.sessions["validation"] == ("Ses04",)
    check_leaks([fold])


def test_manifest_split_without_a_part_is_refused() -> None:
    with pytest.raises(CorpusError, match="no utterance has train or validation or test"):
        make_folds(corpus(), "manifest_split")
    with pytest.raises(CorpusError, match=r"no utterance has validation or test$"):
        make_folds(corpus(part="train"), "manifest_split")


def test_split_table_is_json_and_names_every_utterance() -> None:
    folds = make_folds(corpus(), LOSO)
    table = json.loads(json.dumps(split_table(folds)))
    assert table["digest"] == split_digest(folds)
    first = table["folds"][0]
    assert first["fold"] == 1
    assert first["test"]["sessions"] == ["Ses01"]
    assert first["train"]["sessions"] == ["Ses03", "Ses04", "Ses05"]
    assert first["test"]["utterances"] == sorted(u.id for u in folds[0].test)


# --- leaks -------------------------------------------------------------------------------------------


def leaks_with(**changes: object) -> list[str]:
    """Return the leaks after the first utterance of session 3 gets attributes of session 1."""
    some = corpus(3)
    index = next(i for i, u in enumerate(some.utterances) if u.session == "Ses03")
    changed = [*some.utterances]
    changed[index] = replace(changed[index], **changes)  # type: ignore[arg-type]
    folds = make_folds(replace(some, utterances=tuple(changed)), LOSO)
    found = find_leaks(folds)
    with pytest.raises(LeakError) as caught:
        check_leaks(folds)
    assert caught.value.problems == found
    return found


def test_a_sound_corpus_has_no_leak() -> None:
    assert find_leaks(make_folds(corpus(), LOSO)) == []


def test_a_shared_speaker_is_reported_for_every_fold() -> None:
    assert leaks_with(speaker="01F") == [
        "fold 1: speaker 01F is in train and in test",
        "fold 2: speaker 01F is in train and in validation",
        "fold 3: speaker 01F is in validation and in test",
    ]


def test_a_shared_dialogue_is_reported() -> None:
    assert leaks_with(dialogue="Ses01F_impro01")[0] == "fold 1: dialogue Ses01F_impro01 is in train and in test"


def test_a_shared_utterance_is_reported() -> None:
    assert leaks_with(id="Ses01F_impro01_F000")[0] == "fold 1: utterance Ses01F_impro01_F000 is in train and in test"


def test_the_same_audio_under_two_names_is_reported() -> None:
    twin = utterance("Ses01F_impro01_M001").audio_digest
    assert leaks_with(audio_digest=twin)[0] == (
        "fold 1: Ses03F_impro01_F000 (train) and Ses01F_impro01_M001 (test) are the same audio"
    )


def test_every_leak_is_listed_at_once() -> None:
    found = leaks_with(speaker="01F", dialogue="Ses01F_impro01")
    assert len(found) == 6
