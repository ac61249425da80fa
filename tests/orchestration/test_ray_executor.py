"""On a real Ray with logical GPUs: the same numbers as without, one GPU each, and a lost process is only a delay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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
from cvrunner.orchestration.trials import plan_probes
from cvrunner.records.results import EpochRecord, TrialResult, WorkerStarted
from cvrunner.records.run_directory import TrialDirectory, read_events
from tests.orchestration.test_scheduler import Notes
from tests.training.test_fold_trainer import outcome
from tests.training.test_linear_probe import outcome as probe_outcome
from tests.trials import tiny_trials

ray = pytest.importorskip("ray")
from cvrunner.orchestration import ray_executor  # noqa: E402
from cvrunner.orchestration.ray_executor import RayExecutor  # noqa: E402

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]


def run_all(folder: Path, name: str, executor: Any, trials: list[Any]) -> Notes:
    notes = Notes()
    run_trials(trials, lambda t: TrialDirectory(folder / name / t.name), executor, [notes], RetriesConfig())
    executor.close()
    return notes


class Recorder(Notes):
    """Notes the names of the actors and the last event of each trial; every GPU must be in use while a trial runs."""

    def __init__(self) -> None:
        super().__init__()
        self.actors: dict[str, str] = {}
        self.last: dict[str, Any] = {}

    def event(self, trial: Any, event: Any) -> None:
        super().event(trial, event)
        self.last[trial.name] = event
        if isinstance(event, EpochRecord):
            assert ray.available_resources().get("GPU", 0) == 0
            actors = ray.util.list_named_actors(all_namespaces=True)
            self.actors |= {actor["name"]: actor["namespace"] for actor in actors}


@pytest.fixture(scope="module")
def on_ray(local_ray: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], Recorder]:
    """Six trials that two actors trained: their folder, the trials, and what was seen."""
    folder = tmp_path_factory.mktemp("on-ray")
    trials = tiny_trials(folder)
    executor = RayExecutor("names", ClusterConfig(), folder / "cache", len(trials))
    assert executor.slots == 2
    seen = Recorder()
    run_trials(trials, lambda t: TrialDirectory(folder / "ray" / t.name), executor, [seen], RetriesConfig())
    executor.close()
    return folder, trials, seen


def test_trials_on_ray_and_in_this_process_are_bit_identical(on_ray: Any, tmp_path: Path) -> None:
    folder, trials, _ = on_ray
    chosen = [t for t in trials if t.fold.number == 2]
    run_all(folder, "inline", InlineExecutor(tmp_path / "another cache"), chosen)
    for trial in chosen:
        assert outcome(folder, trial, "ray") == outcome(folder, trial, "inline")


def test_a_linear_probe_on_ray_and_in_this_process_is_bit_identical(on_ray: Any, tmp_path: Path) -> None:
    folder, trials, _ = on_ray
    probes: list[Any] = list(plan_probes(trials, "frozen"))
    executor = RayExecutor("probes", ClusterConfig(node_dir=str(tmp_path / "node")), folder / "cache", len(probes))
    notes = run_all(folder, "ray", executor, probes)
    assert [kind for _, kind in notes.events].count("ProbeResult") == len(probes) == 3
    run_all(folder, "inline", InlineExecutor(tmp_path / "another cache"), probes)
    for probe in probes:
        assert probe_outcome(probe, folder, "ray") == probe_outcome(probe, folder, "inline")
    assert not run_all(folder, "ray", InlineExecutor(tmp_path / "none"), probes).failures
    assert not (tmp_path / "none").exists()


def test_each_actor_holds_one_gpu_has_a_readable_name_and_takes_several_trials(on_ray: Any) -> None:
    _, trials, seen = on_ray
    assert seen.actors == {"fold-trainer-1": "names", "fold-trainer-2": "names"}
    assert sum(kind == "TrialResult" for _, kind in seen.events) == len(trials) == 6


def test_results_are_typed_records_on_the_way_back(on_ray: Any) -> None:
    folder, trials, seen = on_ray
    for trial in trials:
        assert isinstance(seen.last[trial.name], TrialResult)
        assert seen.last[trial.name] == TrialDirectory(folder / "ray" / trial.name).result(trial.key)


def test_a_killed_actor_costs_the_epoch_it_was_in(tmp_path: Path, local_ray: Any) -> None:
    trial = next(t for t in tiny_trials(tmp_path, train={"epochs": 12}) if t.name == "unfrozen/fold-1/seed-0")
    executor = RayExecutor("kill", ClusterConfig(), tmp_path / "cache", 1)

    class Kill(Notes):
        pid = 0

        def event(self, trial: Any, event: Any) -> None:
            super().event(trial, event)
            if isinstance(event, WorkerStarted):
                self.pid = event.pid
            if isinstance(event, EpochRecord) and event.epoch == 2 and not self.failures:
                os.kill(self.pid, signal.SIGKILL)

    notes = Kill()
    run_trials([trial], lambda t: TrialDirectory(tmp_path / "killed" / t.name), executor, [notes], RetriesConfig())
    executor.close()
    run_all(tmp_path, "whole", InlineExecutor(tmp_path / "cache"), [trial])
    assert outcome(tmp_path, trial, "killed") == outcome(tmp_path, trial, "whole")
    assert notes.failures == [(trial.name, "worker_died", Decision.RETRY)]
    assert notes.attempts == [(trial.name, 1), (trial.name, 2)]


def test_told_to_stop_trials_save_and_end(tmp_path: Path, local_ray: Any) -> None:
    trial = next(t for t in tiny_trials(tmp_path, train={"epochs": 200}) if t.config.adaptation.trains_encoder)
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
    assert list(read_events(tmp_path / "run" / trial.name / "journal.jsonl", "stopped"))


def test_a_paused_trial_resumes_on_the_same_actor_and_nothing_changes(tmp_path: Path, local_ray: Any) -> None:
    trials = [t for t in tiny_trials(tmp_path, train={"epochs": 6}) if t.config.adaptation.trains_encoder][:2]
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
    assert notes.failures == [(trials[0].name, "stopped", Decision.PAUSE)]
    assert [name for name, _ in notes.attempts] == [trials[0].name, trials[1].name, trials[0].name]


def two_runs(folder: Path) -> tuple[RayExecutor, RayExecutor, Any]:
    """Return an executor that holds both GPUs, for a short and an endless trial, one that holds none, and the short
    trial."""
    short, long = (tiny_trials(folder, train={"epochs": epochs})[0] for epochs in (1, 5000))
    mine, theirs = (RayExecutor(name, ClusterConfig(), folder / "cache", 2) for name in ("mine", "theirs"))
    # One after the other: the short one must not end before the endless one has its GPU.
    for trial, name in ((long, "long"), (short, "short")):
        mine.start(trial, TrialDirectory(folder / name))
        while not all(attempt.placed for attempt in mine.attempts):
            mine.poll(0.1)
    return mine, theirs, short


def test_a_run_without_a_trial_left_for_a_gpu_gives_it_up_and_does_not_take_it_back(
    tmp_path: Path, local_ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "RELEASE_S", 0.5)
    mine, theirs, short = two_runs(tmp_path)
    while mine.slots == 2:
        mine.poll(0.1)
    theirs.start(short, TrialDirectory(tmp_path / "theirs"))
    while theirs.attempts:
        theirs.poll(0.1)
        mine.poll(0.1)
    # Its last trial has trained all the while.
    assert [attempt.placed for attempt in mine.attempts] == [True]
    assert (mine.slots, theirs.slots) == (1, 2)
    for executor in (mine, theirs):
        executor.close()


def test_at_the_end_of_a_trial_a_run_with_more_than_its_share_gives_the_gpu_to_a_run_that_waits(
    tmp_path: Path, local_ray: Any
) -> None:
    mine, theirs, short = two_runs(tmp_path)
    theirs.start(short, TrialDirectory(tmp_path / "theirs"))
    while len(mine.attempts) == 2:
        mine.poll(0.1)
    mine.start(short, TrialDirectory(tmp_path / "next"))
    events: list[Any] = []
    while not any(isinstance(event, TrialResult) for event in events):
        events += [event for _, event in theirs.poll(0.1)]
        mine.poll(0.1)
    assert [attempt.placed for attempt in mine.attempts] == [True, False]
    # The other run, which has no more than its share, keeps its actor for its next trial; then mine continues.
    theirs.start(short, TrialDirectory(tmp_path / "theirs again"))
    while theirs.attempts:
        theirs.poll(0.1)
        mine.poll(0.1)
    assert theirs.made == 1
    assert [attempt.placed for attempt in mine.attempts] == [True, False]
    theirs.close()
    while len(mine.attempts) == 2:
        mine.poll(0.1)
    assert (mine.made, mine.slots) == (3, 2)
    mine.close()


def test_an_actor_is_kept_while_trials_follow_however_long_ago_its_last_one_ended(
    tmp_path: Path, local_ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "RELEASE_S", 0.0)
    trials = [t for t in tiny_trials(tmp_path) if not t.config.adaptation.trains_encoder]
    executor = RayExecutor("kept", ClusterConfig(max_concurrent=1), tmp_path / "cache", len(trials))
    run_trials(trials, lambda t: TrialDirectory(tmp_path / "run" / t.name), executor, [], RetriesConfig())
    assert (executor.made, len(trials)) == (1, 3)
    executor.close()


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


@pytest.mark.parametrize(("level", "dumps"), [("WARNING", 0), ("INFO", 3)])
def test_what_ray_prints_about_a_lost_node_or_process_is_shown_only_with_v(level: str, dumps: int) -> None:
    code = f"""if True:
        import logging
        logging.basicConfig(level="{level}")
        import cvrunner.orchestration.ray_executor
        from ray._private.worker import print_to_stdstream
        for line in (
            "Raylet is terminated. Termination is unexpected.\\n    [state-dump] DebugString() time ms: 0",
            "The node with node id: 1 and address: 127.0.0.1 has been marked dead",
            "A worker died or was killed while executing a task by an unexpected system error.\\nNode ID: 1",
            "epoch 1",
            "epoch 2",
        ):
            print_to_stdstream(dict(lines=[line], pid="raylet", is_err=False), False)"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert shown.count("(raylet)") == dumps + 2
    assert shown.endswith("(raylet) epoch 1\n(raylet) epoch 2\n")


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
