"""A simulated cluster of several nodes: one of them goes away, or they share no disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cvrunner.config.sections import ClusterConfig, RetriesConfig
from cvrunner.orchestration.attempt import InlineExecutor
from cvrunner.orchestration.failures import Decision
from cvrunner.orchestration.scheduler import run_trials
from cvrunner.records.results import EpochRecord, Waiting, WorkerStarted
from cvrunner.records.run_directory import TrialDirectory
from tests.orchestration.test_scheduler import Notes
from tests.training.test_fold_trainer import outcome
from tests.trials import pick, tiny_trials

ray = pytest.importorskip("ray")
from ray._private import ray_logging, worker  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from cvrunner.orchestration import ray_executor  # noqa: E402
from cvrunner.orchestration.ray_executor import RayExecutor  # noqa: E402

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Cluster, list[Any]]]:
    """A head without GPUs, which stays, and two nodes with a logical GPU each."""
    folder = Path(f"/tmp/cvr-{os.getpid()}")  # Ray's sockets lie below it, and their paths may not be long
    cluster = Cluster()
    cluster.add_node(num_cpus=0, include_dashboard=False, temp_dir=str(folder))
    workers = [add_node(cluster) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster, workers
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def add_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, num_gpus=1)


class Watch(Notes):
    """Notes where each attempt ran; calls `on_epoch` with trial and epoch."""

    def __init__(self, on_epoch: Any = lambda *_: None) -> None:
        super().__init__()
        self.places: dict[str, list[str]] = {}
        self.waiting: list[str] = []
        self.on_epoch = on_epoch

    def event(self, trial: Any, event: Any) -> None:
        super().event(trial, event)
        if isinstance(event, WorkerStarted):
            self.places.setdefault(trial.name, []).append(event.node)
        if isinstance(event, Waiting):
            self.waiting.append(event.what)
        if isinstance(event, EpochRecord):
            self.on_epoch(trial, event.epoch)


@pytest.mark.suites("ci", "all")
def test_the_trials_of_a_lost_node_continue_elsewhere_and_end_bit_identical(
    tmp_path: Path, nodes: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another test may have imported Ray before its environment was set.
    allow, skip = (os.environ[f"RAY_DEDUP_LOGS_{name}_REGEX"] for name in ("ALLOW", "SKIP"))
    monkeypatch.setattr(ray_logging, "RAY_DEDUP_LOGS", True)
    monkeypatch.setattr(worker, "stdout_deduplicator", ray_logging.LogDeduplicator(5, allow, skip))
    cluster, workers = nodes
    trials = [t for t in tiny_trials(tmp_path, train={"epochs": 12}) if t.condition == "unfrozen"][:2]
    executor = RayExecutor("nodes", ClusterConfig(), tmp_path / "cache", len(trials))
    assert executor.slots == 2
    lost: list[str] = []

    def lose(trial: Any, epoch: int) -> None:
        if epoch == 2 and not lost:
            node = next(n for n in workers if n.node_id == watch.places[trial.name][0])
            lost.append(trial.name)
            cluster.remove_node(node, allow_graceful=False)

    watch = Watch(lose)
    run_trials(trials, lambda t: TrialDirectory(tmp_path / "lost" / t.name), executor, [watch], RetriesConfig())
    executor.close()
    # Observers report the loss, in a line for each trial; Ray adds none.
    assert "(raylet)" not in capsys.readouterr().out
    # Until Ray calls the node dead it may give it the next actor too.
    assert set(watch.failures) == {(lost[0], "preempted", Decision.RETRY)}
    assert len(set(watch.places[lost[0]])) == 2
    for trial in trials:
        inline = InlineExecutor(tmp_path / "cache")
        run_trials([trial], lambda t: TrialDirectory(tmp_path / "whole" / t.name), inline, [], RetriesConfig())
        assert outcome(tmp_path, trial, "lost") == outcome(tmp_path, trial, "whole")


@pytest.mark.suites("all")
def test_with_no_node_left_it_reports_what_it_waits_for_and_continues_with_the_next_node(
    tmp_path: Path, nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "PATIENCE_S", 3.0)
    cluster, workers = nodes
    trial = pick(tiny_trials(tmp_path, train={"epochs": 30}), "unfrozen")
    executor = RayExecutor("wait", ClusterConfig(), tmp_path / "cache", 1)

    def lose_all(trial: Any, epoch: int) -> None:
        if epoch == 1:
            for node in workers:
                cluster.remove_node(node, allow_graceful=False)

    class Mend(Watch):
        def event(self, trial: Any, event: Any) -> None:
            super().event(trial, event)
            if isinstance(event, Waiting):
                add_node(cluster)

    watch = Mend(lose_all)
    run_trials([trial], lambda t: TrialDirectory(tmp_path / "run" / t.name), executor, [watch], RetriesConfig())
    executor.close()
    # Ray takes a while to call the nodes dead, so the counts are not checked here.
    assert watch.waiting
    assert watch.waiting[0].startswith("1 GPU and 1 CPU on one node: of the cluster's")
    assert {kind for _, kind, _ in watch.failures} == {"preempted"}
    assert TrialDirectory(tmp_path / "run" / trial.name).result(trial.key) is not None


@pytest.mark.suites("all")
def test_nodes_that_share_no_disk_bring_their_results_home(tmp_path: Path, nodes: Any) -> None:
    trials = [t for t in tiny_trials(tmp_path) if not t.config.adaptation.trains_encoder]
    settings = ClusterConfig(node_dir=str(tmp_path / "node"))
    executor = RayExecutor("home", settings, tmp_path / "cache", len(trials))
    watch = Watch()
    run_trials(trials, lambda t: TrialDirectory(tmp_path / "run" / t.name), executor, [watch], RetriesConfig())
    executor.close()
    assert {place for places in watch.places.values() for place in places} == {n.node_id for n in nodes[1]}
    for trial in trials:
        home, there = TrialDirectory(tmp_path / "run" / trial.name), TrialDirectory(tmp_path / "node/home" / trial.name)
        assert home.result(trial.key) == there.result(trial.key) is not None
        assert [p.read_bytes() for p in home.kept] == [p.read_bytes() for p in there.kept]
