"""How far one gets without listening: predicting an utterance by the training labels of its scenario.

Every session of IEMOCAP acts the same scenarios, so that a fold is independent of speakers but not of
content. A CCC is printed beside this floor, and again with the scenario taken out of prediction and truth.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cvrunner.data.folds import Fold
from cvrunner.data.iemocap import side
from cvrunner.data.utterance import Utterance
from cvrunner.verdict.ccc import Ccc, ccc, ccc_by_dimension, defined, mean_if_all

Floats = npt.NDArray[np.float64]
FLOORS = (("scenario",), ("scenario", "gender", "side"))
NO_SCENARIOS = "the corpus names no scenarios"


@dataclass(frozen=True)
class FloorScore:
    """The CCC of predictions made from the names of utterances alone; all None where there is a reason."""

    by: tuple[str, ...]
    by_fold: Mapping[int, Ccc]
    mean: Ccc
    """`ccc_mean`: over folds."""
    pooled: Ccc
    """`ccc_pooled`: of the test utterances of all folds together."""
    reason: str | None = None
    """Why there is no score."""


def scenario_means(
    train: Sequence[Utterance],
    test: Sequence[Utterance],
    dimension: str,
    by: tuple[str, ...] = ("scenario",),
) -> Floats:
    """For every test utterance the mean training label of its cell, on the rating scale; `[N]`.

    A cell is what `by` names: `scenario`, `gender`, `side`. One that training never saw falls back to the
    cell without the last name, and so on to the mean of all. Raises ValueError for no training data or a
    missing label.
    """
    labels = label_array(train, dimension)
    if not len(labels):
        raise ValueError("there is no training utterance to take a mean of")
    cells: dict[tuple[str | None, ...], list[float]] = defaultdict(list)
    for utterance, label in zip(train, labels, strict=True):
        for cell in _cells(utterance, by):
            cells[cell].append(float(label))
    means = {cell: float(np.mean(values)) for cell, values in cells.items()}
    return np.array([next(means[cell] for cell in _cells(u, by) if cell in means) for u in test])


def no_audio_floor(folds: Sequence[Fold], dimensions: Sequence[str]) -> dict[str, FloorScore]:
    """The floor by `scenario` and by `scenario+gender+side`, from the training part of each fold."""
    return {"+".join(by): _floor(folds, dimensions, by) for by in FLOORS}


def scenario_controlled_ccc(
    train: Sequence[Utterance], test: Sequence[Utterance], prediction: npt.ArrayLike, dimension: str
) -> float | None:
    """CCC of the predictions for `test` and their truth, less the training mean of the scenario in both.

    None where it is undefined or the corpus names no scenarios. Predictions are on the rating scale, `[N]`.
    """
    if not _has_scenarios(test):
        return None
    expected = scenario_means(train, test, dimension)
    predicted = np.asarray(prediction, dtype=np.float64)
    if predicted.shape != expected.shape:
        raise ValueError(f"prediction has shape {predicted.shape}, must have {expected.shape}, one for each utterance")
    return defined(ccc(predicted - expected, label_array(test, dimension) - expected))


def label_array(utterances: Sequence[Utterance], dimension: str) -> Floats:
    """Labels `[N]` on the rating scale. Raises ValueError naming the first utterance that has none."""
    labels = [u.label(dimension) for u in utterances]
    if None in labels:
        raise ValueError(f"{utterances[labels.index(None)].id} has no {dimension} label")
    return np.array(labels, dtype=np.float64)


def _floor(folds: Sequence[Fold], dimensions: Sequence[str], by: tuple[str, ...]) -> FloorScore:
    if not any(_has_scenarios(fold.test) for fold in folds):
        nothing: Ccc = dict.fromkeys((*dimensions, "avg"))
        return FloorScore(by, {fold.number: nothing for fold in folds}, nothing, nothing, NO_SCENARIOS)
    predicted = {d: [scenario_means(fold.train, fold.test, d, by) for fold in folds] for d in dimensions}
    true = {d: [label_array(fold.test, d) for fold in folds] for d in dimensions}
    by_fold = {
        fold.number: ccc_by_dimension({d: predicted[d][i] for d in dimensions}, {d: true[d][i] for d in dimensions})
        for i, fold in enumerate(folds)
    }
    mean = {name: mean_if_all(scores[name] for scores in by_fold.values()) for name in (*dimensions, "avg")}
    pooled = ccc_by_dimension(_joined(predicted), _joined(true))
    return FloorScore(by, by_fold, mean, pooled)


def _joined(by_dimension: Mapping[str, list[Floats]]) -> dict[str, Floats]:
    return {dimension: np.concatenate(arrays) for dimension, arrays in by_dimension.items()}


def _cells(utterance: Utterance, by: tuple[str, ...]) -> list[tuple[str | None, ...]]:
    """From the finest cell of an utterance to `()`, the one that holds all."""
    names = {
        "scenario": utterance.scenario,
        "gender": utterance.gender,
        "side": side(utterance.dialogue),
    }
    cell = tuple(names[name] for name in by)
    return [cell[:length] for length in range(len(cell), -1, -1)]


def _has_scenarios(utterances: Sequence[Utterance]) -> bool:
    return any(u.scenario is not None for u in utterances)
