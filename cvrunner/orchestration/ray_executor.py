"""Run trials as one-GPU actors on Ray.

There is a pool of actors, one per slot, and each takes one trial after the other, since starting an actor costs seconds
of imports. Events come back as a streaming generator, so an epoch is seen as soon as it ends. An actor whose trial
failed is replaced, never restarted by Ray: `failures.decide` alone decides what is tried again.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvrunner.config.sections import ClusterConfig
from cvrunner.errors import ClusterError, ClusterLostError
from cvrunner.files import write_atomically
from cvrunner.orchestration.failures import Failure
from cvrunner.orchestration.machine import (
    DEFAULT_TEMP,
    UNIX_PATH_LIMIT,
    available_cores,
    find_gpus,
    ray_temp,
    socket_path_bytes,
    visible_gpus,
)
from cvrunner.orchestration.ray_cluster import bypass_proxy, check_address
from cvrunner.orchestration.resources import capacity, logical_gpus
from cvrunner.records.results import Ending, Result, Waiting, WorkerStarted
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.training.faults import NONE, Chaos
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from cvrunner.training.fold_trainer import Event

# Set before Ray is imported, which reads them then. Ray would merge lines that differ only in numbers, such as epochs.
# All are allowed, except for its own messages about lost nodes and processes, with 20 lines of a log each: every trial
# that lost one has a line of ours. With -v nothing is left out.
os.environ["RAY_DEDUP_LOGS"] = str(int(not logging.getLogger().isEnabledFor(logging.INFO)))
os.environ.setdefault(
    "RAY_DEDUP_LOGS_ALLOW_REGEX",
    r"\A(?!Raylet is terminated|The node with node id: |A worker died or was killed while executing)",
)
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
    # Ray would colour the names of actors even in files.
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
if os.environ.get("RAY_ADDRESS", "") in ("", "local"):
    # For Ray an empty one is set.
    os.environ.pop("RAY_ADDRESS", None)
    # A Ray of our own must listen on loopback only; without this it ignores the address that it is given.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cvrunner.orchestration.ray_actor import FoldActor

ACTOR_NAME = "fold-trainer-"
"""Beginning of the actors' names in the namespace of their run."""
LOOK_EVERY_S = 2.0
"""Seconds between two looks at the cluster's size."""
ANSWER_S = 5.0
"""Longest time for a node to accept a connection."""
RELEASE_S = 30.0
"""Seconds that an actor waits for a trial before its GPU is given up, to other runs on the cluster."""
PATIENCE_S = 20.0
"""Seconds that an attempt waits for a GPU before this is reported."""


@dataclass
class Slot:
    """An actor and where it runs."""

    actor: Any
    node: str | None = None
    """Ray's id of its node; None until the actor has reported it."""
    idle_since: float = 0.0
    """When its last trial ended."""


@dataclass
class Attempt:
    """A trial on an actor."""

    trial: Trial
    directory: TrialDirectory
    node_directory: TrialDirectory
    """Its folder on the actor's node; the same as `directory` unless nodes share no disk."""
    slot: int
    events: Any
    nodes: list[str]
    """Nodes that were alive when it started."""
    started: float = field(default_factory=time.monotonic)
    placed: bool = False
    """Its actor has a process."""
    wait_reported: bool = False


