"""One rater against the others, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cvrunner.data.folds import make_folds
from cvrunner.verdict.ceiling import NO_RATERS, human_ceiling, leave_one_rater_out
from tests.corpora import corpus, utterance


def rated(name="Ses01F_impro01_F000", **raters):
    return utterance(name, raters=raters)


def test_each_observer_is_held_against_the_mean_of_the_others():
    utterances = [rated(E1=(1.0, 5.0, None), E2=(2.0, 4.0, None), E3=(4.0, 3.0, None))]
    pairs = leave_one_rater_out(utterances, "valence")
    assert pairs.tolist() == [[1.0, 3.0], [2.0, 2.5], [4.0, 1.5]]


def test_self_reports_single_ratings_and_missing_values_do_not_count():
    utterances = [
        rated(E1=(1.0, 2.0, None), F1=(5.0, 5.0, 5.0)),
        rated(E1=(3.0, 2.0, 1.0), E2=(2.0, 2.0, None), M1=(5.0, 5.0, 5.0)),
    ]
    assert leave_one_rater_out(utterances, "valence").tolist() == [[3.0, 2.0], [2.0, 3.0]]
    assert leave_one_rater_out(utterances, "dominance").shape == (0, 2)


def test_the_ceiling_of_a_fold_is_the_ccc_computed_by_hand():
    # Two utterances with two observers each give the pairs (1, 2), (2, 1), (4, 5), (5, 4): both columns have mean 3 and
    # variance (4 + 1 + 1 + 4) / 4 = 2.5, their covariance is (2 + 2 + 2 + 2) / 4 = 2, so the CCC is 2 * 2 / 5 = 0.8.
    # Arousal agrees and varies: 1.
    low, high = {"E1": (1.0, 1.0, None), "E2": (2.0, 1.0, None)}, {"E1": (4.0, 3.0, None), "E2": (5.0, 3.0, None)}
    base = corpus(sessions=3, turns=2)
    made = [
        utterance(u.id, raters=low if u.turn == 0 else high) for u in base.utterances if u.dialogue.endswith("impro01")
    ]
    folds = make_folds(type(base)(tuple(made), base.name, base.labels), "leave_one_session_out")
    ceiling = human_ceiling(folds, ("valence", "arousal"))
    for scores in (*ceiling.by_fold.values(), ceiling.mean, ceiling.pooled):
        assert scores == pytest.approx({"valence": 0.8, "arousal": 1.0, "avg": 0.9})
    assert ceiling.reason is None


def test_a_fold_without_ratings_leaves_no_mean_over_folds():
    rating = {"E1": (1.0, 2.0, None), "E2": (2.0, 3.0, None)}
    base = corpus(sessions=3)
    made = [utterance(u.id, raters={} if u.session == "Ses02" else rating) for u in base.utterances]
    folds = make_folds(type(base)(tuple(made), base.name, base.labels), "leave_one_session_out")
    ceiling = human_ceiling(folds, ("valence",))
    assert ceiling.mean == {"valence": None, "avg": None}
    assert ceiling.by_fold[2]["valence"] is None
    assert ceiling.pooled["valence"] is not None


def test_a_corpus_without_raters_has_a_reason_instead():
    ceiling = human_ceiling(make_folds(corpus(), "leave_one_session_out"), ("valence", "arousal"))
    assert ceiling.reason == NO_RATERS
    assert set(ceiling.mean.values()) == set(ceiling.pooled.values()) == {None}


def test_more_noise_in_the_raters_lowers_the_ceiling():
    def ceiling(noise):
        random = np.random.default_rng(0)
        base = corpus(turns=40)
        made = [
            utterance(u.id, raters={f"E{k}": (u.valence + random.normal(0, noise), 1.0, None) for k in range(3)})
            for u in base.utterances
        ]
        folds = make_folds(type(base)(tuple(made), base.name, base.labels), "leave_one_session_out")
        return human_ceiling(folds, ("valence",)).mean["valence"]

    assert 1 > ceiling(0.2) > ceiling(0.8) > 0
