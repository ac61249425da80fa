"""The answer of a run in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from cvrunner.records.results import Aggregate, Decision, Difference, RunRecord

ALPHA = 0.05


def decide(average: Difference) -> Decision:
    """Better or worse only where both sources of doubt agree, else neither.

    The bootstrap interval of the CCC-Avg difference speaks of other test dialogues, the corrected t over folds of other
    trainings on other speakers: it has to leave zero out, and t has to be significant where there are folds for it.
    """
    if not _leaves_zero_out(average) or _folds_disagree(average):
        return "not distinguishable"
    assert average.interval is not None
    return "better" if average.interval.low > 0 else "worse"


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
        differs = f"{name} is not distinguishable from {baseline}: CCC-Avg differs by {average.mean:+.4f} ({found})"
        return differs + (_why_not(average) if _leaves_zero_out(average) else "")
    return f"{name} is {decision} than {baseline} by {abs(average.mean):.4f} CCC-Avg ({found})"


def _leaves_zero_out(average: Difference) -> bool:
    return average.interval is not None and not average.interval.low <= 0 <= average.interval.high


def _folds_disagree(average: Difference) -> bool:
    return average.corrected_t is not None and average.corrected_t.p >= ALPHA


def _why_not(average: Difference) -> str:
    """The interval alone would say better or worse: of these trained models, not of training again."""
    assert average.corrected_t is not None
    return (
        f"; these trained models do differ, but the folds too much from each other to expect it of another training "
        f"(corrected t, p = {average.corrected_t.p:.4f}): more seeds would tell"
    )


def design(folds: Sequence[int], seeds: Sequence[int], synthetic: bool) -> str:
    """What the numbers are of: `5 folds x 1 seed, on synthetic data`."""
    data = ", on synthetic data" if synthetic else ""
    return f"{len(folds)} fold{'s' * (len(folds) > 1)} x {len(seeds)} seed{'s' * (len(seeds) > 1)}{data}"
