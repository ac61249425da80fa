"""The comparison of a run's conditions, from run.json, result.json and predictions.csv alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt

from cvrunner.config.schema import Config
from cvrunner.config.sections import VerdictConfig
from cvrunner.records.results import Ccc, RunRecord, Score, TrialResult
from cvrunner.records.run_directory import trial_name
from cvrunner.records.summary import (
    Aggregate,
    Convergence,
    CorpusLevel,
    Cost,
    Difference,
    Interval,
    Reference,
    SubsetDifference,
    Summary,
)
from cvrunner.verdict.ccc import ccc_of_rows, mean_if_all
from cvrunner.verdict.levels import ALPHA, corpus_levels, holm, p_value, speakers_level, too_few_seeds
from cvrunner.verdict.predictions import IMPROVISED, Floats, OutOfFold
from cvrunner.verdict.protocol import cluster_unit
from cvrunner.verdict.sentence import confirmations, decide, sentence
from cvrunner.verdict.statistics import Bootstrap, Compared, bootstrap

AVG = "avg"
KINDS = {"scripted": IMPROVISED[False], "improvised": IMPROVISED[True]}
LENGTHS = {"below 2 s": (0.0, 2.0), "2 to 5 s": (2.0, 5.0), "5 s and longer": (5.0, np.inf)}
SUBSET_RESAMPLES = 1000
Scores = Mapping[str, Mapping[str, Aggregate]]
"""By condition, then dimension or `avg`."""


@dataclass(frozen=True)
class Design:
    """What the uncertainty of every difference of a comparison is computed from."""

    unit: str
    """Cluster that is resampled: `dialogue` or `speaker`."""
    drawn: Bootstrap
    other_unit: Bootstrap
    """With the other unit as the cluster."""
    test_train_ratio: float | None
    """None: folds say nothing about new speakers, because they share test utterances."""
    margin: float
    no_training_variance: str | None
    """Why level 1 is impossible, because of the seeds; None if it is possible."""


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


def mixed_precision(config: Config, results: Iterable[TrialResult]) -> str:
    """Return how the same `train.precision` became several ones, on several devices; empty if it did not. A difference
    between such trials would be one of machines. Conditions that request different precisions are meant to be compared.
    """
    found: dict[str, set[str]] = {}
    for result in results:
        found.setdefault(config.for_condition(result.condition).train.precision, set()).add(result.precision)
    mixed = [f"{requested} became {' and '.join(sorted(of))}" for requested, of in found.items() if len(of) > 1]
    return "; ".join(mixed)


def compare_conditions(
    run: RunRecord,
    results: dict[str, TrialResult],
    data: OutOfFold,
    settings: VerdictConfig,
    references: Mapping[str, Floats] | None = None,
    convergence: Mapping[str, Convergence] | None = None,
    added_after_look: Sequence[str] = (),
    mixed: str = "",
) -> Summary:
    """Return aggregates, paired differences at two levels, and the verdict of a complete run.

    `references`: predictions `[1, N, K]` of the predictors that are no condition, by name, in the rows of `data`.
    `convergence`: by condition, as far as the journals show it. `added_after_look`: seeds and conditions that were
    added after test scores had been seen. `mixed`: from `mixed_precision`; if there is one, only scores are returned.
    """
    references = references or {}
    scores = {condition: condition_scores(run, results, data, condition) for condition in run.conditions}
    baseline, *others = run.conditions
    if mixed:
        return Summary(
            run=run.run,
            status="COMPLETE",
            missing=[],
            baseline=baseline,
            scores=scores,
            differences={},
            primary=settings.primary,
            margin=settings.margin,
            verdict=f"NOT COMPARED: train.precision {mixed}, so a difference of conditions could be one of machines. "
            "Set train.precision to one that all devices have, and run again with --new.",
        )
    design = design_of(run, data, dict(data.predicted) | dict(references), results.values(), settings)
    differences = paired_differences(design, scores, baseline, others)
    with_holm(differences, settings.primary)
    decisions = {other: decide(differences[other][settings.primary], settings.margin) for other in others}
    summary = Summary(
        run=run.run,
        status="COMPLETE",
        missing=[],
        baseline=baseline,
        scores=scores,
        differences=differences,
        primary=settings.primary,
        margin=settings.margin,
        cluster=design.unit,
        clusters=design.drawn.clusters,
        decisions=decisions,
        for_new_speakers=confirmations(decisions, differences, settings.primary),
        references={
            name: _reference(run, data, design, scores, name, predicted) for name, predicted in references.items()
        },
        groups={
            condition: {name: _pooled(run, data, condition, rows) for name, rows in subsets_of(data).items()}
            for condition in run.conditions
        },
        subsets={other: _subset_differences(run, data, design, settings.primary, other) for other in others},
        convergence=dict(convergence or {}),
        costs={c: _cost([r for r in results.values() if r.condition == c]) for c in run.conditions},
        added_after_look=list(added_after_look),
        verdict="",
    )
    return summary.model_copy(update={"verdict": sentence(run, summary)})


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


def _cost(results: Sequence[TrialResult]) -> Cost:
    """Return the cost of the trials of one condition, in which folds may have different settings."""
    parameters = max((result.parameters for result in results), key=lambda count: count.trainable)
    adapters = sum(count for group, count in parameters.groups.items() if group.startswith("lora"))
    hours = sum(result.train_s for result in results) / 3600
    return Cost(parameters=parameters.trainable, adapters=adapters, hours=hours)


def _pooled(run: RunRecord, data: OutOfFold, condition: str, rows: npt.NDArray[np.bool_] | None = None) -> Ccc:
    """Return the CCC over `rows` (None: all) of all folds together, mean over seeds, per dimension and `avg`."""
    by_seed = [ccc_of_rows(predicted, data.truth, run.dimensions, rows) for predicted in data.predicted[condition]]
    scores: Ccc = {dimension: mean_if_all(of[dimension] for of in by_seed) for dimension in run.dimensions}
    return scores | {AVG: mean_if_all(scores.values())}


def subsets_of(data: OutOfFold) -> dict[str, npt.NDArray[np.bool_]]:
    """Return the rows of each part of the test data, as far as the corpus names them: gender, kind, length, speaker."""
    about, seconds = data.about, np.array([float(value or "nan") for value in data.about["duration_s"]])
    parts = {f"gender {g}": (about["gender"] == g).to_numpy() for g in sorted(set(about["gender"]) - {""})}
    parts |= {kind: (about["improvised"] == value).to_numpy() for kind, value in KINDS.items()}
    parts |= {name: (seconds >= low) & (seconds < high) for name, (low, high) in LENGTHS.items()}
    parts |= {f"speaker {s}": (about["speaker"] == s).to_numpy() for s in sorted(set(about["speaker"]))}
    # A single utterance has no CCC.
    return {name: rows for name, rows in parts.items() if np.count_nonzero(rows) > 1}


def _subset_differences(
    run: RunRecord, data: OutOfFold, design: Design, outcome: str, condition: str
) -> dict[str, SubsetDifference]:
    """Return the difference from the baseline within each part, all folds pooled."""
    baseline, column = run.conditions[0], [*run.dimensions, AVG].index(outcome)
    found = {}
    for name, rows in subsets_of(data).items():
        both = {c: data.predicted[c][:, rows] for c in (baseline, condition)}
        by_seed = {
            c: [ccc_of_rows(p, data.truth, run.dimensions, rows)[outcome] for p in data.predicted[c]] for c in both
        }
        values = [minus(one, other) for one, other in zip(by_seed[condition], by_seed[baseline], strict=True)]
        mean, interval = mean_if_all(values), None
        # Pooled, a part is like a single fold.
        if mean is not None and not (design.no_training_variance or too_few_seeds(1, len(values))):
            about = data.about[rows]
            # All utterances of a speaker are one cluster; within it, dialogues are resampled.
            unit = "dialogue" if name.startswith("speaker ") else design.unit
            one_fold = np.zeros(len(about), dtype=np.int64)
            compared = Compared(both, data.truth[rows], one_fold, about["session"].to_numpy(), about[unit].to_numpy())
            drawn = bootstrap(compared, unit, SUBSET_RESAMPLES)
            draws = drawn.differences([condition], baseline, column)
            if draws is not None:
                (level,) = corpus_levels(np.array([[values]], dtype=np.float64), draws, drawn.df, design.margin)
                interval = level.interval
        found[name] = SubsetDifference(utterances=int(rows.sum()), mean=mean, interval=interval)
    return found


# --- two conditions --------------------------------------------------------------------------------------------------


def design_of(
    run: RunRecord,
    data: OutOfFold,
    predicted: Mapping[str, Floats],
    results: Iterable[TrialResult],
    settings: VerdictConfig,
) -> Design:
    """Resample the predictions `[S, N, K]` of several predictors together, with either unit as the cluster."""
    about, units = data.about, ("dialogue", "speaker")
    unit = cluster_unit(settings, zip(about["session"], about["speaker"], strict=True))
    drawn = {}
    for name in units:
        fold, session, cluster = (about[column].to_numpy() for column in ("fold", "session", name))
        drawn[name] = bootstrap(Compared(predicted, data.truth, fold, session, cluster, run.folds_share_test), name)
    shared = None
    if not run.folds_have_own_seeds:
        shared = "an earlier version trained the folds of a seed with the same random draws"
    # Folds differ in size; the corrected t takes their mean ratio.
    ratio = None if run.folds_share_test else fmean(r.test_utterances / r.train_utterances for r in results)
    other = units[1 - units.index(unit)]
    return Design(
        unit, drawn[unit], drawn[other], ratio, settings.margin, shared or too_few_seeds(len(run.folds), len(run.seeds))
    )


def paired_differences(
    design: Design, scores: Scores, baseline: str, others: Sequence[str]
) -> dict[str, dict[str, Difference]]:
    """Return each of `others` minus the baseline, by name, then dimension or `avg`, at both levels.

    The intervals of level 1 are simultaneous over `others`.
    """
    found: dict[str, dict[str, Difference]] = {other: {} for other in others}
    for column, outcome in enumerate(scores[baseline]):
        below = scores[baseline][outcome]
        by_trial = {
            other: {
                trial: minus(value, below.by_trial[trial]) for trial, value in scores[other][outcome].by_trial.items()
            }
            for other in others
        }
        arrays = {name: array for name, values in by_trial.items() if (array := _by_fold_and_seed(values)) is not None}
        levels, reason = _levels_on_corpus(design, arrays, baseline, column)
        for other in others:
            draws = design.drawn.differences([other], baseline, column)
            as_trained = speakers = None
            if other in arrays and design.test_train_ratio is not None:
                speakers = speakers_level(arrays[other].mean(1), design.test_train_ratio, design.margin, len(others))
            if draws is not None:
                low, high = np.quantile(draws[:, 0].mean(axis=1), [ALPHA / 2, 1 - ALPHA / 2])
                as_trained = Interval(low=float(low), high=float(high), level=1 - ALPHA)
            mean = mean_if_all(by_trial[other].values())
            found[other][outcome] = Difference(
                mean=mean,
                # A spread without a mean would be one of the trials that happen to be defined.
                std=None if mean is None else _std(by_trial[other].values()),
                by_trial=by_trial[other],
                pooled=minus(scores[other][outcome].pooled, below.pooled),
                on_corpus=levels.get(other),
                no_corpus_level=None if other in levels else reason or "a CCC is undefined",
                as_trained=as_trained,
                new_speakers=speakers,
            )
    return found


def _levels_on_corpus(
    design: Design, differences: Mapping[str, Floats], baseline: str, column: int
) -> tuple[dict[str, CorpusLevel], str | None]:
    """Return level 1 of the differences `[F, S]` by name, or why there is none."""
    if reason := design.no_training_variance or design.drawn.reason:
        return {}, reason
    names = list(differences)
    draws = design.drawn.differences(names, baseline, column) if names else None
    if draws is None:
        return {}, None
    stacked = np.stack([differences[name] for name in names])
    levels = corpus_levels(stacked, draws, design.drawn.df, design.margin)
    other = design.other_unit.differences(names, baseline, column)
    if other is not None:
        second = corpus_levels(stacked, other, design.other_unit.df, design.margin)
        levels = [one.model_copy(update={"other_unit": two.interval}) for one, two in zip(levels, second, strict=True)]
    return dict(zip(names, levels, strict=True)), None


def with_holm(differences: dict[str, dict[str, Difference]], primary: str) -> None:
    """Add the adjusted p values of the secondary outcomes: all outcomes but the primary one, of all conditions."""
    secondary = [
        (name, outcome, difference.on_corpus, difference.mean)
        for name, by_outcome in differences.items()
        for outcome, difference in by_outcome.items()
        if outcome != primary and difference.on_corpus is not None and difference.mean is not None
    ]
    adjusted = holm([p_value(mean, level.standard_error, level.df) for *_, level, mean in secondary])
    for (name, outcome, level, _), p in zip(secondary, adjusted, strict=True):
        with_p = level.model_copy(update={"holm_p": p})
        differences[name][outcome] = differences[name][outcome].model_copy(update={"on_corpus": with_p})


def _reference(
    run: RunRecord, data: OutOfFold, design: Design, scores: Scores, name: str, predicted: Floats
) -> Reference:
    """Return the scores of a predictor without seeds, and each condition's lead over it."""
    about_fold = data.about["fold"].to_numpy()
    by_fold = {fold: ccc_of_rows(predicted[0], data.truth, run.dimensions, about_fold == fold) for fold in run.folds}
    pooled = ccc_of_rows(predicted[0], data.truth, run.dimensions)
    own = {
        outcome: Aggregate(
            mean=mean_if_all(of[outcome] for of in by_fold.values()),
            std=None,
            pooled=pooled[outcome],
            # The reference has no seeds: every seed of a condition is compared with the same predictions.
            by_trial={f"fold-{fold}/seed-{seed}": by_fold[fold][outcome] for fold in run.folds for seed in run.seeds},
        )
        for outcome in (*run.dimensions, AVG)
    }
    leads = {
        condition: paired_differences(design, {condition: of, name: own}, name, [condition])[condition]
        for condition, of in scores.items()
    }
    return Reference(scores={d: Score(mean=a.mean, pooled=a.pooled) for d, a in own.items()}, leads=leads)


def minus(one: float | None, other: float | None) -> float | None:
    """Return a difference; None if a value is undefined."""
    if one is None or other is None:
        return None
    return one - other


def _by_fold_and_seed(by_trial: Mapping[str, float | None]) -> Floats | None:
    """Return differences by `fold-<k>/seed-<s>` as `[F, S]`; None if one is undefined."""
    folds: dict[str, list[float]] = {}
    for name, value in by_trial.items():
        if value is None:
            return None
        folds.setdefault(name.split("/")[0], []).append(value)
    return np.array(list(folds.values()), dtype=np.float64)
