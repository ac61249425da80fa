"""The comparison of a run's conditions, from run.json, result.json and predictions.csv alone."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt

from cvrunner.records.results import (
    Aggregate,
    Ccc,
    CorrectedT,
    Difference,
    Interval,
    RunRecord,
    SignCount,
    Summary,
    TrialResult,
)
from cvrunner.records.run_directory import RunDirectory, trial_name
from cvrunner.verdict.ccc import ccc, defined, mean_if_all
from cvrunner.verdict.out_of_fold import Floats, OutOfFold, out_of_fold
from cvrunner.verdict.predictions import IMPROVISED
from cvrunner.verdict.sentence import decide, sentence
from cvrunner.verdict.statistics import (
    LEVEL,
    RESAMPLES,
    Bootstrap,
    Paired,
    corrected_t,
    paired_bootstrap,
    sign_count,
)

Scores = dict[str, dict[str, Aggregate]]
AVG = "avg"
KINDS = (("scripted", IMPROVISED[False]), ("improvised", IMPROVISED[True]))


def summarise(directory: RunDirectory) -> Summary:
    """Aggregates, paired differences and the verdict; with trials missing, only their names and a verdict saying so.

    Raises ResultsError where the files contradict each other.
    """
    run = directory.read_run()
    results = directory.results(run)
    missing = [name for name in run.trials if name not in results]
    if missing:
        return _unfinished(run, missing)
    data = out_of_fold(directory, run, results)
    scores = {condition: condition_scores(run, results, data, condition) for condition in run.conditions}
    baseline, *others = run.conditions
    differences = {other: _differences(run, results, data, scores, other) for other in others}
    decisions = {other: decide(by_dimension[AVG]) for other, by_dimension in differences.items()}
    return Summary(
        run=run.run,
        status="COMPLETE",
        missing=[],
        baseline=baseline,
        scores=scores,
        differences=differences,
        decisions=decisions,
        groups={condition: _groups(run, data, condition) for condition in run.conditions},
        verdict=sentence(run, scores, differences, decisions),
    )


def _unfinished(run: RunRecord, missing: list[str]) -> Summary:
    count = f"{len(missing)} of {len(run.trials)} trials"
    have = "has" if len(missing) == 1 else "have"
    return Summary(
        run=run.run,
        status="INCOMPLETE",
        missing=missing,
        baseline=run.conditions[0],
        scores={},
        differences={},
        verdict=f"INCOMPLETE: {count} {have} no result ({', '.join(missing)}), so nothing is compared"
        + (", on synthetic data." if run.synthetic else "."),
    )


def _std(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return stdev(known) if len(known) > 1 else None


# --- one condition ---------------------------------------------------------------------------------------------------


def condition_scores(
    run: RunRecord, results: dict[str, TrialResult], data: OutOfFold, condition: str
) -> dict[str, Aggregate]:
    """By dimension and, last, `avg`."""
    pooled = _pooled(run, data, condition)
    scores = {}
    for dimension in (*run.dimensions, AVG):
        by_trial = _by_trial(run, results, condition, dimension)
        average = mean_if_all(by_trial.values())
        std = None if average is None else _std(by_trial.values())
        scores[dimension] = Aggregate(mean=average, std=std, pooled=pooled[dimension], by_trial=by_trial)
    return scores


def _by_trial(
    run: RunRecord, results: dict[str, TrialResult], condition: str, dimension: str
) -> dict[str, float | None]:
    """Test CCC by `fold-<k>/seed-<s>`."""
    return {
        f"fold-{fold}/seed-{seed}": results[trial_name(condition, fold, seed)].test_ccc.get(dimension)
        for fold in run.folds
        for seed in run.seeds
    }


def _pooled(run: RunRecord, data: OutOfFold, condition: str, rows: npt.NDArray[np.bool_] | None = None) -> Ccc:
    """CCC over `rows` (or all) of all folds together, mean over seeds, by dimension and `avg`."""
    scores: Ccc = {}
    for k, dimension in enumerate(run.dimensions):
        known = ~np.isnan(data.truth[:, k]) & (True if rows is None else rows)
        truth = data.truth[known, k]
        scores[dimension] = mean_if_all(
            defined(ccc(predicted[known, k], truth)) for predicted in data.predicted[condition]
        )
    return scores | {AVG: mean_if_all(scores.values())}


def _groups(run: RunRecord, data: OutOfFold, condition: str) -> dict[str, Ccc]:
    """CCC within each gender, scripted and improvised dialogues apart, and each speaker, where the corpus tells."""
    about = data.about
    parts = {f"gender {g}": (about["gender"] == g).to_numpy() for g in sorted(set(about["gender"]) - {""})}
    parts |= {kind: (about["improvised"] == value).to_numpy() for kind, value in KINDS}
    parts |= {f"speaker {s}": (about["speaker"] == s).to_numpy() for s in sorted(set(about["speaker"]))}
    return {name: _pooled(run, data, condition, rows) for name, rows in parts.items() if np.count_nonzero(rows) > 1}


# --- two conditions --------------------------------------------------------------------------------------------------


def _differences(
    run: RunRecord, results: dict[str, TrialResult], data: OutOfFold, scores: Scores, other: str
) -> dict[str, Difference]:
    baseline = run.conditions[0]
    paired = pair(data, data.predicted[baseline], data.predicted[other])
    return paired_differences(scores[baseline], scores[other], paired, results.values())


def pair(data: OutOfFold, baseline: Floats, other: Floats) -> Paired:
    """Predictions `[S, N, K]` of two conditions for the utterances of `data`."""
    columns = (data.about[name].to_numpy() for name in ("fold", "session", "dialogue"))
    return Paired(baseline, other, data.truth, *columns)


def paired_differences(
    baseline: dict[str, Aggregate], other: dict[str, Aggregate], data: Paired, results: Iterable[TrialResult]
) -> dict[str, Difference]:
    """Other minus baseline, by dimension and `avg`, of aggregates in the order of `data`'s columns."""
    bootstrap = paired_bootstrap(data)
    ratio = fmean(r.test_utterances / r.train_utterances for r in results)
    return {
        dimension: _difference(baseline[dimension], other[dimension], bootstrap, k, ratio)
        for k, dimension in enumerate(baseline)
    }


