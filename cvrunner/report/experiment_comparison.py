"""results/experiment_comparison.md: one row per run, newest first, made anew from all run folders, never by hand."""

from __future__ import annotations

from pathlib import Path

from cvrunner.errors import ResultsError
from cvrunner.files import write_atomically
from cvrunner.records.results import RunRecord, Summary, ccc_label
from cvrunner.records.run_directory import RunDirectory
from cvrunner.report.tables import markdown_cell, number

FILE_NAME = "experiment_comparison.md"
LOCK_TIMEOUT_S = 60
COLUMNS = ("run", "started", "status", "corpus", "folds x seeds", "test CCC, mean over trials", "verdict")


def update_experiment_comparison(results_root: Path) -> Path:
    """Write the table of all runs under `results_root` and return its path; safe with two runs ending at once.

    Raises ResultsError when another process holds the lock for a minute.
    """
    from filelock import FileLock, Timeout

    path = results_root / FILE_NAME
    results_root.mkdir(parents=True, exist_ok=True)
    try:
        # The folders are read inside the lock: otherwise the slower writer could put an older state back.
        with FileLock(results_root / f".{FILE_NAME}.lock", timeout=LOCK_TIMEOUT_S):
            write_atomically(path, _document(results_root))
    except Timeout:
        raise ResultsError(f"{path}: another process has held its lock for {LOCK_TIMEOUT_S} s") from None
    return path


def _document(results_root: Path) -> str:
    folders = [RunDirectory(file.parent) for file in results_root.glob("*/run.json")]
    rows = sorted((_row(folder) for folder in folders), reverse=True)
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(cells for _, _, cells in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"# Runs\n\nNewest first. Made from the run folders after every run; do not edit.\n\n{table}\n"


def _row(folder: RunDirectory) -> tuple[str, str, tuple[str, ...]]:
    """Start time and name to sort by, and the cells."""
    try:
        run = folder.read_run()
        summary = _summary(folder)
    except ResultsError as error:
        cells = (_link(folder), "", "unreadable", "", "", "", str(error))
        return "", folder.name, tuple(map(markdown_cell, cells))
    design = f"{len(run.folds)} x {len(run.seeds)}"
    status = "INCOMPLETE" if summary and summary.missing and run.status == "COMPLETE" else run.status
    cells = (
        _link(folder),
        run.started_at,
        status,
        run.corpus,
        design,
        _scores(run, summary),
        _verdict(summary),
    )
    return run.started_at, folder.name, tuple(map(markdown_cell, cells))


def _summary(folder: RunDirectory) -> Summary | None:
    file = folder.summary_file
    return Summary.from_json(file.read_bytes(), str(file)) if file.is_file() else None


def _link(folder: RunDirectory) -> str:
    return f"[{folder.name}]({folder.name}/comparison.md)"


def _scores(run: RunRecord, summary: Summary | None) -> str:
    if summary is None:
        return ""
    return "<br>".join(
        f"{condition}: " + ", ".join(f"{ccc_label(name)} {number(score.mean)}" for name, score in by_dimension.items())
        for condition, by_dimension in summary.scores.items()
    )


def _verdict(summary: Summary | None) -> str:
    return summary.verdict if summary else ""
