"""A sweep on Ray Tune: a Tune trial is one setting, and trains all its folds as one-GPU actors in its placement group.

Tune places the settings and asks ASHA which to stop. Tune's own state is thrown away: the truth is in sweep.json and in
the folds' journals and checkpoints, so the same command continues a sweep that was killed anywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cvrunner.config.sections import ClusterConfig
from cvrunner.config.tuning import TuneConfig
from cvrunner.errors import ClusterLostError, UsageError
from cvrunner.orchestration.failures import Decision, Failure
from cvrunner.orchestration.ray_executor import RayExecutor, alive_nodes, connect
from cvrunner.orchestration.resources import capacity_by_node
from cvrunner.orchestration.scheduler import run_trials
from cvrunner.records.results import EpochRecord, TrainingFinished
from cvrunner.records.run_directory import TrialDirectory, read_events
from cvrunner.training.trial import Trial
from cvrunner.tune.settings import Objective
from cvrunner.tune.store import SettingEpoch, SweepStore, comparable

# Tune reads these while it is imported. Ctrl-C is handled by cvrunner, nobody reads the files of Tune's loggers, and a
# trainable has to stay in the working directory for relative paths to hold.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
# The new output prints a banner even with `verbose=0`.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

SETTING, EPOCH, SCORE, RECORD, FAILURE, ABORTS = "setting", "epoch", "score", "record", "failure", "aborts"
"""Keys of the results that a setting reports to Tune."""


@dataclass(frozen=True)
class TrainableArguments:
    """Everything that the process of one setting needs."""

    name: str
    """Names of the sweep and the setting: the namespace of its actors."""
    trials: Sequence[Trial]
    """One per fold."""
    directories: Mapping[int, TrialDirectory]
    """By fold."""
    cluster: ClusterConfig
    cache_dir: Path
    slots: int
    """Number of folds that train at a time."""


@dataclass(frozen=True)
class SweepResources:
    """What fits on the cluster."""

    slots: int
    """Number of folds of one setting that train at a time."""
    max_settings: int
    """Number of settings that train at a time."""


@contextlib.contextmanager
def sweep_resources(run: str, cluster: ClusterConfig, folds: int) -> Iterator[SweepResources]:
    """Connect to Ray and yield what fits on it. Raises ClusterError if not even one fold fits."""
    started_ray = not ray.is_initialized()
    if started_ray:
        connect(run, cluster)
    try:
        capacity = capacity_by_node((node["Resources"] for node in alive_nodes().values()), cluster)
        capacity = min(capacity, cluster.max_concurrent or capacity)
        slots = min(folds, capacity)
        yield SweepResources(slots, capacity // slots)
    finally:
        # A Ray that the caller has started may be in use by others.
        if started_ray:
            ray.shutdown()


def run_sweep(
    store: SweepStore,
    trials: Mapping[str, Sequence[Trial]],
    rule: TuneConfig,
    cluster: ClusterConfig,
    cache_dir: Path,
    resources: SweepResources,
    stop: threading.Event,
) -> None:
    """Train the settings that have not ended and write the outcome to `store`. Returns early, all saved, on `stop`.

    Raises UsageError for an error that every setting would meet, and ClusterLostError if Ray dies.
    """
    # Left by an earlier invocation; everything that counts is in sweep.json and the folds' folders.
    shutil.rmtree(store.directory.tune, ignore_errors=True)
    stop_flag = ray.remote(num_cpus=0)(StopFlag).remote()
    scheduler = SweepScheduler(store, rule, stop)
    arguments = {}
    for name in store.pending:
        folders = {trial.fold.number: store.directory.fold(name, trial.fold.number) for trial in trials[name]}
        arguments[name] = TrainableArguments(
            f"{store.directory.name}-{name}", trials[name], folders, cluster, cache_dir, resources.slots
        )
    bundle = {"GPU": cluster.gpus_per_trial, "CPU": float(cluster.cpus_per_trial)}
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(train_setting, arguments=arguments, stop_flag=stop_flag),
            # The first bundle is for the process that only collects epochs; it needs nothing.
            tune.PlacementGroupFactory([{}, *[bundle] * resources.slots]),
        ),
        param_space={SETTING: tune.grid_search(list(arguments))},
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            max_concurrent_trials=resources.max_settings,
            trial_dirname_creator=lambda trial: trial.config[SETTING],
        ),
        run_config=tune.RunConfig(
            name=store.directory.tune.name,
            storage_path=str(store.directory.path),
            stop=SweepStopper(scheduler, stop_flag),
            failure_config=tune.FailureConfig(max_failures=cluster.retries.worker_died),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except RayError as error:
        first = str(error).strip().partition("\n")[0]
        raise ClusterLostError(f"Ray has died: {first}; what was saved is safe, the same command continues") from error
    if scheduler.aborted:
        raise UsageError(scheduler.aborted)


# --- in the process of a setting --------------------------------------------------------------------------------------


def train_setting(config: dict[str, Any], arguments: Mapping[str, TrainableArguments], stop_flag: Any) -> None:
    """Train the folds of one setting from where their files end; report each epoch that all folds have finished."""
    setting = config[SETTING]
    own = arguments[setting]
    reporter = Reporter(setting, own)
    executor = RayExecutor(own.name, own.cluster, own.cache_dir, own.slots)
    try:
        reporter.report()
        aborted = run_trials(
            own.trials,
            lambda trial: own.directories[trial.fold.number],
            executor,
            [reporter],
            own.cluster.retries,
            # The other folds of a setting that has failed are not worth training.
            should_stop=lambda: reporter.failure is not None or bool(ray.get(stop_flag.is_set.remote())),
        )
    finally:
        executor.close()
    if reporter.failure is not None:
        tune.report({SETTING: setting, FAILURE: reporter.failure, ABORTS: aborted is not None})


class Reporter:
    """An observer of a setting's folds that reports to Tune each epoch that all of them have finished."""

    def __init__(self, setting: str, arguments: TrainableArguments) -> None:
        self.setting = setting
        self.objective = Objective([trial.fold.number for trial in arguments.trials])
        self.failure: str | None = None
        """Why a fold cannot be trained."""
        # Epochs of before a restart are reported again; the scheduler recognises them.
        for trial in arguments.trials:
            for line in read_events(arguments.directories[trial.fold.number].journal, "epoch"):
                self.objective.epoch(trial.fold.number, EpochRecord.from_json(json.dumps(line), "journal"))

    def report(self) -> None:
        for epoch in self.objective.new_epochs():
            # Tune decides by plain numbers; the record is what the driver stores.
            numbers = {EPOCH: epoch.epoch, SCORE: comparable(epoch.score)}
            tune.report({SETTING: self.setting, **numbers, RECORD: epoch.model_dump_json()})

    def attempt(self, trial: Trial, number: int) -> None: ...

    def event(self, trial: Trial, event: object) -> None:
        if isinstance(event, EpochRecord):
            self.objective.epoch(trial.fold.number, event)
        elif isinstance(event, TrainingFinished):
            self.objective.ended.add(trial.fold.number)
        self.report()

    def failed(self, trial: Trial, failure: Failure, decision: Decision) -> None:
        if decision in (Decision.FAIL, Decision.ABORT):
            self.failure = self.failure or f"fold {trial.fold.number}: {failure.message}"


