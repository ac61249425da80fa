"""A sweep as a user runs it: killed in the middle, the same command gives the table of folds trained one by one."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from cvrunner.config.reading import load_config
from cvrunner.config.sections import RetriesConfig
from cvrunner.orchestration.attempt import InlineExecutor
from cvrunner.orchestration.scheduler import run_trials
from cvrunner.records.results import EpochRecord, TrialResult
from cvrunner.records.run_directory import TrialDirectory, read_events
from cvrunner.run.prepare import prepare
from cvrunner.training.trial import Trial
from cvrunner.tune.settings import Objective, plan_setting
from cvrunner.tune.store import SettingEpoch, SweepDirectory, SweepRecord
from tests.end_to_end.programs import command, cvrunner, environment, started, tiny_config, wait_until
from tests.orchestration.test_scheduler import Notes

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
]
SPACE = "{train.lr: {low: 1e-4, high: 1e-2, scale: log}, model.unfreeze_top_layers: {choices: [null, 1]}}"
SETTINGS = f"tune={{num_samples: 2, folds: [1, 2], epochs: 3, grace_period: 3, search_space: {SPACE}}}"


def sweep_in(folder: Path) -> SweepDirectory | None:
    found = list(folder.glob("results/tiny-tune-*/sweep.json"))
    return SweepDirectory(found[0].parent) if found else None


def epochs_of_first(folder: Path) -> int:
    directory = sweep_in(folder)
    return len(next(iter(directory.read().settings.values())).epochs) if directory else 0


@pytest.mark.suites("all")
def test_a_sweep_that_was_killed_ends_with_the_table_of_one_that_was_not(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    arguments = ("tune", "--config", config, "--set", SETTINGS)
    with started(command(*arguments), tmp_path, environment(tmp_path), tmp_path / "log") as driver:
        wait_until(lambda: epochs_of_first(tmp_path) or driver.poll() is not None, "the first epoch")
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(20)
    directory = sweep_in(tmp_path)
    assert directory is not None, (tmp_path / "log").read_text()
    before = {name: state.epochs for name, state in directory.read().settings.items()}

    finished = cvrunner(*arguments, folder=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    record = directory.read()
    assert record.status == "COMPLETE"
    for name, epochs in before.items():
        assert record.settings[name].epochs[: len(epochs)] == epochs
    assert expected(config, record, tmp_path) == {name: state.epochs for name, state in record.settings.items()}
    nothing_was_repeated(directory, record, len(before["frozen-01"]))
    nothing_of_the_test_parts_is_there(directory)
    in_mlflow(tmp_path / "results" / "mlflow.db")

    for condition in ("frozen", "unfrozen"):
        best = record.best(condition)
        assert best is not None
        as_configured = best == f"{condition}-01"
        assert (f"{condition}: of 2 settings none is better" in finished.stdout) is as_configured
        assert (f"{condition}: {best} is the best of 2" in finished.stdout) is not as_configured
    tuned = load_config(tmp_path / "configs" / directory.tuned.name)
    assert tuned == load_config(directory.tuned)
    for condition in ("frozen", "unfrozen"):
        best = record.best(condition)
        assert best is not None
        assert tuned.for_condition(condition).train.lr == record.settings[best].values["train.lr"]
        assert tuned.for_condition(condition).train.epochs == 2  # the configuration's own
    assert tuned.settings_from.samples_per_condition == {"frozen": 2, "unfrozen": 2}

    again = cvrunner(*arguments, folder=tmp_path)
    assert again.returncode == 0
    assert directory.read().settings == record.settings


@pytest.mark.suites("all")
def test_a_sweep_that_is_stopped_saves_and_says_so(tmp_path: Path) -> None:
    settings = f"tune={{num_samples: 1, folds: [1], epochs: 300, search_space: {SPACE}}}"
    arguments = ("tune", "--config", tiny_config(tmp_path), "--set", settings)
    log = tmp_path / "log"
    with started(command(*arguments), tmp_path, environment(tmp_path), log) as driver:
        wait_until(lambda: epochs_of_first(tmp_path) or driver.poll() is not None, "the first epoch")
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(60) == 143, log.read_text()
    directory = sweep_in(tmp_path)
    assert directory is not None
    assert directory.read().status == "STOPPED"
    assert "stopped; the same command continues" in log.read_text()
    assert list(directory.fold("frozen-01", 1).path.glob("checkpoint/0*"))
    assert not directory.tuned.exists()


def expected(config: Path, record: SweepRecord, folder: Path) -> dict[str, tuple[object, ...]]:
    """The epochs of each setting from its folds trained in this process."""
    experiment = prepare(config, [SETTINGS, f"corpus.root={folder / 'corpus'}"])
    found = {}
    for name, state in record.settings.items():
        trials = plan_setting(
            experiment.config, state.condition, state.values, experiment.corpus, experiment.folds, record.folds
        )
        found[name] = tuple(trained_alone(trials, folder / "alone" / name, folder / "another cache"))
    return found


def trained_alone(trials: list[Trial], folder: Path, cache_dir: Path) -> Iterator[SettingEpoch]:
    objective = Objective([trial.fold.number for trial in trials])

    class Collect(Notes):
        def event(self, trial: Trial, event: object) -> None:
            assert not isinstance(event, TrialResult)
            if isinstance(event, EpochRecord):
                objective.epoch(trial.fold.number, event)

    executor = InlineExecutor(cache_dir)
    run_trials(trials, lambda t: TrialDirectory(folder / t.name), executor, [Collect()], RetriesConfig())
    yield from objective.new_epochs()


def nothing_was_repeated(directory: SweepDirectory, record: SweepRecord, reported: int) -> None:
    """Each epoch of the first setting was trained once; only one that was not saved yet may be repeated."""
    epochs = record.epochs["frozen"]
    for fold in record.folds:
        lines = list(read_events(directory.fold("frozen-01", fold).journal))
        again = [line["resumed_epoch"] for line in lines if line["event"] == "started"][1:]
        assert all(epoch >= reported for epoch in again)
        trained = [line["epoch"] for line in lines if line["event"] == "epoch"]
        assert sorted(set(trained)) == list(range(1, epochs + 1))
        assert len(trained) <= epochs + len(again)


def nothing_of_the_test_parts_is_there(directory: SweepDirectory) -> None:
    names = {path.name for path in (directory.path / "settings").rglob("*") if path.is_file()}
    assert names == {"journal.jsonl", ".lock"}
    assert not list((directory.path / "settings").rglob("checkpoint/*"))


def in_mlflow(database: Path) -> None:
    """A parent and two settings per condition, all finished, every epoch once."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        roles = connection.execute(
            "select t.value, r.status, count(*) from runs r join tags t on t.run_uuid = r.run_uuid "
            "where t.key = 'cvrunner.role' group by 1, 2 order by 1"
        ).fetchall()
        steps = connection.execute(
            "select step, count(*) from metrics where key = 'mean/validation_ccc_avg' group by step order by step"
        ).fetchall()
    assert roles == [("setting", "FINISHED", 4), ("sweep", "FINISHED", 1)]
    assert steps == [(1, 4), (2, 4), (3, 4)]
