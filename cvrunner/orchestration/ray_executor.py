"""Trials as one-GPU actors on Ray. The only file that imports Ray, but for the sweep.

A pool of actors, one a slot, each taking one trial after the other: an actor costs seconds of imports to start. Events
come back as a streaming generator, so a trial's epochs are seen as they end. An actor that died is replaced, never
restarted by Ray, so that what is tried again is decided in one place.
"""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvrunner.config import ClusterConfig
from cvrunner.errors import ClusterError
from cvrunner.orchestration.scheduler import Failure, classify
from cvrunner.records.results import TrialResult
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.training.fold_trainer import Event
from cvrunner.training.trial import Trial

# Ray folds lines that differ only in numbers; those are the ones a user wants.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

import ray
from ray.exceptions import RayActorError, RayTaskError


class FoldActor:
    """Holds one GPU and trains the trials it is given, one at a time."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.trial = "idle"
        self.stopping = threading.Event()

    def __repr__(self) -> str:
        return f"{self.label} {self.trial}"

    def run(self, trial: Trial, directory: TrialDirectory, cache_dir: Path) -> Any:
        """A generator of the trial's events."""
        import torch

        from cvrunner.training.fold_trainer import FoldTrainer, Workplace

        device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        self.trial = trial.name
        try:
            yield from FoldTrainer(trial, Workplace(directory, cache_dir, device, self.stopping.is_set)).run()
        finally:
            self.trial = "idle"

    # On a thread of its own, so that it is heard while a trial runs. Cancelling the task would end its stream at once,
    # and the driver could not wait for what the trial still saves.
    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Ask the running trial to save and end."""
        self.stopping.set()


@dataclass
class Attempt:
    """A trial on an actor."""

    trial: Trial
    slot: int
    events: Any


class RayExecutor:
    """As many slots as the cluster has room for, at most `wanted`.

    Joins the cluster of RAY_ADDRESS (set in a Ray job), else starts Ray on this machine: its GPUs, or, where there are
    none, one logical GPU for each core or share of cores.
    """

    def __init__(self, run: str, cluster: ClusterConfig, cache_dir: Path, wanted: int) -> None:
        self.run = run
        self.cluster = cluster
        self.cache_dir = cache_dir
        self.started_ray = not ray.is_initialized()
        if self.started_ray:
            _connect(run, cluster)
        try:
            room = capacity(ray.cluster_resources(), cluster)  # type: ignore[no-untyped-call]
        except ClusterError:
            self.close()
            raise
        self.slots = min(room, wanted, cluster.max_concurrent or wanted)
        self.actors: dict[int, Any] = {}
        self.made = 0
        self.attempts: list[Attempt] = []

    def start(self, trial: Trial, directory: TrialDirectory) -> None:
        slot = min(set(range(self.slots)) - {attempt.slot for attempt in self.attempts})
        if slot not in self.actors:
            self.actors[slot] = self._new_actor()
        method = self.actors[slot].run.options(name=trial.name, num_returns="streaming")
        self.attempts.append(Attempt(trial, slot, method.remote(trial, directory, self.cache_dir)))

    def poll(self, timeout_s: float) -> list[tuple[Trial, Event | Failure]]:
        if not self.attempts:
            return []
        ready, _ = ray.wait([attempt.events for attempt in self.attempts], timeout=timeout_s, fetch_local=False)
        happened: list[tuple[Trial, Event | Failure]] = []
        for attempt in [a for a in self.attempts if a.events in ready]:
            event = self._next(attempt)
            happened.append((attempt.trial, event))
            if isinstance(event, (Failure, TrialResult)):
                self.attempts.remove(attempt)
        return happened

    def stop(self) -> None:
        for attempt in self.attempts:
            self.actors[attempt.slot].stop.remote()

    def close(self) -> None:
        for actor in getattr(self, "actors", {}).values():
            ray.kill(actor)
        if self.started_ray:
            ray.shutdown()

    def _new_actor(self) -> Any:
        self.made += 1
        label = f"fold-trainer-{self.made}"
        options: dict[str, Any] = {
            "num_gpus": self.cluster.gpus_per_trial,
            "num_cpus": self.cluster.cpus_per_trial,
            "max_restarts": 0,
            "max_task_retries": 0,
            "concurrency_groups": {"control": 1},
            "name": label,
            "namespace": self.run,
        }
        return ray.remote(**options)(FoldActor).remote(label)

    def _next(self, attempt: Attempt) -> Event | Failure:
        try:
            event: Event = ray.get(next(attempt.events))
            return event
        except RayTaskError as error:
            return classify(error.cause if isinstance(error.cause, BaseException) else error)
        except (RayActorError, StopIteration) as error:
            actor = self.actors.pop(attempt.slot, None)
            if actor is not None:
                ray.kill(actor)
            return Failure("lost", f"its process is gone: {_first_line(error)}")


def capacity(resources: dict[str, float], cluster: ClusterConfig) -> int:
    """How many trials a cluster of these resources can hold. Pure. Raises ClusterError where it is none."""
    gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    room = min(math.floor(gpus / cluster.gpus_per_trial + 1e-9), math.floor(cpus / cluster.cpus_per_trial))
    if room < 1:
        raise ClusterError(
            f"a trial needs {cluster.gpus_per_trial:g} GPU and {cluster.cpus_per_trial} CPU; the cluster has "
            f"{gpus:g} GPU and {cpus:g} CPU. Lower cluster.gpus_per_trial or cluster.cpus_per_trial, or start Ray with "
            "more: without real GPUs, `ray start --head --num-gpus 8` gives logical ones"
        )
    return room


def _connect(run: str, cluster: ClusterConfig) -> None:
    common: dict[str, Any] = {"namespace": run, "log_to_driver": False, "logging_level": "ERROR"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**common)
        return
    import torch

    cores = os.cpu_count() or 1
    gpus = torch.cuda.device_count() or max(1, cores // cluster.cpus_per_trial)
    ray.init(
        address="local",
        num_cpus=cores,
        num_gpus=gpus,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        **common,
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
