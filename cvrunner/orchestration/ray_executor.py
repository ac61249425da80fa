"""Trials as one-GPU actors on Ray.

A pool of actors, one a slot, each taking one trial after the other: an actor costs seconds of imports to start. Events
come back as a streaming generator, so a trial's epochs are seen as they end. An actor whose trial failed is replaced,
never restarted by Ray, so that what is tried again is decided in one place.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvrunner.config.sections import ClusterConfig
from cvrunner.errors import ClusterError, ClusterLostError
from cvrunner.files import write_atomically
from cvrunner.orchestration.capacity import capacity, logical_gpus
from cvrunner.orchestration.events import format_event
from cvrunner.orchestration.failures import Failure
from cvrunner.records.results import TrainingFinished, TrialResult, Waiting, WorkerStarted
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.training.faults import NONE, Chaos
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from cvrunner.training.fold_trainer import Event

# Ray folds lines that differ only in numbers; those are the ones a user wants.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
    # Ray colours the names of actors everywhere, also in files.
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
if "RAY_ADDRESS" not in os.environ:
    # A Ray of our own on one machine: without this its ports listen to the whole network, whatever address it is given.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LOOK_EVERY_S = 2.0
"""How often the size of the cluster is looked at."""
ANSWER_S = 5.0
"""How long a node has to accept a connection."""
PATIENCE_S = 20.0
"""How long an attempt may wait for a GPU before it is said what it waits for."""


class FoldActor:
    """Holds one GPU and trains the trials it is given, one at a time."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.stopping = threading.Event()
        self.pausing: str | None = None

    # Ray asks once, when the actor has begun. The trial it works on is its task's name, and stands in every log line.
    def __repr__(self) -> str:
        return self.label

    def run(self, trial: Trial, directory: TrialDirectory, cache_dir: Path, chaos: Chaos) -> Any:
        """A generator of the trial's events; the last one is its result or its failure."""
        yield WorkerStarted(host=socket.gethostname(), node=ray.get_runtime_context().get_node_id(), pid=os.getpid())
        from cvrunner.orchestration.attempt import attempt
        from cvrunner.training.device import default_device
        from cvrunner.training.fold_trainer import TrialContext

        def should_stop() -> bool:
            return self.stopping.is_set() or self.pausing == trial.name

        place = TrialContext(directory, cache_dir, default_device(), should_stop, chaos)
        for event in attempt(trial, place):
            _log(trial, event)
            yield event
        self.pausing = None

    # On a thread of its own, so that it is heard while a trial runs. Cancelling the task would end its stream at once,
    # and the driver could not wait for what the trial still saves.
    @ray.method(concurrency_group="control")
    def pause(self, trial_name: str) -> None:
        """Ask this trial to save and end, where it still runs; the actor is used again."""
        self.pausing = trial_name

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Ask the running trial to save and end."""
        self.stopping.set()

    @ray.method(concurrency_group="control")
    def read(self, directory: TrialDirectory) -> dict[str, bytes]:
        """The files of a finished trial by their place in its folder, the result last."""
        return {str(path.relative_to(directory.path)): path.read_bytes() for path in directory.kept}


@dataclass
class Slot:
    """An actor and what is known of it."""

    actor: Any
    node: str | None = None
    """Ray's id of the node it runs on, once it has said so."""


@dataclass
class Attempt:
    """A trial on an actor."""

    trial: Trial
    directory: TrialDirectory
    there: TrialDirectory
    """The same on the actor's node."""
    slot: int
    events: Any
    nodes: list[str]
    """Alive when it began."""
    since: float = field(default_factory=time.monotonic)
    placed: bool = False
    """Its actor has a process."""
    said: bool = False
    """What it waits for."""


