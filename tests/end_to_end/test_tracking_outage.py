"""A tracking server that is killed, slow or read-only during a run: training continues, and nothing is missing or twice
in the end."""

from __future__ import annotations

import http.server
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cvrunner.records.run_directory import RunDirectory
from cvrunner.report.report import read_epochs, read_report
from cvrunner.tracking import tracker as tracker_module
from cvrunner.tracking.mirror import sync_run
from cvrunner.tracking.tracker import RunTracker
from tests.end_to_end.programs import environment, free_ports, started, wait_until
from tests.runs import make_run
from tests.tracking.test_tracking import runs_by_role, steps

pytestmark = [pytest.mark.end_to_end, pytest.mark.filterwarnings("ignore")]
EPOCHS = 3


def server(folder: Path, port: int) -> list[str]:
    """A real MLflow server over a database in `folder`."""
    mlflow = str(Path(sys.executable).parent / "mlflow")
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
    return [mlflow, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *store]


def answers(port: int) -> bool:
    import requests

    try:
        return bool(requests.get(f"http://127.0.0.1:{port}/health", timeout=1).ok)
    except requests.RequestException:
        return False


def report(tracker: RunTracker, directory: RunDirectory, after_first_epoch: Any = None) -> None:
    """Report a run as the driver does."""
    run = directory.read_run()
    trials: Any = {name: SimpleNamespace(name=name) for name in run.trials}
    tracker.start(run, directory.read_config(), directory)
    for trial in trials.values():
        tracker.attempt(trial, 1)
    for epoch in range(EPOCHS):
        for name, state in run.trials.items():
            tracker.event(trials[name], read_epochs(directory, state.condition, state.fold, state.seed)[epoch])
        if epoch == 0 and after_first_epoch:
            assert tracker.wait(60)
            after_first_epoch()
    for name, result in directory.results(run).items():
        tracker.event(trials[name], result)


def whole(uri: str) -> None:
    """Every run is there once, ended, with each epoch once."""
    found = runs_by_role(uri)
    assert {role: len(runs) for role, runs in found.items()} == {"parent": 2, "trial": 4, "comparison": 1}
    assert {run.info.status for runs in found.values() for run in runs} == {"FINISHED"}
    for trial in found["trial"]:
        assert steps(uri, trial, "train/loss") == [1, 2, 3]
        assert len(steps(uri, trial, "test/ccc_avg")) == 1


@pytest.mark.suites("ci", "all")
def test_a_server_that_is_killed_is_filled_up_when_it_is_back(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "results", folds=2, epochs=EPOCHS)
    (port,) = free_ports(1)
    uri, warnings = f"http://127.0.0.1:{port}", []
    tracker = RunTracker(uri, warnings.append)
    with started(server(tmp_path, port), tmp_path, environment(tmp_path), tmp_path / "server.log") as process:
        wait_until(lambda: answers(port), "the server")

        def kill() -> None:
            os.killpg(process.pid, signal.SIGKILL)
            wait_until(lambda: not answers(port), "its end")

        report(tracker, directory, kill)
    tracker.finish(read_report(directory), "COMPLETE")
    assert [w.split(": ")[0] for w in warnings] == [f"MLflow ({uri})"] * 2
    with started(server(tmp_path, port), tmp_path, environment(tmp_path), tmp_path / "server.log"):
        wait_until(lambda: answers(port), "the server")
        sync_run(directory, uri)
        sync_run(directory, uri)
        whole(uri)


def test_after_a_while_it_tries_again_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "QUIET_S", 0.0)
    directory = make_run(tmp_path / "results", folds=2, epochs=EPOCHS)
    uri, warnings = f"sqlite:///{tmp_path}/mlflow.db", []
    # The start, four attempts and an epoch succeed; three epochs do not, nor do the ends of two trials.
    away = iter([False] * 6 + [True] * 3 + [False] * 8 + [True] * 2)
    tracker = RunTracker(uri, warnings.append, lambda: next(away, False))
    report(tracker, directory)
    tracker.finish(read_report(directory), "COMPLETE")
    assert len(warnings) == 2
    whole(uri)


@pytest.fixture
def set_read_only() -> Iterator[Any]:
    """Permissions do not bind root, so SQLite itself is set, whenever a connection is taken from a pool."""
    import sqlalchemy

    state = {"query_only": "off"}

    def tell_sqlite(connection: Any, *_: Any) -> None:
        connection.execute(f"pragma query_only = {state['query_only']}")

    sqlalchemy.event.listen(sqlalchemy.pool.Pool, "checkout", tell_sqlite)
    yield lambda on: state.update(query_only="on" if on else "off")
    state["query_only"] = "off"
    sqlalchemy.event.remove(sqlalchemy.pool.Pool, "checkout", tell_sqlite)


def test_a_database_that_turns_read_only_loses_nothing(tmp_path: Path, set_read_only: Any) -> None:
    directory = make_run(tmp_path / "results", folds=2, epochs=EPOCHS)
    uri, warnings = f"sqlite:///{tmp_path}/mlflow.db", []
    tracker = RunTracker(uri, warnings.append)
    report(tracker, directory, lambda: set_read_only(True))
    tracker.finish(read_report(directory), "COMPLETE")
    assert warnings
    assert "readonly database" in warnings[0]
    set_read_only(False)
    sync_run(directory, uri)
    whole(uri)


class Stuck(http.server.BaseHTTPRequestHandler):
    """Answers nothing until the test is over."""

    over = threading.Event()

    def _answer(self) -> None:
        self.over.wait(60)

    do_GET = do_POST = do_PATCH = _answer  # noqa: N815 (names of the base class)

    def log_message(self, *_: Any) -> None: ...


def test_a_server_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "STOP_S", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    directory = make_run(tmp_path / "results", folds=2, epochs=EPOCHS)
    warnings: list[str] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stuck) as stuck:
        stuck.daemon_threads = True
        threading.Thread(target=stuck.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{stuck.server_port}"
        tracker = RunTracker(uri, warnings.append)
        report(tracker, directory)
        tracker.finish(read_report(directory), "STOPPED")
        assert warnings == ["MLflow took longer than 0.5 s; `cvrunner sync RUN` writes what is missing"]
        assert tracker.links() == {}
        assert not Stuck.over.is_set()  # all of that went by while the first request was still waiting
        Stuck.over.set()
        stuck.shutdown()
