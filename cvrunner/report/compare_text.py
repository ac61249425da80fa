"""What `compare` shows on a terminal."""

from __future__ import annotations

from cvrunner.records.results import ccc_label
from cvrunner.report.compare_runs import RunComparison
from cvrunner.report.evidence import differing
from cvrunner.report.render import tables_as_text
from cvrunner.report.tables import Table, table_of_differences, table_of_folds, table_of_scores


def comparison_text(comparison: RunComparison, width: int = 120) -> str:
    """Scores, and for runs that are paired differences and folds; the sentence last."""
    mark = "" if comparison.paired else ", UNPAIRED: not to be subtracted"
    tables = [table_of_scores(f"Test CCC by run and condition{mark}", comparison.scores, _labels(comparison))]
    if comparison.paired:
        tables += _paired_tables(comparison)
    rows = differing(comparison.settings)
    if rows:
        tables.append(Table("Settings that differ", ["key", *comparison.settings], rows))
    return tables_as_text(tables, comparison.verdict, width)


def _paired_tables(comparison: RunComparison) -> list[Table]:
    named = {f"{pair.other} - {pair.baseline}": pair.differences for pair in comparison.pairs}
    folds, seeds = comparison.folds, comparison.seeds
    return [
        table_of_differences(named, len(folds), len(seeds)),
        # Scores of each run stand in its own report; here a fold has what no report has.
        table_of_folds({}, named, folds, seeds, _labels(comparison), title="Differences by fold"),
    ]


def _labels(comparison: RunComparison) -> dict[str, str]:
    """Of the dimensions that both runs have, and their own averages."""
    first, second = comparison.dimensions
    shared = [dimension for dimension in first if dimension in second]
    # An average over other dimensions has the same name and another meaning.
    average = ["avg"] if first == second else []
    return {dimension: ccc_label(dimension) for dimension in (*shared, *average)}
