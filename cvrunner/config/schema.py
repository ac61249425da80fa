"""The whole configuration: checked, frozen, and with one clear line for every mistake in it."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ValidationError, field_validator, model_validator

from cvrunner.config.adaptation import Adaptation, adaptation_of
from cvrunner.config.sections import (
    TABLES,
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
    VerdictConfig,
    VerifyConfig,
)
from cvrunner.config.tuning import NOT_SEARCHED, SettingsFrom, TuneConfig
from cvrunner.errors import ConfigError

RENAMED_KEYS = {
    "model.unfreeze_layers": "model.unfreeze_top_layers",
    "train.early_stopping": "train.early_stopping_patience",
    "train.length_pool": "train.length_bucket_batches",
    "train.warmup": "train.warmup_ratio",
    "train.weights_ema": "train.ema_decay",
    "cluster.change_over": "cluster.preempt",
    "cluster.retries.lost": "cluster.retries.worker_died",
    "cluster.retries.numbers": "cluster.retries.non_finite",
    "tune.condition": "tune.conditions",
    "tune.grace_epochs": "tune.grace_period",
    "tune.samples": "tune.num_samples",
    "tune.space": "tune.search_space",
}
"""Keys of earlier versions. A user's configuration that has one is refused with the new name; a stored run is read."""
NOT_PER_FOLD = (
    ("model", "encoder"),
    ("model", "revision"),
    ("model", "freeze_speech_encoder"),
    ("model", "protocol"),
    ("train", "seeds"),
)
"""Keys that say what a condition is, and so cannot differ between its folds."""


LINEAR_PROBE = "linear_probe"
"""Name of the linear probe in results and tables, so no condition can have it."""


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
    """Named overrides of `model` and `train`. The others are compared with the first. `folds` in a condition has
    overrides per fold, as a nested search writes them: `folds: {1: {train: {lr: 3e-4}}}`."""
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    results: ResultsConfig = ResultsConfig()
    verdict: VerdictConfig = VerdictConfig()
    reference: ReferenceConfig = ReferenceConfig()
    verify: VerifyConfig = VerifyConfig()
    tune: TuneConfig = TuneConfig()
    settings_from: SettingsFrom = SettingsFrom()

    @field_validator("conditions", mode="before")
    @classmethod
    def _fold_numbers_as_text(cls, conditions: Any) -> Any:
        """Return the conditions with folds named by text: YAML reads a number, JSON and `--set` a text."""
        if not isinstance(conditions, dict):
            return conditions
        named = dict(conditions)
        for name, overrides in named.items():
            if isinstance(overrides, dict) and isinstance(overrides.get("folds"), dict):
                folds: dict[str, Any] = {}
                for fold, changes in overrides["folds"].items():
                    # Merged, because an override of fold 1 must not replace what the file says about it.
                    folds = merge(folds, {str(fold): changes})
                named[name] = {**overrides, "folds": folds}
        return named

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.conditions:
            raise ValueError("conditions must name one condition or more")
        if LINEAR_PROBE in self.conditions:
            raise ValueError(f"conditions.{LINEAR_PROBE}: every run has a linear probe of this name; choose another")
        for name, overrides in self.conditions.items():
            if other := sorted(set(overrides) - {"model", "train", "folds"}):
                raise ValueError(f"conditions.{name}.{other[0]}: a condition may change only model and train")
            folds = overrides.get("folds", {})
            if not isinstance(folds, dict):
                raise ValueError(f"conditions.{name}.folds: must be overrides by fold, not {short(folds)}")
            for fold, changes in folds.items():
                _check_fold_overrides(f"conditions.{name}.folds.{fold}", fold, changes)
        if self.folds.scheme == "manifest_split" and self.corpus.format not in TABLES:
            raise ValueError(f"folds.scheme manifest_split needs corpus.format {', '.join(TABLES)}")
        outcomes = (*self.corpus.dimensions, "avg")
        if self.verdict.primary not in outcomes:
            rule = f"is not predicted, choose one of {', '.join(outcomes)}"
            raise ValueError(f"verdict.primary {self.verdict.primary}: {rule}")
        if self.model.protocol == "dialogue" and self.train.accumulation == "averaged":
            raise ValueError("train.accumulation averaged cannot be used with model.protocol dialogue")
        return self

    def for_condition(self, name: str, fold: int | None = None) -> Config:
        """Return this configuration with the overrides of one condition applied, and only that condition in it.

        With `fold`, also with the condition's overrides for that fold.
        """
        if name not in self.conditions:
            raise ConfigError(f"conditions.{name}: unknown condition; choose one of {', '.join(self.conditions)}")
        overrides = self.conditions[name]
        where, layers = f"conditions.{name}", [{key: overrides[key] for key in overrides if key != "folds"}]
        if fold in self.folds_of(name):
            where, layers = f"{where}.folds.{fold}", [*layers, overrides["folds"][str(fold)]]
        # Validated again as a whole: an override may break a rule between two keys.
        data = functools.reduce(merge, layers, self.model_dump(mode="json"))
        data["conditions"] = {name: overrides}
        return _parse(data, where, ())

    def folds_of(self, condition: str) -> list[int]:
        """Return the folds for which a condition has overrides of their own."""
        return [int(fold) for fold in self.conditions[condition].get("folds", {})]

    def chosen_condition(self, name: str | None, key: str) -> str:
        """Return the condition `name`, which `key` asks for. None: `unfrozen` if there is one, else the last.

        Raises ConfigError for an unknown condition.
        """
        if name is None:
            return "unfrozen" if "unfrozen" in self.conditions else list(self.conditions)[-1]
        if name not in self.conditions:
            raise ConfigError(f"{key} {name}: unknown condition; choose one of {', '.join(self.conditions)}")
        return name

    @property
    def adaptation(self) -> Adaptation:
        """How a condition adapts the encoder; ask the configuration of that condition."""
        return adaptation_of(self.model, self.train)

    @property
    def label_variant(self) -> str:
        """`corpus.labels`; a table of utterances has its own labels."""
        if self.corpus.format in TABLES:
            return self.corpus.format
        return self.corpus.labels

    @functools.cached_property
    def numerics(self) -> dict[str, Any]:
        """The settings that a trial's numbers depend on, as plain JSON."""
        data = self.model_dump(mode="json", include={"corpus", "folds", "model", "train"})
        # A trial's key has digests of the corpus and the encoder, and the seed; their names and places do not count.
        for key in ("root", "format", "demo", "partial", "ratings", "audformat"):
            data["corpus"].pop(key)
        for key in ("encoder", "revision", "allow_tuned_encoder"):
            data["model"].pop(key)
        # Nor does how the device was requested: the key has the one that the trial gets.
        data["train"].pop("seeds"), data["train"].pop("device")
        # On a CPU the number of threads decides the order of floating-point additions.
        data["threads"] = self.cluster.cpus_per_trial
        return data


