"""The GPUs that a plan is for: given, of this machine, or of a cluster simulated by nodes of 8 logical GPUs."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cvrunner.config.sections import ClusterConfig
from cvrunner.errors import ClusterError, UsageError
from cvrunner.orchestration.resources import Resources, found_resources, possible_resources

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from cvrunner.orchestration.ray_executor import LOOK_EVERY_S, RayExecutor  # noqa: E402
from tests.end_to_end.programs import cvrunner, tiny_config  # noqa: E402


def test_a_node_of_8_and_four_such_nodes_are_compared_with_what_exists() -> None:
    found = possible_resources(ClusterConfig(), 2, {})
    assert [(one.nodes, one.gpus, one.slots) for one in found] == [(1, 2, 2), (1, 8, 8), (4, 32, 32)]
    assert [one.gpus for one in possible_resources(ClusterConfig(), 8, {})] == [8, 32]


def test_without_ray_and_without_gpus_there_is_a_logical_one_for_each_share_of_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert found_resources(ClusterConfig(cpus_per_trial=3), {}) == Resources("this machine, logical", 1, 2, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert found_resources(ClusterConfig(), {}) == Resources("this machine", 1, 4, 4)


def test_what_cannot_be_planned_for_is_refused() -> None:
    with pytest.raises(UsageError, match="--gpus 0: must be 1 or more"):
        possible_resources(ClusterConfig(), 0, {})
    with pytest.raises(ClusterError, match=r"RAY_ADDRESS 127\.0\.0\.1:9: nobody answers .* or give --gpus N"):
        possible_resources(ClusterConfig(), None, {"RAY_ADDRESS": "127.0.0.1:9"})
    with pytest.raises(ClusterError, match="needs 1 GPU and 99999 CPU"):
        found_resources(ClusterConfig(cpus_per_trial=99999), {})


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A node of 8 logical GPUs with a dashboard, which reports the size of the cluster; nodes are added to it."""
    monkeypatch.setenv("RAY_prestart_worker_first_driver", "0")  # nothing runs on it
    folder = Path(f"/tmp/cvr-{os.getpid()}")  # Ray's sockets lie below it, and their paths may not be long
    cluster = Cluster()
    cluster.add_node(num_cpus=8, num_gpus=8, include_dashboard=True, dashboard_host="127.0.0.1", temp_dir=str(folder))
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.suites("ci", "all")
@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore")
def test_a_node_of_8_gpus_holds_8_trials_four_such_nodes_hold_32_and_plan_sees_them(
    tmp_path: Path, node: Cluster
) -> None:
    executor = RayExecutor("size", ClusterConfig(), tmp_path / "cache", 50)
    assert executor.slots == 8
    for _ in range(3):
        node.add_node(num_cpus=8, num_gpus=8)
    time.sleep(LOOK_EVERY_S)
    assert executor.slots == 32
    executor.close()
    assert found_resources(ClusterConfig(), {"RAY_ADDRESS": node.address}) == Resources("the cluster", 4, 32, 32)
    # Without the second setting Ray would look for 127.0.0.1 under this machine's other address, in vain.
    joins = {"RAY_ADDRESS": node.address, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    planned = cvrunner("plan", "--config", tiny_config(tmp_path), folder=tmp_path, **joins)
    assert planned.returncode == 0, planned.stderr
    assert "the cluster: 32 GPUs" in planned.stdout
    assert "Memory is host memory" in planned.stdout
    assert planned.stdout.rstrip().endswith("on 32 GPUs")
