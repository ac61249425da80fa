"""One invocation that works on a run: open, announce, train, conclude; and how it is stopped."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from cvrunner import paths
from cvrunner.errors import ClusterError, ClusterLostError, CvrunnerError, ResultsError, Stopped, UsageError
from cvrunner.orchestration.preemption import Preemption
from cvrunner.orchestration.ray_cluster import RAY_STOP_WAIT_S, STOP_WAIT
from cvrunner.orchestration.ray_metrics import Gauges
from cvrunner.orchestration.scheduler import Executor, Observer, run_trials
from cvrunner.orchestration.trials import plan_trials
from cvrunner.records.results import RunRecord, RunStatus, Summary
from cvrunner.records.run_directory import RunDirectory
from cvrunner.report.report import read_report
from cvrunner.report.tables import render_text
from cvrunner.report.write import write_files
from cvrunner.run.prepare import Experiment
from cvrunner.run.progress import Progress
from cvrunner.run.store import RunStore
from cvrunner.text import line_printer, plural
from cvrunner.tracking.tracker import RunTracker, tracker_for
from cvrunner.training.faults import NONE, Chaos
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from rich.console import Console

UI_ADDRESS = "http://127.0.0.1:5000"
"""Where `make ui` serves MLflow if the store is a local database."""


@dataclass
class Run:
    """An open run; this process holds the lock of its folder."""

    experiment: Experiment
    store: RunStore
    trials: list[Trial]
    tracker: RunTracker
    console: Console
    quiet: bool = False

    def pending(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return those of `trials` that have no result with their key."""
        return [trial for trial in trials if self.store.trial_directory(trial).result(trial.key) is None]


@dataclass(frozen=True)
class Outcome:
    """How the training of a run ended."""

    stopped: bool
    """The user stopped it."""
    error: CvrunnerError | None
    """What ended it for all trials, if anything did."""


