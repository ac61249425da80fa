"""Two runs held against each other: paired where both tested the same utterances in the same folds, else not at all.

Files alone are read. What makes a pair is the split and the corpus, by digest; everything else may differ, since it is
what one wants to compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cvrunner.config.schema import Config
from cvrunner.errors import IncompleteRunError, ResultsError, UsageError
from cvrunner.records.results import Aggregate, Decision, Difference, Record, RunRecord, TrialResult
from cvrunner.records.run_directory import RunDirectory
from cvrunner.report.evidence import settings
from cvrunner.verdict.comparison import condition_scores, pair, paired_differences
from cvrunner.verdict.out_of_fold import OutOfFold, out_of_fold
from cvrunner.verdict.sentence import clause, decide, design

LABEL_TOLERANCE = 1e-9


class PairedConditions(Record):
    """A condition of the second run minus one of the first; names are `<run>/<condition>`."""

    baseline: str
    other: str
    differences: dict[str, Difference]
    """By dimension and `avg`."""
    decision: Decision
    """On CCC-Avg."""


class RunComparison(Record):
    """What `compare` found; with `--json`, what it prints."""

    paired: bool
    unpaired_because: list[str]
    """Why nothing is subtracted, where nothing is."""
    dimensions: list[list[str]]
    """Of the first run, of the second."""
    folds: list[int]
    """Of the pairs; empty without pairs."""
    seeds: list[int]
    """Those that both runs have; empty without pairs."""
    scores: dict[str, dict[str, Aggregate]]
    """By `<run>/<condition>`, then dimension or `avg`."""
    pairs: list[PairedConditions]
    settings: dict[str, dict[str, str]]
    """By `<run>/<condition>`: what its numbers depend on."""
    verdict: str
    """One sentence."""


@dataclass(frozen=True)
class Side:
    """One condition of one run, all its trials there."""

    name: str
    run: RunRecord
    """With this condition and the chosen seeds only."""
    config: Config
    condition: str
    results: dict[str, TrialResult]
    data: OutOfFold
    scores: dict[str, Aggregate]

    @property
    def settings(self) -> dict[str, str]:
        """With the weights and the version, which the configuration does not tell."""
        found = {key: str(value) for key, value in settings(self.config, self.condition).items()}
        weights = ", ".join(sorted({r.encoder_digest[:12] for r in self.results.values()}))
        return found | {"encoder weights, SHA-256": weights, "cvrunner": self.run.cvrunner_version}


def compare_runs(
    first: RunDirectory,
    second: RunDirectory,
    condition: str | None = None,
    with_: str | None = None,
    unpaired: bool = False,
) -> RunComparison:
    """Conditions of the second run against those of the first: the same-named ones, or `condition` against `with_`.

    With `unpaired` scores only. Raises UsageError for conditions that are not there, ResultsError where the runs
    cannot be paired, IncompleteRunError where trials are missing.
    """
    runs = first.read_run(), second.read_run()
    chosen = choose(runs[0], runs[1], condition, with_)
    if first.path.resolve() == second.path.resolve() and any(one == other for one, other in chosen):
        raise UsageError(f"{first.name}: the same run twice; choose two conditions with --condition and --with")
    names = _names(first, second)
    if unpaired:
        because = obstacles(*runs) or ["--unpaired was asked for"]
        return _side_by_side((first, second), runs, names, chosen, because)
    if found := obstacles(*runs):
        raise ResultsError(
            f"{names[0]} and {names[1]} cannot be paired: {'; '.join(found)}. --unpaired shows their scores side by "
            "side, without a difference"
        )
    seeds = [seed for seed in runs[0].seeds if seed in runs[1].seeds]
    sides = [
        (read_side(first, runs[0], one, seeds, names[0]), read_side(second, runs[1], other, seeds, names[1]))
        for one, other in chosen
    ]
    pairs = [_pair(*both) for both in sides]
    clauses = [clause(p.other, p.baseline, p.differences["avg"], p.decision) for p in pairs]
    shown = [side for both in sides for side in both]
    return RunComparison(
        paired=True,
        unpaired_because=[],
        dimensions=[run.dimensions for run in runs],
        folds=runs[0].folds,
        seeds=seeds,
        scores={side.name: side.scores for side in shown},
        pairs=pairs,
        settings={side.name: side.settings for side in shown},
        verdict=f"{'; '.join(clauses)}; {design(runs[0].folds, seeds, runs[0].synthetic)}.",
    )


def choose(first: RunRecord, second: RunRecord, condition: str | None, with_: str | None) -> list[tuple[str, str]]:
    """Pairs of a condition of the first run and one of the second. Raises UsageError."""
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
    """Why the two cannot be paired; nothing where they can."""
    found = []
    for what, one, other in (
        ("split", first.split_digest, second.split_digest),
        ("corpus (audio or labels)", first.corpus_digest, second.corpus_digest),
    ):
        if one != other:
            found.append(f"the {what} differs (digests {one[:12]} and {other[:12]})")
    for what, mine, theirs in (
        ("dimensions", ", ".join(first.dimensions), ", ".join(second.dimensions)),
        ("protocol", first.protocol, second.protocol),
    ):
        if mine != theirs:
            found.append(f"the {what} differ{'s' * (not what.endswith('s'))} ({mine} and {theirs})")
    if not set(first.seeds) & set(second.seeds):
        found.append(f"no seed is in both ({first.seeds} and {second.seeds})")
    return found


def read_side(directory: RunDirectory, run: RunRecord, condition: str, seeds: Sequence[int], name: str) -> Side:
    """One condition with its predictions and scores. Raises IncompleteRunError naming the trials it lacks."""
    trials = {n: t for n, t in run.trials.items() if t.condition == condition and t.seed in seeds}
    only = run.model_copy(update={"conditions": [condition], "seeds": list(seeds), "trials": trials})
    results = directory.results(only)
    if missing := [n for n in trials if n not in results]:
        raise IncompleteRunError(f"{name}: no result for {', '.join(missing)}, so nothing is compared")
    data = out_of_fold(directory, only, results)
    scores = condition_scores(only, results, data, condition)
    return Side(f"{name}/{condition}", only, directory.read_config(), condition, results, data, scores)


def _names(first: RunDirectory, second: RunDirectory) -> tuple[str, str]:
    """The runs' names; told apart by a number where two folders are called the same."""
    if first.name != second.name or first.path.resolve() == second.path.resolve():
        return first.name, second.name
    return f"{first.name} (1)", f"{second.name} (2)"


