"""Who may score what on another corpus: never a model that met the speaker or the recording."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cvrunner.data.folds import Fold, make_folds
from cvrunner.data.utterance import Utterance
from cvrunner.verdict.levels import speakers_level
from cvrunner.verdict.statistics import Compared, bootstrap
from cvrunner.verdict.transfer import Known, find_overlap, floor_elsewhere, may_score
from tests.corpora import DIMENSIONS, corpus

OWN = corpus(sessions=3)
KNOWN = {u.id: Known(u.speaker, u.audio_digest) for u in OWN.utterances}
FOLDS = {
    fold.number: {u.id for u in (*fold.train, *fold.validation)} for fold in make_folds(OWN, "leave_one_session_out")
}


def others(**changes: object) -> tuple[Utterance, ...]:
    """The same speakers with other recordings."""
    return tuple(replace(u, id=f"other_{u.id}", audio_digest=f"x{u.id}", **changes) for u in OWN.utterances)  # type: ignore[arg-type]


@pytest.mark.parametrize("fold", FOLDS)
def test_a_fold_scores_only_the_speakers_that_it_tested(fold: int) -> None:
    overlap = find_overlap(KNOWN, others(), speakers_differ=False)
    scored = may_score(others(), overlap, KNOWN, FOLDS[fold], whole_dialogues=False)
    assert {u.session for u in scored} == {f"Ses0{fold}"}
    assert len(scored) == 8


@pytest.mark.parametrize("name", ["1f", "01f", "01F ", "0001F", "０１F"])
def test_speakers_are_the_same_however_their_name_is_spelled(name: str) -> None:
    overlap = find_overlap(KNOWN, others(speaker=name), speakers_differ=False)
    assert overlap.speakers == {name: ["01F"]}
    assert may_score(others(speaker=name), overlap, KNOWN, FOLDS[2], whole_dialogues=False) == ()
    assert len(may_score(others(speaker=name), overlap, KNOWN, FOLDS[1], whole_dialogues=False)) == len(OWN.utterances)


def test_one_equal_recording_makes_two_names_one_person_also_if_names_differ_by_declaration() -> None:
    first, *rest = others(speaker="somebody")
    twin = replace(first, audio_digest=OWN.utterances[0].audio_digest)
    overlap = find_overlap(KNOWN, [twin, *rest], speakers_differ=True)
    assert overlap.audio == {first.id: [OWN.utterances[0].id]}
    assert overlap.speakers == {"somebody": [OWN.utterances[0].speaker]}
    assert may_score([twin, *rest], overlap, KNOWN, FOLDS[2], whole_dialogues=False) == ()


def test_a_model_of_dialogues_scores_a_dialogue_only_if_all_its_speakers_are_new() -> None:
    # In each dialogue of session 1 one of two speakers is unknown.
    mixed = [replace(u, speaker="new") if u.speaker.endswith("M") else u for u in others()]
    overlap = find_overlap(KNOWN, mixed, speakers_differ=False)
    by_turn = may_score(mixed, overlap, KNOWN, FOLDS[1], whole_dialogues=False)
    whole = may_score(mixed, overlap, KNOWN, FOLDS[1], whole_dialogues=True)
    assert {u.session for u in by_turn} == {"Ses01", "Ses02", "Ses03"}
    assert {u.session for u in whole} == {"Ses01"}


def test_the_floor_of_a_session_comes_from_the_labels_of_the_other_sessions() -> None:
    parts = [Fold(number, (), (), OWN.utterances[: 8 * number]) for number in (1, 3)]
    record, predicted = floor_elsewhere(OWN, parts, DIMENSIONS)
    assert record.reason is None
    assert predicted["scenario"].shape == (8 + 24, 2)
    first = OWN.utterances[0]
    same = [u.valence for u in OWN.utterances if u.scenario == first.scenario and u.session != first.session]
    assert predicted["scenario"][0, 0] == pytest.approx(np.mean(same))
    assert np.array_equal(predicted["scenario"][:8], predicted["scenario"][8:16])


def test_folds_with_the_same_test_get_the_same_draws() -> None:
    random = np.random.default_rng(0)
    truth, clusters = random.normal(size=(40, 2)), np.repeat(np.arange(10), 4)
    predicted = truth + random.normal(size=(1, 40, 2))
    one = bootstrap(Compared({"a": predicted}, truth, np.ones(40), np.ones(40), clusters), "dialogue")
    twice = Compared(
        {"a": np.tile(predicted, (1, 2, 1))},
        np.tile(truth, (2, 1)),
        np.repeat([1, 2], 40),
        np.ones(80),
        np.tile(clusters, 2),
        folds_share_test=True,
    )
    both = bootstrap(twice, "dialogue")
    # A second fold of equal predictions adds no information, so the spread must not shrink.
    assert both.ccc["a"] == pytest.approx(one.ccc["a"])
    assert (both.clusters, both.df) == (one.clusters, one.df) == (10, 9)


def test_what_all_sessions_share_widens_the_interval_for_new_speakers() -> None:
    differences = np.array([0.01, 0.03, 0.05])
    plain, wider = speakers_level(differences, 0.0, 0.02), speakers_level(differences, 0.0, 0.02, 1, (0.0004, 4))
    assert plain is not None
    assert wider is not None
    error = np.sqrt(differences.var(ddof=1) / 3 + 0.0004)
    assert wider.t == pytest.approx(0.03 / error)
    assert plain.t == pytest.approx(0.03 / np.sqrt(differences.var(ddof=1) / 3))
