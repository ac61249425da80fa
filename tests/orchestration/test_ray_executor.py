"""On a real Ray with logical GPUs: the same numbers as without, one GPU each, and a lost process is only a delay."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cvrunner.config.sections import ClusterConfig, RetriesConfig
from cvrunner.errors import ClusterError
from cvrunner.orchestration.attempt import InlineExecutor
from cvrunner.orchestration.failures import Decision, Failure
from cvrunner.orchestration.preemption import Preemption
from cvrunner.orchestration.resources import capacity
from cvrunner.orchestration.scheduler import run_trials
from cvrunner.records import journal
from cvrunner.records.results import EpochRecord, TrialResult
from cvrunner.records.run_directory import TrialDirectory
from tests.orchestration.test_scheduler import Notes
from tests.training.test_fold_trainer import outcome
from tests.trials import tiny_trials

ray = pytest.importorskip("ray")
from cvrunner.orchestration.ray_executor import RayExecutor  # noqa: E402

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Ray of this test's own: two logical GPUs, its own ports and temporary folder."""
    yield ray.init(
        address="local",
        num_cpus=2,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        namespace="test",
        _node_ip_address="127.0.0.1",
    )
    ray.shutdown()


def run_all(folder: Path, name: str, executor: Any, trials: list[Any]) -> Notes:
    notes = Notes()
    run_trials(trials, lambda t: TrialDirectory(folder / name / t.name), executor, [notes], RetriesConfig())
    executor.close()
    return notes


def test_trials_on_ray_and_in_this_process_are_bit_identical(tmp_path: Path, local_ray: Any) -> None:
    trials = [t for t in tiny_trials(tmp_path) if t.fold.number == 2]
    cache = tmp_path / "cache"
    run_all(tmp_path, "ray", RayExecutor("run", ClusterConfig(), cache, len(trials)), trials)
    run_all(tmp_path, "inline", InlineExecutor(tmp_path / "another cache"), trials)
    for trial in trials:
        assert outcome(tmp_path, trial, "ray") == outcome(tmp_path, trial, "inline")


def test_each_actor_holds_one_gpu_has_a_readable_name_and_takes_several_trials(tmp_path: Path, local_ray: Any) -> None:
    trials = tiny_trials(tmp_path)
    executor = RayExecutor("names", ClusterConfig(), tmp_path / "cache", len(trials))
    assert executor.slots == 2
    seen: dict[str, Any] = {}

    class Look(Notes):
        def event(self, trial: Any, event: Any) -> None:
            super().event(trial, event)
            if isinstance(event, EpochRecord):
                assert ray.available_resources().get("GPU", 0) == 0
                actors = ray.util.list_named_actors(all_namespaces=True)
                seen.update({a["name"]: a["namespace"] for a in actors})

    notes = Look()
    run_trials(trials, lambda t: TrialDirectory(tmp_path / "run" / t.name), executor, [notes], RetriesConfig())
    executor.close()
    assert seen == {"fold-trainer-1": "names", "fold-trainer-2": "names"}
    assert sum(kind == "TrialResult" for _, kind in notes.events) == len(trials) == 6


def test_a_killed_actor_costs_the_epoch_it_was_in(tmp_path: Path, local_ray: Any) -> None:
    trial = next(t for t in tiny_trials(tmp_path, train={"epochs": 4}) if t.name == "unfrozen/fold-1/seed-0")
    executor = RayExecutor("kill", ClusterConfig(), tmp_path / "cache", 1)

    class Kill(Notes):
        def event(self, trial: Any, event: Any) -> None:
            super().event(trial, event)
            if isinstance(event, EpochRecord) and event.epoch == 2 and not self.failures:
                pid = ray.get(executor.occupied[0].actor.__ray_call__.remote(lambda self: os.getpid()))
                os.kill(pid, signal.SIGKILL)

    notes = Kill()
    run_trials([trial], lambda t: TrialDirectory(tmp_path / "killed" / t.name), executor, [notes], RetriesConfig())
    executor.close()
    run_all(tmp_path, "whole", InlineExecutor(tmp_path / "cache"), [trial])
    assert outcome(tmp_path, trial, "killed") == outcome(tmp_path, trial, "whole")
    if notes.failures:  # the trial may have ended before the signal came
        assert notes.failures == [(trial.name, "worker_died", Decision.RETRY)]
        assert notes.attempts == [(trial.name, 1), (trial.name, 2)]


