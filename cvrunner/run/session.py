"""One invocation that works on a run: open, announce, train, conclude; and how it is stopped."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from cvrunner import paths
from cvrunner.config.schema import Config
from cvrunner.errors import ClusterError, ClusterLostError, CvrunnerError, Stopped, UsageError
from cvrunner.orchestration.preemption import Preemption
from cvrunner.orchestration.ray_cluster import RAY_STOP_WAIT_S, STOP_WAIT
from cvrunner.orchestration.ray_metrics import Gauges
from cvrunner.orchestration.scheduler import Executor, Observer, run_trials
from cvrunner.orchestration.trials import plan_probes, plan_trials
from cvrunner.records.results import ProbeResult, RunRecord, RunStatus
from cvrunner.records.run_directory import RunDirectory, TrialDirectory
from cvrunner.records.summary import Summary
from cvrunner.report.report import read_report
from cvrunner.report.tables import render_text
from cvrunner.report.write import write_files
from cvrunner.run.prepare import Experiment
from cvrunner.run.progress import ProbeProgress, Progress
from cvrunner.run.store import RunStore, lock
from cvrunner.text import line_printer, plural
from cvrunner.tracking.names import UI_ADDRESS
from cvrunner.tracking.tracker import RunTracker, tracker_for
from cvrunner.training.faults import NONE, Chaos
from cvrunner.training.trial import LinearProbe, Trial

if TYPE_CHECKING:
    from rich.console import Console

MOST_NAMED = 5
"""Largest number of trials to train that are named one by one at the start of a run."""


@dataclass
class Run:
    """An open run; this process holds the lock of its folder."""

    experiment: Experiment
    store: RunStore
    trials: list[Trial]
    probes: list[LinearProbe]
    tracker: RunTracker
    console: Console
    quiet: bool = False

    def pending(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return those of `trials` that have no result with their key."""
        return [trial for trial in trials if self.store.trial_directory(trial).result(trial.key) is None]

    def pending_probes(self, fold: int | None = None) -> list[LinearProbe]:
        """Return the linear probes, of one fold or of all, that have no result with their key."""
        probes = (probe for probe in self.probes if fold in (None, probe.fold.number))
        return [p for p in probes if self.probe_directory(p).read_result(ProbeResult, p.key) is None]

    def probe_directory(self, probe: Trial) -> TrialDirectory:
        return self.store.directory.linear_probe(probe.fold.number)


@dataclass(frozen=True)
class Outcome:
    """How the training of a run ended."""

    stopped: bool
    """The user stopped it."""
    error: CvrunnerError | None
    """What ended it for all trials, if anything did."""


@contextlib.contextmanager
def open_run(
    experiment: Experiment,
    new: bool,
    quiet: bool,
    console: Console,
    chaos: Chaos = NONE,
    only: Callable[[Trial], bool] | None = None,
    preflight: Callable[[Config], None] | None = None,
) -> Iterator[Run]:
    """Find the run of this configuration, corpus and code, or begin one. Raises ResultsError if it is in use.

    `only`: the trials that this command works on, while others may work on the rest; None: nobody else may.
    `preflight`: called before a new run has a folder.
    """
    trials = plan_trials(experiment.config, experiment.corpus, experiment.folds)
    store = RunStore.open(experiment, trials, sys.argv, new, preflight)
    tracker = tracker_for(experiment.config, experiment.results_root, line_printer(console), chaos)
    with contextlib.ExitStack() as held:
        if only is None:
            held.enter_context(lock(store.directory.path))
        else:
            store.claim([trial for trial in trials if only(trial)])
            held.callback(store.release)
            tracker.only = frozenset(store.claims or ())
        store.declare(experiment, trials)
        probes = plan_probes(trials, store.record.conditions[0])
        yield Run(experiment, store, trials, probes, tracker, console, quiet)


def announce(run: Run, chosen: Sequence[Trial], pending: Sequence[Trial]) -> None:
    """Print in a few lines what is going to happen."""
    if run.quiet:
        return
    print_line = line_printer(run.console)
    print_line(run.experiment.corpus.describe())
    for warning in run.experiment.corpus.warnings:
        print_line(f"warning: {warning}")
    print_line(f"run {run.store.record.run} in {run.store.directory.path}")
    recorded, named = run.store.record.conditions, list(run.experiment.config.conditions)
    if recorded[0] != named[0]:
        print_line(
            f"the baseline is {recorded[0]}, as when this run began; the configuration now names {named[0]} first, and "
            "--new begins a run with that baseline"
        )
    if not pending:
        print_line(f"all {len(chosen)} trials are done: nothing to train")
        return
    done = len(chosen) - len(pending)
    what = [trial.name for trial in pending]
    if len(pending) > MOST_NAMED:
        what = [f"{count} of {condition}" for condition, count in Counter(t.condition for t in pending).items()]
    print_line(f"{len(chosen)} trials, {done} done, {len(pending)} to train: {', '.join(what)}")
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


def train_on_ray(
    run: Run, pending: Sequence[Trial], chaos: Chaos = NONE, probes: Sequence[LinearProbe] = ()
) -> Outcome | None:
    """Train the trials as Ray actors, with gauges that Ray exports, then fit the linear probes on the same actors; None
    if there is nothing to do."""
    if not pending and not probes:
        return None
    # Ray takes half a second to import, which a run with nothing left to train does not need.
    from cvrunner.orchestration import ray_executor, ray_metrics

    record, experiment = run.store.record, run.experiment
    # With node_dir, a trial's checkpoint is on the node where it ran last.
    nodes = {name: state.node for name, state in record.trials.items() if state.node}
    cluster, cache_dir = experiment.config.cluster, experiment.cache_dir
    make_executor = functools.partial(
        ray_executor.RayExecutor, record.run, cluster, cache_dir, len(pending) or len(probes), chaos, nodes
    )
    return train(run, pending, make_executor, probes, ray_metrics.exported)


