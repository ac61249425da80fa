"""The commands of the main job: each composes the parts below it and returns an exit code. `cli.py` parses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cvrunner import paths
from cvrunner.config.reading import load_config
from cvrunner.config.schema import Config
from cvrunner.data.corpus import fold_count
from cvrunner.errors import LeakError, UsageError
from cvrunner.orchestration.machine import find_gpus
from cvrunner.orchestration.trials import plan_trials
from cvrunner.records.run_directory import RunDirectory, TrialDirectory
from cvrunner.report.check import check_run, check_text
from cvrunner.report.compare import compare_runs, comparison_text
from cvrunner.report.write import write_report
from cvrunner.run import audit as corpus_audit
from cvrunner.run.prepare import Experiment, check_fold, find_run_directory, prepare, prepare_config
from cvrunner.run.protocol import make_protocol
from cvrunner.run.session import announce, conclude, link_lines, open_run, show, train, train_on_ray
from cvrunner.run.store import lock
from cvrunner.text import line_printer, plural
from cvrunner.tracking.mirror import sync_run
from cvrunner.tracking.names import UI_ADDRESS
from cvrunner.tracking.tracker import tracking_uri
from cvrunner.training.faults import NONE, Chaos
from cvrunner.training.trial import Trial
from cvrunner.verdict.protocol import protocol_text

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from cvrunner.orchestration.scheduler import Executor


def all_folds(
    config_path: Path | None,
    overrides: Sequence[str],
    new: bool,
    quiet: bool,
    console: Console,
    chaos: Chaos = NONE,
    preflight: Callable[[Config], None] | None = None,
) -> int:
    """Train every condition x fold x seed on Ray; continues an interrupted run, repeats nothing that is done.

    `preflight`: raises an error if a new run would fail here; it is asked before the run has a folder.
    """
    directory = run_all_folds(prepare(config_path, overrides), new, quiet, console, chaos, preflight)
    return int(directory.read_run().status != "COMPLETE")


def run_all_folds(
    experiment: Experiment,
    new: bool,
    quiet: bool,
    console: Console,
    chaos: Chaos = NONE,
    preflight: Callable[[Config], None] | None = None,
) -> RunDirectory:
    """As `all_folds`, but return the run's folder. Raises what ended the run for all trials, and Stopped."""
    with open_run(experiment, new, quiet, console, chaos, preflight=preflight) as run:
        pending = run.pending(run.trials)
        announce(run, run.trials, pending)
        conclude(run, train_on_ray(run, pending, chaos, run.pending_probes()))
        return run.store.directory


def chosen_gpu(number: int, requested: str) -> torch.device:
    """Return the GPU with this number in nvidia-smi. Raises UsageError if torch cannot use it."""
    # It takes seconds, and only this option needs it here.
    import torch

    from cvrunner.training.device import find_device

    gpus = find_gpus()
    if requested == "cpu":
        raise UsageError(f"gpu {number}: train.device is cpu")
    if not 0 <= number < len(gpus):
        raise UsageError(f"gpu {number}: this machine has {plural(len(gpus), 'GPU')}")
    device = find_device(gpus[number].uuid)
    if device is None:
        raise UsageError(f"gpu {number}: torch cannot use it; `cvrunner doctor` compares driver and torch")
    torch.cuda.set_device(device)
    return device


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
    """Train one fold (one condition, or all) in this process, without Ray; the same run and the same numbers."""
    path = config_path or paths.default_config()
    config = load_config(path, overrides)
    # Wrong arguments are reported before the corpus is read, which may take minutes.
    if condition is not None:
        config.for_condition(condition)
    device = None
    if gpu is not None:
        device = chosen_gpu(gpu, config.train.device)
    check_fold(fold, fold_count(config, paths.corpus_root(config.corpus.root)))
    experiment = prepare_config(config, path.stem)
    # Again, since some corpora have to be read before their sessions, and so their folds, can be counted.
    check_fold(fold, len(experiment.folds))

    def is_chosen(trial: Trial) -> bool:
        return trial.fold.number == fold and condition in (None, trial.condition)

    with open_run(experiment, False, quiet, console, chaos, is_chosen) as run:
        chosen = [trial for trial in run.trials if is_chosen(trial)]
        pending = run.pending(chosen)
        announce(run, chosen, pending)

        def make_executor() -> Executor:
            # It imports torch, which takes seconds; a fold that is done does not need it.
            from cvrunner.orchestration.attempt import InlineExecutor

            return InlineExecutor(experiment.cache_dir, device, chaos)

        code = conclude(run, train(run, pending, make_executor, run.pending_probes(fold)))
        # The run may lack other folds; the exit code is about the chosen one.
        if run.pending(chosen):
            return max(code, 1)
        return 0


