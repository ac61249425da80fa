"""The bootstrap against an independent oracle, and against the truth in simulated experiments."""

from __future__ import annotations

import warnings

import audmetric
import numpy as np
import pytest

from cvrunner.records.results import SignCount
from cvrunner.verdict.statistics import (
    Paired,
    ccc_of_moments,
    corrected_t,
    paired_bootstrap,
    sign_count,
)

SESSIONS, DIALOGUES, TURNS = 5, 12, 20


def moments(prediction, truth):
    columns = np.stack([np.ones_like(truth), prediction, truth, prediction**2, truth**2, prediction * truth])
    return columns.sum(axis=1)


def paired(baseline, other, truth, fold, dialogue):
    return Paired(baseline, other, truth, fold, np.array([f"S{f}" for f in fold]), dialogue)


def simulated(random, other_noise=0.7, dialogues=DIALOGUES):
    """One made-up experiment: errors of both conditions share a part within each dialogue."""
    fold = np.repeat(np.arange(SESSIONS), dialogues * TURNS)
    dialogue = np.repeat(np.arange(SESSIONS * dialogues), TURNS)

    def by_dialogue(scale):
        return np.repeat(random.normal(0, scale, SESSIONS * dialogues), TURNS)

    def noise(scale):
        return random.normal(0, scale, len(fold))

    truth = by_dialogue(0.8) + noise(0.6)
    baseline = 0.7 * truth + by_dialogue(0.7) + noise(0.5)
    other = 0.7 * truth + by_dialogue(other_noise) + noise(0.5)
    return paired(baseline[None, :, None], other[None, :, None], truth[:, None], fold, dialogue)


def test_ccc_of_moments_is_audmetrics_ccc_on_resampled_data():
    random = np.random.default_rng(0)
    for _ in range(20):
        truth = random.normal(0, 1, 60)
        prediction = 0.5 * truth + random.normal(0.3, 0.8, 60)
        rows = random.integers(0, 60, 60)
        expected = audmetric.concordance_cc(truth[rows], prediction[rows])
        assert ccc_of_moments(moments(prediction[rows], truth[rows])) == pytest.approx(expected, abs=1e-12)


def test_large_values_do_not_cancel():
    random = np.random.default_rng(1)
    data = simulated(random)
    far = paired(data.baseline + 1e6, data.other + 1e6, data.truth + 1e6, data.fold, data.dialogue)
    near = paired_bootstrap(data, resamples=50)
    assert paired_bootstrap(far, resamples=50).fold_mean == pytest.approx(near.fold_mean, abs=1e-8)


def test_a_resample_is_the_ccc_difference_of_the_drawn_dialogues():
    # Of two dialogues one is drawn, so each resample of one session must be one dialogue's own difference.
    random = np.random.default_rng(2)
    truth = random.normal(0, 1, (40, 1))
    baseline, other = truth + random.normal(0, 1, (1, 40, 1)), truth + random.normal(0, 0.5, (1, 40, 1))
    dialogue = np.repeat(["a", "b"], 20)
    data = paired(baseline, other, truth, np.ones(40, dtype=int), dialogue)
    expected = [
        audmetric.concordance_cc(truth[rows, 0], other[0, rows, 0])
        - audmetric.concordance_cc(truth[rows, 0], baseline[0, rows, 0])
        for rows in (dialogue == "a", dialogue == "b")
    ]
    found = paired_bootstrap(data, resamples=50)
    assert sorted(set(found.fold_mean[:, 0].round(9))) == pytest.approx(sorted(expected), abs=1e-8)
    assert found.pooled == pytest.approx(found.fold_mean)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    data = simulated(np.random.default_rng(3))
    one, same, other = (paired_bootstrap(data, 200, seed=s).interval(0) for s in (7, 7, 8))
    assert one == same
    assert one != other


def test_equal_conditions_differ_by_exactly_nothing():
    data = simulated(np.random.default_rng(4))
    same = paired(data.baseline, data.baseline, data.truth, data.fold, data.dialogue)
    interval = paired_bootstrap(same, 100).interval(-1)
    assert interval is not None
    assert (interval.low, interval.high, interval.detectable) == (0, 0, 0)


def test_seeds_are_averaged_within_a_resample():
    data = simulated(np.random.default_rng(5))
    swapped = paired(
        np.concatenate([data.baseline, data.other]),
        np.concatenate([data.other, data.baseline]),
        data.truth,
        data.fold,
        data.dialogue,
    )
    assert paired_bootstrap(swapped, 100).fold_mean == pytest.approx(0, abs=1e-12)


