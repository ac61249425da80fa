"""The no-audio floor and the human ceiling as run.json keeps them, and scores with the scenario taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cvrunner.records.results import FloorRecord, RunRecord, Score
from cvrunner.records.run_directory import RunDirectory
from cvrunner.verdict.ccc import Ccc, mean_if_all
from cvrunner.verdict.ceiling import CeilingScore, human_ceiling
from cvrunner.verdict.floor import FloorScore, no_audio_floor, scenario_controlled_ccc
from cvrunner.verdict.out_of_fold import read_predictions

if TYPE_CHECKING:
    from cvrunner.data.folds import Fold


def floor_record(folds: Sequence[Fold], dimensions: Sequence[str]) -> FloorRecord:
    """Floor and ceiling on these folds; only a reason where the corpus has no scenarios, or no single ratings."""
    floors, ceiling = no_audio_floor(folds, dimensions), human_ceiling(folds, dimensions)
    reason = next((floor.reason for floor in floors.values() if floor.reason), None)
    return FloorRecord(
        scores={} if reason else {name: _scores(f) for name, f in floors.items()},
        reason=reason,
        ceiling={} if ceiling.reason else _scores(ceiling),
        ceiling_reason=ceiling.reason,
    )


def with_controlled_scores(
    floor: FloorRecord, folds: Sequence[Fold], directory: RunDirectory, run: RunRecord
) -> FloorRecord:
    """`floor` with the scenario-controlled CCC of every condition of a complete run, mean over folds and seeds."""
    if floor.reason:
        return floor
    controlled = {name: _controlled(folds, directory, run, name) for name in run.conditions}
    return floor.model_copy(update={"controlled": controlled})


def _scores(found: FloorScore | CeilingScore) -> dict[str, Score]:
    return {name: Score(mean=found.mean[name], pooled=found.pooled[name]) for name in found.mean}


def _controlled(folds: Sequence[Fold], directory: RunDirectory, run: RunRecord, condition: str) -> dict[str, Score]:
    by_trial = [_trial_scores(fold, directory, run, condition, seed) for fold in folds for seed in run.seeds]
    # Pooling would set the expectations of different training sets against each other, so there is a mean only.
    names = (*run.dimensions, "avg")
    return {name: Score(mean=mean_if_all(scores[name] for scores in by_trial), pooled=None) for name in names}


def _trial_scores(fold: Fold, directory: RunDirectory, run: RunRecord, condition: str, seed: int) -> Ccc:
    table = read_predictions(directory, condition, fold.number, seed).set_index("utterance")
    order = [u.id for u in fold.test]
    predicted: Mapping[str, npt.NDArray[np.float64]] = {
        d: table.loc[order, f"{d}_predicted"].to_numpy(dtype=np.float64) for d in run.dimensions
    }
    scores: Ccc = {d: scenario_controlled_ccc(fold.train, fold.test, predicted[d], d) for d in run.dimensions}
    return scores | {"avg": mean_if_all(scores.values())}
