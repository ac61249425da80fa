"""A sweep on Ray Tune: a Tune trial is one setting, and trains all its folds as one-GPU actors in its placement group.

Tune places the settings and asks ASHA which to stop. What it keeps itself is thrown away and made anew: the truth is
in sweep.json and in the folds' journals and checkpoints, so the same command goes on wherever the last one was killed.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cvrunner.config.sections import ClusterConfig, TuneConfig
from cvrunner.errors import ClusterLostError, UsageError
from cvrunner.orchestration.failures import Decision, Failure
from cvrunner.orchestration.ray_executor import RayExecutor, alive_nodes, connect
from cvrunner.orchestration.resources import capacity_by_node
from cvrunner.orchestration.scheduler import run_trials
from cvrunner.records import journal
from cvrunner.records.results import EpochRecord, TrainingFinished
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.training.trial import Trial
from cvrunner.tune.objective import UNDEFINED, Objective
from cvrunner.tune.records import SettingEpoch, SweepDirectory
from cvrunner.tune.store import SweepStore

# Tune's own: Ctrl-C is ours, files of its loggers are nobody's, and a trainable stays in the working directory.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints a banner however quiet it should be

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

SETTING, EPOCH, SCORE, RECORD, FAILURE, ABORTS = "setting", "epoch", "score", "record", "failure", "aborts"
"""Keys of what a setting reports."""


@dataclass(frozen=True)
class Work:
    """All that the process of a setting needs."""

    name: str
    """Of the sweep and the setting: the namespace of its actors."""
    trials: Sequence[Trial]
    """One a fold."""
    directories: Mapping[int, TrialDirectory]
    """By fold."""
    cluster: ClusterConfig
    cache_dir: Path
    slots: int
    """How many folds train at a time."""

    def directory(self, trial: Trial) -> TrialDirectory:
        return self.directories[trial.fold.number]


class Room:
    """Ray, and how many folds of a setting fit at a time. Use as a context: Ray of our own is gone afterwards.

    Raises ClusterError where not even one fits.
    """

    def __init__(self, run: str, cluster: ClusterConfig, folds: int) -> None:
        self.started_ray = not ray.is_initialized()
        if self.started_ray:
            connect(run, cluster)
        try:
            most = capacity_by_node((node["Resources"] for node in alive_nodes().values()), cluster)
        except BaseException:
            self.__exit__()
            raise
        most = min(most, cluster.max_concurrent or most)
        self.slots = min(folds, most)
        self.settings = most // self.slots
        """How many settings train at a time."""

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *_: object) -> None:
        if self.started_ray:
            ray.shutdown()


def run_sweep(
    store: SweepStore,
    trials: Mapping[str, Sequence[Trial]],
    rule: TuneConfig,
    cluster: ClusterConfig,
    cache_dir: Path,
    room: Room,
    stop: threading.Event,
) -> None:
    """Train the settings that have not ended; `book` keeps what comes out. Returns early, all saved, when told to stop.

    Raises UsageError where every setting would meet the same error, ClusterLostError where Ray dies.
    """
    shutil.rmtree(store.directory.tune, ignore_errors=True)
    sign = ray.remote(num_cpus=0)(StopSign).remote()
    judge = Judge(store, rule, stop)
    works = {name: _work(store.directory, name, trials[name], cluster, cache_dir, room.slots) for name in store.pending}
    bundle = {"GPU": cluster.gpus_per_trial, "CPU": float(cluster.cpus_per_trial)}
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(train_setting, works=works, sign=sign),
            # The first bundle is of the process that only collects; it needs nothing.
            tune.PlacementGroupFactory([{}, *[bundle] * room.slots]),
        ),
        param_space={SETTING: tune.grid_search(list(works))},
        tune_config=tune.TuneConfig(
            scheduler=judge,
            max_concurrent_trials=room.settings,
            trial_dirname_creator=lambda trial: trial.config[SETTING],
        ),
        run_config=tune.RunConfig(
            name=store.directory.tune.name,
            storage_path=str(store.directory.path),
            stop=Until(judge, sign),
            failure_config=tune.FailureConfig(max_failures=cluster.retries.worker_died),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except RayError as error:
        first = str(error).strip().partition("\n")[0]
        raise ClusterLostError(f"Ray has died: {first}; what was saved is safe, the same command continues") from error
    if judge.aborted:
        raise UsageError(judge.aborted)


def _work(
    directory: SweepDirectory, name: str, trials: Sequence[Trial], cluster: ClusterConfig, cache_dir: Path, slots: int
) -> Work:
    directories = {trial.fold.number: directory.fold(name, trial.fold.number) for trial in trials}
    return Work(f"{directory.name}-{name}", trials, directories, cluster, cache_dir, slots)


# --- in the process of a setting --------------------------------------------------------------------------------------


def train_setting(config: dict[str, Any], works: Mapping[str, Work], sign: Any) -> None:
    """A Tune trial: the folds of one setting, from where their files say, an epoch of all of them told at a time."""
    work = works[config[SETTING]]
    reporter = Reporter(config[SETTING], work)
    executor = RayExecutor(work.name, work.cluster, work.cache_dir, work.slots)
    try:
        should_stop = lambda: reporter.failed_fold or ray.get(sign.is_set.remote())  # noqa: E731
        reporter.tell()
        aborted = run_trials(
            work.trials, work.directory, executor, [reporter], work.cluster.retries, should_stop=should_stop
        )
    finally:
        executor.close()
    if reporter.failure is not None:
        tune.report({SETTING: config[SETTING], FAILURE: reporter.failure, ABORTS: aborted is not None})


class Reporter:
    """An observer of a setting's folds that tells Tune each epoch that all of them have finished."""

    def __init__(self, setting: str, work: Work) -> None:
        self.setting = setting
        self.objective = Objective([trial.fold.number for trial in work.trials])
        self.failure: str | None = None
        """Why a fold cannot be trained."""
        for trial in work.trials:
            for line in journal.read(work.directory(trial).journal, "epoch"):
                self.objective.epoch(trial.fold.number, EpochRecord.from_json(json.dumps(line), "journal"))

    @property
    def failed_fold(self) -> bool:
        return self.failure is not None

    def tell(self) -> None:
        for epoch in self.objective.news():
            score = UNDEFINED if epoch.score is None else epoch.score
            tune.report({SETTING: self.setting, EPOCH: epoch.epoch, SCORE: score, RECORD: epoch.model_dump_json()})

    def attempt(self, trial: Trial, number: int) -> None: ...

    def event(self, trial: Trial, event: object) -> None:
        if isinstance(event, EpochRecord):
            self.objective.epoch(trial.fold.number, event)
        elif isinstance(event, TrainingFinished):
            self.objective.end(trial.fold.number)
        self.tell()

    def failed(self, trial: Trial, failure: Failure, decision: Decision) -> None:
        if decision in (Decision.FAIL, Decision.ABORT):
            self.failure = self.failure or f"fold {trial.fold.number}: {failure.message}"


