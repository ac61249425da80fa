"""How a run is laid out in MLflow: a parent for each condition with curves of its own, a child for each trial, and
a run for the comparison. Everything is found again by its tags, and only what is not there yet is written.
"""

from __future__ import annotations

import time

from cvrunner.config.schema import Config, digest
from cvrunner.errors import CvrunnerError, ResultsError
from cvrunner.records.results import EpochRecord, RunRecord, RunStatus, Summary, TrialResult, TrialStatus
from cvrunner.records.run_directory import RunDirectory
from cvrunner.report.report import read_epochs
from cvrunner.tracking import names as names
from cvrunner.tracking.mlflow_store import Store, StoredRun
from cvrunner.verdict.comparison import summarise
from cvrunner.verdict.predictions import all_predictions

ENDED: dict[str, str] = {
    "COMPLETE": "FINISHED",
    "INCOMPLETE": "FAILED",
    "DONE": "FINISHED",
    "FAILED": "FAILED",
    "STOPPED": "KILLED",
}


def sync_run(directory: RunDirectory, uri: str, base_url: str | None = None) -> dict[str, str]:
    """Write a run from its files to the server at `uri`; what is there already stays. Returns its `links`.

    Raises ResultsError, also where the server cannot be written, and ConfigError for files that cannot be read.
    """
    try:
        return mirror_files(directory, uri).links(base_url)
    except CvrunnerError:
        raise
    except Exception as error:  # mlflow raises whatever its database and its HTTP client do
        raise ResultsError(f"MLflow ({uri}) cannot be written: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The kind of the error that was at the bottom of it, and the beginning of what it says."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def mirror_files(directory: RunDirectory, uri: str, summary: Summary | None = None) -> MlflowMirror:
    """Tell a mirror everything that a run's files hold, as the driver would have.

    For when nothing is training any more: what run.json calls RUNNING was left so by a process that died.

    Raises what mlflow raises, and ResultsError or ConfigError for files that cannot be read.
    """
    run, mirror = directory.read_run(), MlflowMirror(uri)
    results = directory.results(run)
    mirror.start(run, directory.read_config(), directory)
    for name, state in run.trials.items():
        if state.status != "WAITING":
            mirror.trial_started(name)
            status = "STOPPED" if state.status == "RUNNING" else state.status
            mirror.trial_finished(name, results.get(name), status, state.error)
    mirror.finish(summary or summarise(directory), "STOPPED" if run.status == "RUNNING" else run.status)
    return mirror


class Curve:
    """A series of steps in one run, continued where it stops."""

    def __init__(self, store: Store, run_id: str, marker: str) -> None:
        self._store, self._run_id = store, run_id
        # One metric that every step has tells how far the series goes.
        self._last = store.last_step(run_id, marker)

    def log(self, step: int, metrics: names.Metrics) -> None:
        """Write a step, unless it is there."""
        if step > self._last:
            self._store.log_metrics(self._run_id, metrics, step)
            self._last = step


class MlflowMirror:
    """One run's mirror. Its methods are those of a Tracker and may raise whatever mlflow raises."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._parents: dict[str, StoredRun] = {}
        self._trials: dict[str, StoredRun] = {}
        self._curves: dict[tuple[str, str], Curve] = {}
        self._epochs: dict[str, dict[int, EpochRecord]] = {}

    def start(self, run: RunRecord, config: Config, directory: RunDirectory) -> None:
        """Open the server, sweep what a dead driver left, find or make the parents, and catch up with the journals."""
        self._store = Store(self._uri)
        self._run, self._config, self._directory = run, config, directory
        self._experiment = self._store.experiment(f"{config.tracking.experiment}-{run.protocol}")
        self._store.close_running(self._experiment, {names.RUN_KEY: run.key})
        self._parents = {condition: self._parent(condition) for condition in run.conditions}
        # Made now, so that its address can be printed and stand in the report before the run ends.
        self._comparison = self._named("comparison", self._run.key, f"comparison {run.run}")
        self._store.reopen(self._comparison.id)
        self._save_view()
        for name in run.trials:
            self._catch_up(name)

    def trial_started(self, name: str) -> None:
        trial = self._trial(name)
        self._store.reopen(trial.id)
        self._store.set_tags(trial.id, {"cvrunner.attempts": str(self._attempts(name))})
        self._catch_up(name)

    def epoch(self, name: str, record: EpochRecord) -> None:
        state = self._run.trials[name]
        self._epochs.setdefault(name, {})[record.epoch] = record
        self._curve(self._trial(name).id, "train/loss").log(record.epoch, names.epoch_metrics(record))
        parent, seeds = self._parents[state.condition].id, len(self._run.seeds)
        series = names.fold_metrics(state.fold, state.seed, seeds, record)
        self._curve(parent, names.fold_marker(state.fold, state.seed, seeds)).log(record.epoch, series)
        self._mean(state.condition, record.epoch)

    def trial_finished(
        self, name: str, result: TrialResult | None, status: TrialStatus, error: str | None = None
    ) -> None:
        self._catch_up(name)
        trial = self._trial(name)
        if result is not None:
            if "selected/epoch" not in trial.metrics:
                self._store.log_metrics(trial.id, names.result_metrics(result), result.best_epoch)
            self._store.set_tags(trial.id, names.result_tags(result))
        if error:
            self._store.set_tags(trial.id, {"cvrunner.error": error[:4000]})
        if status in ENDED:
            self._store.close(trial.id, ENDED[status])

    def finish(self, summary: Summary, status: RunStatus) -> None:
        """Scores to the parents, the comparison with its files, and an end to every run that is still open."""
        for condition, parent in self._parents.items():
            if "ccc_mean/avg" not in parent.metrics and (scores := names.score_metrics(summary, condition)):
                self._store.log_metrics(parent.id, scores, 0)
            self._store.set_tags(parent.id, {"mlflow.note.content": summary.verdict})
        self._write_comparison(summary)
        if status in ENDED:
            for ended in (*self._parents.values(), self._comparison):
                self._store.close(ended.id, ENDED[status])
            self._store.close_running(self._experiment, {names.RUN_KEY: self._run.key})

    def links(self, base_url: str | None) -> dict[str, str]:
        """Addresses at the server where the store is one, else at `base_url`, where a page over the store would be."""
        base = names.served_at(self._uri, base_url)
        if base is None:
            return {}
        parents = [parent.id for parent in self._parents.values()]
        return names.page_links(base, self._experiment, self._view_key(), parents, self._comparison.id)

    # --- parts -------------------------------------------------------------------------------------------------------

    def _named(self, role: str, key: str, name: str, **tags: str) -> StoredRun:
        """The run of this role and key, or a new one, with tags besides."""
        found_by = names.run_tags(self._run, role, key)
        return self._store.find_or_create(self._experiment, name, found_by, {"mlflow.source.name": "cvrunner"} | tags)

    def _parent(self, condition: str) -> StoredRun:
        key = f"{self._run.key}/{condition}"
        tags = names.condition_tags(self._run, condition)
        parent = self._named("parent", key, f"{condition} {self._run.run}", **tags)
        self._store.reopen(parent.id)
        self._store.log_params(parent, names.condition_params(self._config, condition))
        return parent

    def _trial(self, name: str) -> StoredRun:
        """Found by its key, or made, once."""
        if name not in self._trials:
            state = self._run.trials[name]
            tags = names.condition_tags(self._run, state.condition)
            tags[names.PARENT] = self._parents[state.condition].id
            trial = self._named("trial", state.key, name, **tags)
            params = names.trial_params(self._config, state.condition, state.fold, state.seed)
            if params.keys() - trial.params.keys():
                self._store.log_params(trial, params)
                self._store.log_dataset(
                    trial.id, self._run.corpus, self._run.corpus_digest, f'{{"split": "{self._run.split_digest}"}}'
                )
            self._trials[name] = trial
        return self._trials[name]

    def _attempts(self, name: str) -> int:
        """As run.json has it by now: the driver writes it before it tells."""
        return self._directory.read_run().trials[name].attempts

    def _catch_up(self, name: str) -> None:
        """Write the epochs that the trial's journal has and the server has not."""
        state = self._run.trials[name]
        for record in read_epochs(self._directory, state.condition, state.fold, state.seed):
            if record.epoch not in self._epochs.get(name, {}):
                self.epoch(name, record)

    def _curve(self, run_id: str, marker: str) -> Curve:
        if (run_id, marker) not in self._curves:
            self._curves[run_id, marker] = Curve(self._store, run_id, marker)
        return self._curves[run_id, marker]

    def _mean(self, condition: str, epoch: int) -> None:
        """The condition's mean of an epoch, once all its trials have been through it."""
        trials = [name for name, state in self._run.trials.items() if state.condition == condition]
        records = {name: self._epochs[name][epoch] for name in trials if epoch in self._epochs.get(name, {})}
        if len(records) == len(trials):
            metrics = names.mean_metrics(records, self._run.dimensions)
            self._curve(self._parents[condition].id, "mean/train_loss").log(epoch, metrics)

    def _write_comparison(self, summary: Summary) -> None:
        run = self._comparison
        self._store.set_tags(run.id, {"mlflow.note.content": summary.verdict, "cvrunner.status": summary.status})
        if not any(name.startswith("delta/") for name in run.metrics):
            if deltas := names.delta_metrics(summary):
                self._store.log_metrics(run.id, deltas, 0)
            for step, metrics in names.delta_steps(summary):
                self._store.log_metrics(run.id, metrics, step)
        self._write_files(run.id)

    def _write_files(self, run_id: str) -> None:
        d = self._directory
        for file in (d.report, d.comparison, d.summary_file, d.config, d.split, d.run_file):
            self._store.log_files(run_id, file)
        self._store.log_files(run_id, d.figures, "figures")
        self._store.log_text(run_id, all_predictions(d, self._run).to_csv(index=False), "predictions.csv")

    def _view_key(self) -> str:
        return digest([self._run.run, self._run.key])[:24]

    def _save_view(self) -> None:
        state = names.view_state(self._run, int(time.time() * 1000))
        self._store.set_experiment_tag(self._experiment, f"mlflow.sharedViewState.{self._view_key()}", state)
