"""The tables that compare, as rows of text: made once here, shown by terminal, comparison.md and report.html alike."""

from __future__ import annotations

from dataclasses import dataclass

from cvrunner.records.results import Aggregate, Difference, Interval, ccc_label
from cvrunner.report.report import Report

NONE = "–"
NUMERIC_STARTS = "0123456789+-" + NONE


@dataclass(frozen=True)
class Table:
    """A heading, columns, rows of text, and a note on how to read them."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def is_numeric(self, column: int) -> bool:
        """Whether every cell of a column begins like a number, or is the dash of an undefined one."""
        return bool(self.rows) and all(row[column] and row[column][0] in NUMERIC_STARTS for row in self.rows)


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
    return table_of_scores("Test CCC by condition", report.summary.scores, report.label)


def table_of_scores(title: str, scores: dict[str, dict[str, Aggregate]], labels: dict[str, str]) -> Table:
    """Named rows of aggregates; `labels`: what each dimension is called."""
    columns = ["condition", *labels.values(), *(f"{label} pooled" for label in labels.values())]
    rows = []
    for name, by_dimension in scores.items():
        aggregates = [by_dimension[dimension] for dimension in labels]
        rows.append([name, *map(_mean_sd, aggregates), *(number(a.pooled) for a in aggregates)])
    return Table(
        title,
        columns,
        rows,
        "Mean ± standard deviation (n - 1) over folds and seeds; pooled: one CCC over all out-of-fold predictions, "
        "mean over seeds.",
    )


def _mean_sd(aggregate: Aggregate) -> str:
    return number(aggregate.mean) + ("" if aggregate.std is None else f" ± {aggregate.std:.4f}")


def differences_table(report: Report) -> Table:
    """Each condition against the baseline, by dimension."""
    baseline = report.summary.baseline
    named = {f"{other} - {baseline}": differences for other, differences in report.summary.differences.items()}
    return table_of_differences(named, len(report.run.folds), len(report.run.seeds))


def table_of_differences(named: dict[str, dict[str, Difference]], folds: int, seeds: int) -> Table:
    """Differences by name, then dimension."""
    columns = ["difference", "dimension", "mean", "95 % interval", "smallest detectable", "pooled"]
    columns += ["95 % interval, pooled", "corrected t, p", "folds +/-", "sign test, p"]
    rows = [
        [name, ccc_label(dimension), *_difference_cells(difference)]
        for name, by_dimension in named.items()
        for dimension, difference in by_dimension.items()
    ]
    return Table("Paired differences", columns, rows, _difference_note(named, folds, seeds))


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


def _difference_note(named: dict[str, dict[str, Difference]], folds: int, seeds: int) -> str:
    some = [d for by_dimension in named.values() for d in by_dimension.values()]
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
        parts.append(f"Sign test: with {folds} folds its p cannot go below {signs.smallest_p:.4f}.")
    if seeds == 1:
        parts.append("One seed: the chance of the training itself is not measured.")
    if len(named) > 1:
        parts.append("Several comparisons: the intervals are not adjusted for their number.")
    return " ".join(parts)


def folds_table(report: Report) -> Table:
    """Each fold and seed: all conditions, and the differences from the baseline."""
    summary = report.summary
    named = {f"{other} - {summary.baseline}": differences for other, differences in summary.differences.items()}
    return table_of_folds(summary.scores, named, report.run.folds, report.run.seeds, report.label)


def table_of_folds(
    scores: dict[str, dict[str, Aggregate]],
    differences: dict[str, dict[str, Difference]],
    folds: list[int],
    seeds: list[int],
    labels: dict[str, str],
    title: str = "Test CCC by fold",
) -> Table:
    """A row for each fold and seed, with named scores and differences side by side."""
    columns = ["fold", "seed", *(f"{name} {label}" for name in (*scores, *differences) for label in labels.values())]
    rows = []
    for fold in folds:
        for seed in seeds:
            trial = f"fold-{fold}/seed-{seed}"
            plain = [number(s[d].by_trial[trial]) for s in scores.values() for d in labels]
            deltas = [signed(s[d].by_trial[trial]) for s in differences.values() for d in labels]
            rows.append([str(fold), str(seed), *plain, *deltas])
    return Table(title, columns, rows)
