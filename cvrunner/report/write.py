"""Everything that is made from a run's files, written in one go; again and again with the same outcome."""

from __future__ import annotations

from cvrunner.files import write_atomically
from cvrunner.records.run_directory import RunDirectory
from cvrunner.report.experiment_comparison import update_experiment_comparison
from cvrunner.report.figures import draw, save_figures
from cvrunner.report.html import render_html
from cvrunner.report.render import render_markdown
from cvrunner.report.report import Report, read_report


def write_report(directory: RunDirectory, links: dict[str, str] | None = None) -> Report:
    """Write summary.json, comparison.md, figures/ and report.html, and the table of all runs beside the run's folder.

    `links` go into report.html; without them those in run.json do. Raises ResultsError or ConfigError for files that
    cannot be read or contradict each other.
    """
    report = read_report(directory, links=links)
    figures = draw(report)
    directory.write_summary(report.summary)
    write_atomically(directory.comparison, render_markdown(report))
    save_figures(directory, figures)
    write_atomically(directory.report, render_html(report, figures))
    update_experiment_comparison(directory.path.parent)
    return report
