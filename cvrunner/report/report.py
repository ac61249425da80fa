"""Everything a report is made of, read once from a run's folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cvrunner.config.schema import Config
from cvrunner.errors import ResultsError
from cvrunner.records.results import EpochRecord, FloorRecord, RunRecord, Summary, TrialResult, ccc_label
from cvrunner.records.run_directory import RunDirectory, read_events
from cvrunner.verdict.comparison import summarise
from cvrunner.verdict.out_of_fold import OutOfFold, all_predictions, out_of_fold

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Report:
    """A run as its files tell it."""

    directory: RunDirectory
    run: RunRecord
    summary: Summary
    config: Config
    results: dict[str, TrialResult]
    """By trial name; only the trials that have one."""
    epochs: dict[str, list[EpochRecord]]
    """By trial name; empty where none is finished."""
    floor: FloorRecord | None
    links: dict[str, str]
    """By name: addresses of the same run in MLflow."""

    def predictions(self) -> OutOfFold | None:
        """The predictions of a complete run, else None."""
        return None if self.summary.missing else out_of_fold(self.directory, self.run, self.results)

    @property
    def predictions_table(self) -> pd.DataFrame:
        """The predictions of all trials that have a result, as one table."""
        return all_predictions(self.directory, self.run)

    @property
    def label(self) -> dict[str, str]:
        """What each dimension is called in a heading, CCC-Avg last."""
        return {dimension: ccc_label(dimension) for dimension in (*self.run.dimensions, "avg")}


def read_report(
    directory: RunDirectory,
    summary: Summary | None = None,
    floor: FloorRecord | None = None,
    links: dict[str, str] | None = None,
) -> Report:
    """Read a run's folder. Without `summary` the comparison is made again; without `floor` the run's own is taken.

    Raises ResultsError or ConfigError where the folder cannot be read.
    """
    run = directory.read_run()
    return Report(
        directory=directory,
        run=run,
        summary=summary or summarise(directory),
        config=directory.read_config(),
        results=directory.results(run),
        epochs={
            name: read_epochs(directory, state.condition, state.fold, state.seed) for name, state in run.trials.items()
        },
        floor=floor or run.floor,
        links=run.links if links is None else links,
    )


def read_epochs(directory: RunDirectory, condition: str, fold: int, seed: int) -> list[EpochRecord]:
    """A trial's epochs from its journal, in order; of an epoch that was trained again, the last time."""
    path = directory.trial(condition, fold, seed).journal
    by_epoch = {record.epoch: record for record in map(_epoch, read_events(path, "epoch")) if record}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def _epoch(line: dict[str, Any]) -> EpochRecord | None:
    """A journal line as a record; None for a line of another version, which costs a point in a curve and no more."""

    try:
        return EpochRecord.from_json(json.dumps(line), "journal")
    except ResultsError:
        return None
