"""The settings of a sweep: drawn from the search space, planned as trials without a test part, and scored.

A setting is scored by the mean over its folds of the validation CCC, epoch by epoch.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cvrunner.config.schema import Config, digest, merge, nested, validate
from cvrunner.config.tuning import SearchRange, TuneConfig
from cvrunner.data.folds import Fold, split_digest
from cvrunner.data.utterance import Corpus
from cvrunner.encoders.files import find_encoder
from cvrunner.orchestration.resources import device_type
from cvrunner.records.results import Ccc, EpochRecord
from cvrunner.training.trial import Trial
from cvrunner.tune.store import SettingEpoch, comparable
from cvrunner.verdict.ccc import mean_if_all

ENCODER_KEYS = {
    "train.encoder_lr",
    "train.lora_lr",
    "train.layer_lr_decay",
    "train.unfreeze_layers_per_epoch",
    "train.freeze_epochs",
    "train.gradient_checkpointing",
    "model.unfreeze_top_layers",
    "model.encoder_dropout",
    "model.spec_augment",
    "model.lora.rank",
    "model.lora.alpha",
    "model.lora.dropout",
    "model.lora.targets",
}
"""Keys that change nothing if the encoder is frozen."""
TRIES = 50
"""Number of draws per requested setting, because a draw may repeat an earlier one."""


def searched_values(config: Config, condition: str) -> dict[str, Any]:
    """Return the condition's values without a search, by those keys of the search space that change something."""
    resolved = config.for_condition(condition)
    data: dict[str, Any] = resolved.model_dump(mode="json")
    idle: set[str] = set()
    if resolved.adaptation.lora is not None and "model.lora.rank" not in config.tune.search_space:
        # With adapters, the encoder's own weights do not learn.
        idle = {"train.encoder_lr"}
    elif not resolved.adaptation.trains_encoder:
        idle = ENCODER_KEYS
    return {
        key: functools.reduce(lambda section, part: section[part], key.split("."), data)
        for key in config.tune.search_space
        if key not in idle
    }


def draw_settings(tune: TuneConfig, condition: str, current: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return values by key, by setting: `<condition>-01` has the current ones, the others are drawn for the same keys.

    Equal `tune` sections give equal settings, and a larger `num_samples` only adds settings. A small space may have
    fewer settings than requested.
    """
    # A generator of its own, so that nothing drawn elsewhere moves the settings. Each condition draws all keys, also
    # those that change nothing in it, so that the keys they share get the same values.
    random = np.random.default_rng(tune.seed)
    drawn: list[dict[str, Any]] = [dict(current)]
    for _ in range(TRIES * tune.num_samples):
        if len(drawn) == tune.num_samples:
            break
        all_values = {key: _draw(tune, key, random) for key in tune.search_space}
        values = {key: all_values[key] for key in current}
        if values not in drawn:
            drawn.append(values)
    width = max(2, len(str(tune.num_samples)))
    return {f"{condition}-{number:0{width}}": values for number, values in enumerate(drawn, 1)}


def _draw(tune: TuneConfig, key: str, random: np.random.Generator) -> Any:
    search = tune.search_space[key]
    if not isinstance(search, SearchRange):
        return search.choices[int(random.integers(len(search.choices)))]
    share = random.random()
    if search.scale == "linear":
        value = search.low + share * (search.high - search.low)
    else:
        value = math.exp(math.log(search.low) + share * math.log(search.high / search.low))
    # Rounded as the table shows it, so that the table shows the value that was trained.
    return float(f"{value:.4g}")


def with_setting(
    config: Config, condition: str, values: Mapping[str, Any], epochs: int | None = None, fold: int | None = None
) -> Config:
    """Return the configuration with a setting's values in one condition only, or only in one fold of it. Raises
    ConfigError."""
    data = config.model_dump(mode="json")
    place = f"conditions.{condition}"
    if fold is not None:
        place += f".folds.{fold}"
    for key, value in values.items():
        data = merge(data, nested(f"{place}.{key}", value))
    if epochs is not None:
        data = merge(data, nested(f"{place}.train.epochs", epochs))
    return validate(data, f"tune, with {', '.join(f'{key}={value}' for key, value in values.items())}")


def plan_setting(
    config: Config,
    condition: str,
    values: Mapping[str, Any],
    corpus: Corpus,
    folds: Sequence[Fold],
    chosen: Sequence[int],
) -> list[Trial]:
    """Return a trial per chosen fold, with the first seed."""
    resolved = with_setting(config, condition, values, config.tune.epochs).for_condition(condition)
    encoder = find_encoder(resolved.model.encoder, resolved.model.revision, resolved.model.allow_tuned_encoder)
    # Without its test part a fold cannot be scored on it, not even by mistake.
    parts = [replace(fold, test=()) for fold in folds if fold.number in chosen]
    seed, split = resolved.train.seeds[0], split_digest(folds)
    device = device_type(resolved.train.device, os.environ)
    return [Trial(condition, fold, seed, resolved, encoder, split, corpus.digest, device) for fold in parts]


def sweep_key(tune: TuneConfig, trials: Mapping[str, Sequence[Trial]]) -> str:
    """Return a hash of everything that decides a sweep's table: settings, trials, and when a setting is stopped."""
    rule = [tune.grace_period, tune.reduction_factor, tune.nested]
    return digest([rule, [[name, [trial.key for trial in some]] for name, some in trials.items()]])[:32]


def rungs(tune: TuneConfig, epochs: int) -> list[int]:
    """Return the epochs after which ASHA compares the settings, without the last epoch; none if folds are nested.

    The mean over the folds, by which ASHA stops a setting, has the test session of each fold in the validation part of
    another, so a setting of a fold's own must not depend on it.
    """
    if tune.nested:
        return []
    # The same levels as in Ray's ASHAScheduler, which does not publish them.
    grace = min(tune.grace_period, epochs)
    count = int(math.log(epochs / grace) / math.log(tune.reduction_factor) + 1)
    levels = [math.ceil(grace * tune.reduction_factor**k) for k in range(count)]
    return [epoch for epoch in levels if epoch < epochs]


class Objective:
    """Collects the epochs of a setting's folds, which arrive in any order between folds."""

    def __init__(self, folds: Sequence[int]) -> None:
        self.best: dict[int, list[Ccc]] = {fold: [] for fold in folds}
        """Per fold and epoch: validation CCC of the best epoch so far."""
        self.ended: set[int] = set()
        """Folds that have no more epochs; the caller adds them."""
        self.reported = 0
        """Last epoch that `new_epochs` has returned."""

    def epoch(self, fold: int, record: EpochRecord) -> None:
        """Add an epoch of a fold. An epoch that is repeated after a kill changes nothing."""
        known = self.best[fold]
        if record.epoch == len(known) + 1:
            best = record.validation_ccc
            if known and comparable(best["avg"]) <= comparable(known[-1]["avg"]):
                best = known[-1]
            known.append(best)

    def new_epochs(self) -> Iterator[SettingEpoch]:
        """Yield the epochs that every fold has finished, or stopped before, and that were not yielded yet."""
        training = [len(known) for fold, known in self.best.items() if fold not in self.ended]
        # The slowest fold decides; once all have ended, the one with the most epochs.
        reached = min(training, default=max(map(len, self.best.values())))
        while reached > self.reported:
            self.reported += 1
            # A fold that has stopped early counts with its best epoch.
            folds = {fold: known[min(self.reported, len(known)) - 1] for fold, known in self.best.items()}
            score = mean_if_all(ccc["avg"] for ccc in folds.values())
            yield SettingEpoch(epoch=self.reported, folds=folds, score=score)
