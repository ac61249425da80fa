"""The concordance correlation coefficient (Lin 1989) of a whole set: every reported CCC is computed here.

It is audmetric's, in float64; this file defines the edge cases. A mean over batches is never a CCC.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

Ccc = dict[str, float | None]
"""Per dimension and `avg`; None if undefined."""
COLLAPSED_RANGE = 1e-6
"""Predictions within this range, on a scale of 0..1 or 1..5, are constant except for float32 rounding."""
COLLAPSED_SHARE = 0.05
"""Predictions whose standard deviation is below this share of that of the labels have collapsed: even if they followed
the labels perfectly, their CCC would be below 0.1."""


def ccc(prediction: npt.ArrayLike, truth: npt.ArrayLike) -> float:
    """Return `2 cov / (var + var + (mean - mean)^2)` of two sequences `[N]`, with moments divided by N; in -1..1.

    0 if exactly one of them is constant, or both at different values. NaN, as undefined, for one element or if both
    are constant and equal. Raises ValueError for different lengths, no elements, or values that are not finite.
    """
    p, t = _sequence(prediction, "prediction"), _sequence(truth, "truth")
    if len(p) != len(t):
        raise ValueError(f"prediction has {len(p)} values and truth {len(t)}; they must have as many")
    if len(p) == 1:
        return math.nan
    # The mean of equal floats need not equal them, and 1e-34 / 1e-34 would look like a result.
    if np.ptp(p) == 0 or np.ptp(t) == 0:
        return math.nan if np.array_equal(p, t) else 0.0
    # audmetric takes a third of a second to import, and not every command scores.
    import audmetric

    return float(audmetric.concordance_cc(t, p))


def ccc_by_dimension(predicted: Mapping[str, npt.ArrayLike], true: Mapping[str, npt.ArrayLike]) -> Ccc:
    """Return the CCC per dimension, None if undefined, and `avg`: their mean, None if one of them is None.

    Raises ValueError if the dimensions differ, and as `ccc`.
    """
    if set(predicted) != set(true) or not true:
        raise ValueError(f"predicted has {sorted(predicted)} and true {sorted(true)}; they must be the same")
    scores: Ccc = {dimension: defined(ccc(predicted[dimension], true[dimension])) for dimension in true}
    scores["avg"] = mean_if_all(scores.values())
    return scores


def ccc_of_rows(
    predicted: npt.NDArray[np.float64],
    truth: npt.NDArray[np.float64],
    dimensions: Sequence[str],
    rows: npt.NDArray[np.bool_] | None = None,
) -> Ccc:
    """Return the CCC of `[N, K]` over the labelled utterances (not NaN) of `rows` (None: all) per dimension, and `avg`.

    Raises as `ccc`.
    """
    scores: Ccc = {}
    for k, dimension in enumerate(dimensions):
        known = ~np.isnan(truth[:, k])
        if rows is not None:
            known &= rows
        scores[dimension] = defined(ccc(predicted[known, k], truth[known, k]))
    return scores | {"avg": mean_if_all(scores.values())}


def is_collapsed(prediction: npt.ArrayLike, truth: npt.ArrayLike) -> bool:
    """Whether predictions hardly vary next to the labels, or not at all: such a model only predicts a mean."""
    p, t = _sequence(prediction, "prediction"), _sequence(truth, "truth")
    return bool(np.ptp(p) <= COLLAPSED_RANGE or np.std(p) < COLLAPSED_SHARE * np.std(t))


def defined(value: float) -> float | None:
    """Return the value, or None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def mean_if_all(values: Iterable[float | None]) -> float | None:
    """Return the mean; None if one value is None or there is none: a mean over some of them would mislead."""
    given = list(values)
    known = [value for value in given if value is not None]
    return sum(known) / len(known) if known and len(known) == len(given) else None


def _sequence(values: npt.ArrayLike, name: str) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must be a sequence of one value or more, not of shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has {int((~np.isfinite(array)).sum())} values that are not finite")
    return array
