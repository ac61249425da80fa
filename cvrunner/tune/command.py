"""`tune`: search for better settings of each condition by the validation parts of the folds, and what it prints."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cvrunner import paths
from cvrunner.config.reading import load_config
from cvrunner.config.schema import Config
from cvrunner.config.tuning import SearchChoices, SettingsFrom
from cvrunner.errors import ClusterError, ClusterLostError, ConfigError, Stopped
from cvrunner.files import write_atomically
from cvrunner.records.results import ccc_label
from cvrunner.run.prepare import Experiment, check_depth, check_fold, prepare_config
from cvrunner.run.session import stop_on_signals, stop_window
from cvrunner.run.store import lock
from cvrunner.text import Table, format_score, line_printer, plural, tables_as_text, timed
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
    settings: dict[str, dict[str, Any]]
    trials: dict[str, list[Trial]]
    left_out: dict[str, list[str]]
    """By condition: keys of the search space that change nothing because the encoder is frozen."""


def tune(config_path: Path | None, overrides: Sequence[str], new: bool, quiet: bool, console: Console) -> int:
    """Train the settings on Ray Tune, or continue an interrupted sweep; ends with `tuned-<sweep>.yaml`."""
    search = _plan(config_path, overrides)
    experiment, config = search.experiment, search.experiment.config
    key = sweep_key(config.tune, search.trials)
    store = SweepStore.open(experiment, key, search.settings, search.trials, sys.argv, new)
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
    return int(store.record.status != "COMPLETE")


def _plan(config_path: Path | None, overrides: Sequence[str]) -> Search:
    """Read and check everything. Raises what `prepare` raises, and ConfigError for what cannot be searched."""
    path = config_path or paths.default_config()
    config = load_config(path, overrides)
    conditions = [config.chosen_condition(c, "tune.conditions") for c in config.tune.conditions or config.conditions]
    # Before the corpus is read, which can take minutes: what can be refused without it.
    if config.cluster.node_dir is not None:
        raise ConfigError("cluster.node_dir: a sweep keeps its files in results.root, on a disk that all nodes share")
    if config.tune.nested and config.tune.folds is not None:
        raise ConfigError("tune.folds: must be null with tune.nested, because every fold needs settings of its own")
    key = "model.unfreeze_top_layers"
    layers = config.tune.search_space.get(key)
    for condition in conditions:
        if config.folds_of(condition):
            raise ConfigError(
                f"conditions.{condition}.folds: settings per fold would override those of the search; remove them"
            )
        if isinstance(layers, SearchChoices):
            depths = [choice for choice in layers.choices if choice is not None]
            check_depth(config.for_condition(condition).model, depths, f"tune.search_space.{key}")
        if not searched_values(config, condition):
            raise ConfigError(
                f"tune.search_space: none of its keys changes anything in {condition}, whose encoder is frozen: add "
                "train.lr, or name the other conditions in tune.conditions"
            )
    experiment = prepare_config(config, path.stem)
    chosen = config.tune.folds or tuple(fold.number for fold in experiment.folds)
    for fold in chosen:
        check_fold(fold, len(experiment.folds), "tune.folds", ConfigError)
    settings: dict[str, dict[str, Any]] = {}
    trials: dict[str, list[Trial]] = {}
    left_out: dict[str, list[str]] = {}
    for condition in conditions:
        current = searched_values(config, condition)
        drawn = draw_settings(config.tune, condition, current)
        settings |= drawn
        trials |= {
            name: plan_setting(config, condition, values, experiment.corpus, experiment.folds, chosen)
            for name, values in drawn.items()
        }
        if config.tune.nested:
            # Now, not after the search: some keys cannot differ between folds.
            with_setting(config, condition, current, fold=chosen[0])
        left_out[condition] = [key for key in config.tune.search_space if key not in current]
    return Search(experiment, settings, trials, left_out)


def _train(search: Search, store: SweepStore, tracker: SweepTracker, quiet: bool, console: Console) -> bool:
    """Train the settings that have not ended; return whether that was stopped by the user."""
    # Ray takes seconds to import, which a sweep that is already finished must not pay.
    from cvrunner.tune.sweep import run_sweep, sweep_resources

    config, print_line = search.experiment.config, line_printer(console)
    if not quiet:
        store.listeners.append(lambda record, name: print_line(timed(line(record, name))))
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
        f"{len(record.settings)} settings, {done} done: {', '.join(record.searched)}; "
        f"folds {folds}, {plural(resources.max_settings, 'setting')} at a time",
    ]
    for condition in record.conditions:
        epochs = plural(record.epochs[condition], "epoch")
        lines.append(f"{len(record.settings_of(condition))} of {condition}, {epochs} each")
        if search.left_out[condition]:
            left_out = ", ".join(search.left_out[condition])
            lines.append(f"not searched, since the encoder of {condition} is frozen: {left_out}")
        compared = [str(epoch) for epoch in rungs(search.experiment.config.tune, record.epochs[condition])]
        if compared:
            lines.append(f"settings of {condition} are compared after epoch {', '.join(compared)}")
    if record.nested:
        lines.append("nested: each fold gets the setting that is best on its validation session; none is stopped early")
    elif resources.slots < len(record.folds):
        lines.append(
            f"only {resources.slots} of {len(record.folds)} folds train at a time, which delays the comparison of "
            "settings; choose fewer folds with tune.folds"
        )
    return [*lines, stop_window()]


def _conclude(search: Search, store: SweepStore, tracker: SweepTracker, stopped: bool, console: Console) -> None:
    """Write the outcome, mirror it to MLflow and print it."""
    store.end(stopped)
    config, record = search.experiment.config, store.record
    tables = [settings_table(record, condition) for condition in record.conditions]
    lines = [tables_as_text(tables, console.width, record.sentence)]
    lines.append(f"results  {store.directory.path}")
    if record.is_decided and not store.pending:
        tuned = tuned_config(config, record)
        files = [store.directory.tuned]
        # Ray removes the working directory of a job.
        if not paths.in_ray_session(Path.cwd()):
            files.append(Path.cwd() / "configs" / store.directory.tuned.name)
        for file in files:
            write_atomically(file, tuned_yaml(tuned, record))
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
    text = f"{setting}  epoch {last.epoch}/{record.epochs[state.condition]}"
    text += f"  validation CCC-Avg {format_score(last.score)} ({folds})"
    if state.ended:
        text += f"  {OUTCOMES[state.status]}"
    return text


def settings_table(record: SweepRecord, condition: str) -> Table:
    """Return a row per setting of a condition, best first: its values and its validation CCC, each fold at its best
    epoch."""
    dimensions = record.dimensions if len(record.dimensions) > 1 else []
    first, of_first = next(iter(record.settings_of(condition).items()))
    searched = [key for key in record.searched if key in of_first.values]
    columns = ["setting", *searched, "epochs", *(f"fold {fold}" for fold in record.folds)]
    columns += [*map(ccc_label, dimensions), "CCC-Avg", "outcome"]
    rows = []
    for name in record.ranked(condition):
        state = record.settings[name]
        scores: list[float | None] = [None] * (len(record.folds) + len(dimensions))
        if state.epochs:
            folds = state.epochs[-1].folds
            scores = [folds[fold]["avg"] for fold in record.folds]
            scores += [mean_if_all(ccc[dimension] for ccc in folds.values()) for dimension in dimensions]
        values = [_format_value(state.values.get(key)) for key in searched]
        cells = [format_score(score) for score in (*scores, state.score)]
        rows.append([name, *values, str(len(state.epochs)), *cells, OUTCOMES[state.status]])
    title = f"Settings of {condition} by validation CCC, best first; {first} is as configured"
    return Table(title, columns, rows)


def tuned_config(config: Config, record: SweepRecord) -> Config:
    """Return the configuration with the chosen settings, per fold if the search was nested, and their origin."""
    tuned, before = config, config.settings_from
    for condition in record.conditions:
        for fold, name in record.chosen(condition).items():
            tuned = with_setting(tuned, condition, record.settings[name].values, fold=fold)
    # A search of other conditions before this one still holds for them.
    samples = {condition: len(record.settings_of(condition)) for condition in record.conditions}
    origin = SettingsFrom(
        source="tune",
        sweep=", ".join(dict.fromkeys(filter(None, (before.sweep, record.run)))),
        samples_per_condition={**before.samples_per_condition, **samples},
        objective=_objective(record),
        nested=record.nested,
        note=before.note,
    )
    return tuned.model_copy(update={"settings_from": origin})


def _objective(record: SweepRecord) -> str:
    folds = f"folds {', '.join(map(str, record.folds))}"
    epochs = " and ".join(dict.fromkeys(plural(count, "epoch") for count in record.epochs.values()))
    what = f"the mean validation CCC-Avg of {folds}"
    if record.nested:
        what = f"each fold's own validation CCC-Avg, {folds}"
    return f"{what} (seed {record.seed}, {epochs})"


def tuned_yaml(tuned: Config, record: SweepRecord) -> str:
    """Return a tuned configuration for `all-folds --config`, with a header on how it was found.

    It is complete, without a base, so that it can be moved to any folder.
    """
    lines = [
        f"Found by `cvrunner tune`, sweep {record.run}{', on synthetic data' if record.synthetic else ''}.",
        f"Settings were chosen by {_objective(record)}.",
    ]
    for condition in record.conditions:
        settings = record.settings_of(condition)
        ended = [state.status for state in settings.values()]
        stopped, failed = ended.count("PRUNED"), ended.count("FAILED")
        configured = format_score(next(iter(settings.values())).score)
        lines += [
            f"{condition}: {len(ended)} settings, {stopped} stopped early, {failed} failed.",
            f"  As configured {configured}, chosen {format_score(record.score(condition))}:",
        ]
        for fold, name in record.chosen(condition).items():
            values = ", ".join(f"{key}: {_format_value(value)}" for key, value in settings[name].values.items())
            chosen = f"{name}, {values}"
            if fold is not None:
                chosen = f"fold {fold}: {chosen}"
            lines.append(f"  {chosen}")
    tried = {condition: tuned.settings_from.samples(condition) for condition in tuned.conditions}
    if len(set(tried.values())) > 1:
        least = min(tried, key=tried.__getitem__)
        counts = ", ".join(f"{condition} {count}" for condition, count in tried.items())
        lines += [
            f"NOT THE SAME BUDGET for all conditions (settings tried: {counts}), which favours those with more.",
            f"Search {least} in the same way (`cvrunner tune --config <this file> --set tune.conditions={least}`),",
            "or report that this was not done.",
        ]
    if record.nested:
        lines.append("No fold's test session had a part in the choice of its settings.")
    else:
        lines.append("No fold's own test part was read; but one fold's test part is training data of other folds.")
    if any(count != tuned.for_condition(c).train.epochs for c, count in record.epochs.items()):
        lines.append("The search used another number of epochs than the configuration below, which keeps its own.")
    header = "".join(f"# {text}\n" for text in lines)
    return header + yaml.safe_dump(tuned.model_dump(mode="json"), sort_keys=False)


def _format_value(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
