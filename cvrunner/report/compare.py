"""`compare`: two runs, paired if both tested the same utterances in the same folds, else not subtracted at all.

Only the runs' files are read. Runs can be paired if split and corpus have the same digests; everything else may differ,
since that is what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cvrunner.config.sections import VerdictConfig
from cvrunner.errors import IncompleteRunError, ResultsError, UsageError
from cvrunner.records.results import Record, RunRecord, TrialResult, ccc_label
from cvrunner.records.run_directory import RunDirectory
from cvrunner.records.summary import Aggregate, Decision, Difference
from cvrunner.report.evidence import differing, settings
from cvrunner.report.tables import table_of_differences, table_of_folds, table_of_limits, table_of_scores
from cvrunner.text import Table, tables_as_text
from cvrunner.verdict.comparison import (
    Design,
    condition_scores,
    design_of,
    missing_trials,
    paired_differences,
    with_holm,
)
from cvrunner.verdict.predictions import OutOfFold, out_of_fold, read_tables
from cvrunner.verdict.sentence import capitalised, clause, decide, design

# Versions may write the same rating with different digits.
LABEL_TOLERANCE = 1e-9


class PairedConditions(Record):
    """A condition of the second run minus one of the first; names are `<run>/<condition>`."""

    baseline: str
    other: str
    differences: dict[str, Difference]
    """Per dimension and `avg`."""
    decision: Decision
    """Level 1, on the primary outcome."""


class RunComparison(Record):
    """What `compare` found; printed as it is with `--json`."""

    paired: bool
    unpaired_because: list[str]
    """Why nothing is subtracted; empty if paired."""
    dimensions: list[list[str]]
    """Of the first run, of the second."""
    folds: list[int]
    """Of the pairs; empty without pairs."""
    seeds: list[int]
    """Seeds that both runs have; empty without pairs."""
    primary: str
    """The outcome that decides, as declared by the first run, and its margin."""
    margin: float
    cluster: str = "dialogue"
    """Unit that is resampled."""
    scores: dict[str, dict[str, Aggregate]]
    """Per `<run>/<condition>`, then dimension or `avg`."""
    pairs: list[PairedConditions]
    settings: dict[str, dict[str, str]]
    """Per `<run>/<condition>`: what its numbers depend on."""
    verdict: str
    """One sentence."""


@dataclass(frozen=True)
class Side:
    """One condition of one run, all its trials finished."""

    name: str
    condition: str
    results: dict[str, TrialResult]
    data: OutOfFold
    scores: dict[str, Aggregate]
    settings: dict[str, str]
    """With the encoder's weights and cvrunner's version, which are not in the configuration."""


def compare_runs(
    first: RunDirectory,
    second: RunDirectory,
    condition: str | None = None,
    with_: str | None = None,
    unpaired: bool = False,
) -> RunComparison:
    """Compare conditions of two runs: those with the same name, or `condition` of the first and `with_` of the second.

    With `unpaired`, there are only scores. Raises UsageError for unknown conditions, ResultsError if the runs cannot be
    paired, and IncompleteRunError if trials are missing.
    """
    runs = first.read_run(), second.read_run()
    chosen = choose(runs[0], runs[1], condition, with_)
    if first.path.resolve() == second.path.resolve() and any(one == other for one, other in chosen):
        raise UsageError(f"{first.name}: the same run twice; choose two conditions with --condition and --with")
    names = (first.name, second.name)
    if first.name == second.name and first.path.resolve() != second.path.resolve():
        names = (f"{first.name} (1)", f"{second.name} (2)")
    if unpaired:
        because = obstacles(*runs) or ["--unpaired was given"]
        return _side_by_side((first, second), runs, names, chosen, because)
    if found := obstacles(*runs):
        raise ResultsError(
            f"{names[0]} and {names[1]} cannot be paired: {'; '.join(found)}. --unpaired shows their scores side by "
            "side, without a difference"
        )
    # A seed that only one run has cannot be paired.
    seeds = [seed for seed in runs[0].seeds if seed in runs[1].seeds]
    sides = [
        (read_side(first, runs[0], one, seeds, names[0]), read_side(second, runs[1], other, seeds, names[1]))
        for one, other in chosen
    ]
    verdict = first.read_config().verdict
    # The pairs of one comparison need not share a baseline, so their intervals are not simultaneous.
    designs, pairs = zip(*(_pair(*both, runs, seeds, verdict) for both in sides), strict=True)
    clauses = [
        clause(p.other, p.baseline, verdict.primary, p.differences[verdict.primary], p.decision, verdict.margin)
        for p in pairs
    ]
    shown = [side for both in sides for side in both]
    return RunComparison(
        paired=True,
        unpaired_because=[],
        dimensions=[run.dimensions for run in runs],
        folds=runs[0].folds,
        seeds=seeds,
        primary=verdict.primary,
        margin=verdict.margin,
        cluster=designs[0].unit,
        scores={side.name: side.scores for side in shown},
        pairs=list(pairs),
        settings={side.name: side.settings for side in shown},
        verdict=capitalised(f"{'; '.join(clauses)}; {design(runs[0].folds, seeds, runs[0].synthetic)}."),
    )


def choose(first: RunRecord, second: RunRecord, condition: str | None, with_: str | None) -> list[tuple[str, str]]:
    """Return pairs of a condition of the first run and one of the second. Raises UsageError."""
    if condition is None and with_ is None:
        shared = [(name, name) for name in first.conditions if name in second.conditions]
        if not shared:
            raise UsageError(
                f"no condition has the same name in both runs ({', '.join(first.conditions)} and "
                f"{', '.join(second.conditions)}): choose with --condition and --with"
            )
        return shared
    one, other = condition or with_ or "", with_ or condition or ""
    for option, name, run in (("--condition", one, first), ("--with", other, second)):
        if name not in run.conditions:
            raise UsageError(f"{option} {name}: {run.run} has {', '.join(run.conditions)}")
    return [(one, other)]


def obstacles(first: RunRecord, second: RunRecord) -> list[str]:
    """Return why two runs cannot be paired; empty if they can."""
    found = []
    for what, one, other in (
        ("split", first.split_digest, second.split_digest),
        ("corpus (audio or labels)", first.corpus_digest, second.corpus_digest),
    ):
        if one != other:
            found.append(f"the {what} differs (digests {one[:12]} and {other[:12]})")
    if first.dimensions != second.dimensions:
        found.append(f"the dimensions differ ({', '.join(first.dimensions)} and {', '.join(second.dimensions)})")
    if first.protocol != second.protocol:
        found.append(f"the protocol differs ({first.protocol} and {second.protocol})")
    if not set(first.seeds) & set(second.seeds):
        found.append(f"no seed is in both ({first.seeds} and {second.seeds})")
    return found


def read_side(directory: RunDirectory, run: RunRecord, condition: str, seeds: Sequence[int], name: str) -> Side:
    """Read one condition with its predictions and scores. Raises IncompleteRunError naming the missing trials."""
    # Only these trials have to be finished: a run with another, incomplete condition can be compared.
    trials = {n: t for n, t in run.trials.items() if t.condition == condition and t.seed in seeds}
    only = run.model_copy(update={"conditions": [condition], "seeds": list(seeds), "trials": trials})
    results = directory.results(only)
    if missing := missing_trials(only, results):
        raise IncompleteRunError(f"{name}: no result for {', '.join(missing)}, so nothing is compared")
    data = out_of_fold(directory, only, results, read_tables(directory, results))
    scores = condition_scores(only, results, data, condition)
    shown = {key: str(value) for key, value in settings(directory.read_config(), condition).items()}
    shown["encoder weights, SHA-256"] = ", ".join(sorted({r.encoder_digest[:12] for r in results.values()}))
    shown["cvrunner"] = run.cvrunner_version
    return Side(f"{name}/{condition}", condition, results, data, scores, shown)


def _pair(
    baseline: Side, other: Side, runs: tuple[RunRecord, RunRecord], seeds: list[int], verdict: VerdictConfig
) -> tuple[Design, PairedConditions]:
    """Compare two sides at both levels, over their common seeds."""
    _check_same_test(baseline, other)
    _check_same_precision(baseline, other)
    predicted = {
        baseline.name: baseline.data.predicted[baseline.condition],
        other.name: other.data.predicted[other.condition],
    }
    # If the folds of one run shared their random draws, the differences of the folds do too.
    older = min(runs, key=lambda run: run.folds_have_own_seeds).model_copy(update={"seeds": seeds})
    results = [*baseline.results.values(), *other.results.values()]
    design = design_of(older, baseline.data, predicted, results, verdict)
    scores = {baseline.name: baseline.scores, other.name: other.scores}
    differences = paired_differences(design, scores, baseline.name, [other.name])
    with_holm(differences, verdict.primary)
    of = differences[other.name]
    decision = decide(of[verdict.primary], verdict.margin)
    return design, PairedConditions(baseline=baseline.name, other=other.name, differences=of, decision=decision)


def _check_same_precision(one: Side, other: Side) -> None:
    """Raise ResultsError if the same `train.precision` became another one on another device: the difference would be
    one of machines. Conditions that request different precisions are meant to be compared."""
    requested = {side.settings["train.precision"] for side in (one, other)}
    found = {f"{r.precision} on {r.device}": r.precision for side in (one, other) for r in side.results.values()}
    if len(requested) == 1 and len(set(found.values())) > 1:
        raise ResultsError(
            f"{one.name} and {other.name}: train.precision {requested.pop()} became {' and '.join(sorted(found))}; set "
            "it to one that all devices have, or give --unpaired"
        )


def _check_same_test(one: Side, other: Side) -> None:
    """Raise ResultsError if the predictions are not of the same utterances and ratings, although the digests are equal.

    A digest is only what the run recorded; the files may have been changed since.
    """
    keys = ["fold", "utterance"]
    rows, others = one.data.about[keys].to_numpy(), other.data.about[keys].to_numpy()
    if rows.shape != others.shape or not bool((rows == others).all()):
        raise ResultsError(f"{one.name} and {other.name}: the test utterances in predictions.csv differ")
    if not np.allclose(one.data.truth, other.data.truth, rtol=0, atol=LABEL_TOLERANCE, equal_nan=True):
        raise ResultsError(f"{one.name} and {other.name}: the true ratings in predictions.csv differ")


def _side_by_side(
    directories: tuple[RunDirectory, RunDirectory],
    runs: tuple[RunRecord, RunRecord],
    names: tuple[str, str],
    chosen: list[tuple[str, str]],
    because: list[str],
) -> RunComparison:
    """Return the scores of every chosen condition over its run's folds and seeds, without differences."""
    sides = [
        read_side(directory, run, condition, run.seeds, name)
        for pair_of in chosen
        for directory, run, condition, name in zip(directories, runs, pair_of, names, strict=True)
    ]
    return RunComparison(
        paired=False,
        unpaired_because=because,
        dimensions=[run.dimensions for run in runs],
        folds=[],
        seeds=[],
        primary="avg",
        margin=0.0,
        scores={side.name: side.scores for side in sides},
        pairs=[],
        settings={side.name: side.settings for side in sides},
        verdict=f"UNPAIRED: {'; '.join(because)}, so no difference is given.",
    )


