"""How far one gets without listening: predicting an utterance by the training labels of its scenario.

Every session of IEMOCAP acts the same scenarios, so that a fold is independent of speakers but not of content. A CCC is
reported next to this floor, and also with the scenario's mean removed from prediction and truth.

Shapes: `N` utterances, `K` dimensions.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cvrunner.data.folds import Fold
from cvrunner.data.iemocap import side
from cvrunner.data.utterance import Utterance
from cvrunner.errors import ResultsError
from cvrunner.records.results import FloorRecord, RunRecord, Score
from cvrunner.records.run_directory import RunDirectory, trial_name
from cvrunner.verdict.ccc import Ccc, ccc, ccc_of_rows, defined, mean_if_all
from cvrunner.verdict.ceiling import CeilingScore, human_ceiling, panel_of_raters
from cvrunner.verdict.predictions import OutOfFold

if TYPE_CHECKING:
    import pandas as pd

Floats = npt.NDArray[np.float64]
Cell = tuple[str | None, ...]
FLOORS = (("scenario",), ("scenario", "gender", "side"))
STRETCHED = " (stretched)"
"""Ends the name of a predictor that is stretched for CCC; models are held against these."""
NO_SCENARIOS = "the corpus names no scenarios"
ROUNDING = 1e-9
"""Distance from a mean, on the rating scale, that is only a rounding error."""


@dataclass(frozen=True)
class FloorScore:
    """The CCC of predictions made from the names of utterances alone."""

    by_fold: Mapping[int, Ccc]
    mean: Ccc
    """`ccc_mean`: over folds."""
    pooled: Ccc
    """`ccc_pooled`: of the test utterances of all folds together."""


# --- the predictors ---------------------------------------------------------------------------------------------------


def floor_predictions(folds: Sequence[Fold], dimensions: Sequence[str]) -> dict[str, Floats]:
    """Return what each predictor without audio predicts for all test utterances, `[N, K]` on the rating scale.

    The rows are in the order of the folds and, within a fold, of `fold.test`. The predictors are `scenario` and
    `scenario+gender+side`, each also ` (stretched)`. Empty if the corpus names no scenarios.
    """
    if not any(u.scenario is not None for fold in folds for u in fold.test):
        return {}
    predictions: dict[str, Floats] = {}
    for by in FLOORS:
        plain, stretched = [], []
        for fold in folds:
            predicted = scenario_means(fold.train, fold.test, dimensions, by)
            centre = label_array(fold.train, dimensions).mean(axis=0)
            plain.append(predicted)
            stretched.append(centre + stretch_factors(fold.train, dimensions, by) * (predicted - centre))
        name = "+".join(by)
        predictions |= {name: np.concatenate(plain), name + STRETCHED: np.concatenate(stretched)}
    return predictions


def scenario_means(
    train: Sequence[Utterance],
    test: Sequence[Utterance],
    dimensions: Sequence[str],
    by: tuple[str, ...] = ("scenario",),
) -> Floats:
    """Return, for every test utterance, the mean training label of its cell, on the rating scale; `[N, K]`.

    A cell is what `by` names: `scenario`, `gender`, `side`. A cell without training utterances falls back to the cell
    without the last name, and so on to the mean of all. Raises ValueError for no training data or a missing label.
    """
    labels = label_array(train, dimensions)
    if not len(labels):
        raise ValueError("there is no training utterance to take a mean of")
    return _lookup([_cells(u, by) for u in train], labels, [_cells(u, by) for u in test])


def stretch_factors(train: Sequence[Utterance], dimensions: Sequence[str], by: tuple[str, ...]) -> Floats:
    """Return the factors `[K]` around the mean training label that maximise the CCC of the lookup by `by`.

    A conditional mean minimises the squared error and therefore varies less than the labels, which CCC punishes. With
    predictions `m + s (p - m)`, labels `t` and their mean `m`, CCC is `2 s cov(p, t) / (s^2 E(p - m)^2 + var(t))`;
    its maximum over s is at `s = sqrt(var(t) / E(p - m)^2)` if the covariance is positive, otherwise at s = 0, a
    constant. That is Lin's (1989, Biometrics 45, 255-268) scale shift set to 1: equal spread, which costs nothing in
    correlation.

    The sign of the covariance is cross-fitted: the labels of each training session are predicted from the other
    training sessions (with a single session, of each dialogue from the others). A lookup scored on its own labels
    agrees with them even if scenarios mean nothing, and would be stretched then too. The spread needs no agreement, so
    it is that of the lookup which is applied; the cross-fitted one, from fewer sessions, is too wide.
    """
    labels, cells = label_array(train, dimensions), [_cells(u, by) for u in train]
    groups = np.array([u.session for u in train])
    if len(set(groups)) == 1:
        groups = np.array([u.dialogue for u in train])
    predicted = np.tile(labels.mean(axis=0), (len(labels), 1))
    for group in set(groups):
        held = groups == group
        if not held.all():
            known, asked = ([cells[i] for i in np.flatnonzero(rows)] for rows in (~held, held))
            predicted[held] = _lookup(known, labels[~held], asked)
    off = labels - labels.mean(axis=0)
    covariance = (off * (predicted - predicted.mean(axis=0))).mean(axis=0)
    spread = ((_lookup(cells, labels, cells) - labels.mean(axis=0)) ** 2).mean(axis=0)
    useful = (covariance > ROUNDING**2) & (spread > ROUNDING**2)
    factors: Floats = np.sqrt(np.divide(labels.var(axis=0), spread, out=np.zeros_like(spread), where=useful))
    return factors


def label_array(utterances: Sequence[Utterance], dimensions: Sequence[str]) -> Floats:
    """Return the labels `[N, K]` on the rating scale. Raises ValueError naming the first utterance that has none."""
    for u in utterances:
        if missing := [dimension for dimension in dimensions if u.label(dimension) is None]:
            raise ValueError(f"{u.id} has no {missing[0]} label")
    rows = [[u.label(dimension) for dimension in dimensions] for u in utterances]
    return np.array(rows, dtype=np.float64).reshape(len(utterances), len(dimensions))


def _lookup(known: Sequence[Sequence[Cell]], labels: Floats, asked: Sequence[Sequence[Cell]]) -> Floats:
    rows: dict[Cell, list[int]] = defaultdict(list)
    for i, cells in enumerate(known):
        for cell in cells:
            rows[cell].append(i)
    means = {cell: labels[index].mean(axis=0) for cell, index in rows.items()}
    # The cells of an utterance end with `()`, the mean of all, so there is always one that is known.
    return np.array([next(means[cell] for cell in cells if cell in means) for cells in asked])


def _cells(utterance: Utterance, by: tuple[str, ...]) -> list[Cell]:
    """Return the cells of an utterance, from the finest to `()`, which holds all utterances."""
    names = {"scenario": utterance.scenario, "gender": utterance.gender, "side": side(utterance.dialogue)}
    cell = tuple(names[name] for name in by)
    return [cell[:length] for length in range(len(cell), -1, -1)]


# --- their scores and their file --------------------------------------------------------------------------------------


def no_audio_floor(
    folds: Sequence[Fold], dimensions: Sequence[str], predictions: Mapping[str, Floats]
) -> dict[str, FloorScore]:
    """Return the scores of `floor_predictions`, by predictor."""
    true = label_array([u for fold in folds for u in fold.test], dimensions)
    number = np.repeat([fold.number for fold in folds], [len(fold.test) for fold in folds])
    floors = {}
    for name, predicted in predictions.items():
        by_fold = {fold.number: ccc_of_rows(predicted, true, dimensions, number == fold.number) for fold in folds}
        mean = {d: mean_if_all(scores[d] for scores in by_fold.values()) for d in (*dimensions, "avg")}
        floors[name] = FloorScore(by_fold, mean, ccc_of_rows(predicted, true, dimensions))
    return floors


def floor_record(
    folds: Sequence[Fold], dimensions: Sequence[str], predictions: Mapping[str, Floats] | None = None
) -> FloorRecord:
    """Return floor and ceiling on these folds; only a reason if the corpus has no scenarios, or no single ratings."""
    if predictions is None:
        predictions = floor_predictions(folds, dimensions)
    ceiling = human_ceiling(folds, dimensions)
    human: dict[str, Score] = {}
    if ceiling.reason is None:
        human = _scores(ceiling)
    return FloorRecord(
        scores={name: _scores(floor) for name, floor in no_audio_floor(folds, dimensions, predictions).items()},
        reason=None if predictions else NO_SCENARIOS,
        ceiling=human,
        ceiling_reason=ceiling.reason,
        panel=panel_of_raters(folds, dimensions),
    )


def _scores(found: FloorScore | CeilingScore) -> dict[str, Score]:
    return {name: Score(mean=found.mean[name], pooled=found.pooled[name]) for name in found.mean}


def floor_csv(folds: Sequence[Fold], dimensions: Sequence[str], predictions: Mapping[str, Floats]) -> str:
    """Return `floor_predictions` as the text of floor.csv, with every digit.

    Columns: utterance, fold, then `<predictor>:<dimension>` on the rating scale, such as `scenario:valence`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["utterance", "fold", *(f"{name}:{d}" for name in predictions for d in dimensions)])
    about = [(u.id, fold.number) for fold in folds for u in fold.test]
    for i, (utterance, fold) in enumerate(about):
        writer.writerow([utterance, fold, *(repr(float(v)) for values in predictions.values() for v in values[i])])
    return text.getvalue()