def protocol(config_path: Path | None, overrides: Sequence[str], console: Console, as_json: bool = False) -> int:
    """Print the protocol of a configuration; trains nothing and writes nothing to the results folder."""
    experiment = prepare(config_path, overrides)
    trials = plan_trials(experiment.config, experiment.corpus, experiment.folds)
    declared = make_protocol(experiment, trials, list(experiment.config.conditions))
    text = protocol_text(declared)
    if as_json:
        text = json.dumps({"sha256": declared.sha256, "protocol": declared.model_dump(mode="json")}, indent=1)
    line_printer(console)(text)
    return 0


def audit(config_path: Path | None, overrides: Sequence[str], console: Console, as_json: bool = False) -> int:
    """Print corpus, labels, folds, leaks and no-audio floor; trains nothing. Exit code 2 if folds leak."""
    experiment = prepare(config_path, overrides, for_training=False)
    found = corpus_audit.audit(experiment.corpus, experiment.folds, experiment.config)
    text = corpus_audit.render(found, console.width)
    if as_json:
        # Undefined scores are None, so asdict holds nothing that JSON lacks but records.
        text = json.dumps(asdict(found), indent=1, default=lambda record: record.model_dump(mode="json"))
    line_printer(console)(text)
    return LeakError.exit_code if found.leaks else 0


def report(run: Path, console: Console, as_json: bool = False, check: bool = False) -> int:
    """Rebuild tables, figures and report.html from the files of a run alone; `check`: compare with them instead."""
    if check:
        checked = check_run(find_run_directory(run))
        text = json.dumps(asdict(checked), indent=1) if as_json else check_text(checked)
        line_printer(console)(text)
        return int(bool(checked.problems))
    built = write_report(find_run_directory(run))
    for name in built.summary.missing:
        if damage := TrialDirectory(built.directory.path / name).damage(built.run.trials[name].key):
            # Not on standard output, which may have to be JSON.
            print(f"warning: {name} counts as missing: {damage}", file=sys.stderr, flush=True)
    if as_json:
        line_printer(console)(built.summary.to_json().rstrip())
    else:
        show(built.directory, built.run, built.summary, console)
    return int(built.run.status != "COMPLETE" or bool(built.summary.missing))


def compare(
    first: Path, second: Path, condition: str | None, with_: str | None, unpaired: bool, as_json: bool, console: Console
) -> int:
    """Compare two runs, paired by utterance, fold and seed; refused if they cannot be paired."""
    found = compare_runs(find_run_directory(first), find_run_directory(second), condition, with_, unpaired)
    text = found.to_json().rstrip() if as_json else comparison_text(found, console.width)
    line_printer(console)(text)
    return 0


def sync(run: Path, uri: str | None, console: Console) -> int:
    """Upload a run to MLflow from its files; existing entries are kept."""
    directory = find_run_directory(run)
    store = uri or tracking_uri(directory.read_config(), directory.path.parent)
    current = directory.current_run()
    with lock(directory.path, "its driver writes it to MLflow, also what a server missed; `sync` when it has ended"):
        if current.status == "INTERRUPTED":
            # Written while this process holds the lock, with which the run would count as RUNNING.
            directory.write_run(current)
        links, record = sync_run(directory, store, UI_ADDRESS), directory.read_run()
        if links != record.links:
            # The report shows the addresses too, and MLflow has a copy of the report.
            directory.write_run(record.model_copy(update={"links": links}))
            write_report(directory)
            sync_run(directory, store)
    line_printer(console)("\n".join([f"{record.run} is in {store}", *link_lines(links, directory.path)]))
    return 0
