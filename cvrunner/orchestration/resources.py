"""Which GPUs a run would have: of the cluster, of this machine, or of one that is only thought of."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from cvrunner.config.sections import ClusterConfig
from cvrunner.errors import ClusterError, UsageError
from cvrunner.orchestration.capacity import capacity, logical_gpus
from cvrunner.orchestration.machine import find_cluster, find_listeners

NODE_GPUS = 8
SEVERAL_NODES = 4


@dataclass(frozen=True)
class Resources:
    """Some GPUs, and how many trials they take at a time."""

    name: str
    nodes: int
    gpus: int
    slots: int


def possible_resources(cluster: ClusterConfig, gpus: int | None, environment: Mapping[str, str]) -> list[Resources]:
    """The GPUs that are there, or so many as are wanted, first; then one node of 8 and a cluster of 4 such nodes.

    Raises UsageError for less than one GPU, ClusterError where RAY_ADDRESS does not answer or a trial does not fit.
    """
    if gpus is not None and gpus < 1:
        raise UsageError(f"--gpus {gpus}: must be 1 or more")
    first = found_resources(cluster, environment) if gpus is None else hypothetical("as given", 1, gpus, cluster)
    others = [
        hypothetical("a node", 1, NODE_GPUS, cluster),
        hypothetical(f"{SEVERAL_NODES} nodes", SEVERAL_NODES, SEVERAL_NODES * NODE_GPUS, cluster),
    ]
    return [first, *(resources for resources in others if resources.gpus != first.gpus)]


def hypothetical(name: str, nodes: int, gpus: int, cluster: ClusterConfig) -> Resources:
    """GPUs that are not looked for, with cores enough."""
    cores = math.ceil(gpus / cluster.gpus_per_trial) * cluster.cpus_per_trial
    return _resources(name, nodes, gpus, cores, cluster)


def found_resources(cluster: ClusterConfig, environment: Mapping[str, str]) -> Resources:
    """Those of RAY_ADDRESS; without it this machine's, or, as `all-folds` starts Ray, a logical one per share of cores.

    Raises ClusterError.
    """
    ray = find_cluster(environment, find_listeners() or ()) if environment.get("RAY_ADDRESS") else None
    if ray is not None:
        if ray.error is not None:
            raise ClusterError(f"RAY_ADDRESS {ray.address}: {ray.error}. Start Ray there, unset it, or give --gpus N")
        return _resources("the cluster", ray.nodes, ray.gpus, ray.cpus, cluster)
    import torch

    cores, real = os.cpu_count() or 1, torch.cuda.device_count()
    gpus = real or logical_gpus(cores, cluster)
    return _resources("this machine" if real else "this machine, logical", 1, gpus, cores, cluster)


def _resources(name: str, nodes: int, gpus: float, cpus: float, cluster: ClusterConfig) -> Resources:
    slots = capacity({"GPU": gpus, "CPU": cpus}, cluster)
    return Resources(name, nodes, int(gpus), min(slots, cluster.max_concurrent or slots))
