"""How far one gets without listening: predicting an utterance by the training labels of its scenario.

Every session of IEMOCAP acts the same scenarios, so that a fold is independent of speakers but not of content. A CCC is
reported next to this floor, and also with the scenario's mean removed from prediction and truth.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cvrunner.data.folds import Fold
from cvrunner.data.iemocap import side
from cvrunner.data.utterance import Utterance
from cvrunner.records.results import FloorRecord, RunRecord, Score
from cvrunner.records.run_directory import trial_name
from cvrunner.verdict.ccc import Ccc, ccc, ccc_by_dimension, defined, mean_if_all
from cvrunner.verdict.ceiling import CeilingScore, human_ceiling

if TYPE_CHECKING:
    import pandas as pd

Floats = npt.NDArray[np.float64]
FLOORS = (("scenario",), ("scenario", "gender", "side"))
NO_SCENARIOS = "the corpus names no scenarios"


@dataclass(frozen=True)
class FloorScore:
    """The CCC of predictions made from the names of utterances alone; all None if there is a reason."""

    by: tuple[str, ...]
    by_fold: Mapping[int, Ccc]
    mean: Ccc
    """`ccc_mean`: over folds."""
    pooled: Ccc
    """`ccc_pooled`: of the test utterances of all folds together."""
    reason: str | None = None
    """Why there is no score."""


def floor_record(folds: Sequence[Fold], dimensions: Sequence[str]) -> FloorRecord:
    """Return floor and ceiling on these folds; only a reason if the corpus has no scenarios, or no single ratings."""
    floors, ceiling = no_audio_floor(folds, dimensions), human_ceiling(folds, dimensions)
    reason = next((floor.reason for floor in floors.values() if floor.reason), None)
    scores: dict[str, dict[str, Score]] = {}
    if reason is None:
        scores = {name: _scores(floor) for name, floor in floors.items()}
    human: dict[str, Score] = {}
    if ceiling.reason is None:
        human = _scores(ceiling)
    return FloorRecord(scores=scores, reason=reason, ceiling=human, ceiling_reason=ceiling.reason)


def with_controlled_scores(
    floor: FloorRecord, folds: Sequence[Fold], run: RunRecord, tables: Mapping[str, pd.DataFrame]
) -> FloorRecord:
    """Add the scenario-controlled CCC of every condition of a complete run, mean over folds and seeds.

    `tables`: the predictions per trial name.
    """
    if floor.reason:
        return floor
    controlled = {}
    for condition in run.conditions:
        by_trial = [
            _controlled(fold, tables[trial_name(condition, fold.number, seed)], run.dimensions)
            for fold in folds
            for seed in run.seeds
        ]
        # No pooled value: each fold has its own expectations, from its own training set.
        controlled[condition] = {
            name: Score(mean=mean_if_all(scores[name] for scores in by_trial), pooled=None)
            for name in (*run.dimensions, "avg")
        }
    return floor.model_copy(update={"controlled": controlled})


def no_audio_floor(folds: Sequence[Fold], dimensions: Sequence[str]) -> dict[str, FloorScore]:
    """Return the floor by `scenario` and by `scenario+gender+side`, from the training part of each fold."""
    return {"+".join(by): _floor(folds, dimensions, by) for by in FLOORS}


def scenario_means(
    train: Sequence[Utterance],
    test: Sequence[Utterance],
    dimension: str,
    by: tuple[str, ...] = ("scenario",),
) -> Floats:
    """Return, for every test utterance, the mean training label of its cell, on the rating scale; `[N]`.

    A cell is what `by` names: `scenario`, `gender`, `side`. A cell without training utterances falls back to the cell
    without the last name, and so on to the mean of all. Raises ValueError for no training data or a missing label.
    """
    labels = label_array(train, dimension)
    if not len(labels):
        raise ValueError("there is no training utterance to take a mean of")
    cells: dict[tuple[str | None, ...], list[float]] = defaultdict(list)
    for utterance, label in zip(train, labels, strict=True):
        for cell in _cells(utterance, by):
            cells[cell].append(float(label))
    means = {cell: float(np.mean(values)) for cell, values in cells.items()}
    # The cells of an utterance end with `()`, the mean of all, so there is always one that training has.
    return np.array([next(means[cell] for cell in _cells(u, by) if cell in means) for u in test])


def scenario_controlled_ccc(
    train: Sequence[Utterance], test: Sequence[Utterance], prediction: npt.ArrayLike, dimension: str
) -> float | None:
    """Return the CCC of predictions and truth of `test`, both minus the training mean of the scenario.

    None if it is undefined or the corpus names no scenarios. Predictions are on the rating scale, `[N]`.
    """
    if not _has_scenarios(test):
        return None
    expected = scenario_means(train, test, dimension)
    predicted = np.asarray(prediction, dtype=np.float64)
    if predicted.shape != expected.shape:
        raise ValueError(f"prediction has shape {predicted.shape}, must have {expected.shape}, one for each utterance")
    return defined(ccc(predicted - expected, label_array(test, dimension) - expected))


def label_array(utterances: Sequence[Utterance], dimension: str) -> Floats:
    """Return the labels `[N]` on the rating scale. Raises ValueError naming the first utterance that has none."""
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
    pooled = ccc_by_dimension(
        {d: np.concatenate(predicted[d]) for d in dimensions}, {d: np.concatenate(true[d]) for d in dimensions}
    )
    return FloorScore(by, by_fold, mean, pooled)


def _scores(found: FloorScore | CeilingScore) -> dict[str, Score]:
    return {name: Score(mean=found.mean[name], pooled=found.pooled[name]) for name in found.mean}


def _controlled(fold: Fold, table: pd.DataFrame, dimensions: Sequence[str]) -> Ccc:
    """Return a trial's scenario-controlled CCC per dimension, and their mean."""
    # The corpus may list the utterances in another order than when the trial ran.
    table = table.set_index("utterance").loc[[u.id for u in fold.test]]
    scores: Ccc = {
        d: scenario_controlled_ccc(fold.train, fold.test, table[f"{d}_predicted"].to_numpy(dtype=np.float64), d)
        for d in dimensions
    }
    return scores | {"avg": mean_if_all(scores.values())}


def _cells(utterance: Utterance, by: tuple[str, ...]) -> list[tuple[str | None, ...]]:
    """Return the cells of an utterance, from the finest to `()`, which holds all utterances."""
    names = {"scenario": utterance.scenario, "gender": utterance.gender, "side": side(utterance.dialogue)}
    cell = tuple(names[name] for name in by)
    return [cell[:length] for length in range(len(cell), -1, -1)]


def _has_scenarios(utterances: Sequence[Utterance]) -> bool:
    return any(u.scenario is not None for u in utterances)
