"""The commands: each composes the parts below it and returns an exit code. What is parsed is in `cli.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cvrunner import paths
from cvrunner.config.reading import load_config
from cvrunner.errors import LeakError, UsageError
from cvrunner.run.steps import (
    UI_ADDRESS,
    Experiment,
    announce,
    conclude,
    find_run_directory,
    gpu_device,
    link_lines,
    locked,
    open_run,
    prepare,
    show,
    train,
    train_on_ray,
)
from cvrunner.training.faults import NONE, Chaos

if TYPE_CHECKING:
    from rich.console import Console

    from cvrunner.orchestration.scheduler import Executor
    from cvrunner.records.run_directory import RunDirectory


def all_folds(
    config_path: Path | None,
    overrides: Sequence[str],
    new: bool,
    quiet: bool,
    console: Console,
    chaos: Chaos = NONE,
) -> int:
    """Every condition x fold x seed on Ray; continues an interrupted run, repeats nothing that is done."""
    directory = run_all_folds(prepare(config_path, overrides), new, quiet, console, chaos)
    return 0 if directory.read_run().status == "COMPLETE" else 1


def run_all_folds(
    experiment: Experiment, new: bool, quiet: bool, console: Console, chaos: Chaos = NONE
) -> RunDirectory:
    """As `all_folds`; returns where the run is. Raises what ended it for all trials, and Stopped."""
    with open_run(experiment, new, quiet, console, chaos) as run:
        pending = run.pending(run.trials)
        announce(run, run.trials, pending)
        conclude(run, train_on_ray(run, pending, chaos) if pending else None)
        return run.store.directory


def one_fold(
    config_path: Path | None,
    overrides: Sequence[str],
    fold: int,
    condition: str | None,
    gpu: int | None,
    quiet: bool,
    console: Console,
    chaos: Chaos = NONE,
) -> int:
    """The trials of one fold (of one condition, or of all) in this process, without Ray; same run, same numbers."""
    config = load_config(config_path or paths.default_config(), overrides)
    if condition is not None:
        config.for_condition(condition)
    device = gpu_device(gpu)
    from cvrunner.data.corpus import fold_count

    _check_fold(fold, fold_count(config, paths.corpus_root(config.corpus.root)))
    experiment = prepare(config_path, overrides)
    _check_fold(fold, len(experiment.folds))
    with open_run(experiment, False, quiet, console, chaos) as run:
        chosen = [t for t in run.trials if t.fold.number == fold and condition in (None, t.condition)]
        pending = run.pending(chosen)
        announce(run, chosen, pending)

        def executor() -> Executor:
            from cvrunner.orchestration.attempt import InlineExecutor

            return InlineExecutor(experiment.cache_dir, device, chaos)

        code = conclude(run, train(run, pending, executor) if pending else None)
        return max(code, 1) if run.pending(chosen) else 0


def _check_fold(fold: int, count: int | None) -> None:
    """Raise UsageError for a fold that there is not among `count` (None: not known yet)."""
    if fold < 1 or (count is not None and fold > count):
        there = "folds are numbered from 1" if count is None else f"there are folds 1 to {count}"
        raise UsageError(f"--fold {fold}: {there}")


def audit(config_path: Path | None, overrides: Sequence[str], console: Console, as_json: bool = False) -> int:
    """Corpus, labels, folds, leaks, no-audio floor; trains nothing. Exit code 2 when folds leak."""
    experiment = prepare(config_path, overrides, for_training=False)
    from cvrunner.run import audit

    found = audit.audit(experiment.corpus, experiment.folds, experiment.config)
    console.print(
        audit.as_json(found) if as_json else audit.render(found), markup=False, highlight=False, soft_wrap=True
    )
    return LeakError.exit_code if found.leaks else 0


def report(run: Path, console: Console, as_json: bool = False) -> int:
    """Tables, figures and report.html again, from the files of a run alone."""
    directory = find_run_directory(run)
    from cvrunner.report.write import write_report

    summary = write_report(directory).summary
    if as_json:
        console.print(summary.to_json().rstrip(), markup=False, highlight=False, soft_wrap=True)
    else:
        show(directory, console)
    return 0 if directory.read_run().status == "COMPLETE" else 1


def compare(
    first: Path, second: Path, condition: str | None, with_: str | None, unpaired: bool, as_json: bool, console: Console
) -> int:
    """Two runs against each other, paired by utterance, fold and seed; refused where that cannot be."""
    from cvrunner.report.compare_runs import compare_runs
    from cvrunner.report.compare_text import comparison_text

    found = compare_runs(find_run_directory(first), find_run_directory(second), condition, with_, unpaired)
    text = found.to_json().rstrip() if as_json else comparison_text(found, console.width)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def sync(run: Path, uri: str | None, console: Console) -> int:
    """The run in MLflow again, from its files; nothing twice."""
    directory = find_run_directory(run)
    from cvrunner.report.write import write_report
    from cvrunner.tracking.mirror import sync_run
    from cvrunner.tracking.tracker import tracking_uri

    store = uri or tracking_uri(load_config(directory.config), directory.path.parent)
    with locked(directory.path):
        links, record = sync_run(directory, store, UI_ADDRESS), directory.read_run()
        if links != record.links:
            # The report shows the addresses too, and MLflow has a copy of the report.
            directory.write_run(record.model_copy(update={"links": links}))
            write_report(directory)
            sync_run(directory, store)
    console.print(f"{record.run} is in {store}", *link_lines(links), sep="\n", markup=False, soft_wrap=True)
    return 0
