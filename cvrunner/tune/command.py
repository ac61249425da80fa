"""`tune`: search for better settings of one condition by the validation parts of the folds, and what it prints."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cvrunner import paths
from cvrunner.config.reading import load_config
from cvrunner.config.schema import Config
from cvrunner.config.tuning import SearchChoices
from cvrunner.errors import ClusterError, ClusterLostError, ConfigError, Stopped
from cvrunner.files import write_atomically
from cvrunner.records.results import ccc_label
from cvrunner.run.prepare import Experiment, check_depth, check_fold, prepare_config
from cvrunner.run.session import lock, stop_on_signals, stop_window
from cvrunner.text import Table, format_score, line_printer, plural, tables_as_text
from cvrunner.tracking.tracker import tracking_uri
from cvrunner.training.trial import Trial
from cvrunner.tune.settings import draw_settings, plan_setting, rungs, searched_values, sweep_key, with_setting
from cvrunner.tune.store import SettingStatus, SweepRecord, SweepStore
from cvrunner.tune.tracking import SweepTracker
from cvrunner.verdict.ccc import mean_if_all

if TYPE_CHECKING:
    from rich.console import Console

    from cvrunner.tune.sweep import SweepResources

OUTCOMES: dict[SettingStatus, str] = {
    "WAITING": "not finished",
    "DONE": "done",
    "PRUNED": "stopped early",
    "FAILED": "failed",
}


@dataclass(frozen=True)
class Search:
    """Plan of a search; nothing is trained yet."""

    experiment: Experiment
    condition: str
    settings: dict[str, dict[str, Any]]
    trials: dict[str, list[Trial]]
    left_out: list[str]
    """Keys of the search space that change nothing because the encoder is frozen."""


def tune(config_path: Path | None, overrides: Sequence[str], new: bool, quiet: bool, console: Console) -> int:
    """Train the settings on Ray Tune, or continue an interrupted sweep; ends with `tuned-<sweep>.yaml`."""
    search = _plan(config_path, overrides)
    experiment, config = search.experiment, search.experiment.config
    store = SweepStore.open(
        experiment.results_root,
        experiment.name,
        sweep_key(config.tune, search.trials),
        config,
        experiment.corpus,
        experiment.folds,
        search.settings,
        search.trials,
        sys.argv,
        new,
    )
    uri = tracking_uri(config, experiment.results_root) if config.tracking.enabled else None
    tracker, stopped = SweepTracker(uri, line_printer(console)), False
    with lock(store.directory.path):
        store.begin()
        try:
            if store.pending:
                stopped = _train(search, store, tracker, quiet, console)
        finally:
            # Also if nothing was pending: a kill may have left the outcome unwritten. The folder is gone if the cluster
            # was too small to begin.
            if store.directory.path.exists():
                _conclude(search, store, tracker, stopped, console)
        if stopped and store.pending:
            raise Stopped("stopped; the same command continues")
    return 0 if store.record.status == "COMPLETE" else 1


def _plan(config_path: Path | None, overrides: Sequence[str]) -> Search:
    """Read and check everything. Raises what `prepare` raises, and ConfigError for what cannot be searched."""
    path = config_path or paths.default_config()
    config = load_config(path, overrides)
    condition = config.chosen_condition((config.tune.conditions or (None,))[0], "tune.conditions")
    # Before the corpus is read, which can take minutes: what can be refused without it.
    if config.cluster.node_dir is not None:
        raise ConfigError("cluster.node_dir: a sweep keeps its files in results.root, on a disk that all nodes share")
    key = "model.unfreeze_top_layers"
    layers = config.tune.search_space.get(key)
    if isinstance(layers, SearchChoices):
        depths = [choice for choice in layers.choices if choice is not None]
        check_depth(config.for_condition(condition).model, depths, f"tune.search_space.{key}")
    experiment = prepare_config(config, path.stem)
    chosen = config.tune.folds or tuple(fold.number for fold in experiment.folds)
    for fold in chosen:
        check_fold(fold, len(experiment.folds), "tune.folds", ConfigError)
    current = searched_values(config, condition)
    if not current:
        raise ConfigError(
            f"tune.search_space: none of its keys changes anything in {condition}, whose encoder is frozen"
        )
    settings = draw_settings(config.tune, current)
    trials = {
        name: plan_setting(config, condition, values, experiment.corpus, experiment.folds, chosen)
        for name, values in settings.items()
    }
    left_out = [key for key in config.tune.search_space if key not in current]
    return Search(experiment, condition, settings, trials, left_out)


def _train(search: Search, store: SweepStore, tracker: SweepTracker, quiet: bool, console: Console) -> bool:
    """Train the settings that have not ended; return whether that was stopped by the user."""
    # Ray takes seconds to import, which a sweep that is already finished must not pay.
    from cvrunner.tune.sweep import run_sweep, sweep_resources

    config, print_line = search.experiment.config, line_printer(console)
    if not quiet:
        store.listeners.append(lambda record, name: print_line(f"{time.strftime('%H:%M:%S')}  {line(record, name)}"))
    store.listeners.append(tracker.update)
    with contextlib.ExitStack() as stack:
        try:
            found = sweep_resources(store.directory.name, config.cluster, len(store.record.folds))
            resources = stack.enter_context(found)
        except (ClusterError, ClusterLostError):
            # A sweep that could not begin leaves no empty folder.
            store.discard()
            raise
        stop = stack.enter_context(stop_on_signals(console))
        if not quiet:
            for text in _announcement(search, store, resources):
                print_line(text)
        tracker.start(config, store.record, store.directory)
        run_sweep(store, search.trials, config.tune, config.cluster, search.experiment.cache_dir, resources, stop)
        return stop.is_set()


def _announcement(search: Search, store: SweepStore, resources: SweepResources) -> list[str]:
    """Return lines on what is going to be trained."""
    record = store.record
    done, folds = len(record.settings) - len(store.pending), ", ".join(map(str, record.folds))
    lines = [
        search.experiment.corpus.describe(),
        *(f"warning: {warning}" for warning in search.experiment.corpus.warnings),
        f"run {record.run} in {store.directory.path}",
        f"{len(record.settings)} settings of {record.condition}, {done} done: {', '.join(record.searched)}; "
        f"folds {folds}, {record.epochs} epochs, {plural(resources.max_settings, 'setting')} at a time",
    ]
    if search.left_out:
        lines.append(f"not searched, since the encoder of {record.condition} is frozen: {', '.join(search.left_out)}")
    if compared := [str(epoch) for epoch in rungs(search.experiment.config.tune, record.epochs)]:
        lines.append(f"settings are compared after epoch {', '.join(compared)}")
    if resources.slots < len(record.folds):
        lines.append(
            f"only {resources.slots} of {len(record.folds)} folds train at a time, which delays the comparison of "
            "settings; choose fewer folds with tune.folds"
        )
    return [*lines, stop_window()]


def _conclude(search: Search, store: SweepStore, tracker: SweepTracker, stopped: bool, console: Console) -> None:
    """Write the outcome, mirror it to MLflow and print it."""
    store.end(stopped)
    config, record = search.experiment.config, store.record
    lines = [tables_as_text([settings_table(record)], console.width, record.sentence)]
    lines.append(f"results  {store.directory.path}")
    if record.best is not None and not store.pending:
        tuned = with_setting(config, search.condition, record.settings[record.best].values)
        files = [store.directory.tuned]
        # Ray removes the working directory of a job.
        if not paths.in_ray_session(Path.cwd()):
            files.append(Path.cwd() / "configs" / store.directory.tuned.name)
        for file in files:
            write_atomically(file, tuned_yaml(config, tuned, record))
            lines.append(f"tuned    {file}")
        lines.append(f"next     cvrunner all-folds --config {files[-1]}")
    # Not started yet if there was nothing left to train. MLflow gets a copy of the tuned configuration.
    tracker.start(config, record, store.directory)
    tracker.finish(record)
    line_printer(console)("\n".join(lines))


# --- what is printed and written --------------------------------------------------------------------------------------


def line(record: SweepRecord, setting: str) -> str:
    """Return one line on a setting's last epoch, or on how it ended."""
    state = record.settings[setting]
    if state.status == "FAILED":
        return f"{setting}  failed: {state.error}"
    last = state.epochs[-1]
    folds = ", ".join(f"{fold}: {format_score(ccc['avg'])}" for fold, ccc in last.folds.items())
    text = f"{setting}  epoch {last.epoch}/{record.epochs}  validation CCC-Avg {format_score(last.score)} ({folds})"
    return f"{text}  {OUTCOMES[state.status]}" if state.ended else text


