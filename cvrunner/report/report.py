"""Everything a report is made of, read once from a run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cvrunner.config.schema import Config
from cvrunner.errors import ResultsError
from cvrunner.records.results import EpochRecord, Result, RunRecord, TrialResult, ccc_label
from cvrunner.records.run_directory import RunDirectory, TrialDirectory, read_events
from cvrunner.records.summary import Evaluation, Summary
from cvrunner.verdict.comparison import compare_conditions, missing_trials, mixed_precision, unfinished
from cvrunner.verdict.convergence import convergence
from cvrunner.verdict.floor import floor_references, with_controlled_scores
from cvrunner.verdict.predictions import (
    OutOfFold,
    ProbeScores,
    one_table,
    out_of_fold,
    read_probe,
    read_tables,
    recomputed_ccc,
)
from cvrunner.verdict.protocol import ProtocolFile, read_protocol
from cvrunner.verdict.transfer import compare_elsewhere, score_key

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Evaluated:
    """The models of a run on another corpus, as recorded in the files of the evaluation."""

    folder: RunDirectory
    record: Evaluation
    """With the controlled scores of the floor."""
    summary: Summary


@dataclass(frozen=True)
class Report:
    """A run as recorded in its files; terminal, files, figures and MLflow take their numbers from here."""

    directory: RunDirectory
    run: RunRecord
    """As in run.json, with the controlled scores of the floor and the links that the report shows."""
    config: Config
    results: dict[str, TrialResult]
    """Per trial name, for the trials that have a result."""
    epochs: dict[str, list[EpochRecord]]
    """Per trial name; empty if no epoch is finished."""
    out_of_fold: OutOfFold | None
    """The predictions of all conditions, lined up; None while trials are missing."""
    probe: ProbeScores | None
    """The linear probe; None while trials are missing."""
    predictions_table: pd.DataFrame
    """The predictions of all trials that have a result, below each other."""
    summary: Summary
    protocol: ProtocolFile | None
    """None in runs of earlier versions."""
    evaluations: list[Evaluated]
    """By name; those of a run with missing trials are not read."""

    @property
    def label(self) -> dict[str, str]:
        """The heading of each dimension, such as CCC-V; CCC-Avg is last."""
        return labels(self.run)

    def results_of(self, condition: str) -> dict[str, TrialResult]:
        """Return the results of one condition, by trial name."""
        return {name: result for name, result in self.results.items() if result.condition == condition}


def read_report(directory: RunDirectory, links: dict[str, str] | None = None, rescore: bool = False) -> Report:
    """Read a run's folder and compare its conditions; every file is read once.

    The floor of a complete run gets the scenario-controlled scores of its conditions. `links` are shown instead of
    those in run.json. `rescore`: take the test CCCs from predictions.csv, not from result.json. Raises ResultsError or
    ConfigError if the folder cannot be read.
    """
    run, config = directory.current_run(), directory.read_config()
    results = directory.results(run)
    tables, protocol = read_tables(directory, results), read_protocol(directory)
    epochs = {name: read_epochs(directory, t.condition, t.fold, t.seed) for name, t in run.trials.items()}
    if rescore:
        scores = {name: recomputed_ccc(table, run.dimensions) for name, table in tables.items()}
        results = {name: of.model_copy(update={"test_ccc": scores[name]}) for name, of in results.items()}
    if missing := missing_trials(run, results):
        lined_up, probe, summary = None, None, unfinished(run, missing)
    else:
        lined_up = out_of_fold(directory, run, results, tables)
        probe, references = read_probe(directory, run, lined_up), floor_references(directory, run, lined_up)
        if probe.predicted is not None:
            references["linear probe"] = probe.predicted[None]
        added = protocol.added_after_look if protocol else []
        summary = compare_conditions(
            run,
            results,
            lined_up,
            config.verdict,
            references,
            convergence(epochs, run),
            added,
            mixed_precision(config, results.values()),
        )
        if run.floor is not None:
            run = run.model_copy(update={"floor": with_controlled_scores(run.floor, run, tables)})
    # The links of a run that just ended are not in run.json yet.
    if links is not None:
        run = run.model_copy(update={"links": links})
    return Report(
        directory=directory,
        run=run,
        config=config,
        results=results,
        epochs=epochs,
        out_of_fold=lined_up,
        probe=probe,
        predictions_table=one_table(list(tables.values())),
        summary=summary,
        protocol=protocol,
        evaluations=[] if missing else read_evaluations(directory, run, config, results),
    )


def read_evaluations(
    directory: RunDirectory, run: RunRecord, config: Config, trained: Mapping[str, TrialResult]
) -> list[Evaluated]:
    """Read the evaluations of a complete run on other corpora, and compare its conditions there, from predictions.csv.

    Predictions that are damaged, or not of the run's models as they are now, count as missing.
    """
    found = []
    for file in sorted(directory.evaluations.glob("*/evaluation.json")):
        folder, record = RunDirectory(file.parent), Evaluation.from_json(file.read_bytes(), str(file))
        scored = {
            name: result
            for name in record.trials
            if (result := trained.get(name))
            and TrialDirectory(folder.path / name).read_result(Result, score_key(record, result))
        }
        tables = read_tables(folder, scored)
        results = {
            name: result.model_copy(
                update={
                    "test_ccc": recomputed_ccc(tables[name], record.dimensions),
                    "test_utterances": len(tables[name]),
                }
            )
            for name, result in scored.items()
        }
        if missing := missing_trials(record, results):
            summary = unfinished(record, missing)
        else:
            data = out_of_fold(folder, record, results, tables)
            summary = compare_elsewhere(folder, record, config, results, data)
            if record.floor is not None:
                floor = with_controlled_scores(record.floor, record, tables)
                record = record.model_copy(update={"floor": floor})
        found.append(Evaluated(folder, record, summary))
    return found


def labels(run: RunRecord) -> dict[str, str]:
    """Return the heading of each dimension of a run, such as CCC-V; CCC-Avg is last."""
    return {dimension: ccc_label(dimension) for dimension in (*run.dimensions, "avg")}


def read_epochs(directory: RunDirectory, condition: str, fold: int, seed: int) -> list[EpochRecord]:
    """Read a trial's epochs from its journal, in order."""
    by_epoch: dict[int, EpochRecord] = {}
    for line in read_events(directory.trial(condition, fold, seed).journal, "epoch"):
        try:
            record = EpochRecord.from_json(json.dumps(line), "journal")
        except ResultsError:
            # A line of another version costs a point in a curve, but not the report.
            continue
        # An epoch that was trained again after a crash has several lines; the last one counts.
        by_epoch[record.epoch] = record
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]
