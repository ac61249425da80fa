"""The answer of a run in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from cvrunner.records.results import Aggregate, Decision, Difference, RunRecord

ALPHA = 0.05


def decide(average: Difference) -> Decision:
    """Better or worse where the bootstrap interval of the CCC-Avg difference leaves zero out, else neither."""
    if average.interval is None:
        return "not distinguishable"
    if average.interval.low > 0:
        return "better"
    return "worse" if average.interval.high < 0 else "not distinguishable"


def sentence(
    run: RunRecord,
    scores: dict[str, dict[str, Aggregate]],
    differences: dict[str, dict[str, Difference]],
    decisions: dict[str, Decision],
) -> str:
    """Every condition against the baseline on CCC-Avg, with interval, detectable difference, folds, seeds and data."""
    baseline, of = run.conditions[0], design(run.folds, run.seeds, run.synthetic)
    if not differences:
        score = scores[baseline]["avg"].mean
        reached = "has no defined CCC-Avg" if score is None else f"reaches CCC-Avg {score:.4f}"
        return f"{baseline} {reached} ({of}); there is no other condition to compare it with."
    clauses = [clause(name, baseline, d["avg"], decisions[name]) for name, d in differences.items()]
    return f"{'; '.join(clauses)}; {of}."


def clause(name: str, baseline: str, average: Difference, decision: Decision) -> str:
    """A condition against another on CCC-Avg."""
    if average.mean is None:
        return f"{name} cannot be compared with {baseline}, because the CCC-Avg of a trial is undefined"
    if average.interval is None:
        return (
            f"{name} is not distinguishable from {baseline}: CCC-Avg differs by {average.mean:+.4f}, and no "
            f"interval can be given ({average.interval_reason})"
        )
    interval = average.interval
    found = (
        f"95 % interval {interval.low:+.4f} to {interval.high:+.4f}, "
        f"smallest detectable difference {interval.detectable:.4f}"
    )
    if decision == "not distinguishable":
        return f"{name} is not distinguishable from {baseline}: CCC-Avg differs by {average.mean:+.4f} ({found})"
    return f"{name} is {decision} than {baseline} by {abs(average.mean):.4f} CCC-Avg ({found}){_doubt(average)}"


def _doubt(average: Difference) -> str:
    """The interval speaks of these trained models, the t of training on other speakers; they need not agree."""
    test = average.corrected_t
    if test is None or test.p < ALPHA:
        return ""
    return f", not confirmed by the corrected t over folds (p = {test.p:.4f})"


def design(folds: Sequence[int], seeds: Sequence[int], synthetic: bool) -> str:
    """What the numbers are of: `5 folds x 1 seed, on synthetic data`."""
    data = ", on synthetic data" if synthetic else ""
    return f"{len(folds)} fold{'s' * (len(folds) > 1)} x {len(seeds)} seed{'s' * (len(seeds) > 1)}{data}"