class StopFlag:
    """An actor with which the driver asks all settings to save and end."""

    def __init__(self) -> None:
        self.stopping = False

    def stop(self) -> None:
        self.stopping = True

    def is_set(self) -> bool:
        return self.stopping


# --- in the driver ----------------------------------------------------------------------------------------------------


class SweepScheduler(FIFOScheduler):
    """Asks ASHA after every epoch, stores its decision first, and obeys the decisions stored before a restart."""

    def __init__(self, store: SweepStore, rule: TuneConfig, stop: threading.Event) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.store = store
        self.stop = stop
        self.aborted: str | None = None
        """An error that every setting would meet."""
        self.controller: Any = None
        # One per condition, whose settings compete with each other only.
        self.asha: dict[str, Any] = {}
        if not store.record.nested:
            self.asha = {
                condition: ASHAScheduler(
                    time_attr=EPOCH,
                    metric=SCORE,
                    mode="max",
                    max_t=epochs,
                    grace_period=min(rule.grace_period, epochs),
                    reduction_factor=rule.reduction_factor,
                )
                for condition, epochs in store.record.epochs.items()
            }
        # ASHA has no state on disk: replaying the stored epochs gives it the scores to compare with.
        for name, state in store.record.settings.items():
            if state.condition in self.asha:
                self.asha[state.condition].on_trial_add(None, SimpleNamespace(trial_id=name))
            for epoch in state.epochs:
                self._stops(name, epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its scheduler; a store and an event belong to the driver alone.

    @property
    def stopping(self) -> bool:
        return self.stop.is_set() or self.aborted is not None

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self.controller = tune_controller

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        # Settings that wait stay pending; the same command trains them.
        if self.stopping:
            return None
        return super().choose_trial_to_run(tune_controller)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name = result[SETTING]
        if FAILURE in result:
            self.store.end_setting(name, result[FAILURE])
            if result[ABORTS]:
                self.aborted = self.aborted or result[FAILURE]
            return str(self.STOP)
        epoch = SettingEpoch.from_json(result[RECORD], name)
        # A restarted setting reports its epochs again; what was decided then still holds.
        if all(decided.epoch != epoch.epoch for decided in self.store.record.settings[name].epochs):
            last = self.store.record.epochs[self.store.record.settings[name].condition]
            stops = self._stops(name, epoch) and epoch.epoch < last
            self.store.decide(name, epoch.model_copy(update={"stops": stops}))
        if self.store.record.settings[name].ended:
            return str(self.STOP)
        return str(self.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Note that a setting's function has returned: all folds have ended, unless they were asked to stop."""
        name = trial.config[SETTING]
        if not self.stopping and not self.store.record.settings[name].ended:
            # Early stopping may have ended the folds before the last epoch.
            self.store.end_setting(name)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        error = str(trial.get_error() or "").strip().rpartition("\n")[2]
        self.store.end_setting(trial.config[SETTING], f"the process that collects its epochs failed: {error}")

    def _stops(self, name: str, epoch: SettingEpoch) -> bool:
        """Return whether ASHA stops a setting after an epoch. It compares at few epochs only, and at each once."""
        result = {EPOCH: epoch.epoch, SCORE: comparable(epoch.score)}
        asha = self.asha.get(self.store.record.settings[name].condition)
        return asha is not None and asha.on_trial_result(None, SimpleNamespace(trial_id=name), result) == self.STOP


class SweepStopper(tune.Stopper):
    """Ends Tune's loop once the sweep is stopping and no setting trains any more."""

    def __init__(self, scheduler: SweepScheduler, stop_flag: Any) -> None:
        self.scheduler = scheduler
        self.stop_flag = stop_flag
        self.asked = False

    def __getstate__(self) -> dict[str, Any]:
        return {}  # As for the scheduler.

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self.scheduler.stopping and not self.asked:
            self.asked = True
            self.stop_flag.stop.remote()
        controller = self.scheduler.controller
        training = controller is not None and any(trial.status == "RUNNING" for trial in controller.get_trials())
        # Ending the loop at once would kill the folds before they have saved.
        return self.scheduler.stopping and not training
