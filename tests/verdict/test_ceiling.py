"""One rater against the others, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cvrunner.data.folds import make_folds
from cvrunner.data.utterance import Corpus
from cvrunner.verdict.ccc import ccc
from cvrunner.verdict.ceiling import (
    ATTAINABLE,
    ATTAINABLE_STRETCHED,
    NO_RATERS,
    SECOND_PANEL,
    human_ceiling,
    label_noise,
    leave_one_rater_out,
    panel_of_raters,
    reliability,
)
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


# --- the panel --------------------------------------------------------------------------------------------------------

SHROUT_FLEISS = np.array(
    [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], dtype=np.float64
)
"""Six targets and four judges: table 2 of Shrout and Fleiss (1979), Psychological Bulletin 86, 420-428."""


def test_reliability_is_the_published_icc_1_k() -> None:
    # Their table 4: ICC(1,1) = .17 and ICC(1,4) = .44, from BMS 11.24 and WMS 6.26.
    assert reliability(SHROUT_FLEISS) == pytest.approx((11.24 - 6.26) / 11.24, abs=0.001)
    assert round(reliability(SHROUT_FLEISS), 2) == 0.44


def test_reliability_with_unequal_numbers_of_ratings_by_hand() -> None:
    # Means 2, 4, 5. Within: (1 + 1 + 0 + 0 + 0) / (1 + 2 + 0) = 2/3. Between: 7/3. Mean of 1/n: (1/2 + 1/3 + 1) / 3 =
    # 11/18. Noise 11/27, true 7/3 - 11/27 = 52/27, so the reliability is 52/63.
    nan = np.nan
    ratings = np.array([[1, 3, nan], [4, 4, 4], [nan, 5, nan]])
    assert reliability(ratings) == pytest.approx(52 / 63)
    assert label_noise(ratings) == pytest.approx((11 / 27) ** 0.5)


def test_raters_who_agree_by_chance_have_no_reliability_and_single_ratings_an_undefined_one() -> None:
    assert reliability(np.array([[1.0, 5.0], [5.0, 1.0], [3.0, 3.0]])) == 0
    assert np.isnan(reliability(np.array([[1.0, np.nan], [np.nan, 3.0]])))
    assert np.isnan(reliability(np.ones((3, 2))))


def simulated(raters: int, noise: float, turns: int = 200) -> tuple[Corpus, dict[str, float]]:
    """Return a corpus rated by noisy raters, and what raters would say on average, by utterance."""
    random, base, made, truth = np.random.default_rng(0), corpus(3, turns=turns), [], {}
    for u in base.utterances:
        truth[u.id] = float(random.normal())
        given = truth[u.id] + random.normal(0, noise, raters)
        made.append(
            replace(
                u, valence=float(given.mean()), raters={f"E{k}": (float(v), 1.0, None) for k, v in enumerate(given)}
            )
        )
    return replace(base, utterances=tuple(made)), truth


def test_a_perfect_model_and_a_second_panel_reach_what_is_attainable() -> None:
    some, truth = simulated(raters=3, noise=1.0)
    folds = make_folds(some, "leave_one_session_out")
    panel = panel_of_raters(folds, ("valence",))
    perfect, stretched, second = [], [], []
    random = np.random.default_rng(1)
    for fold in folds:
        label, said = (np.array([of(u) for u in fold.test]) for of in (lambda u: u.valence, lambda u: truth[u.id]))
        perfect.append(ccc(said, label))
        stretched.append(max(ccc(s * said, label) for s in np.arange(0.5, 2, 0.01)))
        second.append(ccc(said + random.normal(0, 1.0, (3, len(said))).mean(axis=0), label))
    # The population's values: R = 1 / (1 + 1/3).
    for kind, simulation, formula in (
        (ATTAINABLE, perfect, 6 / 7),
        (ATTAINABLE_STRETCHED, stretched, 0.75**0.5),
        (SECOND_PANEL, second, 0.75),
    ):
        assert panel.scores[kind]["valence"].mean == pytest.approx(np.mean(simulation), abs=0.02)
        assert panel.scores[kind]["valence"].mean == pytest.approx(formula, abs=0.02)
        assert panel.scores[kind]["valence"].low < formula < panel.scores[kind]["valence"].high
    assert panel.raters == pytest.approx(3)
    assert panel.label_noise["valence"] == pytest.approx(1 / 3**0.5, abs=0.02)


def test_the_interval_covers_the_reliability_of_panels_drawn_from_a_population_of_biased_raters() -> None:
    folds = make_folds(corpus(3, turns=30), "leave_one_session_out")
    random, within = np.random.default_rng(0), 0
    # Truth is 1 and -1 in turn: its variance, divided by n - 1, is 60/59 in a session of 60 utterances.
    expected = 1 / (1 + (0.5**2 + 0.7**2) / 6 / (60 / 59))
    for _ in range(60):
        biases = random.normal(0, 0.5, 6)
        rated = []
        for fold in folds:
            given = [(-1) ** u.turn + biases + random.normal(0, 0.7, 6) for u in fold.test]
            raters = [{f"E{k}": (float(v), None, None) for k, v in enumerate(of)} for of in given]
            rated.append(
                replace(fold, test=tuple(replace(u, raters=r) for u, r in zip(fold.test, raters, strict=True)))
            )
        score = panel_of_raters(rated, ("valence",)).scores[SECOND_PANEL]["valence"]
        within += score.low <= expected <= score.high
    # 95 % of 60, less three standard deviations.
    assert 52 <= within <= 60


def test_two_raters_give_no_interval() -> None:
    two = panel_of_raters(make_folds(simulated(2, 0.7, turns=20)[0], "leave_one_session_out"), ("valence",))
    assert two.interval_reason == "an interval over raters needs 3 raters, not 2"
    assert two.scores[SECOND_PANEL]["valence"].low is None
    assert two.scores[SECOND_PANEL]["valence"].mean is not None


def test_a_dimension_without_ratings_is_undefined_next_to_one_that_has_them() -> None:
    panel = panel_of_raters(
        make_folds(simulated(3, 1.0, turns=8)[0], "leave_one_session_out"), ("valence", "dominance")
    )
    assert panel.scores[SECOND_PANEL]["dominance"].mean is None
    assert panel.scores[SECOND_PANEL]["valence"].mean is not None
    assert panel.label_noise["dominance"] is None


def test_without_two_ratings_of_anything_there_is_no_panel() -> None:
    assert panel_of_raters(make_folds(corpus(), "leave_one_session_out"), ("valence",)) is None
