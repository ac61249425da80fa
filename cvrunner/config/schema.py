"""The whole configuration: checked, frozen, with a digest of what decides numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self

from pydantic import BaseModel, ValidationError, model_validator

from cvrunner.config.messages import nearest, origin, sentences, short
from cvrunner.config.sections import (
    NOT_SEARCHED,
    ClusterConfig,
    Condition,
    CorpusConfig,
    FoldsConfig,
    ModelConfig,
    ReferenceConfig,
    ResultsConfig,
    Section,
    TrackingConfig,
    TrainConfig,
    TuneConfig,
    VerifyConfig,
)
from cvrunner.errors import ConfigError


class Config(Section):
    """One resolved configuration. Only `corpus`, `folds`, `model` and `train` change a trial's numbers."""

    corpus: CorpusConfig = CorpusConfig()
    folds: FoldsConfig = FoldsConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    conditions: dict[Condition, dict[str, Any]] = {  # noqa: RUF012 (pydantic copies it)
        "frozen": {"model": {"freeze_speech_encoder": True}},
        "unfrozen": {"model": {"freeze_speech_encoder": False}},
    }
    """Named overrides of `model` and `train`. The first is what the others are compared with."""
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    results: ResultsConfig = ResultsConfig()
    reference: ReferenceConfig = ReferenceConfig()
    verify: VerifyConfig = VerifyConfig()
    tune: TuneConfig = TuneConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.conditions:
            raise ValueError("conditions must name one condition or more")
        for name, overrides in self.conditions.items():
            if other := sorted(set(overrides) - {"model", "train"}):
                raise ValueError(f"conditions.{name}.{other[0]}: a condition may change only model and train")
        if self.folds.scheme == "manifest_split" and self.corpus.format != "manifest":
            raise ValueError("folds.scheme manifest_split needs corpus.format manifest")
        if self.model.protocol == "dialogue" and self.train.accumulation == "averaged":
            raise ValueError("train.accumulation averaged cannot be used with model.protocol dialogue")
        return self

    def for_condition(self, name: str) -> Config:
        """This configuration with one condition laid over it, and no conditions of its own but that one."""
        if name not in self.conditions:
            raise ConfigError(f"conditions.{name}: unknown condition; choose one of {', '.join(self.conditions)}")
        overrides = self.conditions[name]
        data = merge(self.model_dump(mode="json"), overrides)
        data["conditions"] = {name: overrides}
        return _parsed(data, f"conditions.{name}", ())

    def chosen_condition(self, name: str | None, key: str) -> str:
        """The condition that `key` names, or where it names none `unfrozen`, else the last. Raises ConfigError."""
        if name is None:
            return "unfrozen" if "unfrozen" in self.conditions else list(self.conditions)[-1]
        if name not in self.conditions:
            raise ConfigError(f"{key} {name}: unknown condition; choose one of {', '.join(self.conditions)}")
        return name

    @cached_property
    def numerics(self) -> dict[str, Any]:
        """What a trial's numbers depend on, as plain JSON: not where the corpus lies, nor its name."""
        data = self.model_dump(mode="json", include={"corpus", "folds", "model", "train"})
        for key in ("root", "format", "demo"):
            data["corpus"].pop(key)
        data["model"].pop("encoder"), data["model"].pop("revision")
        data["train"].pop("seeds")
        data["threads"] = self.cluster.cpus_per_trial
        return data


def digest(value: object) -> str:
    """SHA-256 of a JSON value in canonical form, as 64 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`: mappings key by key, everything else replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def validate(data: Mapping[str, Any], where: str, overrides: Sequence[str] = ()) -> Config:
    """A checked Config, its conditions checked too. Raises ConfigError with all problems, one a line.

    `where` the data comes from and which `overrides` are in it: for messages.
    """
    config = _parsed(data, where, overrides)
    for name in config.conditions:
        config.for_condition(name)
    _check_space(config, where, overrides)
    return config


def _parsed(data: Mapping[str, Any], where: str, overrides: Sequence[str]) -> Config:
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(sentences(error, where, overrides, valid_keys()))) from None


def _check_space(config: Config, where: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError if `tune.search_space` names a key that cannot be searched or a value its key cannot take."""
    problems = []
    for key, search in config.tune.search_space.items():
        place = f"({origin(f'tune.search_space.{key}', where, overrides)})"
        if key in NOT_SEARCHED:
            problems.append(f"tune.search_space.{key}: is {NOT_SEARCHED[key]} {place}")
        elif key not in searchable_keys():
            hint = nearest(key, searchable_keys())
            problems.append(f"tune.search_space.{key}: no key of model or train {place}{hint}")
        elif rule := next((rule for value in search.examples if (rule := _misfit(key, value))), None):
            problems.append(f"tune.search_space.{key}: {rule} {place}")
    if problems:
        raise ConfigError("\n".join(problems))


def searchable_keys() -> list[str]:
    """The keys of `model` and `train` that hold a value, not a section."""
    keys = valid_keys()
    sections = {key.rpartition(".")[0] for key in keys}
    return [key for key in keys if key.startswith(("model.", "train.")) and key not in sections]


def _misfit(key: str, value: object) -> str | None:
    """Why a key cannot have a value, whatever the other keys say."""
    try:
        Config.model_validate(nested(key, value))
    except ValidationError as error:
        for item in error.errors():
            if item["type"] != "value_error":
                return f"{item['msg'][0].lower()}{item['msg'][1:]}, not {short(value)}"
    return None


def nested(key: str, value: object) -> dict[str, Any]:
    """`{"train": {"lr": value}}` of `train.lr`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)  # type: ignore[call-overload, no-any-return]


def valid_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every key of the schema with its sections, such as `train.lr`."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += valid_keys(field.annotation, f"{prefix}{name}.")
    return keys