def settings_table(record: SweepRecord) -> Table:
    """Return a row per setting, best first: its values and its validation CCC, each fold at its best epoch."""
    dimensions = record.dimensions if len(record.dimensions) > 1 else []
    columns = ["setting", *record.searched, "epochs", *(f"fold {fold}" for fold in record.folds)]
    columns += [*map(ccc_label, dimensions), "CCC-Avg", "outcome"]
    rows = []
    for name in record.ranked:
        state = record.settings[name]
        scores: list[float | None] = [None] * (len(record.folds) + len(dimensions))
        if state.epochs:
            folds = state.epochs[-1].folds
            scores = [folds[fold]["avg"] for fold in record.folds]
            scores += [mean_if_all(ccc[dimension] for ccc in folds.values()) for dimension in dimensions]
        values = [_format_value(state.values.get(key)) for key in record.searched]
        cells = [format_score(score) for score in (*scores, state.score)]
        rows.append([name, *values, str(len(state.epochs)), *cells, OUTCOMES[state.status]])
    first = next(iter(record.settings))
    title = f"Settings of {record.condition} by validation CCC, best first; {first} is as configured"
    return Table(title, columns, rows)


def tuned_yaml(config: Config, tuned: Config, record: SweepRecord) -> str:
    """Return `tuned` as a configuration for `all-folds --config`, with a header on how it was found.

    It is complete, without a base, so that it can be moved to any folder.
    """
    assert record.best is not None
    best, first = record.settings[record.best], next(iter(record.settings.values()))
    ended = [state.status for state in record.settings.values()]
    lines = [
        f"Found by `cvrunner tune`, sweep {record.run}{', on synthetic data' if record.synthetic else ''}.",
        f"{len(ended)} settings of {record.condition} were searched by the mean validation CCC-Avg of "
        f"folds {', '.join(map(str, record.folds))}",
        f"(seed {record.seed}, {record.epochs} epochs); {ended.count('PRUNED')} were stopped early, "
        f"{ended.count('FAILED')} failed.",
        f"Best: {record.best} with {format_score(best.score)}; as configured {format_score(first.score)}.",
        *(f"  {key}: {_format_value(value)}" for key, value in best.values.items()),
    ]
    if others := [name for name in config.conditions if name != record.condition]:
        names = " and ".join(others)
        lines += [
            f"Only {record.condition} was searched, so a comparison with {names} favours it by the search. Search",
            f"{names} in the same way (`cvrunner tune --config <this file> --set tune.condition={others[0]}`),",
            "or report that this was not done.",
        ]
    lines.append("No fold's own test part was read; but one fold's test part is training data of other folds.")
    if record.epochs != tuned.for_condition(record.condition).train.epochs:
        lines.append(f"The search used {record.epochs} epochs; the configuration below keeps its own number.")
    header = "".join(f"# {text}\n" for text in lines)
    return header + yaml.safe_dump(tuned.model_dump(mode="json"), sort_keys=False)


def _format_value(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