@contextlib.contextmanager
def open_run(experiment: Experiment, new: bool, quiet: bool, console: Console, chaos: Chaos = NONE) -> Iterator[Run]:
    """Find the run of this configuration, corpus and code, or begin one. Raises ResultsError if it is in use."""
    trials = plan_trials(experiment.config, experiment.corpus, experiment.folds)
    store = RunStore.open(experiment, trials, sys.argv, new)
    tracker = tracker_for(experiment.config, experiment.results_root, line_printer(console), chaos)
    with lock(store.directory.path):
        store.declare(experiment, trials)
        yield Run(experiment, store, trials, tracker, console, quiet)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder. Raises ResultsError if it is in use."""
    try:
        # The system frees the lock if its process is killed, so it never keeps a run from continuing. No waiting: the
        # other process may need it for days.
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ResultsError(f"{folder}: another process is working on this run; wait for it or stop it") from None


def announce(run: Run, chosen: Sequence[Trial], pending: Sequence[Trial]) -> None:
    """Print in a few lines what is going to happen."""
    if run.quiet:
        return
    print_line = line_printer(run.console)
    print_line(run.experiment.corpus.describe())
    for warning in run.experiment.corpus.warnings:
        print_line(f"warning: {warning}")
    print_line(f"run {run.store.record.run} in {run.store.directory.path}")
    if not pending:
        print_line(f"all {len(chosen)} trials are done: nothing to train")
        return
    done = len(chosen) - len(pending)
    print_line(f"{len(chosen)} trials, {done} done, {len(pending)} to train: {', '.join(t.name for t in pending)}")
    print_line(stop_window("; `saving takes about` below should be well under it"))


def stop_window(hint: str = "") -> str:
    """Return a sentence on how to stop and how much time there is to save. `hint`: what to compare that time with."""
    if not paths.in_ray_session(Path.cwd()):
        return "Ctrl-C or SIGTERM saves what is running and ends; the same command continues"
    window_s = float(os.environ.get(STOP_WAIT, RAY_STOP_WAIT_S))
    return (
        f"`ray job stop` saves what is running within {window_s:g} s ({STOP_WAIT} of the job's runtime "
        f"environment{hint}); the same command continues"
    )


def train_on_ray(run: Run, pending: Sequence[Trial], chaos: Chaos = NONE) -> Outcome | None:
    """Train the trials as Ray actors, with gauges that Ray exports; None if there is nothing to train."""
    if not pending:
        return None
    # Ray takes half a second to import, which a run with nothing left to train does not need.
    from cvrunner.orchestration import ray_executor, ray_metrics

    record, experiment = run.store.record, run.experiment
    # With node_dir, a trial's checkpoint is on the node where it ran last.
    nodes = {name: state.node for name, state in record.trials.items() if state.node}
    cluster, cache_dir = experiment.config.cluster, experiment.cache_dir
    make_executor = functools.partial(
        ray_executor.RayExecutor, record.run, cluster, cache_dir, len(pending), chaos, nodes
    )
    return train(run, pending, make_executor, ray_metrics.exported)


def train(
    run: Run,
    pending: Sequence[Trial],
    make_executor: Callable[[], Executor],
    exported: Callable[[Gauges], AbstractContextManager[object]] = contextlib.nullcontext,
) -> Outcome | None:
    """Train the trials; None if there are none. While the context of `exported` is entered, others see the gauges."""
    if not pending:
        return None
    try:
        executor = make_executor()
    except (ClusterError, ClusterLostError):
        # Nothing was trained, so a folder that was just made is removed again.
        run.store.discard()
        raise
    try:
        # Not before there is an executor: what the cluster refuses must not stay in run.json as RUNNING.
        run.store.begin()
        run.tracker.start(run.store.record, run.experiment.config, run.store.directory)
        gauges = Gauges(run.store.record.run, run.trials, pending, executor.slots)
        with (
            exported(gauges),
            stop_on_signals(run.console) as stop,
            Progress(pending, executor.slots, run.console, run.quiet) as progress,
        ):
            # The store comes first, so that run.json is never behind what the others show.
            observers: list[Observer] = [run.store, progress, gauges, run.tracker]
            cluster = run.experiment.config.cluster
            preemption = None
            # With node_dir, a trial can continue only on the node that has its checkpoint, so it must not be paused.
            if cluster.preempt and not cluster.node_dir:
                preemption = Preemption(pending, executor.slots)
            aborted = run_trials(
                pending, run.store.trial_directory, executor, observers, cluster.retries, stop.is_set, preemption
            )
        if aborted:
            return Outcome(stop.is_set(), UsageError(aborted.message))
        return Outcome(stop.is_set(), None)
    except ClusterLostError as error:
        return Outcome(False, error)
    finally:
        executor.close()


def conclude(run: Run, ending: Outcome | None) -> int:
    """Compare, write, mirror and print the outcome; returns the exit code. `ending`: None if nothing was trained."""
    status, summary = close(run, ending)
    # Before any error is raised: what is finished is worth reading also if the rest failed.
    show(run.store.directory, run.store.record, summary, run.console)
    raise_for_outcome(ending, status)
    return 0 if status == "COMPLETE" else 1


def close(run: Run, ending: Outcome | None) -> tuple[RunStatus, Summary]:
    """Compare, write and mirror the run, unless that was done before and nothing was trained since."""
    store = run.store
    directory, status = store.directory, store.record.status
    if ending or status != "COMPLETE":
        status = store.end(ending is not None and ending.stopped)
    # A run that is started again with nothing to do is only shown: its comparison, which takes seconds, is on disk.
    if ending is None and not store.changed and directory.report.is_file() and directory.summary_file.is_file():
        summary = Summary.from_json(directory.summary_file.read_bytes(), str(directory.summary_file))
        # A driver that was killed after its last trial has left the summary of an unfinished run.
        if bool(summary.missing) == (status != "COMPLETE"):
            return status, summary
    # No links may also mean that MLflow does not answer now; those in run.json stay.
    report = read_report(directory, run.experiment.folds, run.tracker.links(UI_ADDRESS) or None)
    store.note(floor=report.run.floor, links=report.run.links)
    store.count_look(sys.argv[1:], report.results)
    report = replace(report, run=store.record)
    write_files(report)
    run.tracker.finish(report, status)
    return status, report.summary


def raise_for_outcome(ending: Outcome | None, status: RunStatus) -> None:
    """Raise Stopped if the user stopped the run, or the error that ended it for all trials."""
    # A signal that came after the last trial has stopped nothing.
    if ending and ending.stopped and status != "COMPLETE":
        raise Stopped("stopped; the same command continues")
    if ending and ending.error:
        raise ending.error


def show(directory: RunDirectory, record: RunRecord, summary: Summary, console: Console) -> None:
    """Print the comparison, and the paths and addresses of everything that was written."""
    lines = [render_text(record, summary, console.width), f"results  {directory.path}", f"report   {directory.report}"]
    if record.looks_before is not None:
        times = plural(record.looks_before, "time")
        lines.append(f"ledger   test scores of this corpus were looked at {times} in this results folder before")
    line_printer(console)("\n".join([*lines, *link_lines(record.links)]))


def link_lines(links: dict[str, str]) -> list[str]:
    """Return lines with the addresses of the run in MLflow; none if it is not there."""
    if not links:
        return []
    served = any(link.startswith(UI_ADDRESS) for link in links.values())
    lines = ["MLflow   `make ui` serves it; then open" if served else "MLflow"]
    return lines + [f"         {link}  ({name})" for name, link in links.items()]


@contextlib.contextmanager
def stop_on_signals(console: Console) -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and Ctrl-C set, so that trials can save; a second Ctrl-C ends at once.

    Python delivers signals to the main thread only; in another thread nothing sets the event.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: object) -> None:
        # Not on a second SIGTERM: `ray job stop`, given twice, must not cut the saving short.
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        console.print(f"{signal.Signals(number).name}: saving what is running; the same command continues")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        # In a notebook the process lives on, and Ctrl-C must interrupt it again.
        for number, handler in before.items():
            signal.signal(number, handler)
