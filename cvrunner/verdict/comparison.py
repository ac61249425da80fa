"""The comparison of a run's conditions, from run.json, result.json and predictions.csv alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt

from cvrunner.records.results import Aggregate, Ccc, Difference, RunRecord, Summary, TrialResult
from cvrunner.records.run_directory import RunDirectory, trial_name
from cvrunner.verdict.ccc import ccc, defined, mean_if_all
from cvrunner.verdict.predictions import IMPROVISED, Floats, OutOfFold, out_of_fold, read_tables
from cvrunner.verdict.sentence import decide, sentence
from cvrunner.verdict.statistics import Bootstrap, Paired, corrected_t, paired_bootstrap, sign_count

AVG = "avg"
KINDS = {"scripted": IMPROVISED[False], "improvised": IMPROVISED[True]}


def summarise(directory: RunDirectory) -> Summary:
    """Read a run's files and compare its conditions. Raises ResultsError if the files contradict each other."""
    run = directory.read_run()
    results = directory.results(run)
    if missing := missing_trials(run, results):
        return unfinished(run, missing)
    return compare_conditions(run, results, out_of_fold(directory, run, results, read_tables(directory, results)))


def missing_trials(run: RunRecord, results: Mapping[str, TrialResult]) -> list[str]:
    """Return the names of the trials without a result, in the run's order."""
    return [name for name in run.trials if name not in results]


def unfinished(run: RunRecord, missing: list[str]) -> Summary:
    """Return the summary of a run with missing trials: their names and a verdict, but no number."""
    verb, data = "have", ""
    if len(missing) == 1:
        verb = "has"
    if run.synthetic:
        data = ", on synthetic data"
    return Summary(
        run=run.run,
        status="INCOMPLETE",
        missing=missing,
        baseline=run.conditions[0],
        scores={},
        differences={},
        verdict=f"INCOMPLETE: {len(missing)} of {len(run.trials)} trials {verb} no result ({', '.join(missing)}), so "
        f"nothing is compared{data}.",
    )


def compare_conditions(run: RunRecord, results: dict[str, TrialResult], data: OutOfFold) -> Summary:
    """Return aggregates, paired differences and the verdict of a complete run."""
    scores = {condition: condition_scores(run, results, data, condition) for condition in run.conditions}
    baseline, *others = run.conditions
    differences, decisions = {}, {}
    for other in others:
        paired = pair(data, data.predicted[baseline], data.predicted[other])
        differences[other] = paired_differences(scores[baseline], scores[other], paired, results.values())
        decisions[other] = decide(differences[other][AVG])
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


def _std(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    if len(known) < 2:
        return None
    return stdev(known)


# --- one condition ---------------------------------------------------------------------------------------------------


def condition_scores(
    run: RunRecord, results: dict[str, TrialResult], data: OutOfFold, condition: str
) -> dict[str, Aggregate]:
    """Return the test scores of a condition per dimension and, last, `avg`."""
    pooled = _pooled(run, data, condition)
    scores = {}
    for dimension in (*run.dimensions, AVG):
        by_trial = {
            f"fold-{fold}/seed-{seed}": results[trial_name(condition, fold, seed)].test_ccc.get(dimension)
            for fold in run.folds
            for seed in run.seeds
        }
        mean, std = mean_if_all(by_trial.values()), None
        # A spread without a mean would be one of the trials that happen to be defined.
        if mean is not None:
            std = _std(by_trial.values())
        scores[dimension] = Aggregate(mean=mean, std=std, pooled=pooled[dimension], by_trial=by_trial)
    return scores


def _pooled(run: RunRecord, data: OutOfFold, condition: str, rows: npt.NDArray[np.bool_] | None = None) -> Ccc:
    """Return the CCC over `rows` (None: all) of all folds together, mean over seeds, per dimension and `avg`."""
    scores: Ccc = {}
    for k, dimension in enumerate(run.dimensions):
        known = ~np.isnan(data.truth[:, k])
        if rows is not None:
            known &= rows
        truth = data.truth[known, k]
        scores[dimension] = mean_if_all(
            defined(ccc(predicted[known, k], truth)) for predicted in data.predicted[condition]
        )
    return scores | {AVG: mean_if_all(scores.values())}


def _groups(run: RunRecord, data: OutOfFold, condition: str) -> dict[str, Ccc]:
    """Return the CCC per gender, of scripted and of improvised dialogues, and per speaker, as far as they are known."""
    about = data.about
    parts = {f"gender {g}": (about["gender"] == g).to_numpy() for g in sorted(set(about["gender"]) - {""})}
    parts |= {kind: (about["improvised"] == value).to_numpy() for kind, value in KINDS.items()}
    parts |= {f"speaker {s}": (about["speaker"] == s).to_numpy() for s in sorted(set(about["speaker"]))}
    # A single utterance has no CCC.
    return {name: _pooled(run, data, condition, rows) for name, rows in parts.items() if np.count_nonzero(rows) > 1}


# --- two conditions --------------------------------------------------------------------------------------------------


def pair(data: OutOfFold, baseline: Floats, other: Floats) -> Paired:
    """Pair the predictions `[S, N, K]` of two conditions for the utterances of `data`."""
    columns = (data.about[name].to_numpy() for name in ("fold", "session", "dialogue"))
    return Paired(baseline, other, data.truth, *columns)


def paired_differences(
    baseline: dict[str, Aggregate], other: dict[str, Aggregate], data: Paired, results: Iterable[TrialResult]
) -> dict[str, Difference]:
    """Return other minus baseline, per dimension and `avg`; the aggregates are in the order of `data`'s columns."""
    bootstrap = paired_bootstrap(data)
    # Folds differ in size; the corrected t takes their mean ratio.
    ratio = fmean(r.test_utterances / r.train_utterances for r in results)
    return {
        dimension: _difference(baseline[dimension], other[dimension], bootstrap, k, ratio)
        for k, dimension in enumerate(baseline)
    }


def _difference(
    baseline: Aggregate, other: Aggregate, bootstrap: Bootstrap, column: int, test_train_ratio: float
) -> Difference:
    by_trial = {name: _minus(other.by_trial[name], baseline.by_trial[name]) for name in other.by_trial}
    pooled = _minus(other.pooled, baseline.pooled)
    pooled_interval = bootstrap.interval(column, pooled=True)
    no_interval: str | None = bootstrap.reason or "a CCC is undefined"
    by_fold = _by_fold(by_trial)
    if by_fold is None:
        return Difference(
            mean=None,
            std=None,
            by_trial=by_trial,
            pooled=pooled,
            pooled_interval=pooled_interval,
            interval_reason=no_interval,
        )
    interval = bootstrap.interval(column)
    if interval is not None:
        no_interval = None
    return Difference(
        mean=mean_if_all(by_trial.values()),
        std=_std(by_trial.values()),
        by_trial=by_trial,
        pooled=pooled,
        interval=interval,
        pooled_interval=pooled_interval,
        interval_reason=no_interval,
        corrected_t=corrected_t(by_fold, test_train_ratio),
        signs=sign_count(by_fold),
    )


def _minus(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return None
    return one - other


def _by_fold(by_trial: dict[str, float | None]) -> npt.NDArray[np.float64] | None:
    """Average differences over the seeds of each fold, which share its test set and count as one; None if undefined."""
    folds: dict[str, list[float]] = {}
    for name, value in by_trial.items():
        if value is None:
            return None
        folds.setdefault(name.split("/")[0], []).append(value)
    return np.array([fmean(values) for values in folds.values()])
