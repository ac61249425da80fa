"""`ui` finds the store of a run wherever it is, serves it on this machine only, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.error import URLError

import pytest
from rich.console import Console

from cvrunner.errors import ResultsError, UsageError
from cvrunner.run.ui import find_store, served, ui
from cvrunner.tracking.mirror import sync_run
from cvrunner.tracking.names import UI_ADDRESS
from tests.runs import make_run, write_config


@pytest.fixture(scope="module")
def synced(tmp_path_factory):
    """A run in a results folder of its own, with its store."""
    directory = make_run(tmp_path_factory.mktemp("elsewhere"), folds=2, epochs=2)
    links = sync_run(directory, f"sqlite:///{directory.path.parent}/mlflow.db", UI_ADDRESS)
    directory.write_run(directory.read_run().model_copy(update={"links": links}))
    return directory


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@pytest.mark.timeout(180)
def test_the_printed_links_open_at_the_chosen_port_and_kill_ends_the_server(synced, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "cvrunner", "ui", str(synced.path), "--port", str(port)]
    env = {**os.environ, "COLUMNS": "500"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=env) as process:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(2 + len(synced.read_run().links))]
        assert f"http://127.0.0.1:{port} for sqlite:///{synced.path.parent}/mlflow.db" in lines[0]
        assert sum(f"http://127.0.0.1:{port}/#/" in line for line in lines[2:]) == len(lines) - 2
        run_id = (
            synced.read_run().links["difference with intervals, report, predictions"].split("/runs/")[1].split("/")[0]
        )
        address = f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/get?run_id={run_id}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert json.load(answer)["run"]["info"]["status"] == "FINISHED"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    with pytest.raises(URLError):
        urllib.request.urlopen(address, timeout=5)
    assert list(tmp_path.iterdir()) == []


def test_a_results_folder_stands_for_its_newest_run_and_a_name_for_the_run_in_results(synced, tmp_path, monkeypatch):
    store = f"sqlite:///{synced.path.parent}/mlflow.db"
    assert find_store(synced.path)[1] == store
    directory, found = find_store(synced.path.parent)
    assert (directory.path, found) == (synced.path, store)
    (tmp_path / "results").symlink_to(synced.path.parent)
    monkeypatch.chdir(tmp_path)
    for chosen in (None, Path(synced.name)):
        assert find_store(chosen)[1] == f"sqlite:///{tmp_path}/results/mlflow.db"


def test_a_database_without_runs_is_served_and_a_folder_without_both_is_refused(tmp_path):
    (tmp_path / "mlflow.db").touch()
    assert find_store(tmp_path) == (None, f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "mlflow.db").unlink()
    with pytest.raises(ResultsError, match="no run here"):
        find_store(tmp_path)


def test_a_run_that_is_on_a_server_gets_its_links_and_no_second_server(synced, tmp_path, capsys):
    shutil.copytree(synced.path, tmp_path / synced.name)
    directory = type(synced)(tmp_path / synced.name)
    config = directory.read_config()
    tracking = config.tracking.model_copy(update={"uri": "https://mlflow.example"})
    write_config(directory, config.model_copy(update={"tracking": tracking}))
    assert ui(directory.path, 5000, Console(soft_wrap=True)) == 0
    assert "https://mlflow.example serves its own pages" in capsys.readouterr().out


def test_what_cannot_be_served_is_refused_with_the_remedy(synced, tmp_path):
    shutil.copytree(synced.path, tmp_path / synced.name)
    with pytest.raises(ResultsError, match=f"cvrunner sync {tmp_path}"):
        ui(tmp_path / synced.name, 5000, Console())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}: .* such as --port {port + 1}"), served("sqlite://", port):
            pass