# --- as text ----------------------------------------------------------------------------------------------------------


def comparison_text(comparison: RunComparison, width: int = 100) -> str:
    """Return the comparison for a terminal of `width` columns; the verdict is last."""
    first, second = comparison.dimensions
    label = {dimension: ccc_label(dimension) for dimension in first if dimension in second}
    if first == second:
        # Over different dimensions, the averages would have the same name and different meanings.
        label["avg"] = ccc_label("avg")
    title = "Test CCC by run and condition: mean ± standard deviation over folds and seeds"
    if not comparison.paired:
        title += ", UNPAIRED: do not subtract"
    tables = [table_of_scores(title, comparison.scores, label)]
    if comparison.paired:
        named = {f"{pair.other} - {pair.baseline}": pair.differences for pair in comparison.pairs}
        folds, seeds = comparison.folds, comparison.seeds
        tables.append(table_of_differences("Paired differences", named, comparison.primary, comparison.cluster))
        tables.append(table_of_limits(named, comparison.primary, comparison.margin, comparison.cluster))
        # Each run's report has the scores by fold; only the differences are new here.
        tables.append(table_of_folds("Differences by fold", {}, named, folds, seeds, list(label)))
    rows = differing(comparison.settings)
    if rows:
        tables.append(Table("Settings that differ", ["key", *comparison.settings], rows))
    return tables_as_text(tables, width, comparison.verdict)
