"""The layout of a run in MLflow: a parent per condition with its own curves, a child per trial, and a comparison.

Everything is found again by its tags, and only what the server does not have yet is written. The methods of a mirror
may raise whatever mlflow raises.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from cvrunner.config.schema import Config, digest
from cvrunner.errors import CvrunnerError, ResultsError
from cvrunner.records.results import EpochRecord, Provenance, RunRecord, RunStatus, TrialResult, TrialStatus
from cvrunner.records.run_directory import RunDirectory
from cvrunner.report.report import Report, read_epochs, read_report
from cvrunner.tracking import names

if TYPE_CHECKING:
    from cvrunner.tracking.mlflow_store import StoredRun

MAX_TAG = 4000
"""Number of characters of an error that are kept; MLflow refuses tags above 5,000."""


def sync_run(directory: RunDirectory, uri: str, base_url: str | None = None) -> dict[str, str]:
    """Upload a run from its files to the server at `uri`; existing entries are kept. Returns the run's links.

    Raises ResultsError, also if the server cannot be written, and ConfigError for files that cannot be read.
    """
    report = read_report(directory)
    # Nothing is training: what run.json calls RUNNING was left by a process that died.
    status: RunStatus = "STOPPED" if report.run.status == "RUNNING" else report.run.status
    try:
        mirror = MlflowMirror(uri, report.run, report.config, directory)
        mirror.finish(report, status)
        return mirror.links(base_url)
    except CvrunnerError:
        raise
    except Exception as error:  # mlflow raises whatever its database and its HTTP client do
        raise ResultsError(f"MLflow ({uri}) cannot be written: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the type of an error's first cause and the first line of its message."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


class Mirror:
    """An experiment in MLflow in which the parts of a run, or of a sweep, are found again by their tags."""

    def __init__(self, uri: str, config: Config, record: Provenance) -> None:
        # mlflow takes seconds to import, which a command on a finished run, or with tracking off, must not pay.
        from cvrunner.tracking.mlflow_store import MlflowStore

        self.uri, self.config, self.record = uri, config, record
        self.store = MlflowStore(uri)
        self.experiment = self.store.experiment(f"{config.tracking.experiment}-{record.protocol}")
        self._last_steps: dict[tuple[str, str], int] = {}
        # A driver that died has left its entries RUNNING.
        self.close_running()

    def find_or_create(self, role: str, key: str, name: str, **tags: str) -> StoredRun:
        """Return the entry with this role and key; a new one also gets `tags`."""
        found_by = names.run_tags(self.record, role, key)
        return self.store.find_or_create(self.experiment, name, found_by, {"mlflow.source.name": "cvrunner"} | tags)

    def log_step(self, run_id: str, marker: str, step: int, metrics: names.Metrics) -> None:
        """Write one step of a curve unless the server has it; `marker` is a metric that every step of the curve has."""
        curve = run_id, marker
        if curve not in self._last_steps:
            self._last_steps[curve] = self.store.last_step(run_id, marker)
        if step > self._last_steps[curve]:
            self.store.log_metrics(run_id, metrics, step)
            self._last_steps[curve] = step

    def close_running(self) -> None:
        """Mark every entry of this run that is still RUNNING as KILLED."""
        self.store.close_running(self.experiment, {names.RUN_KEY: self.record.key})


class MlflowMirror(Mirror):
    """A run in MLflow."""

    def __init__(self, uri: str, run: RunRecord, config: Config, directory: RunDirectory) -> None:
        """Find or create the parents and the comparison, and catch up with the files."""
        super().__init__(uri, config, run)
        self.run, self.directory = run, directory
        self._trials: dict[str, StoredRun] = {}
        self._epochs: dict[str, dict[int, EpochRecord]] = {}
        self._parents = {condition: self._open_parent(condition) for condition in run.conditions}
        # Created at the start, so that its address can be printed, and stand in the report, before the run ends.
        self._comparison = self.find_or_create("comparison", run.key, f"comparison {run.run}")
        self.store.set_status(self._comparison.id, "RUNNING")
        self._view_key = digest([run.run, run.key])[:24]
        view = names.view_state(run, int(time.time() * 1000))
        self.store.set_experiment_tag(self.experiment, f"mlflow.sharedViewState.{self._view_key}", view)
        self._catch_up()

    def trial_started(self, name: str) -> None:
        """Mark a trial as RUNNING."""
        trial = self._trial(name)
        self.store.set_status(trial.id, "RUNNING")
        self._trials[name] = replace(trial, status="RUNNING")
        self.store.set_tags(trial.id, {"cvrunner.attempts": str(self._attempts(name))})
        self._log_journal(name)

    def epoch(self, name: str, record: EpochRecord) -> None:
        """Write an epoch of a trial to its own curves and to those of its condition; an epoch twice changes nothing."""
        state, seeds = self.run.trials[name], len(self.run.seeds)
        self._epochs.setdefault(name, {})[record.epoch] = record
        self.log_step(self._trial(name).id, "train/loss", record.epoch, names.epoch_metrics(record))
        parent = self._parents[state.condition].id
        marker = names.fold_marker(state.fold, state.seed, seeds)
        self.log_step(parent, marker, record.epoch, names.fold_metrics(state.fold, state.seed, seeds, record))
        # The mean of an epoch is known once all trials of the condition have finished it.
        trials = [other for other, trial in self.run.trials.items() if trial.condition == state.condition]
        finished = [self._epochs[other] for other in trials if record.epoch in self._epochs.get(other, {})]
        if len(finished) == len(trials):
            means = names.mean_metrics([epochs[record.epoch] for epochs in finished], self.run.dimensions)
            self.log_step(parent, "mean/train_loss", record.epoch, means)

    def trial_finished(
        self, name: str, result: TrialResult | None, status: TrialStatus, error: str | None = None
    ) -> None:
        """Write how a trial that is done, has failed or was stopped ended."""
        self._log_journal(name)
        trial, tags = self._trial(name), {"cvrunner.attempts": str(self._attempts(name))}
        if result is not None:
            if "selected/epoch" not in trial.metrics:
                metrics = names.result_metrics(result)
                self.store.log_metrics(trial.id, metrics, result.best_epoch)
                trial = replace(trial, metrics=metrics)
            tags |= names.result_tags(result)
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
            self.store.set_tags(parent.id, {"mlflow.note.content": summary.verdict})
        self._log_comparison(report)
        for entry in (*self._parents.values(), self._comparison):
            self.store.set_status(entry.id, names.ENDED[status])
        self.close_running()

    def links(self, base_url: str | None) -> dict[str, str]:
        """Return the addresses of the run's pages by name; see `page_links`."""
        parents = [parent.id for parent in self._parents.values()]
        return names.page_links(self.uri, base_url, self.experiment, self._view_key, parents, self._comparison.id)

    # --- parts -------------------------------------------------------------------------------------------------------

    def _open_parent(self, condition: str) -> StoredRun:
        tags = names.condition_tags(self.run, condition)
        parent = self.find_or_create("parent", f"{self.run.key}/{condition}", f"{condition} {self.run.run}", **tags)
        self.store.set_status(parent.id, "RUNNING")
        self.store.log_params(parent, names.condition_params(self.config, condition))
        return parent

    def _trial(self, name: str) -> StoredRun:
        """Return a trial's entry, found by its key or created once."""
        if name not in self._trials:
            state = self.run.trials[name]
            tags = names.condition_tags(self.run, state.condition)
            tags[names.PARENT] = self._parents[state.condition].id
            trial = self.find_or_create("trial", state.key, name, **tags)
            params = {"condition": state.condition, "fold": str(state.fold), "seed": str(state.seed)}
            params |= names.condition_params(self.config, state.condition)
            if params.keys() - trial.params.keys():
                self.store.log_params(trial, params)
                source = f'{{"split": "{self.run.split_digest}"}}'
                self.store.log_dataset(trial.id, self.run.corpus, self.run.corpus_digest, source)
            self._trials[name] = trial
        return self._trials[name]

    def _attempts(self, name: str) -> int:
        """Return the number of attempts from run.json, which the driver updates before it calls its other observers."""
        return self.directory.read_run().trials[name].attempts

    def _catch_up(self) -> None:
        """Write what the files have and the server has not: after an outage, or if an earlier driver was killed."""
        current = self.directory.read_run()
        results = self.directory.results(current)
        for name in self.run.trials:
            state = current.trials[name]
            if state.status == "WAITING":
                self._log_journal(name)
            elif state.status == "RUNNING":
                self.trial_started(name)
            else:
                self.trial_finished(name, results.get(name), state.status, state.error)

    def _log_journal(self, name: str) -> None:
        """Write the epochs of the trial's journal that this mirror has not seen."""
        state = self.run.trials[name]
        for record in read_epochs(self.directory, state.condition, state.fold, state.seed):
            if record.epoch not in self._epochs.get(name, {}):
                self.epoch(name, record)

    def _log_comparison(self, report: Report) -> None:
        entry, summary, directory = self._comparison, report.summary, report.directory
        self.store.set_tags(entry.id, {"mlflow.note.content": summary.verdict, "cvrunner.status": summary.status})
        if not any(name.startswith("delta/") for name in entry.metrics):
            if deltas := names.delta_metrics(summary):
                self.store.log_metrics(entry.id, deltas, 0)
            for step, metrics in names.delta_steps(summary):
                self.store.log_metrics(entry.id, metrics, step)
        files = directory.report, directory.comparison, directory.summary_file
        for file in (*files, directory.config, directory.split, directory.run_file):
            self.store.log_files(entry.id, file)
        self.store.log_files(entry.id, directory.figures, "figures")
        self.store.log_text(entry.id, report.predictions_table.to_csv(index=False), "predictions.csv")