def read_floor(directory: RunDirectory) -> pd.DataFrame | None:
    """Read a run's floor.csv; None if there is none: no scenarios, or a run of an earlier version.

    Raises ResultsError if it is not such a table.
    """
    import pandas as pd  # half a second

    if not directory.floor.is_file():
        return None
    try:
        # As text first: pandas' own parser may lose the last digit, and names must stay text.
        table = pd.read_csv(directory.floor, dtype=str, keep_default_na=False)
        numbers = dict.fromkeys(table.columns.drop(["utterance", "fold"]), np.float64)
        typed: pd.DataFrame = table.astype(numbers | {"fold": int})
    except (OSError, ValueError, KeyError) as error:
        raise ResultsError(f"{directory.floor}: cannot be read as a table of predictions: {error}") from None
    return typed


def floor_references(directory: RunDirectory, run: RunRecord, data: OutOfFold) -> dict[str, Floats]:
    """Return the stretched predictors of floor.csv as `[1, N, K]` in the rows of `data`, by name; empty without one.

    Models are held against the stretched ones: they are trained for CCC, and so must be what they have to beat.
    """
    table = read_floor(directory)
    if table is None:
        return {}
    rows = table.set_index(["fold", "utterance"]).reindex(
        list(zip(data.about["fold"], data.about["utterance"], strict=True))
    )
    names = [f"{'+'.join(by)}{STRETCHED}" for by in FLOORS]
    found = {
        f"floor ({', '.join(by)})": rows[[f"{name}:{d}" for d in run.dimensions]].to_numpy(dtype=np.float64)
        for by, name in zip(FLOORS, names, strict=True)
    }
    # Files of another run, or altered ones, are no reference.
    return {name: values[None] for name, values in found.items() if np.isfinite(values).all()}


