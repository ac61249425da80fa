"""GPUs a run could have, in a cluster, on this machine or on a hypothetical one, and how many trials they hold."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from cvrunner.config.sections import ClusterConfig
from cvrunner.errors import ClusterError, UsageError
from cvrunner.orchestration.machine import (
    ANSWER_S,
    available_cores,
    find_cluster,
    find_gpus,
    find_listeners,
    visible_gpus,
)
from cvrunner.orchestration.ray_cluster import answers, ask_nodes
from cvrunner.training.trial import DeviceType

NODE_GPUS = 8
SEVERAL_NODES = 4


@dataclass(frozen=True)
class Resources:
    """GPUs, and how many trials run on them at a time."""

    name: str
    nodes: int
    gpus: int
    slots: int


def possible_resources(cluster: ClusterConfig, gpus: int | None, environment: Mapping[str, str]) -> list[Resources]:
    """Return the resources found, or `gpus` GPUs if given, then one node of 8 GPUs and a cluster of 4 such nodes.

    Raises UsageError for less than one GPU, ClusterError if RAY_ADDRESS does not answer or a trial does not fit.
    """
    if gpus is None:
        first = found_resources(cluster, environment)
    elif gpus < 1:
        raise UsageError(f"--gpus {gpus}: must be 1 or more")
    else:
        first = hypothetical("as given", 1, gpus, cluster)
    others = [
        hypothetical("a node", 1, NODE_GPUS, cluster),
        hypothetical(f"{SEVERAL_NODES} nodes", SEVERAL_NODES, SEVERAL_NODES * NODE_GPUS, cluster),
    ]
    return [first, *(resources for resources in others if resources.gpus != first.gpus)]


def hypothetical(name: str, nodes: int, gpus: int, cluster: ClusterConfig) -> Resources:
    """Return a hypothetical machine with `gpus` GPUs and enough CPU cores for its trials."""
    cores = math.ceil(gpus / cluster.gpus_per_trial) * cluster.cpus_per_trial
    return _resources(name, nodes, gpus, cores, cluster)


def found_resources(cluster: ClusterConfig, environment: Mapping[str, str]) -> Resources:
    """Return the resources of the cluster at RAY_ADDRESS, else of this machine, as `all-folds` would use them.

    Raises ClusterError.
    """
    if environment.get("RAY_ADDRESS") and (ray := find_cluster(environment, find_listeners() or ())) is not None:
        if ray.error is not None:
            raise ClusterError(f"RAY_ADDRESS {ray.address}: {ray.error}. Start Ray there, unset it, or give --gpus N")
        return _resources("the cluster", ray.nodes, ray.gpus, ray.cpus, cluster)
    cores, real = available_cores(), len(visible_gpus(find_gpus(), environment))
    if real:
        return _resources("this machine", 1, real, cores, cluster)
    return _resources("this machine, logical", 1, logical_gpus(cores, cluster), cores, cluster)


def _resources(name: str, nodes: int, gpus: float, cpus: float, cluster: ClusterConfig) -> Resources:
    slots = capacity({"GPU": gpus, "CPU": cpus}, cluster)
    return Resources(name, nodes, int(gpus), min(slots, cluster.max_concurrent or slots))


def device_type(requested: Literal["auto", "cuda", "cpu"], environment: Mapping[str, str]) -> DeviceType:
    """Return the type of device that trials get for `train.device`: with `auto`, cuda if there are real GPUs, not
    logical ones, here or in the cluster at RAY_ADDRESS."""
    if requested != "auto":
        return requested
    if visible_gpus(find_gpus(), environment):
        return "cuda"
    address = environment.get("RAY_ADDRESS", "local")
    # A cluster's head may have no GPU, or its driver a GPU that no node of the cluster has.
    if address not in ("", "local", "auto") and _has_real_gpus(address):
        return "cuda"
    return "cpu"


@functools.cache
def _has_real_gpus(address: str) -> bool:
    """Whether Ray, asked once per process, has found the model of a GPU on a node; a logical GPU has none."""
    if not answers(address):
        return False
    nodes, _ = ask_nodes(address, ANSWER_S)
    return any(resource.startswith("accelerator_type:") for node in nodes for resource in node)


# --- how many trials they hold ----------------------------------------------------------------------------------------


def logical_gpus(cores: int, cluster: ClusterConfig) -> int:
    """Number of GPUs to declare to Ray on a machine without any: one for each trial's share of the cores."""
    return max(1, cores // cluster.cpus_per_trial)


def trials_that_fit(gpus: float, cpus: float, cluster: ClusterConfig) -> int:
    """Number of trials that fit at a time; may be 0."""
    # 1e-9: three trials of a third of a GPU fit into one, whatever the rounding.
    return min(math.floor(gpus / cluster.gpus_per_trial + 1e-9), math.floor(cpus / cluster.cpus_per_trial))


def capacity_by_node(nodes: Iterable[Mapping[str, float]], cluster: ClusterConfig) -> int:
    """Number of trials that these nodes hold at a time, each trial on one node. Raises ClusterError if it is 0."""
    resources = [dict(node) for node in nodes]
    room = sum(trials_that_fit(node.get("GPU", 0.0), node.get("CPU", 0.0), cluster) for node in resources)
    if room < 1:
        largest = max(resources, key=lambda node: (node.get("GPU", 0.0), node.get("CPU", 0.0)), default={})
        return capacity(largest, cluster)  # raises
    return room


def capacity(resources: Mapping[str, float], cluster: ClusterConfig) -> int:
    """Number of trials that resources (`GPU`, `CPU`) hold at a time. Raises ClusterError if it is 0."""
    gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    room = trials_that_fit(gpus, cpus, cluster)
    if room < 1:
        raise ClusterError(
            f"a trial needs {cluster.gpus_per_trial:g} GPU and {cluster.cpus_per_trial} CPU; the cluster has "
            f"{gpus:g} GPU and {cpus:g} CPU. Lower cluster.gpus_per_trial or cluster.cpus_per_trial, or start Ray with "
            "more: without real GPUs, `ray start --head --num-gpus 8` gives logical ones"
        )
    return room
