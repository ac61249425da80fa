"""CCC against its formula, against audmetric, and at its edges."""

from __future__ import annotations

import math
import subprocess
import sys

import audmetric
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cvrunner.verdict.ccc import ccc, ccc_by_dimension, is_collapsed, mean_if_all

Floats = npt.NDArray[np.float64]
values = st.floats(-10, 10, allow_subnormal=False).map(lambda x: round(x, 6))
pairs = arrays(np.float64, st.tuples(st.just(2), st.integers(2, 40)), elements=values)


def by_correlation(prediction: Floats, truth: Floats) -> float:
    """A second derivation: Pearson's r times the bias correction of Lin (1989)."""
    sp, st_ = np.std(prediction), np.std(truth)
    shift = (np.mean(prediction) - np.mean(truth)) / np.sqrt(sp * st_)
    return float(np.corrcoef(prediction, truth)[0, 1] * 2 / (sp / st_ + st_ / sp + shift**2))


def noisy(n: int = 200, seed: int = 0) -> tuple[Floats, Floats]:
    random = np.random.default_rng(seed)
    truth = random.normal(3, 1, n)
    return 0.6 * truth + random.normal(1, 0.5, n), truth


@settings(deadline=None)
@given(pairs)
def test_is_the_formula_of_lin(pair: Floats) -> None:
    prediction, truth = pair
    assume(min(np.std(prediction), np.std(truth)) > 1e-3)
    assert ccc(prediction, truth) == pytest.approx(by_correlation(prediction, truth), abs=1e-9)


@settings(deadline=None)
@given(pairs)
def test_is_symmetric_bounded_and_1_for_itself(pair: Floats) -> None:
    assume(np.ptp(pair[0]) > 1e-3)
    score = ccc(*pair)
    assert -1 - 1e-12 <= score <= 1 + 1e-12
    assert score == pytest.approx(ccc(*pair[::-1]), abs=1e-12)
    assert ccc(pair[0], pair[0]) == pytest.approx(1)


def test_is_that_of_audmetric() -> None:
    prediction, truth = noisy()
    assert ccc(prediction, truth) == audmetric.concordance_cc(truth, prediction)


def test_a_worked_example() -> None:
    assert ccc([0, 1, 1], [0, 1, 2]) == pytest.approx(2 / 3)


def test_an_offset_of_a_million_does_not_cancel() -> None:
    prediction, truth = noisy()
    assert ccc(prediction + 1e6, truth + 1e6) == pytest.approx(ccc(prediction, truth), abs=1e-9)


def test_float32_is_computed_in_float64() -> None:
    prediction, truth = (x.astype(np.float32) for x in noisy(20_000))
    wide = audmetric.concordance_cc(truth.astype(np.float64), prediction.astype(np.float64))
    assert ccc(prediction, truth) == wide
    shifted = ccc(prediction.astype(np.float64) + 1e6, truth.astype(np.float64) + 1e6)
    assert shifted == pytest.approx(wide, abs=1e-9)


def test_a_constant_prediction_scores_0() -> None:
    assert ccc(np.full(9, 0.1), noisy(9)[1]) == 0
    assert ccc(noisy(9)[0], np.full(9, 1e6 + 0.1)) == 0
    assert ccc([0.1, 0.1, 0.1], [0.3, 0.3, 0.3]) == 0


@pytest.mark.parametrize("constant", [0.0, 0.1, 3.3, 1e6 + 0.1])
def test_two_equal_constants_are_undefined(constant: float) -> None:
    assert math.isnan(ccc(np.full(7, constant), np.full(7, constant)))


def test_one_element_is_undefined() -> None:
    assert math.isnan(ccc([1.0], [2.0]))
    assert math.isnan(ccc([1.0], [1.0]))


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        ([1.0, 2.0], [1.0], "prediction has 2 values and truth 1"),
        ([], [], "one value or more"),
        ([[1.0, 2.0]], [[1.0, 2.0]], r"of shape \(1, 2\)"),
        ([1.0, math.nan, math.inf], [1.0, 2.0, 3.0], "prediction has 2 values that are not finite"),
        ([1.0, 2.0], [1.0, math.nan], "truth has 1 values that are not finite"),
    ],
)
def test_bad_input_is_refused(prediction: list[float], truth: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ccc(prediction, truth)


def test_by_dimension_adds_the_mean() -> None:
    prediction, truth = noisy()
    scores = ccc_by_dimension({"valence": prediction, "arousal": truth}, {"valence": truth, "arousal": truth})
    assert list(scores) == ["valence", "arousal", "avg"]
    assert scores["arousal"] == pytest.approx(1)
    assert scores["avg"] == pytest.approx((ccc(prediction, truth) + 1) / 2)


def test_by_dimension_an_undefined_one_makes_the_mean_undefined() -> None:
    same, (prediction, truth) = np.ones(200), noisy()
    scores = ccc_by_dimension({"valence": same, "arousal": prediction}, {"valence": same, "arousal": truth})
    assert scores["valence"] is None
    assert scores["avg"] is None
    assert scores["arousal"] is not None


def test_by_dimension_the_names_must_agree() -> None:
    with pytest.raises(ValueError, match=r"predicted has \['arousal'\] and true \['valence'\]"):
        ccc_by_dimension({"arousal": [1, 2]}, {"valence": [1, 2]})
    with pytest.raises(ValueError, match="must be the same"):
        ccc_by_dimension({}, {})


def test_constant_predictions_have_collapsed_up_to_rounding_in_float32() -> None:
    mean = np.float32(3.217)
    for truth in (np.linspace(1, 5, 50), np.full(50, 3.0)):
        assert is_collapsed(np.full(50, mean), truth)
        assert is_collapsed([mean, np.nextafter(mean, np.float32(4))] * 25, truth)
    assert is_collapsed([1.0], [2.0])


def test_predictions_have_collapsed_below_a_twentieth_of_the_spread_of_the_labels() -> None:
    truth = noisy()[1]
    assert is_collapsed(0.049 * truth, truth)
    assert not is_collapsed(0.051 * truth, truth)
    assert not is_collapsed(0.051 * truth + 1e6, truth)
    # What the limit means: even in perfect agreement with the labels, the CCC would be below 0.1.
    centred = truth - truth.mean()
    assert ccc(0.05 * centred, centred) == pytest.approx(0.1, abs=0.001)


def test_a_mean_needs_all_values() -> None:
    assert mean_if_all([1.0, 2.0]) == 1.5
    assert mean_if_all([1.0, None]) is None
    assert mean_if_all([]) is None


def test_scoring_never_loads_torch() -> None:
    code = (
        "import sys; from cvrunner.verdict import ccc, floor; from cvrunner.run import audit; ccc.ccc([1, 2], [2, 3]); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
