"""How far raters agree: one rater against the others, and what their noise leaves for a model to reach.

One rater compared with the mean of the others is a mark, not a bound: a model is compared with the mean of all raters,
which is steadier than any one of them. The bound follows from the reliability `R` of that mean, a number of 0..1: the
share of the labels' variance that is not noise of the raters.

- A second panel of as many raters, compared with the labels, reaches CCC `R`.
- A perfect model, which predicts what infinitely many raters would say, reaches `2R / (1 + R)`; with its predictions
  stretched to the spread of the labels `sqrt(R)`, which no prediction made without the ratings exceeds on average.

Shapes: `N` utterances, `M` raters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cvrunner.data.folds import Fold
from cvrunner.data.utterance import DIMENSIONS, Utterance
from cvrunner.records.results import Panel, RaterScore
from cvrunner.verdict.ccc import Ccc, ccc, defined, mean_if_all

Floats = npt.NDArray[np.float64]
OBSERVER = "E"
"""First letter of observers; the speakers' ratings of themselves begin with F or M."""
NO_RATERS = "the corpus has no utterance that two observers rated"
FEWEST_RATERS = 3
ATTAINABLE, ATTAINABLE_STRETCHED, SECOND_PANEL = "attainable", "attainable (stretched)", "second panel"
REACHED: dict[str, Callable[[float], float]] = {
    ATTAINABLE: lambda r: 2 * r / (1 + r),
    ATTAINABLE_STRETCHED: lambda r: r**0.5,
    SECOND_PANEL: lambda r: r,
}
"""CCC with the mean of the raters, by the reliability of that mean."""


@dataclass(frozen=True)
class CeilingScore:
    """The CCC of one rater with the mean of the others; all None if there is a reason."""

    by_fold: Mapping[int, Ccc]
    mean: Ccc
    """`ccc_mean`: over folds; None if a fold's test set has no ratings to compare."""
    pooled: Ccc
    """`ccc_pooled`: of the pairs of all folds together."""
    reason: str | None = None
    """Why there is no score."""


# --- one rater --------------------------------------------------------------------------------------------------------


def human_ceiling(folds: Sequence[Fold], dimensions: Sequence[str]) -> CeilingScore:
    """Return the leave-one-rater-out CCC on the test set of each fold."""
    pairs = {fold.number: {d: leave_one_rater_out(fold.test, d) for d in dimensions} for fold in folds}
    by_fold = {number: _scores(of_fold) for number, of_fold in pairs.items()}
    together = {d: np.concatenate([of_fold[d] for of_fold in pairs.values()]) for d in dimensions}
    mean = {name: mean_if_all(scores[name] for scores in by_fold.values()) for name in (*dimensions, "avg")}
    reason = None
    if not any(len(points) for points in together.values()):
        reason = NO_RATERS
    return CeilingScore(by_fold, mean, _scores(together), reason)


def leave_one_rater_out(utterances: Sequence[Utterance], dimension: str) -> Floats:
    """Return pairs `[P, 2]` of one observer's rating and the mean of the other observers of the same utterance.

    Every (utterance, observer) with another observer is one pair, so an utterance with three ratings gives three pairs.
    Who the observers are does not matter: they differ between sessions, and some of them rated little.
    """
    pairs = []
    for utterance in utterances:
        ratings = list(_ratings(utterance, dimension).values())
        if len(ratings) > 1:
            pairs += [(rating, (sum(ratings) - rating) / (len(ratings) - 1)) for rating in ratings]
    return np.array(pairs, dtype=np.float64).reshape(-1, 2)


def _ratings(utterance: Utterance, dimension: str) -> dict[str, float]:
    """Return the observers' ratings of an utterance, by rater."""
    column = DIMENSIONS.index(dimension)
    given = {rater: rating[column] for rater, rating in utterance.raters.items() if rater.startswith(OBSERVER)}
    return {rater: rating for rater, rating in given.items() if rating is not None}


def _scores(pairs: Mapping[str, Floats]) -> Ccc:
    scores: Ccc = dict.fromkeys(pairs)
    for dimension, points in pairs.items():
        if len(points):
            scores[dimension] = defined(ccc(points[:, 0], points[:, 1]))
    return scores | {"avg": mean_if_all(scores.values())}


# --- the panel --------------------------------------------------------------------------------------------------------