class RayExecutor:
    """As many slots as the cluster has room for, at most `wanted`; a cluster may grow and shrink meanwhile.

    Joins the cluster of RAY_ADDRESS (set in a Ray job), else starts Ray on this machine: its GPUs, or, where there are
    none, one logical GPU for each core or share of cores. `places`: by trial, the node that may have its checkpoint.
    """

    def __init__(
        self,
        run: str,
        cluster: ClusterConfig,
        cache_dir: Path,
        wanted: int,
        chaos: Chaos = NONE,
        places: Mapping[str, str] | None = None,
    ) -> None:
        self.run = run
        self.cluster = cluster
        self.cache_dir = cache_dir
        self.wanted = min(wanted, cluster.max_concurrent or wanted)
        self.chaos = chaos
        self.places = dict(places or {})
        self.occupied: dict[int, Slot] = {}
        self.broken: list[Any] = []
        self.made = 0
        self.attempts: list[Attempt] = []
        self.started_ray = not ray.is_initialized()
        if self.started_ray:
            connect(run, cluster)
        here = alive_nodes().get(ray.get_runtime_context().get_node_id())
        try:
            if here is None:
                raise ClusterLostError("Ray has died on this node before it began; the same command tries again")
            self.here = here
            self.room = capacity(ray.cluster_resources(), cluster)  # type: ignore[no-untyped-call]
        except (ClusterError, ClusterLostError):
            self.close()
            raise
        self.looked = time.monotonic()

    @property
    def slots(self) -> int:
        """At least one: with nothing left, a trial waits until the cluster has a node again."""
        self._look()
        return max(1, min(self.room - len(self.broken), self.wanted))

    def _look(self) -> None:
        """How much room the cluster has by now. Raises ClusterLostError where Ray itself is gone."""
        if time.monotonic() - self.looked > LOOK_EVERY_S:
            self.looked = time.monotonic()
            if not _answers(self.here):
                raise ClusterLostError(
                    "Ray has died on this node; what the trials saved is safe, and the same command continues"
                )
            try:
                self.room = capacity(ray.cluster_resources(), self.cluster)  # type: ignore[no-untyped-call]
            except ClusterError:
                self.room = 0

    def start(self, trial: Trial, directory: TrialDirectory) -> None:
        node_dir = self.cluster.node_dir
        there = directory if node_dir is None else TrialDirectory(Path(node_dir) / self.run / trial.name)
        index = self._slot(trial)
        method = self.occupied[index].actor.run.options(name=trial.name, num_returns="streaming")
        events = method.remote(trial, there, self.cache_dir, self.chaos)
        self.attempts.append(Attempt(trial, directory, there, index, events, list(alive_nodes())))

    def poll(self, timeout_s: float) -> list[tuple[Trial, Event | Failure]]:
        if not self.attempts:
            return []
        self._look()
        ready, _ = ray.wait([attempt.events for attempt in self.attempts], timeout=timeout_s, fetch_local=False)
        happened: list[tuple[Trial, Event | Failure]] = []
        for attempt in [a for a in self.attempts if a.events in ready]:
            event = self._next(attempt)
            happened.append((attempt.trial, event))
            if isinstance(event, (Failure, TrialResult, TrainingFinished)):
                self.attempts.remove(attempt)
        self._free_idle()
        return happened + [(a.trial, self._waiting(a)) for a in self.attempts if self._waits(a)]

    def pause(self, trial: Trial) -> None:
        for attempt in self.attempts:
            if attempt.trial is trial:
                self.occupied[attempt.slot].actor.pause.remote(trial.name)

    def stop(self) -> None:
        for attempt in self.attempts:
            self.occupied[attempt.slot].actor.stop.remote()

    def close(self) -> None:
        for actor in (*self.broken, *(slot.actor for slot in self.occupied.values())):
            ray.kill(actor)
        if self.started_ray:
            ray.shutdown()

    # --- actors ------------------------------------------------------------------------------------------------------

    def _slot(self, trial: Trial) -> int:
        """A free slot with an actor: on the trial's own node where there is one."""
        idle, node = self._idle(), self.places.get(trial.name)
        for index in idle:
            if node in (None, self.occupied[index].node):
                return index
        empty = set(range(len(self.occupied) + 1)) - set(self.occupied)
        if idle and len(self.occupied) >= self.slots:
            return idle[0]
        index = min(empty)
        self.occupied[index] = Slot(self._new_actor(node))
        return index

    def _free_idle(self) -> None:
        """An actor without a trial must not hold the GPU that another one waits for."""
        if any(not a.placed and time.monotonic() - a.since > LOOK_EVERY_S for a in self.attempts):
            for index in self._idle():
                ray.kill(self.occupied.pop(index).actor)

    def _idle(self) -> list[int]:
        """Slots whose actor has no trial."""
        busy = {attempt.slot for attempt in self.attempts}
        return [index for index in self.occupied if index not in busy]

    def _new_actor(self, node: str | None) -> Any:
        if self.broken and self.room <= len(self.broken):
            ray.kill(self.broken.pop(0))  # no other GPU is left
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
        if node is not None and ray.util.get_current_placement_group() is None:  # whose bundles have their nodes
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
        return ray.remote(**options)(FoldActor).remote(label)

    def _give_up(self, index: int, failure: Failure) -> None:
        """The actor of a failed attempt is not used again."""
        actor = self.occupied.pop(index).actor
        if failure.kind == "gpu":
            self.broken.append(actor)  # alive, it holds its GPU, so that nobody gets it
        else:
            ray.kill(actor)

    # --- events ------------------------------------------------------------------------------------------------------

    def _next(self, attempt: Attempt) -> Event | Failure:
        attempt.placed = True
        try:
            event: Event | Failure = ray.get(next(attempt.events))
            if isinstance(event, TrialResult):
                self._bring(attempt, event)
        except RayTaskError as error:
            from cvrunner.orchestration.attempt import classify

            event = classify(error.cause if isinstance(error.cause, BaseException) else error)
        except (RayError, StopIteration) as error:
            event = self._lost(attempt, error)
        if isinstance(event, WorkerStarted):
            self.occupied[attempt.slot].node = self.places[attempt.trial.name] = event.node
        if isinstance(event, Failure) and event.kind != "stopped":
            self._give_up(attempt.slot, event)
        return event

    def _bring(self, attempt: Attempt, result: TrialResult) -> None:
        """The files of a trial from a node whose disk is not ours; the result last, as everywhere."""
        if attempt.directory.result(result.key) is None:
            files: dict[str, bytes] = ray.get(self.occupied[attempt.slot].actor.read.remote(attempt.there))
            for name, content in files.items():
                write_atomically(attempt.directory.path / name, content)

    def _lost(self, attempt: Attempt, error: Exception) -> Failure:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if isinstance(error, OutOfMemoryError):
            return Failure("host_memory", f"ended by Ray's memory monitor: {reason}")
        # An actor that never had a process was to have it on any of the nodes that were there.
        node, alive = self.occupied[attempt.slot].node, alive_nodes()
        gone = any(n not in alive or not _answers(alive[n]) for n in ([node] if node else attempt.nodes))
        if isinstance(error, NodeDiedError) or getattr(error, "preempted", False) or gone:
            self.places.pop(attempt.trial.name, None)
            return Failure("preempted", f"its node is gone: {reason}")
        return Failure("worker_died", f"its process is gone: {reason}")

    def _waits(self, attempt: Attempt) -> bool:
        return not attempt.placed and not attempt.said and time.monotonic() - attempt.since > PATIENCE_S

    def _waiting(self, attempt: Attempt) -> Waiting:
        attempt.said = True
        have, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
        return Waiting(
            what=f"{self.cluster.gpus_per_trial:g} GPU and {self.cluster.cpus_per_trial} CPU on one node: of the "
            f"cluster's {have.get('GPU', 0):g} GPU {free.get('GPU', 0):g} are free, of its {have.get('CPU', 0):g} CPU "
            f"{free.get('CPU', 0):g}"
        )


def _log(trial: Trial, event: Event | Failure) -> None:
    """A line for the dashboard's view of the actor's log; with the traceback, where something broke."""
    if text := format_event(event, (*trial.config.corpus.dimensions, "avg")):
        print(f"{time.strftime('%H:%M:%S')}  {trial.name}  {text}", flush=True)
    if isinstance(event, Failure) and event.details:
        print(event.details, flush=True)


def alive_nodes() -> dict[str, dict[str, Any]]:
    """What Ray knows of each node that it takes to be there, by id."""
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_S).close()
    except OSError:
        return False
    return True


def connect(run: str, cluster: ClusterConfig) -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray for this machine alone."""
    verbose = logging.getLogger().isEnabledFor(logging.INFO)
    common: dict[str, Any] = {
        "namespace": run,
        "log_to_driver": verbose,
        "logging_level": "INFO" if verbose else "ERROR",
    }
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**common)
        return
    cores = os.cpu_count() or 1
    # Where there is a driver, Ray counts the GPUs itself.
    gpus = None if Path("/dev/nvidiactl").exists() else logical_gpus(cores, cluster)
    ray.init(
        address="local",
        num_cpus=cores,
        num_gpus=gpus,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        **common,
    )
