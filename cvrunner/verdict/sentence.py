"""The answer of a run in one sentence, by a rule that is fixed before the run (docs/statistics.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from cvrunner.records.results import RunRecord, ccc_label
from cvrunner.records.summary import Decision, Difference, Summary
from cvrunner.text import plural
from cvrunner.verdict.convergence import convergence_clause


def decide(difference: Difference, margin: float) -> Decision:
    """Decide level 1 from the intervals of the primary outcome.

    Better or worse if the 95 % interval excludes zero, marked if the 90 % interval shows that the difference is within
    the margin; practically equal if the 95 % interval contains zero and the 90 % interval is within the margin (two
    one-sided tests at 5 %, Schuirmann 1987). Without level 1, as with a single seed, nothing is claimed.
    """
    level = difference.on_corpus
    if level is None:
        return "no claim"
    low, high = level.interval.low, level.interval.high
    within = -margin < level.equivalence.low and level.equivalence.high < margin
    if low <= 0 <= high:
        return "practically equal" if within else "not distinguishable"
    if low > 0:
        return "better, but by less than the margin" if within else "better"
    return "worse, but by less than the margin" if within else "worse"


def confirmed(decision: Decision, difference: Difference) -> bool:
    """Whether level 2 excludes zero in the direction of the decision."""
    level = difference.new_speakers
    if level is None:
        return False
    if decision.startswith("better"):
        return level.interval.low > 0
    return decision.startswith("worse") and level.interval.high < 0


def confirmations(
    decisions: Mapping[str, Decision], differences: Mapping[str, Mapping[str, Difference]], primary: str
) -> dict[str, bool]:
    """Return by condition whether level 2 confirms its decision for better or worse; other decisions are left out."""
    return {
        name: confirmed(decision, differences[name][primary])
        for name, decision in decisions.items()
        if decision.startswith(("better", "worse"))
    }


def sentence(run: RunRecord, summary: Summary) -> str:
    """Compare every condition with the baseline on the primary outcome, at both levels; with folds, seeds and data."""
    baseline, of = summary.baseline, design(run.folds, run.seeds, run.synthetic)
    if not summary.differences:
        name, score = ccc_label(summary.primary), summary.scores[baseline][summary.primary].mean
        reached = f"has no defined {name}"
        if score is not None:
            reached = f"reaches {name} {score:.4f}"
        return f"{baseline} {reached} ({of}); there is no other condition to compare it with."
    clauses = [
        clause(name, baseline, summary.primary, by_outcome[summary.primary], summary.decisions[name], summary.margin)
        for name, by_outcome in summary.differences.items()
    ]
    baseline_trained = summary.convergence.get(baseline)
    # A baseline that was still improving makes any other condition look good.
    if baseline_trained is not None and baseline_trained.converged is False:
        clauses.append(convergence_clause(baseline, baseline_trained))
    if summary.added_after_look:
        clauses.append(f"added after a look at test scores: {', '.join(summary.added_after_look)}")
    return capitalised(f"{'; '.join(clauses)}; {of}.")


def capitalised(text: str) -> str:
    """Begin a sentence with a capital, unless it begins with the name of a condition."""
    return re.sub(r"^(on this corpus|these trained)", lambda match: match[0].capitalize(), text)


def clause(
    name: str,
    baseline: str,
    primary: str,
    difference: Difference,
    decision: Decision,
    margin: float,
    place: str = "on this corpus, ",
    groups: str = "folds",
) -> str:
    """Compare one condition with another at both levels, without a full stop. `groups`: what level 2 is taken over."""
    label, mean, level = ccc_label(primary), difference.mean, difference.on_corpus
    if mean is None:
        return f"{name} cannot be compared with {baseline}, because the {label} of a trial is undefined"
    if level is None:
        return f"{_as_trained(name, baseline, label, mean, difference)}; {_new_speakers(decision, difference, groups)}"
    found = f"95 % interval {level.interval}"
    if decision == "practically equal":
        first = (
            f"{name} is practically equal to {baseline}: {label} differs by {mean:+.4f}, within ±{margin:g} ({found})"
        )
    elif decision == "not distinguishable":
        first = (
            f"{name} is not distinguishable from {baseline}: {label} differs by {mean:+.4f} ({found}, smallest "
            f"detectable difference {level.detectable:.4f})"
        )
    else:
        direction, _, less = decision.partition(", ")
        first = f"{name} is {direction} than {baseline} by {abs(mean):.4f} {label}"
        if less:
            first += f", which is less than the margin of {margin:g}"
        first += f" ({found})"
    return f"{place}{first}; {_new_speakers(decision, difference, groups)}"


def _as_trained(name: str, baseline: str, label: str, mean: float, difference: Difference) -> str:
    """Return the clause for models whose training varies by an unknown amount: a difference without a direction."""
    found = ""
    if difference.as_trained is not None:
        found = f", 95 % interval over test data only {difference.as_trained}"
    return (
        f"these trained models differ by {mean:+.4f} {label} ({name} minus {baseline}{found}), which is no claim about "
        f"{name}: {difference.no_corpus_level}"
    )


def _new_speakers(decision: Decision, difference: Difference, groups: str) -> str:
    """Return level 2 in a few words."""
    level = difference.new_speakers
    if level is None:
        return f"for new speakers: unknown, because only several {groups} could show it"
    found = f"95 % interval {level.interval}"
    if not decision.startswith(("better", "worse")):
        return f"for new speakers: {found}"
    if confirmed(decision, difference):
        return f"also {decision.partition(',')[0]} for new speakers ({found})"
    return f"not shown for new speakers ({found})"


def design(folds: Sequence[int], seeds: Sequence[int], synthetic: bool) -> str:
    """Return what the numbers are based on: `5 folds x 1 seed, on synthetic data`."""
    data = ""
    if synthetic:
        data = ", on synthetic data"
    return f"{plural(len(folds), 'fold')} x {plural(len(seeds), 'seed')}{data}"
