"""The two levels against formulas, tables and simulations of their own."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cvrunner.verdict.levels import (
    corpus_levels,
    critical_value,
    detectable,
    holm,
    p_value,
    speakers_level,
    too_few_seeds,
)


def test_level_1_is_welchs_t_interval_of_the_two_variances():
    random = np.random.default_rng(0)
    differences = random.normal(0.03, 0.02, (1, 5, 3))
    # Every seed moves with the dialogues by the same amount, so nothing is in both variances.
    draws = np.repeat(random.normal(0.03, 0.01, (4000, 1, 1)), 3, axis=2)
    (level,) = corpus_levels(differences, draws, 35, 0.02)
    dialogues = draws[:, 0, 0].var(ddof=1)
    training = sum(differences[0, f].var(ddof=1) for f in range(5)) / (3 * 25)
    df = (dialogues + training) ** 2 / (dialogues**2 / 35 + training**2 / 10)
    half = stats.t.ppf(0.975, df) * np.sqrt(dialogues + training)
    assert level.df == pytest.approx(df)
    assert level.interval.low == pytest.approx(differences.mean() - half)
    assert level.p == pytest.approx(2 * stats.t.sf(differences.mean() / np.sqrt(dialogues + training), df))
    # One more seed leaves the dialogues and divides the training variance by 4 instead of 3.
    assert level.one_more_seed < half


def test_what_the_test_dialogues_do_to_single_seeds_is_counted_once():
    # No randomness of training: the seeds differ only because each reacts to the dialogues in its own way.
    random = np.random.default_rng(7)
    seeds, folds, own, common = 3, 5, 0.03, 0.02
    found, errors = [], []
    for _ in range(400):
        differences = random.normal(0, own, (1, folds, seeds)) + random.normal(0, common, (1, folds, 1))
        spread = random.normal(0, own / np.sqrt(folds), (300, 1, seeds))
        draws = spread + random.normal(0, common / np.sqrt(folds), (300, 1, 1))
        (level,) = corpus_levels(differences, draws, 35, 0.02)
        found.append(differences.mean())
        errors.append(level.standard_error**2)
    # Cut off at zero, the training variance is a little too large on average, but far from being counted twice.
    twice = (common**2 / folds + 2 * own**2 / (folds * seeds)) / np.var(found)
    assert 0.9 < np.mean(errors) / np.var(found) < (1 + twice) / 2


def test_several_conditions_get_dunnetts_critical_value():
    # Dunnett (1955), two-sided, 5 %: three treatments against a control with equal groups, correlation 1/2, df 20.
    correlation = np.full((3, 3), 0.5) + np.eye(3) / 2
    assert critical_value(0.95, 20, correlation) == pytest.approx(2.54, abs=0.02)
    assert critical_value(0.95, 20) == pytest.approx(2.086, abs=1e-3)
    assert p_value(2.54, 1.0, 20, correlation) == pytest.approx(0.05, abs=0.003)


def test_the_simultaneous_intervals_use_the_correlation_of_the_common_baseline():
    random = np.random.default_rng(1)
    baseline, one, other = random.normal(0, 0.02, (3, 5, 4))
    draws = np.repeat(random.normal(0, 0.01, (4000, 3, 1)), 4, axis=2)
    shared = np.stack([draws[:, 1] - draws[:, 0], draws[:, 2] - draws[:, 0]], axis=1)
    levels = corpus_levels(np.stack([one - baseline, other - baseline]), shared, 35, 0.02)
    assert levels[0].df == levels[1].df
    width = (levels[0].interval.high - levels[0].interval.low) / 2 / levels[0].standard_error
    alone, independent = (critical_value(1 - alpha, levels[0].df) for alpha in (0.05, 0.025))
    assert alone < width < independent


def test_the_detectable_difference_is_found_in_four_of_five_replications():
    random, df = np.random.default_rng(2), 8
    critical = critical_value(0.95, df)
    errors = np.sqrt(random.chisquare(df, 40_000) / df)
    # The true difference is the mean of what the replications print from their estimated standard errors.
    printed = np.mean([detectable(float(error), df, critical) for error in errors[:200]])
    printed *= errors.mean() / errors[:200].mean()
    t = random.normal(printed, 1, 40_000) / errors
    assert np.mean(np.abs(t) > critical) == pytest.approx(0.80, abs=0.01)


def test_the_chance_of_equality_is_that_of_a_simulation():
    random = np.random.default_rng(3)
    draws = np.repeat(random.normal(0, 0.008, (200_000, 1, 1)), 3, axis=2)
    (level,) = corpus_levels(random.normal(0, 1e-6, (1, 5, 3)), draws, 1000, 0.02)
    inside = np.abs(random.normal(0, 0.008, 100_000)) + critical_value(0.90, 1000) * 0.008 < 0.02
    assert level.equality_power == pytest.approx(inside.mean(), abs=0.01)


def test_the_sources_of_variance_are_told_apart():
    random = np.random.default_rng(4)
    sessions = random.normal(0, 0.05, 400)[:, None]
    differences = (sessions + random.normal(0, 0.03, (400, 4)))[None]
    (level,) = corpus_levels(differences, np.repeat(random.normal(0, 0.001, (4000, 1, 1)), 4, axis=2), 3000, 0.02)
    assert level.training_sd == pytest.approx(0.03 / np.sqrt(4 * 400), rel=0.1)
    assert level.sessions_sd == pytest.approx(0.05, rel=0.15)


def test_equal_conditions_differ_by_exactly_nothing():
    (level,) = corpus_levels(np.zeros((1, 5, 2)), np.zeros((100, 1, 2)), 35, 0.02)
    assert (level.interval.low, level.interval.high, level.detectable, level.p) == (0, 0, 0, 1)


def test_level_2_is_the_corrected_t_as_an_interval():
    level = speakers_level(np.array([0.01, 0.03, 0.02, 0.04, 0.05]), 1 / 3, 0.02)
    # mean 0.03, variance 0.00025: 0.03 / sqrt((1/5 + 1/3) * 0.00025), four degrees of freedom.
    assert level.t == pytest.approx(2.598, abs=1e-3)
    assert level.p == pytest.approx(0.0602, abs=1e-3)
    assert level.interval.low == pytest.approx(0.03 - 2.7764 * 0.011547, abs=1e-5)
    assert level.worse + level.equal + level.better == pytest.approx(1)
    assert level.better == pytest.approx(stats.t.sf((0.02 - 0.03) / 0.011547, 4), abs=1e-4)


@pytest.mark.parametrize("values", [[0.1], [0.1, 0.1], [0.1, float("nan")]])
def test_level_2_is_none_where_it_has_no_meaning(values):
    assert speakers_level(np.array(values), 0.3, 0.02) is None


def test_level_2_is_adjusted_for_the_number_of_comparisons():
    values = np.array([0.01, 0.03, 0.02, 0.04, 0.05])
    one, three = speakers_level(values, 1 / 3, 0.02), speakers_level(values, 1 / 3, 0.02, comparisons=3)
    assert three.p == pytest.approx(3 * one.p)
    assert three.interval.low < one.interval.low


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@pytest.mark.parametrize(("folds", "seeds", "enough"), [(5, 1, False), (5, 2, True), (1, 2, False), (1, 3, True)])
def test_training_variance_needs_seeds(folds, seeds, enough):
    assert (too_few_seeds(folds, seeds) is None) == enough


QUECHUA = {
    "vanilla XLS-R": {
        "valence": [0.554628, 0.357647, 0.406576, 0.412047, 0.654137, 0.651841],
        "arousal": [0.680633, 0.602859, 0.687872, 0.740547, 0.699000, 0.625797],
        "dominance": [0.677066, 0.627423, 0.643154, 0.712970, 0.711301, 0.689805],
    },
    "eGeMAPS": {
        "valence": [0.273449, 0.122758, 0.248278, 0.126547, 0.252571, 0.291794],
        "arousal": [0.622661, 0.414176, 0.694980, 0.695239, 0.654342, 0.487580],
        "dominance": [0.656186, 0.432717, 0.526537, 0.694420, 0.676862, 0.537922],
    },
    "SER only": {
        "valence": [0.483498, 0.154933, 0.303098, 0.273087, 0.549504, 0.595123],
        "arousal": [0.528166, 0.551022, 0.630427, 0.664690, 0.663172, 0.613114],
        "dominance": [0.494578, 0.541902, 0.568835, 0.667746, 0.671059, 0.634537],
    },
}
"""CCC of six folds, one actor each, published in the repository QuechuaBase/SER-quechua-collao, results/*_folds.csv
(rounded). Its folds have only a training and a validation part, so these are validation scores; five actors train."""


def quechua(one, other, dimension):
    """The published per-fold differences of two systems, at level 2 with the test/train ratio 1/5."""
    return speakers_level(np.subtract(QUECHUA[one][dimension], QUECHUA[other][dimension]), 1 / 5, 0.02)


def test_level_2_on_published_folds_is_stricter_than_a_plain_t():
    level = quechua("vanilla XLS-R", "eGeMAPS", "arousal")
    plain = stats.ttest_rel(QUECHUA["vanilla XLS-R"]["arousal"], QUECHUA["eGeMAPS"]["arousal"])
    assert (round(level.t, 3), round(level.p, 2), level.df) == (1.796, 0.13, 5)
    assert plain.pvalue == pytest.approx(0.045, abs=5e-4)
    # The correction divides t by sqrt(1 + F x ratio).
    assert level.t == pytest.approx(plain.statistic / np.sqrt(1 + 6 / 5))


@pytest.mark.parametrize("dimension", ["valence", "arousal", "dominance"])
@pytest.mark.parametrize("other", ["eGeMAPS", "SER only"])
def test_level_2_on_published_folds_is_the_corrected_interval(other, dimension):
    level = quechua("vanilla XLS-R", other, dimension)
    d = np.subtract(QUECHUA["vanilla XLS-R"][dimension], QUECHUA[other][dimension])
    half = stats.t.ppf(0.975, 5) * np.sqrt((1 / 6 + 1 / 5) * d.var(ddof=1))
    assert level.interval.low == pytest.approx(d.mean() - half)
    assert level.interval.high == pytest.approx(d.mean() + half)
    assert (level.p < 0.05) == (level.interval.low > 0 or level.interval.high < 0)
