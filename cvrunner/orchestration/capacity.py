"""How many trials some resources hold at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from cvrunner.config.sections import ClusterConfig
from cvrunner.errors import ClusterError


def logical_gpus(cores: int, cluster: ClusterConfig) -> int:
    """How many GPUs Ray is told of where there are none: one for each trial's share of the cores."""
    return max(1, cores // cluster.cpus_per_trial)


def trials_that_fit(gpus: float, cpus: float, cluster: ClusterConfig) -> int:
    """0 where none does."""
    # 1e-9: three trials of a third of a GPU fit into one.
    return min(math.floor(gpus / cluster.gpus_per_trial + 1e-9), math.floor(cpus / cluster.cpus_per_trial))


def capacity_by_node(nodes: Iterable[Mapping[str, float]], cluster: ClusterConfig) -> int:
    """How many trials these nodes can hold at a time, none of them across two. Raises ClusterError where it is none."""
    resources = [dict(node) for node in nodes]
    room = sum(trials_that_fit(node.get("GPU", 0.0), node.get("CPU", 0.0), cluster) for node in resources)
    if room < 1:
        largest = max(resources, key=lambda node: (node.get("GPU", 0.0), node.get("CPU", 0.0)), default={})
        return capacity(largest, cluster)
    return room


def capacity(resources: Mapping[str, float], cluster: ClusterConfig) -> int:
    """How many trials a cluster of these resources (`GPU`, `CPU`) can hold. Raises ClusterError where it is none."""
    gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    room = trials_that_fit(gpus, cpus, cluster)
    if room < 1:
        raise ClusterError(
            f"a trial needs {cluster.gpus_per_trial:g} GPU and {cluster.cpus_per_trial} CPU; the cluster has "
            f"{gpus:g} GPU and {cpus:g} CPU. Lower cluster.gpus_per_trial or cluster.cpus_per_trial, or start Ray with "
            "more: without real GPUs, `ray start --head --num-gpus 8` gives logical ones"
        )
    return room
