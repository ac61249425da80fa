"""The layout of a run in MLflow: a parent per condition with its own curves, a child per trial, and a comparison.

Everything is found again by its tags, and only what the server does not have yet is written. The methods of a mirror
may raise whatever mlflow raises.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from filelock import FileLock

from cvrunner.config.schema import Config, digest
from cvrunner.errors import CvrunnerError, ResultsError
from cvrunner.records.results import EpochRecord, Provenance, RunRecord, RunStatus, TrialResult, TrialStatus
from cvrunner.records.run_directory import RunDirectory
from cvrunner.report.report import Report, read_epochs, read_report
from cvrunner.tracking import names

if TYPE_CHECKING:
    from cvrunner.tracking.mlflow_store import StoredRun

LOGIN = (
    "the server needs a login: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the "
    "environment; for a job, in that of `ray start`"
)
MAX_TAG = 4000
"""Number of characters of an error that are kept; MLflow refuses tags above 5,000."""


def sync_run(directory: RunDirectory, uri: str, base_url: str | None = None) -> dict[str, str]:
    """Upload a run from its files to the server at `uri`; existing entries are kept. Returns the run's links.

    Raises ResultsError, also if the server cannot be written, and ConfigError for files that cannot be read.
    """
    report = read_report(directory)
    # Nothing is training: what run.json calls RUNNING was left by a process that died.
    status: RunStatus = "INTERRUPTED" if report.run.status == "RUNNING" else report.run.status
    try:
        mirror = MlflowMirror(uri, report.run, report.config, directory)
        mirror.finish(report, status)
        return mirror.links(base_url)
    except CvrunnerError:
        raise
    except Exception as error:  # mlflow raises whatever its database and its HTTP client do
        raise ResultsError(f"MLflow ({uri}) cannot be written: {mlflow_problem(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the type of an error's first cause and the first line of its message."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def mlflow_problem(error: BaseException) -> str:
    """Return `first_line` of an error of mlflow's client, and what to do if the server needs a login."""
    text = first_line(error)
    # mlflow's client gives the HTTP status in its message only.
    return f"{text} ({LOGIN})" if re.search(r"\b(401|403)\b", text) else text


class Mirror:
    """An experiment in MLflow in which the parts of a run, or of a sweep, are found again by their tags."""

    def __init__(self, uri: str, config: Config, record: Provenance, alone: bool = True) -> None:
        # mlflow takes seconds to import, which a command on a finished run, or with tracking off, must not pay.
        from cvrunner.tracking.mlflow_store import MlflowStore

        self.uri, self.config = uri, config
        self.store = MlflowStore(uri)
        self.experiment = self.store.experiment(f"{config.tracking.experiment}-{record.protocol}")
        self.own = {names.RUN_KEY: record.key}
        """The tag that all entries of this run have."""
        # A driver that died has left its entries RUNNING; `alone`: none of them can be that of a living one.
        if alone:
            self.store.close_running(self.experiment, self.own)


