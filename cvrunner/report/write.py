"""The files made from a report: summary.json, comparison.md, figures, report.html, and the table of all runs."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from cvrunner.errors import ResultsError
from cvrunner.files import write_atomically
from cvrunner.records.results import ccc_label
from cvrunner.records.run_directory import RunDirectory
from cvrunner.records.summary import Summary
from cvrunner.report.figures import draw, save_figures
from cvrunner.report.html import render_html
from cvrunner.report.paper import write_paper
from cvrunner.report.report import Report, read_report
from cvrunner.report.tables import render_markdown
from cvrunner.text import format_score, markdown_cell

ALL_RUNS = "experiment_comparison.md"
LOCK_TIMEOUT_S = 60
COLUMNS = ("run", "started", "status", "corpus", "folds x seeds", "test CCC, mean over trials", "verdict")


def write_report(directory: RunDirectory, links: dict[str, str] | None = None) -> Report:
    """Read a run's folder and write its report, with `links` instead of those in run.json. Raises as `read_report`."""
    report = read_report(directory, links=links)
    write_files(report)
    return report


def write_files(report: Report) -> None:
    """Write summary.json, comparison.md, figures/, report.html, paper/, and the table of all runs beside the folder."""
    directory, figures = report.directory, draw(report)
    directory.write_summary(report.summary)
    for evaluated in report.evaluations:
        evaluated.folder.write_summary(evaluated.summary)
    write_atomically(directory.comparison, render_markdown(report))
    save_figures(directory, figures)
    write_atomically(directory.report, render_html(report, figures))
    write_paper(report, figures)
    update_experiment_comparison(directory.path.parent)


def update_experiment_comparison(results_root: Path) -> Path:
    """Write results/experiment_comparison.md, one row per run, newest first, and return its path.

    It is rebuilt from all run folders, also if two runs end at once. Raises ResultsError if another process holds the
    lock for a minute.
    """
    path = results_root / ALL_RUNS
    results_root.mkdir(parents=True, exist_ok=True)
    try:
        # The folders are read under the lock: otherwise the slower writer could restore an older state.
        with FileLock(results_root / f".{ALL_RUNS}.lock", timeout=LOCK_TIMEOUT_S):
            rows = sorted((_row(RunDirectory(file.parent)) for file in results_root.glob("*/run.json")), reverse=True)
            lines = [COLUMNS, ("---",) * len(COLUMNS), *(cells for _, _, cells in rows)]
            table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
            text = f"# Runs\n\nNewest first. Made from the run folders after every run; do not edit.\n\n{table}\n"
            write_atomically(path, text)
    except Timeout:
        raise ResultsError(f"{path}: another process has held its lock for {LOCK_TIMEOUT_S} s") from None
    return path


def _row(folder: RunDirectory) -> tuple[str, str, tuple[str, ...]]:
    """Return start time and name to sort by, and the cells."""
    link = f"[{folder.name}]({folder.name}/comparison.md)"
    summary = None
    try:
        run = folder.current_run()
        if folder.summary_file.is_file():
            summary = Summary.from_json(folder.summary_file.read_bytes(), str(folder.summary_file))
    except ResultsError as error:
        # One damaged folder must not hide the other runs.
        return "", folder.name, tuple(map(markdown_cell, (link, "", "unreadable", "", "", "", str(error))))
    status, scores, verdict = str(run.status), "", ""
    if summary is not None:
        verdict = summary.verdict
        by_condition = (
            f"{condition}: " + ", ".join(f"{ccc_label(d)} {format_score(s.mean)}" for d, s in by_dimension.items())
            for condition, by_dimension in summary.scores.items()
        )
        # A line break in a Markdown cell.
        scores = "<br>".join(by_condition)
        if summary.missing and status == "COMPLETE":
            status = "INCOMPLETE"
    design = f"{len(run.folds)} x {len(run.seeds)}"
    cells = (link, run.started_at, status, run.corpus, design, scores, verdict)
    return run.started_at, folder.name, tuple(map(markdown_cell, cells))
