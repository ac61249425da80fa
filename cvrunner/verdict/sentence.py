"""The answer of a run in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from cvrunner.records.results import Aggregate, Decision, Difference, RunRecord
from cvrunner.text import plural

ALPHA = 0.05


def decide(average: Difference) -> Decision:
    """Decide better or worse only if both sources of uncertainty allow it, else neither.

    The bootstrap interval of the CCC-Avg difference covers other test dialogues, and the corrected t over folds covers
    other trainings on other speakers: the interval must exclude zero, and t must be significant if it can be computed.
    """
    interval, test = average.interval, average.corrected_t
    if interval is None or interval.low <= 0 <= interval.high:
        return "not distinguishable"
    if test is not None and test.p >= ALPHA:
        return "not distinguishable"
    if interval.low > 0:
        return "better"
    return "worse"


def sentence(
    run: RunRecord,
    scores: dict[str, dict[str, Aggregate]],
    differences: dict[str, dict[str, Difference]],
    decisions: dict[str, Decision],
) -> str:
    """Compare every condition with the baseline on CCC-Avg; interval, detectable difference, folds, seeds and data."""
    baseline, of = run.conditions[0], design(run.folds, run.seeds, run.synthetic)
    if not differences:
        score, reached = scores[baseline]["avg"].mean, "has no defined CCC-Avg"
        if score is not None:
            reached = f"reaches CCC-Avg {score:.4f}"
        return f"{baseline} {reached} ({of}); there is no other condition to compare it with."
    clauses = [clause(name, baseline, d["avg"], decisions[name]) for name, d in differences.items()]
    return f"{'; '.join(clauses)}; {of}."


def clause(name: str, baseline: str, average: Difference, decision: Decision) -> str:
    """Compare one condition with another on CCC-Avg, without a full stop."""
    if average.mean is None:
        return f"{name} cannot be compared with {baseline}, because the CCC-Avg of a trial is undefined"
    interval = average.interval
    if interval is None:
        return (
            f"{name} is not distinguishable from {baseline}: CCC-Avg differs by {average.mean:+.4f}, and no "
            f"interval can be given ({average.interval_reason})"
        )
    found = (
        f"95 % interval {interval.low:+.4f} to {interval.high:+.4f}, "
        f"smallest detectable difference {interval.detectable:.4f}"
    )
    if decision != "not distinguishable":
        return f"{name} is {decision} than {baseline} by {abs(average.mean):.4f} CCC-Avg ({found})"
    differs = f"{name} is not distinguishable from {baseline}: CCC-Avg differs by {average.mean:+.4f} ({found})"
    if interval.low <= 0 <= interval.high:
        return differs
    # The interval alone would decide: it covers these trained models, but not training them again.
    assert average.corrected_t is not None
    return (
        f"{differs}; these trained models do differ, but the folds vary too much to expect the same of models trained "
        f"again (corrected t, p = {average.corrected_t.p:.4f}): more seeds would help"
    )


def design(folds: Sequence[int], seeds: Sequence[int], synthetic: bool) -> str:
    """Return what the numbers are based on: `5 folds x 1 seed, on synthetic data`."""
    data = ""
    if synthetic:
        data = ", on synthetic data"
    return f"{plural(len(folds), 'fold')} x {plural(len(seeds), 'seed')}{data}"
