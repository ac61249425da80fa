"""The settings of a sweep: drawn from the space, laid over the configuration, as trials that have no test part."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cvrunner.config.schema import Config, digest, merge, nested, validate
from cvrunner.config.sections import SearchRange, TuneConfig
from cvrunner.data.folds import Fold, split_digest
from cvrunner.data.utterance import Corpus
from cvrunner.encoders.files import find_encoder
from cvrunner.training.trial import Trial

ENCODER_KEYS = {
    "train.encoder_lr",
    "train.freeze_epochs",
    "train.gradient_checkpointing",
    "model.unfreeze_top_layers",
    "model.encoder_dropout",
    "model.spec_augment",
}
"""What changes nothing where the encoder is frozen."""
TRIES = 50
"""How often a setting is drawn again that is there already."""


def searched_keys(tune: TuneConfig, frozen: bool) -> list[str]:
    """The keys of the space that change something."""
    return [key for key in tune.search_space if not (frozen and key in ENCODER_KEYS)]


def current_values(config: Config, condition: str, keys: Sequence[str]) -> dict[str, Any]:
    """By key: what the condition has without a search."""
    data: dict[str, Any] = config.for_condition(condition).model_dump(mode="json")
    return {key: functools.reduce(lambda section, part: section[part], key.split("."), data) for key in keys}


def draw_settings(tune: TuneConfig, current: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values by key, by setting. `setting-01` has the current ones, the others are drawn for the same keys.

    The same for the same section; more samples begin with the fewer. Fewer than wanted where there are no more.
    """
    random = np.random.default_rng(tune.seed)
    drawn: list[dict[str, Any]] = [dict(current)]
    for _ in range(TRIES * tune.num_samples):
        if len(drawn) == tune.num_samples:
            break
        values = {key: _draw(tune, key, random) for key in current}
        if values not in drawn:
            drawn.append(values)
    width = max(2, len(str(tune.num_samples)))
    return {f"setting-{number:0{width}}": values for number, values in enumerate(drawn, 1)}


def _draw(tune: TuneConfig, key: str, random: np.random.Generator) -> Any:
    search = tune.search_space[key]
    if not isinstance(search, SearchRange):
        return search.choices[int(random.integers(len(search.choices)))]
    share = random.random()
    if search.scale == "linear":
        value = search.low + share * (search.high - search.low)
    else:
        value = math.exp(math.log(search.low) + share * math.log(search.high / search.low))
    return float(f"{value:.4g}")  # what the table shows is what was trained


def laid_over(config: Config, condition: str, values: Mapping[str, Any], epochs: int | None = None) -> Config:
    """The configuration with a setting in one condition; the others stay as they are. Raises ConfigError."""
    data = config.model_dump(mode="json")
    for key, value in values.items():
        data["conditions"][condition] = merge(data["conditions"][condition], nested(key, value))
    if epochs is not None:
        data["conditions"][condition] = merge(data["conditions"][condition], nested("train.epochs", epochs))
    return validate(data, f"tune, with {', '.join(f'{key}={value}' for key, value in values.items())}")


def plan_setting(
    config: Config,
    condition: str,
    values: Mapping[str, Any],
    corpus: Corpus,
    folds: Sequence[Fold],
    chosen: Sequence[int],
) -> list[Trial]:
    """A trial for each chosen fold, of the first seed. The fold's test part is not in it, so it cannot be read."""
    resolved = laid_over(config, condition, values, config.tune.epochs).for_condition(condition)
    encoder = find_encoder(resolved.model.encoder, resolved.model.revision)
    return [
        Trial(
            condition,
            replace(fold, test=()),
            resolved.train.seeds[0],
            resolved,
            encoder,
            split_digest(folds),
            corpus.digest,
        )
        for fold in folds
        if fold.number in chosen
    ]


def sweep_key(tune: TuneConfig, trials: Mapping[str, Sequence[Trial]]) -> str:
    """Hash of what decides a sweep's table: settings, trials, and when a setting is stopped."""
    rule = [tune.grace_period, tune.reduction_factor]
    return digest([rule, [[name, [trial.key for trial in some]] for name, some in trials.items()]])[:32]


def rungs(tune: TuneConfig, epochs: int) -> list[int]:
    """The epochs after which ASHA compares the settings, before the last one."""
    grace = min(tune.grace_period, epochs)
    count = int(math.log(epochs / grace) / math.log(tune.reduction_factor) + 1)
    levels = [math.ceil(grace * tune.reduction_factor**k) for k in range(count)]
    return [epoch for epoch in levels if epoch < epochs]