class RayExecutor:
    """Runs as many trials at a time as the cluster holds, at most `most`; the cluster may grow and shrink meanwhile.

    Joins the cluster at RAY_ADDRESS (set in a Ray job), else starts Ray on this machine with its GPUs, or without any
    GPU with one logical GPU per trial's share of the cores. `places`: node that may have each trial's checkpoint.
    Raises ClusterError if not even one trial fits, ClusterLostError if Ray is gone.
    """

    def __init__(
        self,
        run: str,
        cluster: ClusterConfig,
        cache_dir: Path,
        most: int,
        chaos: Chaos = NONE,
        places: Mapping[str, str] | None = None,
    ) -> None:
        self.run = run
        self.cluster = cluster
        self.cache_dir = cache_dir
        self.most = min(most, cluster.max_concurrent or most)
        self.chaos = chaos
        self.places = dict(places or {})
        self.occupied: dict[int, Slot] = {}
        self.broken: list[Any] = []
        """Actors on GPUs with errors; alive only to keep these GPUs from being used."""
        self.made = 0
        self.attempts: list[Attempt] = []
        self.started_ray = not ray.is_initialized()
        if self.started_ray:
            connect(run, cluster)
        here = alive_nodes().get(ray.get_runtime_context().get_node_id())
        try:
            if here is None:
                raise ClusterLostError("Ray died on this node before the run began; the same command tries again")
            self.here = here
            self.capacity = capacity(ray.cluster_resources(), cluster)  # type: ignore[no-untyped-call]
        except (ClusterError, ClusterLostError):
            self.close()
            raise
        self.looked = time.monotonic()

    @property
    def slots(self) -> int:
        """At least one: with no node left, a trial waits until the cluster has one again."""
        self._look()
        return max(1, min(self.capacity - len(self.broken), self.most))

    def _look(self) -> None:
        """Update the cluster's capacity. Raises ClusterLostError if Ray itself is gone."""
        if time.monotonic() - self.looked <= LOOK_EVERY_S:
            return
        self.looked = time.monotonic()
        # A plain connection fails at once, where Ray's own calls to a dead server block for most of a minute.
        if not _answers(self.here):
            raise ClusterLostError(
                "Ray has died on this node; what the trials saved is safe, and the same command continues"
            )
        try:
            self.capacity = capacity(ray.cluster_resources(), self.cluster)  # type: ignore[no-untyped-call]
        except ClusterError:
            self.capacity = 0

    def start(self, trial: Trial, directory: TrialDirectory) -> None:
        node_dir = self.cluster.node_dir
        node_directory = directory if node_dir is None else TrialDirectory(Path(node_dir) / self.run / trial.name)
        index = self._choose_slot(trial)
        method = self.occupied[index].actor.run.options(name=trial.name, num_returns="streaming")
        events = method.remote(trial, node_directory, self.cache_dir, self.chaos)
        self.attempts.append(Attempt(trial, directory, node_directory, index, events, list(alive_nodes())))

    def poll(self, timeout_s: float) -> list[tuple[Trial, Event | Failure]]:
        if not self.attempts:
            return []
        self._look()
        self._release()
        ready, _ = ray.wait([attempt.events for attempt in self.attempts], timeout=timeout_s, fetch_local=False)
        found: list[tuple[Trial, Event | Failure]] = []
        for attempt in [a for a in self.attempts if a.events in ready]:
            event = self._next_event(attempt)
            found.append((attempt.trial, event))
            if isinstance(event, Failure | Ending):
                self.attempts.remove(attempt)
                if slot := self.occupied.get(attempt.slot):
                    slot.idle_since = time.monotonic()
                    if self._over_share():
                        # Not for good: the next trial asks Ray for a GPU again, behind those that wait.
                        ray.kill(self.occupied.pop(attempt.slot).actor)
        for attempt in self.attempts:
            waited_s = time.monotonic() - attempt.started
            if not attempt.placed and not attempt.wait_reported and waited_s > PATIENCE_S:
                attempt.wait_reported = True
                have, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
                what = (
                    f"{self.cluster.gpus_per_trial:g} GPU and {self.cluster.cpus_per_trial} CPU on one node: of the "
                    f"cluster's {have.get('GPU', 0):g} GPU {free.get('GPU', 0):g} are free, of its "
                    f"{have.get('CPU', 0):g} CPU {free.get('CPU', 0):g}"
                )
                found.append((attempt.trial, Waiting(what=what)))
        return found

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

    def _choose_slot(self, trial: Trial) -> int:
        """Return a slot with an idle actor, if possible on the node that has the trial's checkpoint and features."""
        idle, node = self._idle(), self.places.get(trial.name)
        for index in idle:
            if node in (None, self.occupied[index].node):
                return index
        # No idle actor is on that node. If a slot is left, a new actor there is worth its start; if not, it would wait
        # for the GPU that an idle actor holds, so that one must do.
        if idle and len(self.occupied) >= self.slots:
            return idle[0]
        index = min(set(range(len(self.occupied) + 1)) - set(self.occupied))
        self.occupied[index] = Slot(self._new_actor(node))
        return index

    def _idle(self) -> list[int]:
        """Slots whose actor has no trial."""
        busy = {attempt.slot for attempt in self.attempts}
        return [index for index in self.occupied if index not in busy]

    def _release(self) -> None:
        """End the actors that no trial is left for: every trial that can start was started before events are polled.

        One that has been idle for long gives its slot up for good. What the run still does (retries, linear probes)
        gets by with the other slots: it must not wait for a GPU it gave away.
        """
        # An own trial that waits for a GPU may wait for the one that an idle actor holds.
        needed = any(not a.placed and time.monotonic() - a.started > LOOK_EVERY_S for a in self.attempts)
        for index in self._idle():
            long = time.monotonic() - self.occupied[index].idle_since > RELEASE_S
            if needed or long:
                ray.kill(self.occupied.pop(index).actor)
            if long:
                self.most = len(self.occupied)

    def _over_share(self) -> bool:
        """Whether this run has more than an equal share of the cluster while another run waits for a GPU."""
        if self.started_ray or ray.util.get_current_placement_group() is not None:
            return False
        named = ray.util.list_named_actors(all_namespaces=True)  # also those that wait for a GPU
        others = Counter(one["namespace"] for one in named if one["name"].startswith(ACTOR_NAME))
        del others[self.run]
        mine = len(self.occupied) + len(self.broken) - sum(not attempt.placed for attempt in self.attempts)
        return others.total() > self.capacity - mine and mine > self.capacity / (1 + len(others))

    def _new_actor(self, node: str | None) -> Any:
        # With no other GPU left, one that had an error is better than none.
        if self.broken and self.capacity <= len(self.broken):
            ray.kill(self.broken.pop(0))
        self.made += 1
        label = f"{ACTOR_NAME}{self.made}"
        options: dict[str, Any] = {
            "num_gpus": self.cluster.gpus_per_trial,
            "num_cpus": self.cluster.cpus_per_trial,
            "max_restarts": 0,
            "max_task_retries": 0,
            "concurrency_groups": {"control": 1},
            "name": label,
            "namespace": self.run,
        }
        # Soft: if that node is gone or full, the trial starts elsewhere. The bundles of a placement group, which a
        # sweep uses, have their nodes already.
        if node is not None and ray.util.get_current_placement_group() is None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
        return ray.remote(**options)(FoldActor).remote(label)

    # --- events ------------------------------------------------------------------------------------------------------

    def _next_event(self, attempt: Attempt) -> Event | Failure:
        attempt.placed = True
        try:
            event: Event | Failure = ray.get(next(attempt.events))
            if isinstance(event, Result) and attempt.directory.read_result(type(event), event.key) is None:
                # The node's disk is not shared. The result is copied last, since it marks a complete trial.
                actor = self.occupied[attempt.slot].actor
                files: dict[str, bytes] = ray.get(actor.read.remote(attempt.node_directory))
                for name, content in files.items():
                    write_atomically(attempt.directory.path / name, content)
        except RayTaskError as error:
            from cvrunner.orchestration.attempt import classify  # imports torch, which the driver rarely needs

            event = classify(error.cause if isinstance(error.cause, BaseException) else error)
        except (RayError, StopIteration) as error:
            event = self._classify_loss(attempt, error)
        if isinstance(event, WorkerStarted):
            self.occupied[attempt.slot].node = self.places[attempt.trial.name] = event.node
        # After a stop or a pause the process is sound. After any other failure its memory or its GPU may not be, so
        # the next attempt gets a new process.
        if isinstance(event, Failure) and event.kind != "stopped":
            actor = self.occupied.pop(attempt.slot).actor
            if event.kind == "gpu":
                self.broken.append(actor)
            else:
                ray.kill(actor)
        return event

    def _classify_loss(self, attempt: Attempt, error: Exception) -> Failure:
        """Return why an actor is gone: memory, its node, or its process alone."""
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if isinstance(error, OutOfMemoryError):
            return Failure("host_memory", f"ended by Ray's memory monitor: {reason}")
        # Ray often reports only a dead actor, and takes a while to call its node dead, so the nodes are asked here. An
        # actor that never had a process could have been meant for any node that was alive at the start.
        node, alive = self.occupied[attempt.slot].node, alive_nodes()
        suspects = [node] if node else attempt.nodes
        gone = any(one not in alive or not _answers(alive[one]) for one in suspects)
        if isinstance(error, NodeDiedError) or getattr(error, "preempted", False) or gone:
            self.places.pop(attempt.trial.name, None)
            return Failure("preempted", f"its node is gone: {reason}")
        return Failure("worker_died", f"its process is gone: {reason}")


