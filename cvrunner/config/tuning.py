"""The sections of the configuration about the search for settings, and about where the settings come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from cvrunner.config.sections import LIST, UNIQUE, Condition, Count, NonNegative, Section


class SearchRange(Section):
    """A range of real numbers from which values are drawn uniformly. Whole numbers need `choices`."""

    low: float
    high: float
    scale: Literal["linear", "log"] = "linear"
    """`log`: uniform in the logarithm, which suits learning rates."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"scale log needs low above 0, not {self.low:g}")
        return self

    @property
    def examples(self) -> tuple[Any, ...]:
        """Values to check a key with: both ends, and one that is not a whole number."""
        return self.low + (self.high - self.low) / 3.1, self.low, self.high


class SearchChoices(Section):
    """A list of equally likely values."""

    choices: Annotated[tuple[Any, ...], LIST]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.choices:
            raise ValueError("choices must name one value or more")
        return self

    @property
    def examples(self) -> tuple[Any, ...]:
        """Values to check a key with: all choices."""
        return self.choices


# The parentheses keep these tags out of the key that a message shows.
RANGE, CHOICES = "(range)", "(choices)"


def _kind_of_search(value: object) -> str:
    # Validation passes the mapping from the file; serialisation passes the section.
    if isinstance(value, SearchChoices) or (isinstance(value, dict) and "choices" in value):
        return CHOICES
    return RANGE


Search = Annotated[
    Annotated[SearchRange, Tag(RANGE)] | Annotated[SearchChoices, Tag(CHOICES)], Discriminator(_kind_of_search)
]


def _tuple_of_name(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class TuneConfig(Section):
    """A search for better settings of the conditions, the same for each, judged by the validation parts of the folds
    (docs/tuning.md)."""

    num_samples: Count = 12
    """Number of settings per condition. The first is the configuration as it is; the others are drawn."""
    conditions: Annotated[tuple[Condition, ...] | None, BeforeValidator(_tuple_of_name), LIST, UNIQUE] = None
    """Conditions whose settings are searched, each with the same budget. `null`: all conditions."""
    folds: Annotated[tuple[Count, ...] | None, LIST, UNIQUE] = None
    """Folds to train each setting on. `null`: all folds."""
    nested: bool = False
    """Choose one setting per condition and fold, by the validation session of that fold alone, so that no fold's test
    session has a part in its own settings. No setting is stopped early then. `false`: one setting per condition, by the
    mean over the folds."""
    seed: NonNegative = 0
    """Seed for drawing the settings. Training uses the first of `train.seeds`."""
    epochs: Count | None = None
    """Number of epochs per setting. `null`: `train.epochs`."""
    grace_period: Count = 3
    """Number of epochs before any setting can be stopped."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3.0
    """At epochs grace_period, grace_period x reduction_factor and so on, only the best 1/reduction_factor of the
    settings so far continue."""
    search_space: dict[str, Search] = {  # noqa: RUF012 (pydantic copies it)
        "train.encoder_lr": SearchRange(low=5e-6, high=5e-5, scale="log"),
        "train.lr": SearchRange(low=3e-5, high=1e-3, scale="log"),
        "train.grad_clip": SearchChoices(choices=(0.3, 1.0)),
        "model.unfreeze_top_layers": SearchChoices(choices=(None, 2, 4)),
    }
    """Keys of `model` and `train` to search, each with `{low, high, scale: linear or log}` or `{choices: []}`. Setting
    it replaces the whole default."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.search_space:
            raise ValueError("search_space must name one key or more")
        return self


class SettingsFrom(Section):
    """Who chose the settings of the conditions, and with which budget. `tune` writes it into its configuration; the
    report and MLflow repeat it. It changes no number."""

    source: Literal["hand", "tune", "literature"] = "hand"
    """`hand`: chosen without a recorded search; `tune`: chosen by `cvrunner tune`; `literature`: taken from
    publications, which `note` names."""
    sweep: str | None = None
    """Name of the sweep, or names of several, separated by commas."""
    samples_per_condition: dict[Condition, NonNegative] = {}  # noqa: RUF012 (pydantic copies it)
    """Number of settings that were tried per condition. A condition that is not listed was not searched."""
    objective: str = ""
    """Quantity by which the settings were chosen."""
    nested: bool = False
    """Whether each fold has settings of its own, chosen by its own validation session."""
    note: str = ""
    """Anything else that a reader should know about the choice."""

    def samples(self, condition: str) -> int:
        """Return the number of settings tried for a condition; 0 without a search."""
        return self.samples_per_condition.get(condition, 0)


NOT_SEARCHED = {"train.seeds": "averaged over, not searched", "train.epochs": "set by tune.epochs"}
"""Keys of `train` that a sweep cannot search, and why."""
