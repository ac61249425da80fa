"""The tables that compare, as rows of text: made once here, shown by terminal, comparison.md and report.html alike."""

from __future__ import annotations

from dataclasses import dataclass

from cvrunner.records.results import Aggregate, Difference, Interval
from cvrunner.reporting.report import Report, ccc_label

NONE = "–"


@dataclass(frozen=True)
class Table:
    """A heading, columns, rows of text, and a note on how to read them."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def number(value: float | None) -> str:
    """Four decimals; a dash where undefined."""
    return NONE if value is None else f"{value:.4f}"


def signed(value: float | None) -> str:
    """Four decimals with a sign; a dash where undefined."""
    return NONE if value is None else f"{value:+.4f}"


def markdown_cell(text: str) -> str:
    """Text that cannot end its cell in a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def comparison_tables(report: Report) -> list[Table]:
    """What answers the question: scores, differences, folds. Empty while trials are missing."""
    if report.summary.missing:
        return []
    tables = [scores_table(report), differences_table(report), folds_table(report)]
    return [table for table in tables if table.rows]


def scores_table(report: Report) -> Table:
    """Conditions x (mean ± sd and pooled of each dimension)."""
    labels = report.label
    columns = ["condition", *labels.values(), *(f"{label} pooled" for label in labels.values())]
    rows = []
    for condition, by_dimension in report.summary.scores.items():
        aggregates = [by_dimension[dimension] for dimension in labels]
        rows.append([condition, *map(_mean_sd, aggregates), *(number(a.pooled) for a in aggregates)])
    return Table(
        "Test CCC by condition",
        columns,
        rows,
        "Mean ± standard deviation (n - 1) over folds and seeds; pooled: one CCC over all out-of-fold predictions, "
        "mean over seeds.",
    )


def _mean_sd(aggregate: Aggregate) -> str:
    return number(aggregate.mean) + ("" if aggregate.std is None else f" ± {aggregate.std:.4f}")


def differences_table(report: Report) -> Table:
    """Each condition against the baseline, by dimension."""
    columns = ["difference", "dimension", "mean", "95 % interval", "smallest detectable", "pooled"]
    columns += ["95 % interval, pooled", "corrected t, p", "folds +/-", "sign test, p"]
    baseline = report.summary.baseline
    rows = [
        [f"{other} - {baseline}", ccc_label(dimension), *_difference_cells(difference)]
        for other, by_dimension in report.summary.differences.items()
        for dimension, difference in by_dimension.items()
    ]
    return Table("Paired differences", columns, rows, _difference_note(report))


def _difference_cells(difference: Difference) -> list[str]:
    interval, test, signs = difference.interval, difference.corrected_t, difference.signs
    return [
        signed(difference.mean),
        _interval(interval),
        NONE if interval is None else number(interval.detectable),
        signed(difference.pooled),
        _interval(difference.pooled_interval),
        NONE if test is None else number(test.p),
        NONE if signs is None else f"{signs.above} / {signs.below}",
        NONE if signs is None else number(signs.p),
    ]


def _interval(interval: Interval | None) -> str:
    return NONE if interval is None else f"{interval.low:+.4f} to {interval.high:+.4f}"


def _difference_note(report: Report) -> str:
    some = [d for by_dimension in report.summary.differences.values() for d in by_dimension.values()]
    interval = next((d.interval for d in some if d.interval), None)
    signs = next((d.signs for d in some if d.signs), None)
    test = next((d.corrected_t for d in some if d.corrected_t), None)
    parts = []
    if interval:
        parts.append(
            f"Interval: percentile bootstrap, {interval.resamples} resamples of whole dialogues within sessions; it "
            "covers the choice of test dialogues for the models as trained, not new sessions or another training. "
            "Smallest detectable: 80 % power at the two-sided 5 % level, 2.80 standard errors."
        )
    elif some:
        parts.append(f"No interval: {some[-1].interval_reason}.")
    if test:
        parts.append(
            f"Corrected t: Nadeau and Bengio, over {test.folds} folds, test/train ratio {test.test_train_ratio:.2f}."
        )
    if signs:
        parts.append(f"Sign test: with {len(report.run.folds)} folds its p cannot go below {signs.smallest_p:.4f}.")
    if len(report.run.seeds) == 1:
        parts.append("One seed: the chance of the training itself is not measured.")
    if len(report.summary.differences) > 1:
        parts.append("Several conditions: the intervals are not adjusted for their number.")
    return " ".join(parts)


def folds_table(report: Report) -> Table:
    """Each fold and seed: all conditions, and the differences from the baseline."""
    summary, labels = report.summary, report.label
    columns = ["fold", "seed"]
    columns += [f"{condition} {label}" for condition in summary.scores for label in labels.values()]
    columns += [f"{other} - {summary.baseline} {label}" for other in summary.differences for label in labels.values()]
    rows = []
    for fold in report.run.folds:
        for seed in report.run.seeds:
            name = f"fold-{fold}/seed-{seed}"
            scores = [number(s[d].by_trial[name]) for s in summary.scores.values() for d in labels]
            deltas = [signed(s[d].by_trial[name]) for s in summary.differences.values() for d in labels]
            rows.append([str(fold), str(seed), *scores, *deltas])
    return Table("Test CCC by fold", columns, rows)