def _pair(baseline: Side, other: Side) -> PairedConditions:
    _check_same_test(baseline, other)
    one, two = baseline.data.predicted[baseline.condition], other.data.predicted[other.condition]
    results = [*baseline.results.values(), *other.results.values()]
    differences = paired_differences(baseline.scores, other.scores, pair(baseline.data, one, two), results)
    return PairedConditions(
        baseline=baseline.name, other=other.name, differences=differences, decision=decide(differences["avg"])
    )


def _check_same_test(one: Side, other: Side) -> None:
    """The digests say so already; the tables must say so too. Raises ResultsError."""
    keys = ["fold", "utterance"]
    rows, others = one.data.about[keys].to_numpy(), other.data.about[keys].to_numpy()
    if rows.shape != others.shape or not bool((rows == others).all()):
        raise ResultsError(f"{one.name} and {other.name}: predictions.csv have other test utterances than each other")
    if not np.allclose(one.data.truth, other.data.truth, rtol=0, atol=LABEL_TOLERANCE, equal_nan=True):
        raise ResultsError(f"{one.name} and {other.name}: predictions.csv have other true ratings than each other")


def _side_by_side(
    directories: tuple[RunDirectory, RunDirectory],
    runs: tuple[RunRecord, RunRecord],
    names: tuple[str, str],
    chosen: list[tuple[str, str]],
    because: list[str],
) -> RunComparison:
    """Scores of every chosen condition, each over its own folds and seeds; nothing is subtracted."""
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
        scores={side.name: side.scores for side in sides},
        pairs=[],
        settings={side.name: side.settings for side in sides},
        verdict=f"UNPAIRED: {'; '.join(because)}, so no difference is given.",
    )