# --- controlled for the scenario --------------------------------------------------------------------------------------


def with_controlled_scores(floor: FloorRecord, run: RunRecord, tables: Mapping[str, pd.DataFrame]) -> FloorRecord:
    """Add the scenario-controlled CCC of every condition of a complete run, mean over folds and seeds.

    `tables`: the predictions per trial name. A constant is scored in the same way, on the first seed's tables.
    """
    if floor.reason:
        return floor
    dimensions, first = run.dimensions, run.conditions[0]
    controlled = {
        condition: _mean(
            _controlled(tables[trial_name(condition, fold, seed)], dimensions)
            for fold in run.folds
            for seed in run.seeds
        )
        for condition in run.conditions
    }
    constant = _mean(
        _controlled(tables[trial_name(first, fold, run.seeds[0])], dimensions, constant=True) for fold in run.folds
    )
    return floor.model_copy(update={"controlled": controlled, "controlled_constant": constant})


def _mean(by_trial: Iterable[Ccc]) -> dict[str, Score]:
    scores = list(by_trial)
    # No pooled value: each test set is centred on its own means.
    return {name: Score(mean=mean_if_all(of[name] for of in scores), pooled=None) for name in scores[0]}


def _controlled(table: pd.DataFrame, dimensions: Sequence[str], constant: bool = False) -> Ccc:
    """Return a trial's scenario-controlled CCC per dimension, and their mean; `constant`: that of a constant."""
    scores: Ccc = {}
    for dimension in dimensions:
        known = table[table[f"{dimension}_true"].notna()]
        predicted = known[f"{dimension}_predicted"].to_numpy(dtype=np.float64)
        if constant:
            predicted = np.zeros(len(known))
        true = known[f"{dimension}_true"].to_numpy(dtype=np.float64)
        scores[dimension] = scenario_controlled_ccc(predicted, true, known["scenario"].to_numpy())
    return scores | {"avg": mean_if_all(scores.values())}


def scenario_controlled_ccc(
    prediction: npt.ArrayLike, truth: npt.ArrayLike, scenario: npt.NDArray[np.object_]
) -> float | None:
    """Return the CCC of one test set's predictions and truth, each minus its own scenario means; None if undefined.

    All `[N]`. Utterances without a scenario (`""`) form one group. Both sides lose their own means, so whatever is the
    same for all utterances of a scenario, a constant or the floor by scenario, scores 0. Subtracting the training mean
    from both, as is often done, puts the same noise into both and lets a constant score above 0.
    """
    _, group = np.unique(np.asarray(scenario, dtype=str), return_inverse=True)
    sizes = np.bincount(group)
    centred = []
    for values in (np.asarray(prediction, dtype=np.float64), np.asarray(truth, dtype=np.float64)):
        around = values - (np.bincount(group, values) / sizes)[group]
        # What is constant within scenarios must not score by its rounding errors.
        around[np.abs(around) < ROUNDING] = 0
        centred.append(around)
    return defined(ccc(*centred))
