"""run.json: which run a command continues, and what it says of attempts."""

from __future__ import annotations

import json
from pathlib import Path

from cvrunner.orchestration.failures import Decision, Failure
from cvrunner.records.results import WorkerStarted
from cvrunner.records.run_directory import RunDirectory
from cvrunner.run.store import RunStore, choose_folder
from tests.runs import make_run
from tests.trials import pick, tiny_trials


def test_the_newest_run_is_the_one_with_the_highest_number_whatever_the_clock_said(tmp_path: Path) -> None:
    dates = {"demo-made-up-": "2026-01-03", "demo-made-up--2": "2026-01-02", "demo-made-up--10": "1970-01-01"}
    for name, date in dates.items():
        make_run(tmp_path, name, started_at=f"{date}T00:00:00+00:00")
    found = choose_folder(tmp_path, "demo", "made-up-run-key", "run.json", new=False)
    assert found == (tmp_path / "demo-made-up--10", False)
    free = choose_folder(tmp_path, "demo", "made-up-run-key", "run.json", new=True)
    assert free == (tmp_path / "demo-made-up--3", True)


def test_failures_are_counted_by_kind_and_the_node_is_kept(tmp_path: Path) -> None:
    trial = pick(tiny_trials(tmp_path), "frozen")
    directory = make_run(tmp_path / "results")
    store = RunStore(directory, directory.read_run())
    for kind in ("worker_died", "preempted", "worker_died"):
        store.attempt(trial, 1)
        store.event(trial, WorkerStarted(host="a", node="n1", pid=1))
        store.failed(trial, Failure(kind, "gone"), Decision.RETRY)
    state = json.loads((directory.path / "run.json").read_text())["trials"][trial.name]
    assert state["failures"] == {"worker_died": 2, "preempted": 1}
    assert (state["status"], state["node"], state["error"]) == ("WAITING", "n1", "gone")


def test_a_checkpoint_that_a_kill_left_beside_a_result_is_dropped_when_the_run_goes_on(tmp_path: Path) -> None:
    directory: RunDirectory = make_run(tmp_path)
    left = directory.trial("frozen", 1, 0).checkpoint / "0003-000000"
    left.mkdir(parents=True)
    RunStore(directory, directory.read_run()).begin()
    assert not left.parent.exists()