def train(
    run: Run,
    pending: Sequence[Trial],
    make_executor: Callable[[], Executor],
    probes: Sequence[LinearProbe] = (),
    exported: Callable[[Gauges], AbstractContextManager[object]] = contextlib.nullcontext,
) -> Outcome | None:
    """Train the trials, then fit the linear probes; None if there are neither.

    While the context of `exported` is entered, others see the gauges.
    """
    if not pending and not probes:
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

        def show_links(links: dict[str, str]) -> None:
            run.store.note(links=links)
            if links and not run.quiet:
                line_printer(run.console)("\n".join(link_lines(links, run.store.directory.path)))

        run.tracker.start(run.store.record, run.experiment.config, run.store.directory, show_links)
        gauges = Gauges(run.store.record.run, run.trials, pending, executor.slots)
        with (
            exported(gauges),
            stop_on_signals(run.console) as stop,
        ):
            cluster = run.experiment.config.cluster
            preemption = None
            if cluster.pauses_trials:
                preemption = Preemption(pending, executor.slots)
            with Progress(pending, executor.slots, run.console, run.quiet) as progress:
                # The store comes first, so that run.json is never behind what the others show.
                observers: list[Observer] = [run.store, progress, gauges, run.tracker]
                aborted = run_trials(
                    pending, run.store.trial_directory, executor, observers, cluster.retries, stop.is_set, preemption
                )
            # After the trials, which have made the features, and apart from them, so that nothing that happens to a
            # probe concerns the run.
            if not aborted and not stop.is_set():
                fit_probes(run, probes, executor, stop.is_set)
        if aborted:
            return Outcome(stop.is_set(), UsageError(aborted.message))
        return Outcome(stop.is_set(), None)
    except ClusterLostError as error:
        return Outcome(False, error)
    finally:
        executor.close()


def fit_probes(run: Run, probes: Sequence[LinearProbe], executor: Executor, should_stop: Callable[[], bool]) -> None:
    """Fit the linear probes. One that fails, or a Ray that dies now, costs these rows of the report, not the run."""
    progress, retries = (
        ProbeProgress(run.console, run.quiet, run.probe_directory),
        run.experiment.config.cluster.retries,
    )
    try:
        run_trials(probes, run.probe_directory, executor, [progress], retries, should_stop)
    except ClusterLostError as error:
        line_printer(run.console)(f"linear probe: {error}")


def conclude(run: Run, ending: Outcome | None) -> int:
    """Compare, write, mirror and print the outcome; returns the exit code. `ending`: None if nothing was trained."""
    status, summary = close(run, ending)
    # Before any error is raised: what is finished is worth reading also if the rest failed.
    show(run.store.directory, run.store.record, summary, run.console)
    raise_for_outcome(ending, status)
    return 0 if status == "COMPLETE" else 1


def close(run: Run, ending: Outcome | None) -> tuple[RunStatus, Summary]:
    """Compare, write and mirror the run, unless that was done before and nothing was trained since."""
    # Commands that share a run end one after the other: the last one writes the comparison of all trials.
    with FileLock(run.store.directory.path / ".report.lock"):
        return _close(run, ending)


def _close(run: Run, ending: Outcome | None) -> tuple[RunStatus, Summary]:
    store = run.store
    directory, status = store.directory, store.record.status
    if ending or status != "COMPLETE":
        status = store.end(ending is not None and ending.stopped)
    # A run that is started again with nothing to do is only shown: its comparison, which takes seconds, is on disk.
    if ending is None and not store.changed and directory.report.is_file() and directory.summary_file.is_file():
        summary = Summary.from_json(directory.summary_file.read_bytes(), str(directory.summary_file))
        # A driver that was killed after its last trial has left the summary of an unfinished run.
        # No links, although there is a tracker: MLflow has missed the run, so what is on disk is written there now.
        written = store.record.links or run.tracker.uri is None
        if written and bool(summary.missing) == (status != "COMPLETE"):
            if run.tracker.is_away():
                line_printer(run.console)(f"MLflow ({run.tracker.uri}) does not answer now")
            return status, summary
    # No links may also mean that MLflow does not answer now; those in run.json stay.
    report = read_report(directory, run.tracker.links(UI_ADDRESS) or None)
    store.count_look(sys.argv[1:], report.results)
    report = replace(report, run=report.run.model_copy(update={"looks_before": store.record.looks_before}))
    store.note(links=report.run.links)
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
    if record.status == "INTERRUPTED":
        lines.append("status   INTERRUPTED: its process was killed; the same command continues it")
    if record.looks_before is not None:
        times = plural(record.looks_before, "time")
        lines.append(f"ledger   test scores of this corpus were looked at {times} in this results folder before")
    line_printer(console)("\n".join([*lines, *link_lines(record.links, directory.path)]))


def link_lines(links: dict[str, str], folder: Path) -> list[str]:
    """Return lines with the addresses of the run in `folder` in MLflow; none if it is not there."""
    if not links:
        return []
    served = any(link.startswith(UI_ADDRESS) for link in links.values())
    lines = [f"MLflow   `cvrunner ui {folder}` serves it; then open" if served else "MLflow"]
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