def test_told_to_stop_trials_save_and_end(tmp_path: Path, local_ray: Any) -> None:
    trial = next(t for t in tiny_trials(tmp_path, train={"epochs": 200}) if not t.frozen)
    executor = RayExecutor("stop", ClusterConfig(), tmp_path / "cache", 1)
    notes = Notes()
    run_trials(
        [trial],
        lambda t: TrialDirectory(tmp_path / "run" / t.name),
        executor,
        [notes],
        RetriesConfig(),
        should_stop=lambda: any(kind == "EpochRecord" for _, kind in notes.events),
    )
    executor.close()
    assert notes.failures == [(trial.name, "stopped", Decision.STOP)]
    saved = list((tmp_path / "run" / trial.name / "checkpoint").glob("0*"))
    assert saved
    assert list(journal.read(tmp_path / "run" / trial.name / "journal.jsonl", "stopped"))


def test_a_paused_trial_resumes_on_the_same_actor_and_nothing_changes(tmp_path: Path, local_ray: Any) -> None:
    trials = [t for t in tiny_trials(tmp_path, train={"epochs": 6}) if not t.frozen][:2]
    executor = RayExecutor("pause", ClusterConfig(max_concurrent=1), tmp_path / "cache", 2)

    class Once(Preemption):
        """Only the first trial pauses, at the end of its first epoch."""

        pending = True

        def should_pause(self, trial: str, running: Any, waiting: Any, asked: Any) -> bool:
            first, self.pending = self.pending, False
            return first

    notes = Notes()
    directory, once = lambda t: TrialDirectory(tmp_path / "paused" / t.name), Once(trials, 1)
    run_trials(trials, directory, executor, [notes], RetriesConfig(), preemption=once)
    assert executor.made == 1
    executor.close()
    run_all(tmp_path, "whole", InlineExecutor(tmp_path / "cache"), trials)
    for trial in trials:
        assert outcome(tmp_path, trial, "paused") == outcome(tmp_path, trial, "whole")
    if notes.failures:  # the trial may have ended before it heard of it
        assert notes.failures == [(trials[0].name, "stopped", Decision.PAUSE)]
        assert [name for name, _ in notes.attempts] == [trials[0].name, trials[1].name, trials[0].name]


def test_an_error_in_a_trial_comes_back_as_what_it_is(tmp_path: Path, local_ray: Any) -> None:
    trial = tiny_trials(tmp_path)[0]
    (tmp_path / "wavlm" / "model.safetensors").write_bytes(b"broken")
    executor = RayExecutor("broken", ClusterConfig(), tmp_path / "cache", 1)
    failures: list[Failure] = []

    class Keep(Notes):
        def failed(self, trial: Any, failure: Failure, decision: Decision) -> None:
            super().failed(trial, failure, decision)
            failures.append(failure)

    run_trials([trial], lambda t: TrialDirectory(tmp_path / "run" / t.name), executor, [Keep()], RetriesConfig())
    executor.close()
    assert [f.kind for f in failures] == ["configuration"]
    assert failures[0].message.startswith("model.encoder")


def test_what_the_cluster_cannot_hold_is_refused_at_once(local_ray: Any) -> None:
    with pytest.raises(ClusterError, match="needs 1 GPU and 64 CPU; the cluster has 2 GPU and 2 CPU"):
        RayExecutor("big", ClusterConfig(cpus_per_trial=64), Path("cache"), 1)


@pytest.mark.parametrize(
    ("gpus", "cpus", "settings", "room"),
    [(8, 64, {}, 8), (8, 4, {}, 4), (1, 8, {"gpus_per_trial": 0.25}, 4), (8, 64, {"cpus_per_trial": 16}, 4)],
)
def test_capacity(gpus: float, cpus: float, settings: dict[str, Any], room: int) -> None:
    assert capacity({"GPU": gpus, "CPU": cpus}, ClusterConfig(**settings)) == room


@pytest.mark.parametrize("resources", [{}, {"CPU": 8.0}, {"GPU": 8.0}, {"GPU": 0.5, "CPU": 1.0}])
def test_no_capacity_is_an_error_that_says_what_there_is(resources: dict[str, float]) -> None:
    with pytest.raises(ClusterError, match="the cluster has"):
        capacity(resources, ClusterConfig())


def test_results_are_typed_records_on_the_way_back(tmp_path: Path, local_ray: Any) -> None:
    trial = next(t for t in tiny_trials(tmp_path) if t.frozen)
    executor = RayExecutor("types", ClusterConfig(), tmp_path / "cache", 1)
    last: list[Any] = []

    class Keep(Notes):
        def event(self, trial: Any, event: Any) -> None:
            last.append(event)

    run_trials([trial], lambda t: TrialDirectory(tmp_path / "run" / t.name), executor, [Keep()], RetriesConfig())
    executor.close()
    assert isinstance(last[-1], TrialResult)
    assert last[-1] == TrialDirectory(tmp_path / "run" / trial.name).result(trial.key)