def alive_nodes() -> dict[str, dict[str, Any]]:
    """Return Ray's record of each node that it considers alive, by id."""
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_S).close()
    except OSError:
        return False
    return True


def connect(run: str, cluster: ClusterConfig) -> None:
    """Join the cluster at RAY_ADDRESS, or start Ray for this machine alone."""
    bypass_proxy(os.environ)
    verbose = logging.getLogger().isEnabledFor(logging.INFO)
    level = "INFO" if verbose else "ERROR"
    common: dict[str, Any] = {"namespace": run, "log_to_driver": verbose, "logging_level": level}
    if address := os.environ.get("RAY_ADDRESS"):
        check_address(address)
        ray.init(**common)
        return
    cores = available_cores()
    # Real ones are counted by Ray itself. Asked of the driver, since WSL2 has no /dev/nvidiactl.
    gpus = None if visible_gpus(find_gpus(), os.environ) else logical_gpus(cores, cluster)
    temp = f"{DEFAULT_TEMP}/ray" if socket_path_bytes(ray_temp(os.environ)) > UNIX_PATH_LIMIT else None
    try:
        ray.init(
            address="local",
            num_cpus=cores,
            num_gpus=gpus,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=temp,
            **common,
        )
    except Exception as error:
        # These two are raised if Ray's processes end, or do not answer in time, as on an overloaded machine.
        if type(error) not in (Exception, RuntimeError):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise ClusterError(
            f"Ray did not start on this machine: {reason}. The same command tries again; Ray's logs are in "
            f"{temp or ray_temp(os.environ) + '/ray'}/session_latest/logs"
        ) from None
