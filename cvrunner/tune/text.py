"""What a sweep prints and leaves: lines while it runs, one table, one sentence, and the configuration it found."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import yaml

from cvrunner.config.schema import Config
from cvrunner.records.results import ccc_label
from cvrunner.text import Table, tables_as_text
from cvrunner.text import format_score as number
from cvrunner.tune.records import SettingState, SweepRecord
from cvrunner.verdict.ccc import mean_if_all

OUTCOMES = {"WAITING": "not finished", "DONE": "done", "PRUNED": "stopped early", "FAILED": "failed"}


def line(record: SweepRecord, setting: str) -> str:
    """A setting's last epoch, or its end."""
    state = record.settings[setting]
    if state.status == "FAILED":
        return f"{setting}  failed: {state.error}"
    last = state.epochs[-1]
    folds = ", ".join(f"{fold}: {number(ccc['avg'])}" for fold, ccc in last.folds.items())
    end = f"  {OUTCOMES[state.status]}" if state.ended else ""
    return f"{setting}  epoch {last.epoch}/{record.epochs}  validation CCC-Avg {number(last.score)} ({folds}){end}"


def setting_printer(tell: Callable[[str], None]) -> Callable[[SweepRecord, str], None]:
    """Prints a line with the time for each change."""
    return lambda record, setting: tell(f"{time.strftime('%H:%M:%S')}  {line(record, setting)}")


def sweep_text(record: SweepRecord, width: int) -> str:
    """The table, best first, and the sentence."""
    return tables_as_text([settings_table(record)], width, sentence(record))


def settings_table(record: SweepRecord) -> Table:
    """A row for each setting; its validation CCC by fold and dimension, each fold at its best epoch."""
    keys, dimensions = record.searched, [d for d in record.dimensions if len(record.dimensions) > 1]
    columns = ["setting", *keys, "epochs", *(f"fold {fold}" for fold in record.folds)]
    columns += [*map(ccc_label, dimensions), "CCC-Avg", "outcome"]
    rows = [
        [
            name,
            *(_value(record.settings[name].values.get(key)) for key in keys),
            str(len(record.settings[name].epochs)),
            *(number(_fold(record.settings[name], fold)) for fold in record.folds),
            *(number(_mean(record.settings[name], dimension)) for dimension in dimensions),
            number(record.settings[name].score),
            OUTCOMES[record.settings[name].status],
        ]
        for name in record.ranked
    ]
    title = (
        f"Settings of {record.condition} by validation CCC, best first; {next(iter(record.settings))} is as configured"
    )
    return Table(title, columns, rows)


def sentence(record: SweepRecord) -> str:
    """What came out, and what it does not say."""
    data = ", on synthetic data" if record.synthetic else ""
    if record.best is None:
        return f"no setting is trained to the end yet{data}"
    first, score = next(iter(record.settings)), _score(record, record.best)
    if record.best == first:
        return f"of {len(record.settings)} settings none is better than the configuration as it is, {score}{data}"
    return (
        f"{record.best} is the best of {len(record.settings)}: mean validation CCC-Avg {score}, as configured "
        f"{_score(record, first)}{data}; it was chosen by this very value, which therefore flatters it"
    )


def tuned_yaml(config: Config, tuned: Config, record: SweepRecord) -> str:
    """`tuned` for `all-folds --config`: complete, so that it holds wherever the file lies, with an honest header."""
    assert record.best is not None
    values, ended = record.settings[record.best].values, [state.status for state in record.settings.values()]
    lines = [
        f"Found by `cvrunner tune`, sweep {record.run}{', on synthetic data' if record.synthetic else ''}.",
        f"{len(ended)} settings of {record.condition} were searched by the mean validation CCC-Avg of "
        f"folds {', '.join(map(str, record.folds))}",
        f"(seed {record.seed}, {record.epochs} epochs); {ended.count('PRUNED')} were stopped early, "
        f"{ended.count('FAILED')} failed.",
        f"Best: {record.best} with {_score(record, record.best)}; as configured "
        f"{_score(record, next(iter(record.settings)))}.",
        *(f"  {key}: {_value(value)}" for key, value in values.items()),
        *_advice(record, [name for name in config.conditions if name != record.condition]),
        "No fold's own test part was read; but what is one fold's test part is training data of others.",
    ]
    if record.epochs != tuned.for_condition(record.condition).train.epochs:
        lines.append(f"It was searched with {record.epochs} epochs; below are the configuration's own.")
    header = "".join(f"# {text}\n" for text in lines)
    return header + yaml.safe_dump(tuned.model_dump(mode="json"), sort_keys=False)


def _advice(record: SweepRecord, others: list[str]) -> list[str]:
    if not others:
        return []
    names = " and ".join(others)
    return [
        f"Only {record.condition} was searched, so a comparison with {names} favours it by the search. Give {names}",
        f"the same search (`cvrunner tune --config <this file> --set tune.condition={others[0]}`),",
        "or report that it had none.",
    ]


def _fold(state: SettingState, fold: int) -> float | None:
    return state.epochs[-1].folds[fold]["avg"] if state.epochs else None


def _mean(state: SettingState, dimension: str) -> float | None:
    return mean_if_all(ccc[dimension] for ccc in state.epochs[-1].folds.values()) if state.epochs else None


def _score(record: SweepRecord, name: str) -> str:
    return number(record.settings[name].score)


def _value(value: Any) -> str:
    return "null" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