def coverage(pooled, utterance_wise, experiments=300):
    """In how many of the experiments the interval holds the difference of the whole population."""
    population = simulated(np.random.default_rng(99), other_noise=0.4, dialogues=4000)
    rows = population.fold == 0
    truth = audmetric.concordance_cc(population.truth[rows, 0], population.other[0, rows, 0])
    truth -= audmetric.concordance_cc(population.truth[rows, 0], population.baseline[0, rows, 0])
    random, inside = np.random.default_rng(6), 0
    for experiment in range(experiments):
        data = simulated(random, other_noise=0.4)
        if utterance_wise:
            data = paired(data.baseline, data.other, data.truth, data.fold, np.arange(len(data.fold)))
        interval = paired_bootstrap(data, 400, seed=experiment).interval(0, pooled)
        assert interval is not None
        inside += interval.low <= truth <= interval.high
    return inside / experiments


@pytest.mark.parametrize("pooled", [False, True])
def test_intervals_over_dialogues_cover_the_truth_about_as_often_as_they_say(pooled):
    assert 0.90 <= coverage(pooled, utterance_wise=False) <= 0.985


def test_intervals_over_utterances_fail_the_same_test():
    assert coverage(pooled=False, utterance_wise=True, experiments=60) < 0.7


def test_missing_labels_do_not_count():
    data = simulated(np.random.default_rng(8))
    half = data.truth.copy()
    half[::2] = np.nan
    known = ~np.isnan(half[:, 0])
    kept = paired(data.baseline[:, known], data.other[:, known], half[known], data.fold[known], data.dialogue[known])
    with_gaps = paired(data.baseline, data.other, half, data.fold, data.dialogue)
    assert paired_bootstrap(with_gaps, 50).pooled == pytest.approx(paired_bootstrap(kept, 50).pooled)


def test_a_session_with_a_single_dialogue_has_no_interval_and_says_why():
    truth = np.arange(6.0)[:, None]
    data = paired(truth[None], truth[None], truth, np.ones(6, dtype=int), np.repeat("only", 6))
    found = paired_bootstrap(data, 10)
    assert found.interval(0) is None
    assert found.reason == "session S1 has a single dialogue in its test set"


def test_a_ccc_that_is_undefined_in_most_resamples_has_no_interval():
    truth = np.repeat([1.0, 1.0, 2.0], 4)[:, None]
    data = paired(truth[None], truth[None], truth, np.ones(12, dtype=int), np.repeat(["a", "b", "c"], 4))
    assert paired_bootstrap(data, 500).interval(0) is None


def test_a_corpus_of_the_size_of_iemocap_has_an_interval():
    random = np.random.default_rng(9)
    truth = random.normal(size=(10_000, 3))
    predicted = truth + random.normal(size=(2, 1, 10_000, 3))
    fold = np.repeat(np.arange(5), 2000)
    found = paired_bootstrap(paired(predicted[0], predicted[1], truth, fold, np.arange(10_000) // 66), 2000)
    assert found.interval(0) is not None


def test_corrected_t_is_wider_than_the_plain_one():
    found = corrected_t(np.array([0.01, 0.03, 0.02, 0.04, 0.05]), 1 / 3)
    # mean 0.03, variance 0.00025: 0.03 / sqrt((1/5 + 1/3) * 0.00025), four degrees of freedom.
    assert found.t == pytest.approx(2.598, abs=1e-3)
    assert found.p == pytest.approx(0.0602, abs=1e-3)


@pytest.mark.parametrize("values", [[0.1], [0.1, 0.1], [0.1, float("nan")]])
def test_corrected_t_is_none_where_it_has_no_meaning(values):
    assert corrected_t(np.array(values), 0.3) is None


def test_five_folds_cannot_go_below_one_in_sixteen():
    five = sign_count(np.full(5, 0.1))
    assert (five.above, five.below, five.p, five.smallest_p) == (5, 0, pytest.approx(0.0625), pytest.approx(0.0625))
    assert sign_count(np.array([0.1, -0.1, 0.0])) == SignCount(above=1, below=1, p=1.0, smallest_p=0.25)
    assert sign_count(np.zeros(3)) == SignCount(above=0, below=0, p=1.0, smallest_p=0.25)


def test_no_warning_for_constant_predictions():
    data = simulated(np.random.default_rng(10))
    collapsed = paired(np.full_like(data.baseline, 3.3), data.other, data.truth, data.fold, data.dialogue)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paired_bootstrap(collapsed, 50).interval(0) is not None
