"""`sync` rebuilds a run in MLflow from its files, and twice is once."""

from __future__ import annotations

import base64
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from filelock import FileLock

from cvrunner.cli import main
from cvrunner.report.write import write_report
from tests.runs import make_run
from tests.tracking.test_tracking import runs_by_role, steps


def sync(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["sync", *map(str, arguments)])
    return ended.value.code or 0


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A run with its report, to be copied."""
    directory = make_run(tmp_path_factory.mktemp("reported"), folds=2, epochs=3)
    write_report(directory)
    return directory


@pytest.fixture
def directory(reported, tmp_path):
    return type(reported)(shutil.copytree(reported.path, tmp_path / reported.name))


def contents(uri):
    """What the store holds that a second writing could double or change."""
    return {
        run.info.run_name: (role, run.info.status, run.data.metrics, run.data.params, _curve(uri, role, run))
        for role, runs in runs_by_role(uri).items()
        for run in runs
    }


def _curve(uri, role, run):
    metric = {"parent": "val_mean/ccc_avg", "trial": "train/loss", "comparison": "delta/unfrozen_avg"}[role]
    return steps(uri, run, metric)


def test_the_run_is_written_from_its_files_and_nothing_twice(directory, tmp_path, capsys):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert sync(directory.path) == 0
    first = contents(uri)
    assert sorted(role for role, *_ in first.values()) == ["comparison", "parent", "parent"] + ["trial"] * 4
    assert {status for _, status, *_ in first.values()} == {"FINISHED"}
    assert first["unfrozen/fold-2/seed-0"][-1] == [1, 2, 3]
    assert sync(directory.path) == 0
    assert contents(uri) == first
    printed = capsys.readouterr().out
    links = directory.read_run().links
    assert links
    for link in links.values():
        assert link in printed
        assert link.replace("&", "&amp;") in directory.report.read_text()


def test_a_store_rebuilt_elsewhere_holds_the_same_and_the_report_leads_to_it(directory, tmp_path):
    sync(directory.path)
    before = directory.read_run().links
    elsewhere = f"sqlite:///{tmp_path}/elsewhere/mlflow.db"
    (tmp_path / "elsewhere").mkdir()
    assert sync(directory.path, "--uri", elsewhere) == 0
    assert contents(elsewhere) == contents(f"sqlite:///{tmp_path}/mlflow.db")
    after = directory.read_run().links
    assert set(after) == set(before)
    assert after != before
    assert after["conditions side by side"].replace("&", "&amp;") in directory.report.read_text()


def test_what_a_dead_driver_left_running_is_closed(directory, tmp_path):
    run = directory.read_run()
    name = "unfrozen/fold-2/seed-0"
    directory.trial("unfrozen", 2, 0).result_file.unlink()
    running = run.trials[name].model_copy(update={"status": "RUNNING"})
    directory.write_run(run.model_copy(update={"status": "RUNNING", "trials": run.trials | {name: running}}))
    sync(directory.path)
    found = contents(f"sqlite:///{tmp_path}/mlflow.db")
    assert found[name][1] == "KILLED"
    assert directory.read_run().status == "INTERRUPTED"
    assert "RUNNING" not in {status for _, status, *_ in found.values()}


def test_a_run_that_is_training_is_left_alone(directory, capsys):
    with FileLock(directory.path / ".lock"):
        assert sync(directory.path) == 2
    assert "another process is working on this run; its driver writes it to MLflow" in capsys.readouterr().err


def test_a_server_that_is_away_is_said_in_one_line(directory, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert sync(directory.path, "--uri", "http://127.0.0.1:9") == 2
    error = capsys.readouterr().err
    assert "MLflow (http://127.0.0.1:9) cannot be written" in error
    assert "Traceback" not in error


def test_a_server_with_a_login_gets_it_from_the_environment_and_asks_for_it_otherwise(directory, monkeypatch, capsys):
    logins = []

    class WantsLogin(BaseHTTPRequestHandler):
        def do_GET(self):
            logins.append(self.headers.get("Authorization"))
            self.send_response(403 if logins[-1] else 401)
            self.end_headers()

        def log_message(self, *_): ...

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with ThreadingHTTPServer(("127.0.0.1", 0), WantsLogin) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        assert sync(directory.path, "--uri", uri) == 2
        assert "MLFLOW_TRACKING_USERNAME" in capsys.readouterr().err
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
        assert sync(directory.path, "--uri", uri) == 2
        assert "secret" not in capsys.readouterr().err
        server.shutdown()
    assert logins == [None, "Basic " + base64.b64encode(b"me:secret").decode()]