def panel_of_raters(folds: Sequence[Fold], dimensions: Sequence[str]) -> Panel | None:
    """Return what the agreement of the raters makes attainable on the folds' test sets; None if no two rated anything.

    The interval of a mean over folds is a delete-one jackknife over raters (Efron and Tibshirani 1993, chapter 11) on
    the scale `log(1 - CCC)`, with a t quantile for M - 1 degrees of freedom. Whole raters are left out, because the
    ratings of one rater share a bias and a way of using the scale; ratings drawn again within utterances would count
    thousands of independent ones where there are a few people. Utterances are given, as at level 1 of the verdict.
    The columns of a manifest that hold a different person in every row are left out in the same way, as random groups.
    """
    names = sorted({r for fold in folds for u in fold.test for r in u.raters if r.startswith(OBSERVER)})
    ratings = {d: [rating_table(fold.test, d, names) for fold in folds] for d in dimensions}
    together = {d: np.concatenate(tables) for d, tables in ratings.items()}
    if not any((np.isfinite(table).sum(axis=1) > 1).any() for table in together.values()):
        return None
    everyone = _reached(ratings)
    pooled = _reached({d: [table] for d, table in together.items()})
    without = []
    if len(names) >= FEWEST_RATERS:
        without = [_reached(ratings, left_out) for left_out in range(len(names))]
    scores = {
        kind: {
            name: RaterScore(mean=mean, pooled=pooled[kind][name], **_interval(mean, [w[kind][name] for w in without]))
            for name, mean in of.items()
        }
        for kind, of in everyone.items()
    }
    reason = None
    if not without:
        reason = f"an interval over raters needs {FEWEST_RATERS} raters, not {len(names)}"
    elif all(score.low is None for of in scores.values() for score in of.values()):
        reason = "without one of the raters, a fold has no utterance that two rated"
    counts = np.concatenate([np.isfinite(table).sum(axis=1) for table in together.values()])
    return Panel(
        raters=float(1 / np.mean(1 / counts[counts > 0])),
        label_noise={d: defined(label_noise(table)) for d, table in together.items()},
        scores=scores,
        interval_reason=reason,
    )


def rating_table(utterances: Sequence[Utterance], dimension: str, raters: Sequence[str]) -> Floats:
    """Return the ratings `[N, M]`; NaN where a rater gave none."""
    rows = [_ratings(utterance, dimension) for utterance in utterances]
    table = np.array([[row.get(rater, np.nan) for rater in raters] for row in rows], dtype=np.float64)
    return table.reshape(len(rows), len(raters))


def label_noise(ratings: Floats) -> float:
    """Return the standard error of the mean rating of an utterance, root mean square over the utterances of `[N, M]`.

    `sqrt(MSW mean(1 / n))`, n ratings per utterance and MSW their variance within utterances. NaN if no utterance has
    two ratings.
    """
    return float(np.sqrt(_noise(ratings)[1] * _shares(ratings)))


def reliability(ratings: Floats, left_out: int | None = None) -> float:
    """Return the reliability of the mean rating of an utterance, `[N, M]`: 1 - noise / variance of the means; 0..1.

    One-way random effects with the means unweighted (Thomas and Hultquist 1978, Annals of Statistics 6, 582-587):
    utterances may have different numbers of ratings, and count alike, as they do in a CCC. With k ratings of each it is
    ICC(1,k) = (BMS - WMS) / BMS (Shrout and Fleiss 1979), for raters who differ between utterances: the bias of a rater
    is noise. `left_out`: estimate both variances without this rater, for as many ratings as with it.
    NaN if no utterance has two ratings, or if nothing varies.
    """
    some = ratings
    if left_out is not None:
        some = np.delete(ratings, left_out, axis=1)
    means, within = _noise(some)
    if len(means) < 2 or np.isnan(within):
        return np.nan
    true = max(0.0, float(np.var(means, ddof=1)) - within * _shares(some))
    noise = within * _shares(ratings)
    if true + noise == 0:
        return np.nan
    return true / (true + noise)


def _noise(ratings: Floats) -> tuple[Floats, float]:
    """Return the mean rating of every rated utterance, and the variance of single ratings within utterances."""
    count = np.isfinite(ratings).sum(axis=1)
    some, count = ratings[count > 0], count[count > 0]
    means = np.nansum(some, axis=1) / count
    if not (count > 1).any():
        return means, np.nan
    return means, float(np.nansum((some - means[:, None]) ** 2) / (count - 1).sum())


def _shares(ratings: Floats) -> float:
    """Return the mean of 1 / n over the rated utterances."""
    count = np.isfinite(ratings).sum(axis=1)
    if not count.any():
        return np.nan
    return float(np.mean(1 / count[count > 0]))


def _reached(ratings: Mapping[str, Sequence[Floats]], left_out: int | None = None) -> dict[str, Ccc]:
    """Return what is attainable, mean over the tables of each dimension, by kind, then dimension or `avg`."""
    of_labels = {d: [defined(reliability(table, left_out)) for table in tables] for d, tables in ratings.items()}
    reached: dict[str, Ccc] = {}
    for kind, formula in REACHED.items():
        scores: Ccc = {
            d: mean_if_all(None if r is None else formula(r) for r in by_fold) for d, by_fold in of_labels.items()
        }
        reached[kind] = scores | {"avg": mean_if_all(scores.values())}
    return reached


def _interval(value: float | None, without: Sequence[float | None]) -> dict[str, float]:
    """Return the ends of a jackknife interval; nothing if a value is undefined or there is none."""
    from scipy.stats import t  # half a second

    known = [v for v in without if v is not None]
    if value is None or not known or len(known) < len(without):
        return {}
    # Raters who agree exactly leave no distance from 1, whose logarithm must stay finite.
    center, points = (np.log(np.maximum(1 - np.array(v), 1e-12)) for v in (value, known))
    count = len(known)
    error = np.sqrt((count - 1) / count * np.sum((points - points.mean()) ** 2))
    reach = float(t.ppf(0.975, count - 1) * error)
    low, high = 1 - np.exp(center + reach), 1 - np.exp(center - reach)
    # The formulas are about agreement above chance; a reliability below 0 is none.
    return {"low": max(0.0, float(low)), "high": float(high)}
