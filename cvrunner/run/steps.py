"""The parts of a run that commands are made of: prepare, open, announce, train, conclude, show."""

from __future__ import annotations

import contextlib
import difflib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cvrunner import paths
from cvrunner.config.reading import load_config
from cvrunner.config.schema import Config
from cvrunner.config.sections import ModelConfig
from cvrunner.errors import (
    ClusterError,
    ClusterLostError,
    ConfigError,
    CvrunnerError,
    ResultsError,
    Stopped,
    UsageError,
)
from cvrunner.run import completion
from cvrunner.training.faults import NONE, Chaos

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from cvrunner.data.folds import Fold
    from cvrunner.data.utterance import Corpus
    from cvrunner.orchestration.ray_metrics import Gauges
    from cvrunner.orchestration.scheduler import Executor, Observer
    from cvrunner.records.results import RunStatus
    from cvrunner.records.run_directory import RunDirectory
    from cvrunner.run.store import RunStore
    from cvrunner.tracking.tracker import Tracker
    from cvrunner.training.trial import Trial


UI_ADDRESS = "http://127.0.0.1:5000"
"""Where `make ui` serves MLflow when the store is a local database."""


@dataclass(frozen=True)
class Experiment:
    """A configuration with its corpus and folds, checked: nothing stands in the way of training."""

    name: str
    config: Config
    corpus: Corpus
    folds: tuple[Fold, ...]
    results_root: Path
    cache_dir: Path


def prepare(config_path: Path | None, overrides: Sequence[str], for_training: bool = True) -> Experiment:
    """Read everything and check everything, before anything is trained; what is cheap to check comes first.

    Raises ConfigError, CorpusError and, where it is for training, EncoderError and LeakError.
    """
    path = config_path or paths.default_config()
    config = load_config(path, overrides)
    results_root = paths.lasting(config.results.root, "results.root")
    cache_dir = paths.lasting(config.cluster.cache_dir, "cluster.cache_dir")
    from cvrunner.data.corpus import load_corpus
    from cvrunner.data.folds import check_labels, check_leaks, make_folds

    if for_training:
        _check_encoders(config)
    corpus = load_corpus(config.corpus, paths.corpus_root(config.corpus.root))
    folds = make_folds(corpus, config.folds.scheme)
    if for_training:
        check_leaks(folds)
    check_labels(corpus, folds, config.corpus.dimensions)
    return Experiment(path.stem, config, corpus, folds, results_root, cache_dir)


def _check_encoders(config: Config) -> None:
    """Raise EncoderError or ConfigError for an encoder that a condition cannot use."""
    from cvrunner.encoders.files import check_encoder

    for name in config.conditions:
        model = config.for_condition(name).model
        check_encoder(model.encoder, model.revision, () if model.layers == "all" else model.layers)
        if model.unfreeze_top_layers is not None:
            check_depth(model, [model.unfreeze_top_layers], "model.unfreeze_top_layers")


def check_depth(model: ModelConfig, wanted: Sequence[int], key: str) -> None:
    """Raise ConfigError where the encoder has fewer transformer layers than `key` wants trained."""
    from cvrunner.encoders.files import encoder_depth

    depth = encoder_depth(model.encoder, model.revision)
    if (most := max(wanted, default=0)) > depth:
        raise ConfigError(f"{key}: {most} is more than the {depth} transformer layers of the encoder {model.encoder}")


def find_run_directory(run: Path) -> RunDirectory:
    """A run by its folder, or by its name in the results folder. Raises ResultsError where there is none."""
    from cvrunner.records.run_directory import RunDirectory

    for path in (run, paths.lasting("results", "results.root") / run):
        if (path / "run.json").is_file():
            return RunDirectory(path.absolute())
    near = difflib.get_close_matches(run.name, completion.run_names(), n=3, cutoff=0.3)
    there = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ResultsError(f"{run}: no run here (run.json is missing){there}")


@dataclass
class Run:
    """An open run: its folder is held by this process alone."""

    experiment: Experiment
    store: RunStore
    trials: list[Trial]
    tracker: Tracker
    console: Console
    quiet: bool = False

    def pending(self, trials: Sequence[Trial]) -> list[Trial]:
        return [trial for trial in trials if self.store.result(trial) is None]