def digest(value: object) -> str:
    """Return the SHA-256 of a JSON value in canonical form, as 64 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `below` overridden by `above`: mappings key by key, any other value as a whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def nested(key: str, value: object) -> dict[str, Any]:
    """Return `{"train": {"lr": value}}` for `train.lr`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)  # type: ignore[call-overload, no-any-return]


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested mappings as one, with keys joined by dots."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def valid_keys(model: type[BaseModel] = Config, prefix: str = "", sections: bool = True) -> list[str]:
    """Return every key of the schema that holds a value, such as `train.lr`, and every section, unless left out."""
    keys = []
    for name, field in model.model_fields.items():
        below: list[str] = []
        # Lists of sections, such as claims, have no keys that an override could name.
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            below = valid_keys(field.annotation, f"{prefix}{name}.", sections)
        if sections or not below:
            keys.append(prefix + name)
        keys += below
    return keys


def validate(data: Mapping[str, Any], where: str, overrides: Sequence[str] = ()) -> Config:
    """Return the checked Config, after checking its conditions too.

    `where` names the source of the data and `overrides` the overrides in it, for messages. Raises ConfigError with all
    problems, one per line.
    """
    config = _parse(data, where, overrides)
    # Now, not when its first trial starts, hours later.
    for name in config.conditions:
        for fold in (None, *config.folds_of(name)):
            config.for_condition(name, fold)
    _check_search_space(config, where, overrides)
    return config


def _check_fold_overrides(where: str, fold: str, changes: object) -> None:
    """Raise ValueError unless `changes` are overrides that one fold of a condition may have."""
    if not re.fullmatch(r"[1-9][0-9]{0,5}", fold):
        raise ValueError(f"{where}: a fold is named by its number, from 1")
    if not isinstance(changes, dict) or set(changes) - {"model", "train"}:
        raise ValueError(f"{where}: a fold may change only model and train, not {short(changes)}")
    for section, key in NOT_PER_FOLD:
        if isinstance(changes.get(section), dict) and key in changes[section]:
            raise ValueError(f"{where}.{section}.{key}: must be the same in all folds of a condition")


