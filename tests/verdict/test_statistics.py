"""The bootstrap against an independent oracle, and against the truth in simulated experiments."""

from __future__ import annotations

import warnings

import audmetric
import numpy as np
import pytest

from cvrunner.verdict.statistics import Compared, bootstrap, ccc_of_sums

SESSIONS, DIALOGUES, TURNS = 5, 12, 20


def sums(prediction, truth):
    columns = np.stack([np.ones_like(truth), prediction, truth, prediction**2, truth**2, prediction * truth])
    return columns.sum(axis=1)


def compared(baseline, other, truth, fold, dialogue):
    """Two conditions `[S, N, K]`; each fold tests one session."""
    return Compared({"baseline": baseline, "other": other}, truth, fold, np.array([f"S{f}" for f in fold]), dialogue)


def drawn(data, resamples=200, seed=0):
    """The resampled differences `[R, K + 1]` of the two conditions."""
    found = bootstrap(data, "dialogue", resamples, seed)
    return (found.ccc["other"] - found.ccc["baseline"]).mean(axis=1)


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
    return compared(baseline[None, :, None], other[None, :, None], truth[:, None], fold, dialogue)


def test_ccc_of_sums_is_audmetrics_ccc_on_resampled_data():
    random = np.random.default_rng(0)
    for _ in range(20):
        truth = random.normal(0, 1, 60)
        prediction = 0.5 * truth + random.normal(0.3, 0.8, 60)
        rows = random.integers(0, 60, 60)
        expected = audmetric.concordance_cc(truth[rows], prediction[rows])
        assert ccc_of_sums(sums(prediction[rows], truth[rows])) == pytest.approx(expected, abs=1e-12)


def test_large_values_do_not_cancel():
    data = simulated(np.random.default_rng(1))
    one, other = data.predicted["baseline"], data.predicted["other"]
    far = compared(one + 1e6, other + 1e6, data.truth + 1e6, data.fold, data.cluster)
    assert drawn(far, 50) == pytest.approx(drawn(data, 50), abs=1e-8)


def test_a_resample_is_the_ccc_difference_of_the_drawn_dialogues():
    # Of two dialogues one is drawn, so each resample of one session must be one dialogue's own difference.
    random = np.random.default_rng(2)
    truth = random.normal(0, 1, (40, 1))
    baseline, other = truth + random.normal(0, 1, (1, 40, 1)), truth + random.normal(0, 0.5, (1, 40, 1))
    dialogue = np.repeat(["a", "b"], 20)
    expected = [
        audmetric.concordance_cc(truth[rows, 0], other[0, rows, 0])
        - audmetric.concordance_cc(truth[rows, 0], baseline[0, rows, 0])
        for rows in (dialogue == "a", dialogue == "b")
    ]
    found = drawn(compared(baseline, other, truth, np.ones(40, dtype=int), dialogue), 50)
    assert sorted(set(found[:, 0].round(9))) == pytest.approx(sorted(expected), abs=1e-8)


def test_the_same_seed_gives_the_same_draws_and_another_seed_others():
    data = simulated(np.random.default_rng(3))
    one, same, other = (drawn(data, seed=s) for s in (7, 7, 8))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_equal_conditions_differ_by_exactly_nothing():
    data = simulated(np.random.default_rng(4))
    one = data.predicted["baseline"]
    assert np.all(drawn(compared(one, one, data.truth, data.fold, data.cluster)) == 0)


def test_ccc_is_averaged_over_seeds_within_a_resample():
    data = simulated(np.random.default_rng(5))
    one, other = data.predicted["baseline"], data.predicted["other"]
    both = compared(np.concatenate([one, other]), np.concatenate([other, one]), data.truth, data.fold, data.cluster)
    assert drawn(both) == pytest.approx(0, abs=1e-12)


def test_a_predictor_without_seeds_shares_the_draws_of_the_others():
    data = simulated(np.random.default_rng(5))
    one, other = data.predicted["baseline"], data.predicted["other"]
    twice = compared(np.concatenate([one, one]), other, data.truth, data.fold, data.cluster)
    assert drawn(twice) == pytest.approx(drawn(data), abs=1e-12)


@pytest.mark.parametrize("by_dialogue", [True, False])
def test_the_standard_error_over_dialogues_is_that_of_repeated_experiments(by_dialogue):
    random = np.random.default_rng(6)
    found, errors = [], []
    for _ in range(150):
        data = simulated(random)
        if not by_dialogue:
            one, other = data.predicted["baseline"], data.predicted["other"]
            data = compared(one, other, data.truth, data.fold, np.arange(len(data.fold)))
        draws = drawn(data, 100)[:, 0]
        errors.append(draws.std(ddof=1))
        found.append(draws.mean())
    ratio = np.mean(errors) / np.std(found)
    # Utterances as clusters: as if those of a dialogue were independent, the error is far too small.
    assert (0.85 < ratio < 1.15) if by_dialogue else (ratio < 0.6)


def test_missing_labels_do_not_count():
    data = simulated(np.random.default_rng(8))
    one, other = data.predicted["baseline"], data.predicted["other"]
    half = data.truth.copy()
    half[::2] = np.nan
    known = ~np.isnan(half[:, 0])
    kept = compared(one[:, known], other[:, known], half[known], data.fold[known], data.cluster[known])
    with_gaps = compared(one, other, half, data.fold, data.cluster)
    assert drawn(with_gaps, 50) == pytest.approx(drawn(kept, 50))


def test_a_session_with_a_single_cluster_cannot_be_resampled_and_says_why():
    truth = np.arange(6.0)[:, None]
    data = compared(truth[None], truth[None], truth, np.ones(6, dtype=int), np.repeat("only", 6))
    found = bootstrap(data, "speaker", 10)
    assert found.differences(["other"], "baseline", 0) is None
    assert found.reason == "session S1 has a single speaker in its test set"


def test_a_ccc_that_is_undefined_in_most_resamples_gives_no_draws():
    truth = np.repeat([1.0, 1.0, 2.0], 4)[:, None]
    data = compared(truth[None], truth[None], truth, np.ones(12, dtype=int), np.repeat(["a", "b", "c"], 4))
    assert bootstrap(data, "dialogue", 500).differences(["other"], "baseline", 0) is None


def test_the_degrees_of_freedom_are_clusters_minus_sessions():
    found = bootstrap(simulated(np.random.default_rng(9)), "dialogue", 10)
    assert (found.clusters, found.df) == (60, 55)


def test_no_warning_for_constant_predictions():
    data = simulated(np.random.default_rng(10))
    constant = np.full_like(data.predicted["baseline"], 3.3)
    collapsed = compared(constant, data.predicted["other"], data.truth, data.fold, data.cluster)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bootstrap(collapsed, "dialogue", 50).differences(["other"], "baseline", 0) is not None