def _difference(
    baseline: Aggregate, other: Aggregate, bootstrap: Bootstrap, column: int, test_train_ratio: float
) -> Difference:
    by_trial = {name: _minus(other.by_trial[name], baseline.by_trial[name]) for name in other.by_trial}
    average = mean_if_all(by_trial.values())
    by_fold = None if average is None else _by_fold(by_trial)
    interval = None if average is None else _interval(bootstrap, column, pooled=False)
    return Difference(
        mean=average,
        std=None if average is None else _std(by_trial.values()),
        by_trial=by_trial,
        pooled=_minus(other.pooled, baseline.pooled),
        interval=interval,
        pooled_interval=_interval(bootstrap, column, pooled=True),
        interval_reason=None if interval else bootstrap.reason or "a CCC is undefined",
        corrected_t=None if by_fold is None else _corrected_t(by_fold, test_train_ratio),
        signs=None if by_fold is None else _signs(by_fold),
    )


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _by_fold(by_trial: dict[str, float | None]) -> npt.NDArray[np.float64]:
    """Differences by fold, averaged over seeds: seeds of a fold share its test set and count as one."""
    folds: dict[str, list[float]] = {}
    for name, value in by_trial.items():
        folds.setdefault(name.split("/")[0], []).append(float("nan") if value is None else value)
    return np.array([fmean(values) for values in folds.values()])


def _interval(bootstrap: Bootstrap, column: int, pooled: bool) -> Interval | None:
    found = bootstrap.interval(column, pooled)
    if found is None:
        return None
    return Interval(
        low=found.low,
        high=found.high,
        standard_error=found.standard_error,
        detectable=found.detectable,
        level=LEVEL,
        resamples=RESAMPLES,
    )


def _corrected_t(by_fold: npt.NDArray[np.float64], ratio: float) -> CorrectedT | None:
    found = corrected_t(by_fold, ratio)
    return found and CorrectedT(t=found[0], p=found[1], folds=len(by_fold), test_train_ratio=ratio)


def _signs(by_fold: npt.NDArray[np.float64]) -> SignCount:
    above, below, p, smallest = sign_count(by_fold)
    return SignCount(above=above, below=below, p=p, smallest_p=smallest)