class MlflowMirror(Mirror):
    """A run in MLflow."""

    def __init__(
        self,
        uri: str,
        run: RunRecord,
        config: Config,
        directory: RunDirectory,
        only: Collection[str] | None = None,
    ) -> None:
        """Find or create the parents and the comparison, and catch up with the files.

        `only`: names of the trials to catch up with, if other commands write the others; None: all.
        """
        super().__init__(uri, config, run, alone=only is None)
        self.run, self.directory = run, directory
        self._trials: dict[str, StoredRun] = {}
        self._epochs: dict[str, dict[int, EpochRecord]] = {}
        self._parents: dict[str, StoredRun] = {}
        # Commands that share a run begin together, and each entry must be created once.
        with FileLock(directory.path / ".mlflow.lock"):
            for condition in run.conditions:
                tags, params = names.condition_entry(run, config, condition)
                found_by = names.run_tags(run, "parent", f"{run.key}/{condition}")
                parent = self.store.find_or_create(self.experiment, f"{condition} {run.run}", found_by, tags)
                self.store.set_status(parent.id, "RUNNING")
                self.store.log_params(parent, params)
                self._parents[condition] = parent
            # Created at the start, so that its address can be printed, and stand in the report, before the run ends.
            found_by = names.run_tags(run, "comparison", run.key)
            self._comparison = self.store.find_or_create(self.experiment, f"comparison {run.run}", found_by, {})
            self.store.set_status(self._comparison.id, "RUNNING")
        self._view_key = digest([run.run, run.key])[:24]
        view = names.view_state(run, int(time.time() * 1000), [parent.id for parent in self._parents.values()])
        self.store.client.set_experiment_tag(self.experiment, f"mlflow.sharedViewState.{self._view_key}", view)
        # Catch up: the server may have been away, or an earlier driver was killed before it had written everything.
        current = directory.read_run()
        results = directory.results(current)
        for name in run.trials if only is None else only:
            state = current.trials[name]
            if state.status == "WAITING":
                self._log_journal(name)
            elif state.status == "RUNNING":
                self.trial_started(name)
            else:
                self.trial_finished(name, results.get(name), state.status, state.error)

    def trial_started(self, name: str) -> None:
        """Mark a trial as RUNNING."""
        trial = self._trial(name)
        self.store.set_status(trial.id, "RUNNING")
        self._trials[name] = replace(trial, status="RUNNING")
        # The driver updates run.json before it calls its other observers.
        attempts = self.directory.read_run().trials[name].attempts
        self.store.set_tags(trial.id, {"cvrunner.attempts": str(attempts)})
        self._log_journal(name)

    def epoch(self, name: str, record: EpochRecord) -> None:
        """Write an epoch of a trial, and of its condition if it was the last; an epoch twice changes nothing."""
        state = self.run.trials[name]
        self._epochs.setdefault(name, {})[record.epoch] = record
        self.store.log_step(self._trial(name).id, "train/loss", record.epoch, names.epoch_metrics(record))
        # The mean of an epoch is known once all trials of the condition have finished it.
        trials = [other for other, trial in self.run.trials.items() if trial.condition == state.condition]
        finished = [self._epochs[other] for other in trials if record.epoch in self._epochs.get(other, {})]
        if len(finished) == len(trials):
            means = names.mean_metrics([epochs[record.epoch] for epochs in finished], self.run.dimensions)
            self.store.log_step(self._parents[state.condition].id, "mean/train_loss", record.epoch, means)

    def trial_finished(
        self, name: str, result: TrialResult | None, status: TrialStatus, error: str | None = None
    ) -> None:
        """Write how a trial that is done, has failed or was stopped ended."""
        self._log_journal(name)
        trial = self._trial(name)
        tags = {"cvrunner.attempts": str(self.directory.read_run().trials[name].attempts)}
        if result is not None:
            metrics, about = names.result_entry(result)
            tags |= about
            # The server keeps every value of a metric, and its charts would show a second one.
            if "selected/epoch" not in trial.metrics:
                self.store.log_metrics(trial.id, metrics, result.best_epoch)
                trial = replace(trial, metrics=metrics)
        if error:
            tags["cvrunner.error"] = error[:MAX_TAG]
        self.store.set_tags(trial.id, tags)
        # Closing an entry again would move the time at which it ended.
        if trial.status != names.ENDED[status]:
            self.store.set_status(trial.id, names.ENDED[status])
        self._trials[name] = replace(trial, status=names.ENDED[status])

    def finish(self, report: Report, status: RunStatus) -> None:
        """Write scores to the parents and the comparison with its files, and close every entry that is still open."""
        summary = report.summary
        for condition, parent in self._parents.items():
            if "ccc_mean/avg" not in parent.metrics and (scores := names.score_metrics(summary, condition)):
                self.store.log_metrics(parent.id, scores, 0)
            for evaluated in report.evaluations:
                there = names.of_evaluation(evaluated.record.run, names.score_metrics(evaluated.summary, condition))
                self._log_changed(parent, there)
            self.store.set_tags(parent.id, {"mlflow.note.content": summary.verdict})
        comparison = self._comparison
        self.store.set_tags(comparison.id, {"mlflow.note.content": summary.verdict, "cvrunner.status": summary.status})
        if not any(name.startswith("delta/") for name in comparison.metrics):
            for step, metrics in names.delta_metrics(summary):
                self.store.log_metrics(comparison.id, metrics, step)
        for evaluated in report.evaluations:
            name, folder = evaluated.record.run, evaluated.folder
            for step, metrics in names.delta_metrics(evaluated.summary):
                # The differences by fold and seed are steps of one metric, whose last value alone is known here.
                if step == 0:
                    self._log_changed(comparison, names.of_evaluation(name, metrics))
            self.store.set_tags(comparison.id, {f"cvrunner.evaluation.{name}": evaluated.summary.verdict[:MAX_TAG]})
            for file in (folder.evaluation_file, folder.summary_file):
                self.store.log_files(comparison.id, file, f"evaluations/{name}")
        directory = report.directory
        files = directory.report, directory.comparison, directory.summary_file
        for file in (*files, directory.config, directory.split, directory.protocol_file, directory.run_file):
            self.store.log_files(comparison.id, file)
        self.store.log_files(comparison.id, directory.figures, "figures")
        predictions = report.predictions_table.to_csv(index=False)
        self.store.client.log_text(comparison.id, predictions, "predictions.csv")
        for entry in (*self._parents.values(), comparison):
            self.store.set_status(entry.id, names.ENDED[status])
        self.store.close_running(self.experiment, self.own)

    def links(self, base_url: str | None) -> dict[str, str]:
        """Return the addresses of the run's pages by name; see `page_links`."""
        parents = [parent.id for parent in self._parents.values()]
        return names.page_links(self.uri, base_url, self.experiment, self._view_key, parents, self._comparison.id)

    # --- parts -------------------------------------------------------------------------------------------------------

    def _trial(self, name: str) -> StoredRun:
        """Return a trial's entry, found by its key or created once."""
        if name not in self._trials:
            state = self.run.trials[name]
            tags, settings = names.condition_entry(self.run, self.config, state.condition, state.fold)
            tags[names.PARENT] = self._parents[state.condition].id
            found_by = names.run_tags(self.run, "trial", state.key)
            trial = self.store.find_or_create(self.experiment, name, found_by, tags)
            # Only a trial has its condition as a parameter, by which the page groups trials.
            params = {"condition": state.condition, "fold": str(state.fold), "seed": str(state.seed)} | settings
            if params.keys() - trial.params.keys():
                self.store.log_params(trial, params)
                source = f'{{"split": "{self.run.split_digest}"}}'
                self.store.log_dataset(trial.id, self.run.corpus, self.run.corpus_digest, source)
            self._trials[name] = trial
        return self._trials[name]

    def _log_changed(self, entry: StoredRun, metrics: names.Metrics) -> None:
        """Log metrics that the entry does not have with this value yet."""
        if changed := {name: value for name, value in metrics.items() if entry.metrics.get(name) != value}:
            self.store.log_metrics(entry.id, changed, 0)

    def _log_journal(self, name: str) -> None:
        """Write the epochs of the trial's journal that this mirror has not seen."""
        state = self.run.trials[name]
        for record in read_epochs(self.directory, state.condition, state.fold, state.seed):
            if record.epoch not in self._epochs.get(name, {}):
                self.epoch(name, record)
