"""The GPUs that a plan is for: given, of this machine, or of a cluster simulated by nodes of 8 logical GPUs."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cvrunner.config.sections import ClusterConfig
from cvrunner.errors import ClusterError, UsageError
from cvrunner.orchestration import resources
from cvrunner.orchestration.machine import Gpu, available_cores, available_memory, visible_gpus
from cvrunner.orchestration.resources import Resources, device_type, found_resources, possible_resources

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from cvrunner.orchestration.ray_executor import LOOK_EVERY_S, RayExecutor  # noqa: E402
from tests.end_to_end.programs import cvrunner, tiny_config  # noqa: E402

GPU = Gpu("NVIDIA GeForce RTX 4090", 3.0, 24564.0, 0, {}, "GPU-8f2c")


def test_a_node_of_8_and_four_such_nodes_are_compared_with_what_exists() -> None:
    found = possible_resources(ClusterConfig(), 2, {})
    assert [(one.nodes, one.gpus, one.slots) for one in found] == [(1, 2, 2), (1, 8, 8), (4, 32, 32)]
    assert [one.gpus for one in possible_resources(ClusterConfig(), 8, {})] == [8, 32]


def test_without_ray_and_without_gpus_there_is_a_logical_one_for_each_share_of_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resources, "available_cores", lambda: 8)
    monkeypatch.setattr(resources, "find_gpus", lambda: ())
    assert found_resources(ClusterConfig(cpus_per_trial=3), {}) == Resources("this machine, logical", 1, 2, 2)
    monkeypatch.setattr(resources, "find_gpus", lambda: (GPU,) * 4)
    assert found_resources(ClusterConfig(), {}) == Resources("this machine", 1, 4, 4)


def test_what_cannot_be_planned_for_is_refused() -> None:
    with pytest.raises(UsageError, match="--gpus 0: must be 1 or more"):
        possible_resources(ClusterConfig(), 0, {})
    with pytest.raises(ClusterError, match=r"RAY_ADDRESS 127\.0\.0\.1:9: nobody answers .* or give --gpus N"):
        possible_resources(ClusterConfig(), None, {"RAY_ADDRESS": "127.0.0.1:9"})
    with pytest.raises(ClusterError, match="needs 1 GPU and 99999 CPU"):
        found_resources(ClusterConfig(cpus_per_trial=99999), {})


@pytest.mark.parametrize(
    ("value", "visible"),
    [(None, "abc"), ("", ""), ("-1", ""), ("2,0", "ca"), ("1,-1,2", "b"), ("0,7,1", "a"), ("GPU-b,GPU-c1", "bc")],
)
def test_the_gpus_that_cuda_may_use_follow_its_variable(value: str | None, visible: str) -> None:
    gpus = [replace(GPU, uuid=f"GPU-{name}1") for name in "abc"]
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert [gpu.uuid[4] for gpu in visible_gpus(gpus, environment)] == list(visible)


@pytest.mark.parametrize(
    ("requested", "gpus", "nodes", "expected"),
    [
        ("auto", (), None, "cpu"),
        ("auto", (GPU,), None, "cuda"),
        ("cpu", (GPU,), None, "cpu"),
        ("cuda", (), None, "cuda"),
        # Eight logical GPUs of `ray start --num-gpus 8`, and eight real ones that the head does not have.
        ("auto", (), [{"CPU": 8.0, "GPU": 8.0}], "cpu"),
        ("auto", (), [{"CPU": 8.0}, {"GPU": 8.0, "accelerator_type:GeForce-RTX-4090": 1.0}], "cuda"),
    ],
)
def test_a_trial_is_for_the_type_of_device_that_the_scheduler_will_give(
    monkeypatch: pytest.MonkeyPatch, requested: Any, gpus: Any, nodes: Any, expected: str
) -> None:
    resources._has_real_gpus.cache_clear()
    monkeypatch.setattr(resources, "find_gpus", lambda: gpus)
    monkeypatch.setattr(resources, "answers", lambda _: True)
    monkeypatch.setattr(resources, "ask_nodes", lambda *_: (nodes, None))
    environment = {} if nodes is None else {"RAY_ADDRESS": "10.0.0.5:6379"}
    assert device_type(requested, environment) == expected
    resources._has_real_gpus.cache_clear()


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({}, 8, 1000),
        ({"cpu.max": "max 100000", "memory.max": "max", "memory.current": "300"}, 8, 1000),
        ({"cpu.max": "250000 100000", "memory.max": "700", "memory.current": "300"}, 2, 400),
        ({"cpu.max": "50000 100000", "memory.max": "200", "memory.current": "300"}, 1, 0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8, 1000),
        (
            {
                "cpu/cpu.cfs_quota_us": "400000",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "900",
                "memory/memory.usage_in_bytes": "100",
            },
            4,
            800,
        ),
    ],
)
def test_the_limits_of_a_container_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int, memory: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert (available_cores(tmp_path), available_memory(1000, tmp_path)) == (cores, memory)


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