@dataclass(frozen=True)
class Outcome:
    """How the training of a run ended."""

    stopped: bool
    """By the user."""
    error: CvrunnerError | None
    """What ended it for all trials, where something did."""


@contextlib.contextmanager
def open_run(experiment: Experiment, new: bool, quiet: bool, console: Console, chaos: Chaos = NONE) -> Iterator[Run]:
    """Find the run of this configuration, corpus and code, or begin one. Raises ResultsError when it is in use."""
    from cvrunner.orchestration.trials import plan_trials
    from cvrunner.run.progress import line_printer
    from cvrunner.run.store import RunStore
    from cvrunner.tracking.tracker import tracker_for
    from cvrunner.verdict.floor_record import floor_record

    trials = plan_trials(experiment.config, experiment.corpus, experiment.folds)
    floor = floor_record(experiment.folds, experiment.config.corpus.dimensions)
    store = RunStore.open(
        experiment.results_root,
        experiment.name,
        experiment.config,
        experiment.corpus,
        experiment.folds,
        trials,
        floor,
        sys.argv,
        new,
    )
    tracker = tracker_for(experiment.config, experiment.results_root, line_printer(console), chaos)
    with locked(store.directory.path):
        yield Run(experiment, store, trials, tracker, console, quiet)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The run's folder is this process's alone. Raises ResultsError when it is in use."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ResultsError(f"{folder}: another process is working on this run; wait for it or stop it") from None


def announce(run: Run, chosen: Sequence[Trial], pending: Sequence[Trial]) -> None:
    """What is going to happen, in a few lines."""
    if run.quiet:
        return
    from cvrunner.run.progress import line_printer

    tell = line_printer(run.console)
    tell(run.experiment.corpus.describe())
    for warning in run.experiment.corpus.warnings:
        tell(f"warning: {warning}")
    tell(f"run {run.store.record.run} in {run.store.directory.path}")
    done = len(chosen) - len(pending)
    if pending:
        tell(f"{len(chosen)} trials, {done} done, {len(pending)} to train: {', '.join(t.name for t in pending)}")
        tell(stop_window("; `saving takes about` below should be well under it"))
    else:
        tell(f"all {len(chosen)} trials are done: nothing to train")


def stop_window(hint: str = "") -> str:
    """What stopping means, and how long there is for it; `hint`: what to hold that against."""
    if not paths.in_ray_session(Path.cwd()):
        return "Ctrl-C or SIGTERM saves what is running and ends; the same command continues"
    from cvrunner.orchestration.ray_cluster import RAY_STOP_WAIT_S, STOP_WAIT

    window_s = float(os.environ.get(STOP_WAIT, RAY_STOP_WAIT_S))
    return (
        f"`ray job stop` saves what is running within {window_s:g} s ({STOP_WAIT} of the job's runtime "
        f"environment{hint}); the same command continues"
    )


def train_on_ray(run: Run, pending: Sequence[Trial], chaos: Chaos = NONE) -> Outcome:
    """As actors, whose gauges Ray exports."""

    def executor() -> Executor:
        from cvrunner.orchestration.ray_executor import RayExecutor

        record, experiment = run.store.record, run.experiment
        places = {name: state.node for name, state in record.trials.items() if state.node}
        return RayExecutor(record.run, experiment.config.cluster, experiment.cache_dir, len(pending), chaos, places)

    def exported(gauges: Gauges) -> AbstractContextManager[object]:
        from cvrunner.orchestration.ray_metrics import exported

        return exported(gauges)

    return train(run, pending, executor, exported)