def _check_search_space(config: Config, where: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError if `tune.search_space` names a key that cannot be searched or a value its key cannot take."""
    searchable = [key for key in valid_keys(sections=False) if key.startswith(("model.", "train."))]
    problems = []
    for key, search in config.tune.search_space.items():
        full = f"tune.search_space.{key}"
        source = f"({_source(full, where, overrides)})"
        if key in RENAMED_KEYS:
            problems.append(f"{full} {source}: renamed to {RENAMED_KEYS[key]}")
        elif key in NOT_SEARCHED:
            problems.append(f"{full}: is {NOT_SEARCHED[key]} {source}")
        elif key not in searchable:
            problems.append(f"{full}: no key of model or train {source}{_suggestion(key, searchable)}")
        elif rule := next((rule for value in search.examples if (rule := _misfit(key, value))), None):
            problems.append(f"{full}: {rule} {source}")
    if problems:
        raise ConfigError("\n".join(problems))


def _misfit(key: str, value: object) -> str | None:
    """Return why a key cannot have a value, whatever the other keys are; None if it can."""
    try:
        Config.model_validate(nested(key, value))
    except ValidationError as error:
        for item in error.errors():
            # Checks across keys raise `value_error`; another value of the other key may satisfy them.
            if item["type"] != "value_error":
                return f"{item['msg'][0].lower()}{item['msg'][1:]}, not {short(value)}"
    return None


# --- messages -----------------------------------------------------------------------------------------------------


def short(value: object) -> str:
    """Return a value as a message shows it, at most 80 characters long."""
    # reprlib shortens inside, so that a huge or nested value is never formatted as a whole.
    text = reprlib.repr(value) if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parse(data: Mapping[str, Any], where: str, overrides: Sequence[str]) -> Config:
    """Return the Config. Raises ConfigError with one line per problem that pydantic found."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        items = error.errors()
    lines = []
    for item in items:
        unknown = item["type"] == "extra_forbidden"
        parts = [str(part) for part in item["loc"]]
        # Pydantic adds the tags of union members, which no user wrote; they are not plain words.
        plain = [part for part in parts if re.fullmatch(r"[A-Za-z0-9_.-]+", part)]
        if unknown and parts[-1] not in plain:
            plain.append(short(parts[-1]))
        key = ".".join(plain)
        source = _source(key, where, overrides)
        if key in RENAMED_KEYS:
            lines.append(f"{key} ({source}): renamed to {RENAMED_KEYS[key]}")
            continue
        if unknown:
            lines.append(f"{key}: unknown key in {source}{_suggestion(key, valid_keys())}")
            continue
        rule = item["msg"].removeprefix("Value error, ")
        if item["type"] in ("model_type", "dict_type"):
            rule = "must be a section with keys"
        rule = f"{rule[0].lower()}{rule[1:]}"
        if key:
            rule = f"{key}: {rule}"
            # Our own checks quote the value themselves, if it helps.
            if item["type"] != "value_error":
                rule += f", not {short(item['input'])}"
        lines.append(f"{rule} ({source})")
    raise ConfigError("\n".join(lines))


def _source(key: str, where: str, overrides: Sequence[str]) -> str:
    """Return the last override of a key, of its section or of a key below it; the file if there is none."""
    # Later overrides win, so the last one is to blame.
    for override in reversed(overrides):
        set_key = override.partition("=")[0]
        if f"{key}.".startswith(f"{set_key}.") or f"{set_key}.".startswith(f"{key}."):
            return f"override {override}"
    return where


def _suggestion(key: str, keys: Sequence[str]) -> str:
    """Return `; did you mean train.epochs?`, or else the valid keys of the section.

    Prefers the same last word in another section, then the most similar key, then the most similar last word.
    """
    section, _, last = key.rpartition(".")
    by_last = {name.rpartition(".")[2]: name for name in keys}
    siblings = [name.rpartition(".")[2] for name in keys if name.rpartition(".")[0] == section]
    likely = [name for name in keys if name.endswith(f".{last}")]
    likely = likely or difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    likely = likely or [by_last[word] for word in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)]
    likely = likely or [word for word in siblings if last in word]
    if likely:
        return f"; did you mean {likely[0]}?"
    if not siblings:
        return ""
    return f"; valid keys: {', '.join(siblings)}"
