"""SIGKILL of trials, the driver or both at random moments: the same command finishes with the same bits."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
from pathlib import Path
from typing import Literal

import psutil
import pytest

from cvrunner.data.utterance import natural_order
from cvrunner.records.run_directory import RunDirectory
from tests.end_to_end.programs import FinishedRun, command, cvrunner, environment, started, tiny_config, wait_until
from tests.runs import numbers

pytestmark = [pytest.mark.end_to_end, pytest.mark.cluster, pytest.mark.timeout(3600)]
KILLS = {"ci": 1, "all": 20}
Victim = Literal["trial", "driver", "both", "raylet"]
VICTIMS: tuple[Victim, ...] = ("both", "trial", "driver", "raylet")


def trials_of(driver: int) -> list[psutil.Process]:
    """The processes below the driver's that train; Ray puts what they do into their names."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(driver).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and ("fold-trainer" in title or "/fold-" in title):
                    found.append(process)
    return found


def kill(driver: subprocess.Popen[bytes], victim: Victim, draw: random.Random) -> str:
    """Kill `victim` and return what was killed."""
    trials = trials_of(driver.pid)
    killed = []
    if victim in ("trial", "both") and trials:
        one = draw.choice(trials)
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
            killed.append("a trial")
    if victim == "raylet":
        for process in psutil.Process(driver.pid).children():
            if process.name() == "raylet":
                process.kill()
                killed.append("Ray's own process")
    if victim in ("driver", "both"):
        os.kill(driver.pid, signal.SIGKILL)
        killed.append("the driver")
    return " and ".join(killed) or "nothing"


@pytest.mark.suites("ci", "all")
def test_killed_at_random_moments_the_same_command_finishes_bit_identical(
    whole: tuple[Path, Path, object], tmp_path: Path, suite: str
) -> None:
    """Kill and run again until there were enough kills; every run that finishes has the numbers of `whole`."""
    folder, config, expected = whole
    kills = KILLS[suite]
    seed = random.SystemRandom().randrange(10**6)
    draw, root = random.Random(seed), tmp_path / "results"
    program = command("all-folds", "--config", config, "--set", f"results.root={root}")
    killed: list[str] = []
    more: list[str] = []
    while True:
        with started([*program, *more], tmp_path, environment(folder), tmp_path / "log") as driver:
            if len(killed) < kills:
                wait_until(lambda: bool(trials_of(driver.pid)) or driver.poll() is not None, "the first trial")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    driver.wait(draw.uniform(0, 10))
                if driver.poll() is None:
                    killed.append(kill(driver, VICTIMS[len(killed) % len(VICTIMS)], draw))
            code = driver.wait(400)
        history = f"seed {seed}, killed {killed}: {(tmp_path / 'log').read_text()[-3000:]}"
        more = []
        if code == 1:
            assert "Ray has died on this node" in history
        elif code != -signal.SIGKILL:
            assert code == 0, history
            assert numbers(latest(root)) == expected, history
            assert latest(root).read_run().status == "COMPLETE"
            more = ["--new"]
            if len(killed) == kills:
                return


def latest(root: Path) -> RunDirectory:
    return RunDirectory(max(root.glob("*/run.json"), key=lambda p: natural_order(p.parent.name)).parent)


@pytest.fixture(scope="module")
def whole(
    suite: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, Path, object]:
    """An uninterrupted run: home folder, configuration, and all its numbers. In `all` its trials are longer."""
    if suite == "ci":
        shared: FinishedRun = request.getfixturevalue("finished")
        return shared.folder, shared.config, numbers(shared.directory)
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_config(folder, epochs=6)
    done = cvrunner("all-folds", "--config", config, folder=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = (folder / "results").glob("*/run.json")
    return folder, config, numbers(RunDirectory(path.parent))


@pytest.mark.suites("all")
def test_with_chaos_a_run_ends_complete_and_sync_fills_what_the_tracker_missed(
    whole: tuple[Path, Path, object], tmp_path: Path
) -> None:
    folder, config, expected = whole
    chaos = ("--chaos", "kill=0.1,tracker=0.1")
    root = ("--set", f"results.root={tmp_path / 'results'}")
    finished = cvrunner("all-folds", "--config", config, *root, *chaos, folder=tmp_path, HOME=str(folder))
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    (path,) = (tmp_path / "results").glob("*/run.json")
    directory = RunDirectory(path.parent)
    assert numbers(directory) == expected
    synced = cvrunner("sync", directory.path, folder=tmp_path)
    assert synced.returncode == 0, synced.stderr
    assert mlflow_statuses(tmp_path / "results" / "mlflow.db") == {"FINISHED": 13}


def mlflow_statuses(database: Path) -> dict[str, int]:
    """Number of runs by status: ten trials, two conditions and a comparison."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return dict(connection.execute("select status, count(*) from runs group by status").fetchall())
