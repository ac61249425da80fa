"""The comparison as tables: built once, shown by the terminal, comparison.md and report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cvrunner.records.results import Aggregate, Difference, Interval, RunRecord, Summary, ccc_label
from cvrunner.report.evidence import evidence_tables, facts
from cvrunner.report.report import Report, labels
from cvrunner.text import DASH, Table, format_score, tables_as_text

Differences = Mapping[str, Mapping[str, Difference]]
"""Per name, then dimension or `avg`."""


def render_markdown(report: Report) -> str:
    """Return comparison.md."""
    tables = [*comparison_tables(report.run, report.summary), *evidence_tables(report)]
    parts = [
        f"# {report.run.run}",
        f"**{report.summary.verdict}**",
        *(table.as_markdown() for table in tables),
        "## What was run\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts(report)),
        "Written by `cvrunner report` from the files in this folder; do not edit.",
    ]
    return "\n\n".join(parts) + "\n"


def render_text(run: RunRecord, summary: Summary, width: int = 120) -> str:
    """Return the comparison and the verdict for a terminal of `width` columns, without colours."""
    return tables_as_text(comparison_tables(run, summary), width, summary.verdict)


def comparison_tables(run: RunRecord, summary: Summary) -> list[Table]:
    """Return the tables that answer the question: scores, differences, folds. Empty while trials are missing."""
    # While trials are missing, any mean would be over those that happen to be there.
    if summary.missing:
        return []
    label = labels(run)
    named = {f"{other} - {summary.baseline}": differences for other, differences in summary.differences.items()}
    tables = [
        table_of_scores("Test CCC by condition", summary.scores, label),
        table_of_differences(named, len(run.folds), len(run.seeds)),
        table_of_folds(summary.scores, named, run.folds, run.seeds, label),
    ]
    return [table for table in tables if table.rows]


def table_of_scores(title: str, scores: Mapping[str, Mapping[str, Aggregate]], label: Mapping[str, str]) -> Table:
    """Return a row per condition: mean ± sd of each dimension, then its pooled CCC."""
    columns = ["condition", *label.values(), *(f"{name} pooled" for name in label.values())]
    rows = []
    for condition, by_dimension in scores.items():
        aggregates = [by_dimension[dimension] for dimension in label]
        means = []
        for aggregate in aggregates:
            mean = format_score(aggregate.mean)
            if aggregate.std is not None:
                mean += f" ± {aggregate.std:.4f}"
            means.append(mean)
        rows.append([condition, *means, *(format_score(a.pooled) for a in aggregates)])
    return Table(
        title,
        columns,
        rows,
        "Mean ± standard deviation (n - 1) over folds and seeds; pooled: one CCC over all out-of-fold predictions, "
        "mean over seeds.",
    )


def table_of_differences(named: Differences, folds: int, seeds: int) -> Table:
    """Return a row per difference and dimension, with interval and tests."""
    columns = ["difference", "dimension", "mean", "95 % interval", "smallest detectable", "pooled"]
    columns += ["95 % interval, pooled", "corrected t, p", "folds +/-", "sign test, p"]
    rows = [
        [name, ccc_label(dimension), *_difference_cells(difference)]
        for name, by_dimension in named.items()
        for dimension, difference in by_dimension.items()
    ]
    return Table("Paired differences", columns, rows, _difference_note(named, folds, seeds))


def _difference_cells(difference: Difference) -> list[str]:
    detectable = t_p = folds = sign_p = None
    if difference.interval is not None:
        detectable = difference.interval.detectable
    if difference.corrected_t is not None:
        t_p = difference.corrected_t.p
    if difference.signs is not None:
        folds = f"{difference.signs.above} / {difference.signs.below}"
        sign_p = difference.signs.p
    return [
        format_score(difference.mean, signed=True),
        _interval(difference.interval),
        format_score(detectable),
        format_score(difference.pooled, signed=True),
        _interval(difference.pooled_interval),
        format_score(t_p),
        folds or DASH,
        format_score(sign_p),
    ]


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return DASH
    return f"{interval.low:+.4f} to {interval.high:+.4f}"


def _difference_note(named: Differences, folds: int, seeds: int) -> str:
    some = [difference for by_dimension in named.values() for difference in by_dimension.values()]
    interval = next((d.interval for d in some if d.interval), None)
    signs = next((d.signs for d in some if d.signs), None)
    test = next((d.corrected_t for d in some if d.corrected_t), None)
    parts = []
    if interval:
        parts.append(
            f"Interval: percentile bootstrap, {interval.resamples} resamples of whole dialogues within sessions; it "
            "covers the choice of test dialogues for the models as trained, but not new sessions or another training. "
            "Smallest detectable difference: 80 % power at the two-sided 5 % level, 2.80 standard errors."
        )
    elif some:
        parts.append(f"No interval: {some[-1].interval_reason}.")
    if test:
        parts.append(
            f"Corrected t: Nadeau and Bengio, over {test.folds} folds, test/train ratio {test.test_train_ratio:.2f}."
        )
    if signs:
        parts.append(f"Sign test: with {folds} folds, p cannot be less than {signs.smallest_p:.4f}.")
    if seeds == 1:
        parts.append("One seed: the randomness of training itself is not measured.")
    if len(named) > 1:
        parts.append("Several comparisons: the intervals are not adjusted for their number.")
    return " ".join(parts)


def table_of_folds(
    scores: Mapping[str, Mapping[str, Aggregate]],
    differences: Differences,
    folds: Sequence[int],
    seeds: Sequence[int],
    label: Mapping[str, str],
    title: str = "Test CCC by fold",
) -> Table:
    """Return a row per fold and seed, with scores and differences side by side."""
    columns = ["fold", "seed", *(f"{name} {of}" for name in (*scores, *differences) for of in label.values())]
    rows = []
    for fold in folds:
        for seed in seeds:
            trial = f"fold-{fold}/seed-{seed}"
            plain = [format_score(s[d].by_trial[trial]) for s in scores.values() for d in label]
            signed = [format_score(s[d].by_trial[trial], signed=True) for s in differences.values() for d in label]
            rows.append([str(fold), str(seed), *plain, *signed])
    return Table(title, columns, rows)