def train(
    run: Run,
    pending: Sequence[Trial],
    make_executor: Callable[[], Executor],
    exported: Callable[[Gauges], AbstractContextManager[object]] = contextlib.nullcontext,
) -> Outcome:
    """Run the trials that have no result; `exported`: while it lasts, others can see the gauges."""
    from cvrunner.orchestration.preemption import Preemption
    from cvrunner.orchestration.ray_metrics import Gauges
    from cvrunner.orchestration.scheduler import run_trials
    from cvrunner.run.progress import Progress
    from cvrunner.tracking.observer import TrackingObserver

    try:
        executor = make_executor()
    except (ClusterError, ClusterLostError):
        run.store.discard()
        raise
    try:
        run.store.begin()
        run.tracker.start(run.store.record, run.experiment.config, run.store.directory)
        gauges = Gauges(run.store.record.run, run.trials, pending, executor.slots)
        with (
            exported(gauges),
            stop_on_signals(run.console) as stop,
            Progress(pending, executor.slots, run.console, run.quiet) as progress,
        ):
            observers: list[Observer] = [run.store, progress, gauges, TrackingObserver(run.tracker)]
            cluster = run.experiment.config.cluster
            # Without a disk that all nodes share, a trial goes on only where its checkpoint is.
            preemption = Preemption(pending, executor.slots) if cluster.preempt and not cluster.node_dir else None
            aborted = run_trials(
                pending, run.store.trial_directory, executor, observers, cluster.retries, stop.is_set, preemption
            )
        return Outcome(stop.is_set(), UsageError(aborted.message) if aborted else None)
    except ClusterLostError as error:
        return Outcome(False, error)
    finally:
        executor.close()


def conclude(run: Run, ending: Outcome | None) -> int:
    """Compare, write, mirror and say it; returns the exit code. `ending`: None where there was nothing to train."""
    status = close(run, ending)
    show(run.store.directory, run.console)
    raise_outcome(ending, status)
    return 0 if status == "COMPLETE" else 1


def close(run: Run, ending: Outcome | None) -> RunStatus:
    """Compare, write and mirror what there is."""
    from cvrunner.report.write import write_report
    from cvrunner.verdict.floor_record import with_controlled_scores

    store = run.store
    status = store.record.status
    if ending or status != "COMPLETE":
        status = store.end(ending is not None and ending.stopped)
    if ending or not store.directory.report.is_file():
        if status == "COMPLETE" and store.record.floor is not None:
            store.note(
                floor=with_controlled_scores(store.record.floor, run.experiment.folds, store.directory, store.record)
            )
        if links := run.tracker.links(UI_ADDRESS):
            store.note(links=links)
        report = write_report(store.directory)
        run.tracker.finish(report.summary, status)
    return status


def raise_outcome(ending: Outcome | None, status: RunStatus) -> None:
    """Raise Stopped, or what ended the run for all trials, where something did."""
    if ending and ending.stopped and status != "COMPLETE":
        raise Stopped("stopped; the same command continues")
    if ending and ending.error:
        raise ending.error


def show(directory: RunDirectory, console: Console) -> None:
    """The comparison, and where everything is."""
    from cvrunner.records.results import Summary
    from cvrunner.report.render import render_text
    from cvrunner.report.report import read_report

    summary = Summary.from_json(directory.summary_file.read_bytes(), str(directory.summary_file))
    report = read_report(directory, summary)
    lines = [render_text(report, console.width), f"results  {directory.path}", f"report   {directory.report}"]
    lines += link_lines(report.run.links)
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def link_lines(links: dict[str, str]) -> list[str]:
    """Where the run is in MLflow; nothing where it is not."""
    if not links:
        return []
    served = any(link.startswith(UI_ADDRESS) for link in links.values())
    lines = ["MLflow   `make ui` serves it; then open" if served else "MLflow"]
    return lines + [f"         {link}  ({name})" for name, link in links.items()]


def gpu_device(gpu: int | None) -> torch.device | None:
    """A GPU by its index. Raises UsageError where there is no such GPU."""
    if gpu is None:
        return None
    import torch

    if not 0 <= gpu < torch.cuda.device_count():
        raise UsageError(f"--gpu {gpu}: this machine has {torch.cuda.device_count()} GPUs that torch can use")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


@contextlib.contextmanager
def stop_on_signals(console: Console) -> Iterator[threading.Event]:
    """SIGTERM and Ctrl-C set the event, so that trials can save; a second Ctrl-C ends at once.

    Outside of the main thread, where Python hears no signals, nothing sets it.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        console.print(f"{signal.Signals(number).name}: saving what is running; the same command continues")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