class StopSign:
    """An actor by which the driver tells all settings to save and end."""

    def __init__(self) -> None:
        self.stopping = False

    def stop(self) -> None:
        self.stopping = True

    def is_set(self) -> bool:
        return self.stopping


# --- in the driver ----------------------------------------------------------------------------------------------------


class Judge(FIFOScheduler):
    """Asks ASHA after every epoch, writes its decision down first, and obeys what was written down before a restart."""

    def __init__(self, store: SweepStore, rule: TuneConfig, stop: threading.Event) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.store = store
        self.stop = stop
        self.aborted: str | None = None
        """What every setting would meet."""
        self.controller: Any = None
        epochs = store.record.epochs
        asha: Any = ASHAScheduler(
            time_attr=EPOCH,
            metric=SCORE,
            mode="max",
            max_t=epochs,
            grace_period=min(rule.grace_period, epochs),
            reduction_factor=rule.reduction_factor,
        )
        self.asha = asha
        for name, state in store.record.settings.items():
            asha.on_trial_add(None, SimpleNamespace(trial_id=name))
            for epoch in state.epochs:
                self._ask(name, epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles what it was given; this belongs to the driver alone

    @property
    def stopping(self) -> bool:
        return self.stop.is_set() or self.aborted is not None

    @property
    def training(self) -> bool:
        """Whether a setting is."""
        trials = self.controller.get_trials() if self.controller else []
        return any(trial.status == "RUNNING" for trial in trials)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self.controller = tune_controller

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        return None if self.stopping else super().choose_trial_to_run(tune_controller)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name = result[SETTING]
        if FAILURE in result:
            self.store.failed(name, result[FAILURE])
            self.aborted = self.aborted or (result[FAILURE] if result[ABORTS] else None)
            return str(self.STOP)
        epoch = SettingEpoch.from_json(result[RECORD], name)
        decided = self.store.decided(name, epoch.epoch)
        if decided is None:
            stops = self._ask(name, epoch) and epoch.epoch < self.store.record.epochs
            decided = epoch.model_copy(update={"stops": stops})
            self.store.decide(name, decided)
        return str(self.STOP if self.store.record.settings[name].ended else self.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Its function has returned: all folds have ended, unless they were told to stop."""
        name = trial.config[SETTING]
        if not self.stopping and not self.store.record.settings[name].ended:
            self.store.done(name)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        error = str(trial.get_error() or "").strip().rpartition("\n")[2]
        self.store.failed(trial.config[SETTING], f"the process that collects its epochs failed: {error}")

    def _ask(self, name: str, epoch: SettingEpoch) -> bool:
        """Whether ASHA stops a setting after an epoch. It compares at few epochs only, and each of them once."""
        score = UNDEFINED if epoch.score is None else epoch.score
        result = {EPOCH: epoch.epoch, SCORE: score}
        return bool(self.asha.on_trial_result(None, SimpleNamespace(trial_id=name), result) == self.STOP)


class Until(tune.Stopper):
    """Ends Tune's loop once it was told to stop and no setting trains any more."""

    def __init__(self, judge: Judge, sign: Any) -> None:
        self.judge = judge
        self.sign = sign
        self.told = False

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self.judge.stopping and not self.told:
            self.told = True
            self.sign.stop.remote()
        return self.judge.stopping and not self.judge.training
