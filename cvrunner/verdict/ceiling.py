"""How far one human rater gets: the CCC of each rater with the mean of the others who heard the same utterance.

A model is compared with the mean of all raters, which is steadier than any one of them. So this is what a single
person reaches on the task, a reference point for a CCC, and not a bound that no model can pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cvrunner.data.folds import Fold
from cvrunner.data.utterance import DIMENSIONS, Utterance
from cvrunner.verdict.ccc import Ccc, ccc, defined, mean_if_all

OBSERVER = "E"
"""First letter of observers; the speakers' ratings of themselves begin with F or M."""
NO_RATERS = "the corpus has no utterance that two observers rated"


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


def leave_one_rater_out(utterances: Sequence[Utterance], dimension: str) -> npt.NDArray[np.float64]:
    """Return pairs `[P, 2]` of one observer's rating and the mean of the other observers of the same utterance.

    Every (utterance, observer) with another observer is one pair, so an utterance with three ratings gives three pairs.
    Who the observers are does not matter: they differ between sessions, and some of them rated little.
    """
    pairs = [pair for utterance in utterances for pair in _pairs(utterance, dimension)]
    return np.array(pairs, dtype=np.float64).reshape(-1, 2)


def _pairs(utterance: Utterance, dimension: str) -> Iterator[tuple[float, float]]:
    column = DIMENSIONS.index(dimension)
    given = [rating[column] for rater, rating in utterance.raters.items() if rater.startswith(OBSERVER)]
    ratings = [rating for rating in given if rating is not None]
    if len(ratings) > 1:
        for rating in ratings:
            yield rating, (sum(ratings) - rating) / (len(ratings) - 1)


def _scores(pairs: Mapping[str, npt.NDArray[np.float64]]) -> Ccc:
    scores: Ccc = dict.fromkeys(pairs)
    for dimension, points in pairs.items():
        if len(points):
            scores[dimension] = defined(ccc(points[:, 0], points[:, 1]))
    return scores | {"avg": mean_if_all(scores.values())}
