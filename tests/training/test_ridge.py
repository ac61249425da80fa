"""Ridge regression on statistics of hidden states, against plain scikit-learn and numpy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from cvrunner.training.ridge import PENALTIES, best_stretch, choose, chosen, fit_ridge
from cvrunner.verdict.ccc import ccc

LAYERS, WIDTH, DIMENSIONS = 3, 4, 2


@pytest.mark.parametrize("count", [15, 60])  # fewer and more utterances than the 24 features
def test_every_penalty_predicts_as_ridge_regression_on_standardised_features(count: int) -> None:
    random = np.random.default_rng(count)
    scale, shift = random.uniform(0.1, 10, LAYERS * 2 * WIDTH), random.normal(0, 5, LAYERS * 2 * WIDTH)
    features = (random.normal(size=(count + 20, LAYERS * 2 * WIDTH)) * scale + shift).astype(np.float32)
    features[:, 5] = 1.5  # a constant feature
    labels = features[:count, :DIMENSIONS] + random.normal(size=(count, DIMENSIONS))
    by_layer = features.reshape(-1, LAYERS, 2 * WIDTH)
    ridge = fit_ridge(lambda layer: by_layer[:count, layer], LAYERS, labels)
    found = ridge.centre + ridge.deviations(lambda layer: by_layer[count:, layer])
    scaler = StandardScaler().fit(features[:count].astype(np.float64))
    known, new = (scaler.transform(part.astype(np.float64)) for part in (features[:count], features[count:]))
    for penalty, predicted in zip(PENALTIES, found, strict=True):
        plain = Ridge(alpha=penalty * LAYERS * 2 * WIDTH).fit(known, labels)
        np.testing.assert_allclose(predicted, plain.predict(new), rtol=1e-3, atol=1e-3)


def test_the_stretch_is_the_best_of_all_factors() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(0.4, 1, 50)
    deviation = 0.1 * truth + random.normal(0.05, 0.1, 50)
    best = minimize_scalar(lambda s: -ccc(s * deviation, truth), bounds=(0.01, 100), method="bounded")
    assert best_stretch(deviation, truth) == pytest.approx(best.x, rel=1e-3)
    assert best_stretch(np.zeros(50), truth) == 1


def test_each_dimension_gets_the_penalty_with_the_best_ccc_of_the_validation_part() -> None:
    random = np.random.default_rng(1)
    labels, centre = random.normal(3, 1, (40, 2)), np.array([2.9, 3.2])
    deviations = random.normal(size=(len(PENALTIES), 40, 2))
    for k, best in enumerate((4, 9)):
        deviations[best, :, k] += 0.5 * (labels[:, k] - centre[k])
    choices = choose(deviations, labels, centre)
    assert [choice.penalty for choice in choices] == [4, 9]
    for k, choice in enumerate(choices):
        predicted = centre[k] + choice.stretch * deviations[choice.penalty, :, k]
        assert choice.ccc == pytest.approx(ccc(predicted, labels[:, k]))
        one_by_one = [
            ccc(centre[k] + best_stretch(d, labels[:, k] - centre[k]) * d, labels[:, k]) for d in deviations[:, :, k]
        ]
        assert choice.ccc == pytest.approx(max(one_by_one))


def test_the_chosen_map_predicts_from_raw_features_what_the_ridge_predicts_from_standardised_ones() -> None:
    random = np.random.default_rng(2)
    features = (random.normal(size=(60, LAYERS, 2 * WIDTH)) * 7 + 3).astype(np.float32)
    labels = features[:, 0, :DIMENSIONS] + random.normal(size=(60, DIMENSIONS))
    ridge = fit_ridge(lambda layer: features[:40, layer], LAYERS, labels[:40])
    deviations = ridge.deviations(lambda layer: features[40:, layer])
    choices = choose(deviations, labels[40:], ridge.centre)
    expected = [c.stretch * deviations[c.penalty, :, k] for k, c in enumerate(choices)]
    predicted = chosen(ridge, choices).predict(lambda layer: features[40:, layer])
    np.testing.assert_allclose(predicted, ridge.centre + np.transpose(expected), rtol=1e-4)
