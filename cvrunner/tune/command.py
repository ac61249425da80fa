"""`tune`: a search for better settings of one condition, by the validation parts of the folds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvrunner import paths
from cvrunner.config.reading import load_config
from cvrunner.config.schema import Config
from cvrunner.config.sections import SearchChoices
from cvrunner.errors import ClusterError, ClusterLostError, ConfigError, Stopped
from cvrunner.files import write_atomically
from cvrunner.run.prepare import Experiment, check_depth, check_fold, prepare_config
from cvrunner.run.session import lock, stop_on_signals, stop_window
from cvrunner.text import line_printer

if TYPE_CHECKING:
    from rich.console import Console

    from cvrunner.training.trial import Trial
    from cvrunner.tune.records import SweepRecord
    from cvrunner.tune.store import SweepStore
    from cvrunner.tune.tracking import SweepTracker


@dataclass(frozen=True)
class Search:
    """What is to be searched: nothing is trained yet."""

    experiment: Experiment
    condition: str
    settings: dict[str, dict[str, Any]]
    trials: dict[str, list[Trial]]
    left_out: list[str]
    """Keys of the space that change nothing, since the encoder is frozen."""

    @property
    def config(self) -> Config:
        return self.experiment.config


def tune(config_path: Path | None, overrides: Sequence[str], new: bool, quiet: bool, console: Console) -> int:
    """Train the settings on Ray Tune, or go on where that was interrupted; ends with `tuned-<sweep>.yaml`."""
    search = _planned(config_path, overrides)
    store = _book(search, new)
    with lock(store.directory.path):
        store.begin()
        tracker, stopped = _tracker(search, store, console), False
        try:
            stopped = bool(store.pending) and _trained(search, store, tracker, quiet, console)
        finally:
            if store.directory.path.exists():  # not where the cluster was too small
                _conclude(search, store, tracker, stopped, console)
        if stopped and store.pending:
            raise Stopped("stopped; the same command continues")
    return 0 if store.record.status == "COMPLETE" else 1


def _planned(config_path: Path | None, overrides: Sequence[str]) -> Search:
    """Read and check all. Raises what `prepare` raises, and ConfigError for what cannot be searched."""
    path = config_path or paths.default_config()
    config = load_config(path, overrides)
    condition = config.chosen_condition(config.tune.condition, "tune.condition")
    _check_search(config, condition)
    experiment = prepare_config(config, path.stem)
    from cvrunner.tune.settings import current_values, draw_settings, plan_setting, searched_keys

    chosen = config.tune.folds or tuple(fold.number for fold in experiment.folds)
    for fold in chosen:
        check_fold(fold, len(experiment.folds), "tune.folds", ConfigError)
    keys = searched_keys(config.tune, config.for_condition(condition).model.freeze_speech_encoder)
    if not keys:
        raise ConfigError(
            f"tune.search_space: none of its keys changes anything in {condition}, whose encoder is frozen"
        )
    settings = draw_settings(config.tune, current_values(config, condition, keys))
    trials = {
        name: plan_setting(config, condition, values, experiment.corpus, experiment.folds, chosen)
        for name, values in settings.items()
    }
    return Search(experiment, condition, settings, trials, [key for key in config.tune.search_space if key not in keys])


def _check_search(config: Config, condition: str) -> None:
    """Raise ConfigError for what can be seen to be wrong before the corpus is read."""
    if config.cluster.node_dir is not None:
        raise ConfigError("cluster.node_dir: a sweep keeps its files in results.root, on a disk that all nodes share")
    key = "model.unfreeze_top_layers"
    layers = config.tune.search_space.get(key)
    if isinstance(layers, SearchChoices):
        requested = [choice for choice in layers.choices if choice is not None]
        check_depth(config.for_condition(condition).model, requested, f"tune.search_space.{key}")


def _book(search: Search, new: bool) -> SweepStore:
    from cvrunner.tune.settings import sweep_key
    from cvrunner.tune.store import SweepStore

    experiment, key = search.experiment, sweep_key(search.config.tune, search.trials)
    return SweepStore.open(
        experiment.results_root,
        experiment.name,
        key,
        experiment.config,
        experiment.corpus,
        experiment.folds,
        search.settings,
        search.trials,
        sys.argv,
        new,
    )


def _tracker(search: Search, store: SweepStore, console: Console) -> SweepTracker | None:
    if not search.config.tracking.enabled:
        return None
    from cvrunner.tracking.tracker import tracking_uri
    from cvrunner.tune.tracking import SweepMirror, SweepTracker

    uri = tracking_uri(search.config, search.experiment.results_root)
    return SweepTracker(lambda: SweepMirror(uri, search.config, store.directory), line_printer(console))


def _trained(search: Search, store: SweepStore, tracker: SweepTracker | None, quiet: bool, console: Console) -> bool:
    """Train what has not ended; whether it was stopped."""
    from cvrunner.tune.sweep import Room, run_sweep
    from cvrunner.tune.text import setting_printer

    config = search.config
    if not quiet:
        store.listeners.append(setting_printer(line_printer(console)))
    if tracker is not None:
        store.listeners.append(lambda record, _: tracker.update(record))
    try:
        room = Room(store.directory.name, config.cluster, len(store.record.folds))
    except (ClusterError, ClusterLostError):
        store.discard()
        raise
    with room, stop_on_signals(console) as stop:
        _announce(search, store, room.slots, room.settings, quiet, console)
        if tracker is not None:
            tracker.update(store.record)
        run_sweep(store, search.trials, config.tune, config.cluster, search.experiment.cache_dir, room, stop)
        return stop.is_set()


def _announce(search: Search, store: SweepStore, slots: int, at_a_time: int, quiet: bool, console: Console) -> None:
    """What is going to happen, in a few lines."""
    if quiet:
        return
    from cvrunner.tune.settings import rungs

    tell, record = line_printer(console), store.record
    tell(search.experiment.corpus.describe())
    tell(f"run {record.run} in {store.directory.path}")
    done = len(record.settings) - len(store.pending)
    folds = ", ".join(map(str, record.folds))
    tell(
        f"{len(record.settings)} settings of {record.condition}, {done} done: {', '.join(record.searched)}; "
        f"folds {folds}, {record.epochs} epochs, {at_a_time} setting{'s' if at_a_time > 1 else ''} at a time"
    )
    if search.left_out:
        tell(f"not searched, since the encoder of {record.condition} is frozen: {', '.join(search.left_out)}")
    if compared := rungs(search.config.tune, record.epochs):
        tell(f"compared after epoch{'s' if len(compared) > 1 else ''} {', '.join(map(str, compared))}")
    if slots < len(record.folds):
        tell(
            f"only {slots} of {len(record.folds)} folds train at a time, so a bad setting is known late; "
            "tune.folds takes fewer"
        )
    tell(stop_window())


def _conclude(search: Search, store: SweepStore, tracker: SweepTracker | None, stopped: bool, console: Console) -> None:
    """Write what was found, mirror it and say it."""
    from cvrunner.tune.text import sweep_text

    store.end(stopped)
    tuned = _write_tuned(search, store)
    if tracker is not None:
        tracker.finish(store.record)
    lines = [sweep_text(store.record, console.width), f"results  {store.directory.path}"]
    lines += [f"tuned    {path}" for path in tuned]
    if tuned:
        lines.append(f"next     cvrunner all-folds --config {tuned[-1]}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _write_tuned(search: Search, store: SweepStore) -> list[Path]:
    """The configuration with the best setting, once all have ended: with the sweep, and in configs/ where it lasts."""
    from cvrunner.tune.settings import laid_over
    from cvrunner.tune.text import tuned_yaml

    record: SweepRecord = store.record
    if record.best is None or store.pending:
        return []
    tuned = laid_over(search.config, search.condition, record.settings[record.best].values)
    places = [store.directory.tuned]
    if not paths.in_ray_session(Path.cwd()):
        places.append(Path.cwd() / "configs" / store.directory.tuned.name)
    for place in places:
        write_atomically(place, tuned_yaml(search.config, tuned, record))
    return places
