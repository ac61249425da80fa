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
from cvrunner.run_steps import Prepared, check_depth, held, prepare, stop_on_signals, stop_window

if TYPE_CHECKING:
    from rich.console import Console

    from cvrunner.orchestration.sweep_book import SweepBook
    from cvrunner.records.sweep import SweepRecord
    from cvrunner.reporting.tracking_sweep import SweepTracker
    from cvrunner.training.trial import Trial


@dataclass(frozen=True)
class Search:
    """What is to be searched: nothing is trained yet."""

    prepared: Prepared
    condition: str
    settings: dict[str, dict[str, Any]]
    trials: dict[str, list[Trial]]
    left_out: list[str]
    """Keys of the space that change nothing, since the encoder is frozen."""

    @property
    def config(self) -> Config:
        return self.prepared.config


def tune(config_path: Path | None, overrides: Sequence[str], new: bool, quiet: bool, console: Console) -> int:
    """Train the settings on Ray Tune, or go on where that was interrupted; ends with `tuned-<sweep>.yaml`."""
    search = _planned(config_path, overrides)
    book = _book(search, new)
    with held(book.directory.path):
        book.begin()
        tracker, stopped = _tracker(search, book, console), False
        try:
            stopped = bool(book.todo) and _trained(search, book, tracker, quiet, console)
        finally:
            if book.directory.path.exists():  # not where the cluster was too small
                _conclude(search, book, tracker, stopped, console)
        if stopped and book.todo:
            raise Stopped("stopped; the same command continues")
    return 0 if book.record.status == "COMPLETE" else 1


def _planned(config_path: Path | None, overrides: Sequence[str]) -> Search:
    """Read and check all. Raises what `prepare` raises, and ConfigError for what cannot be searched."""
    path = config_path or paths.default_config()
    condition = _checked_condition(load_config(path, overrides))
    prepared = prepare(path, overrides)
    from cvrunner.orchestration.settings import current_values, draw_settings, plan_setting, searched_keys

    config, numbers = prepared.config, [fold.number for fold in prepared.folds]
    chosen = config.tune.folds or tuple(numbers)
    if unknown := [fold for fold in chosen if fold not in numbers]:
        raise ConfigError(f"tune.folds {unknown[0]}: there are folds 1 to {len(numbers)}")
    keys = searched_keys(config.tune, config.for_condition(condition).model.freeze_speech_encoder)
    if not keys:
        raise ConfigError(f"tune.space: none of its keys changes anything in {condition}, whose encoder is frozen")
    settings = draw_settings(config.tune, current_values(config, condition, keys))
    trials = {
        name: plan_setting(config, condition, values, prepared.corpus, prepared.folds, chosen)
        for name, values in settings.items()
    }
    return Search(prepared, condition, settings, trials, [key for key in config.tune.space if key not in keys])


def _checked_condition(config: Config) -> str:
    """The condition to search. Raises ConfigError for what is wrong before the corpus is read."""
    condition, key = config.chosen_condition(config.tune.condition, "tune.condition"), "model.unfreeze_layers"
    if config.cluster.node_dir is not None:
        raise ConfigError("cluster.node_dir: a sweep keeps its files in results.root, on a disk that all nodes share")
    layers = config.tune.space.get(key)
    if isinstance(layers, SearchChoices):
        wanted = [choice for choice in layers.choices if choice is not None]
        check_depth(config.for_condition(condition).model, wanted, f"tune.space.{key}")
    return condition


def _book(search: Search, new: bool) -> SweepBook:
    from cvrunner.orchestration.settings import sweep_key
    from cvrunner.orchestration.sweep_book import SweepBook

    prepared, key = search.prepared, sweep_key(search.config.tune, search.trials)
    return SweepBook.open(
        prepared.results_root,
        prepared.name,
        key,
        prepared.config,
        prepared.corpus,
        prepared.folds,
        search.settings,
        search.trials,
        sys.argv,
        new,
    )


def _tracker(search: Search, book: SweepBook, console: Console) -> SweepTracker | None:
    if not search.config.tracking.enabled:
        return None
    from cvrunner.reporting.progress import teller
    from cvrunner.reporting.tracker import tracking_uri
    from cvrunner.reporting.tracking_sweep import SweepMirror, SweepTracker

    uri = tracking_uri(search.config, search.prepared.results_root)
    return SweepTracker(lambda: SweepMirror(uri, search.config, book.directory), teller(console))


def _trained(search: Search, book: SweepBook, tracker: SweepTracker | None, quiet: bool, console: Console) -> bool:
    """Train what has not ended; whether it was stopped."""
    from cvrunner.orchestration.sweep import Room, run_sweep
    from cvrunner.reporting.progress import teller
    from cvrunner.reporting.sweep_text import teller_of_settings

    config = search.config
    if not quiet:
        book.listeners.append(teller_of_settings(teller(console)))
    if tracker is not None:
        book.listeners.append(lambda record, _: tracker.update(record))
    try:
        room = Room(book.directory.name, config.cluster, len(book.record.folds))
    except (ClusterError, ClusterLostError):
        book.discard()
        raise
    with room, stop_on_signals(console) as stop:
        _announce(search, book, room.slots, room.settings, quiet, console)
        if tracker is not None:
            tracker.update(book.record)
        run_sweep(book, search.trials, config.tune, config.cluster, search.prepared.cache_dir, room, stop)
        return stop.is_set()


def _announce(search: Search, book: SweepBook, slots: int, at_a_time: int, quiet: bool, console: Console) -> None:
    """What is going to happen, in a few lines."""
    if quiet:
        return
    from cvrunner.orchestration.settings import rungs
    from cvrunner.reporting.progress import teller

    tell, record = teller(console), book.record
    tell(search.prepared.corpus.describe())
    tell(f"run {record.run} in {book.directory.path}")
    done = len(record.settings) - len(book.todo)
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


def _conclude(search: Search, book: SweepBook, tracker: SweepTracker | None, stopped: bool, console: Console) -> None:
    """Write what was found, mirror it and say it."""
    from cvrunner.reporting.sweep_text import sweep_text

    book.end(stopped)
    tuned = _write_tuned(search, book)
    if tracker is not None:
        tracker.finish(book.record)
    lines = [sweep_text(book.record, console.width), f"results  {book.directory.path}"]
    lines += [f"tuned    {path}" for path in tuned]
    if tuned:
        lines.append(f"next     cvrunner all-folds --config {tuned[-1]}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _write_tuned(search: Search, book: SweepBook) -> list[Path]:
    """The configuration with the best setting, once all have ended: with the sweep, and in configs/ where it lasts."""
    from cvrunner.orchestration.settings import laid_over
    from cvrunner.reporting.sweep_text import tuned_yaml

    record: SweepRecord = book.record
    if record.best is None or book.todo:
        return []
    tuned = laid_over(search.config, search.condition, record.settings[record.best].values)
    places = [book.directory.tuned]
    if not paths.in_ray_session(Path.cwd()):
        places.append(Path.cwd() / "configs" / book.directory.tuned.name)
    for place in places:
        write_atomically(place, tuned_yaml(search.config, tuned, record))
    return places
