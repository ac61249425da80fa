"""`all-folds` from speech to verdict in a separate process, and what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest

from cvrunner.cli import main
from cvrunner.records.run_directory import RunDirectory, read_events
from tests.end_to_end.programs import FinishedRun, command, cvrunner, environment, started, wait_until

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(600)]
TRIALS = [f"{condition}/fold-{fold}/seed-0" for condition in ("frozen", "unfrozen") for fold in range(1, 6)]


def test_it_says_what_it_does_and_ends_with_the_comparison(finished: FinishedRun) -> None:
    out = finished.stdout
    assert "synthetic" in out
    assert "10 trials, 0 done, 10 to train" in out
    assert "unfrozen/fold-1/seed-0  epoch 2/2" in out
    assert "ETA" in out
    assert "on synthetic data" in out
    assert f"report   {finished.directory.report}" in out
    assert finished.stderr == ""


def test_every_file_of_the_contract_is_there(finished: FinishedRun) -> None:
    run = finished.directory
    record = run.read_run()
    assert record.status == "COMPLETE"
    assert sorted(record.trials) == TRIALS
    assert {state.status for state in record.trials.values()} == {"DONE"}
    for path in (run.config, run.split, run.protocol_file, run.summary_file, run.comparison, run.report):
        assert path.stat().st_size > 100, path
    assert {p.suffix for p in run.figures.iterdir()} == {".png", ".svg"}
    for state in record.trials.values():
        trial = run.trial(state.condition, state.fold, state.seed)
        assert trial.result(state.key) is not None
        assert len(list(read_events(trial.journal, "epoch"))) == 2
        assert not trial.checkpoint.exists()
    assert run.name in (finished.folder / "results" / "experiment_comparison.md").read_text()


def test_the_second_time_nothing_is_trained_and_it_says_so(finished: FinishedRun) -> None:
    run = finished.directory
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file() and not p.name.endswith(".lock")}
    again = cvrunner("all-folds", "--config", finished.config, folder=finished.folder)
    assert again.returncode == 0
    assert "all 10 trials are done: nothing to train" in again.stdout
    assert again.stdout[again.stdout.index("Test CCC") :] == finished.stdout[finished.stdout.index("Test CCC") :]
    assert {
        p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file() and not p.name.endswith(".lock")
    } == before


def test_the_report_is_made_again_from_the_files_alone(finished: FinishedRun, tmp_path: Path) -> None:
    shutil.copytree(finished.directory.path, tmp_path / "results" / finished.directory.name)
    run = RunDirectory(tmp_path / "results" / finished.directory.name)
    for path in (run.comparison, run.summary_file, run.report):
        path.unlink()
    made = cvrunner("report", run.name, folder=tmp_path)
    assert made.returncode == 0, made.stderr
    assert run.comparison.read_bytes() == finished.directory.comparison.read_bytes()
    assert run.summary_file.read_bytes() == finished.directory.summary_file.read_bytes()
    assert run.report.stat().st_size > 10_000
    checked = cvrunner("report", run.name, "--check", folder=tmp_path)
    assert checked.returncode == 0, checked.stdout


def test_mlflow_holds_parents_trials_and_the_comparison(finished: FinishedRun) -> None:
    with contextlib.closing(sqlite3.connect(finished.folder / "results" / "mlflow.db")) as database:
        experiments = database.execute("select name from experiments where name != 'Default'").fetchall()
        statuses = database.execute("select distinct status from runs").fetchall()
        tags: dict[str, dict[str, str]] = {}
        for run, key, value in database.execute("select run_uuid, key, value from tags where key like 'cvrunner.%'"):
            tags.setdefault(run, {})[key.removeprefix("cvrunner.")] = value
        conditions = dict(database.execute("select run_uuid, value from params where key = 'condition'"))
        scores = dict(database.execute("select run_uuid, value from latest_metrics where key = 'test/ccc_avg'"))
    assert experiments == [("cvrunner-utterance",)]
    assert statuses == [("FINISHED",)]
    assert sorted(tag["role"] for tag in tags.values()) == ["comparison"] + ["parent"] * 2 + ["trial"] * 10
    trials = {run for run, tag in tags.items() if tag["role"] == "trial"}
    assert set(conditions) == trials
    assert set(conditions.values()) == {"frozen", "unfrozen"}
    results = finished.directory.results(finished.directory.read_run()).values()
    stored = sorted((conditions[run], scores[run]) for run in trials)
    assert stored == [
        (condition, pytest.approx(score))
        for condition, score in sorted((result.condition, result.test_ccc["avg"]) for result in results)
    ]


def test_one_fold_without_ray_gives_the_same_numbers_bit_for_bit(finished: FinishedRun, tmp_path: Path) -> None:
    done = cvrunner(
        "fold", "--fold", "3", "--condition", "unfrozen", "--config", finished.config,
        "--set", f"results.root={tmp_path}", folder=finished.folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (other,) = tmp_path.glob("demo-*")
    one, two = finished.directory.trial("unfrozen", 3, 0), RunDirectory(other).trial("unfrozen", 3, 0)
    assert one.predictions.read_bytes() == two.predictions.read_bytes()
    first, second = one.result(), two.result()
    assert first is not None
    assert second is not None
    assert first.test_ccc == second.test_ccc
    assert RunDirectory(other).read_run().status == "INCOMPLETE"
    assert "unfrozen/fold-4/seed-0" in (other / "comparison.md").read_text()


def test_ctrl_c_saves_and_the_exit_code_says_stopped(finished: FinishedRun, tmp_path: Path) -> None:
    arguments = command(
        "all-folds", "--config", finished.config, "--set", f"results.root={tmp_path}", "--set", "train.epochs=500"
    )
    with started(arguments, finished.folder, environment(finished.folder), tmp_path / "log") as process:
        wait_until(lambda: "epoch 1/500" in (tmp_path / "log").read_text(), "the first epoch")
        # As a terminal does it: to the whole process group, Ray's processes too.
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 143
    (stopped,) = tmp_path.glob("demo-*")
    assert RunDirectory(stopped).read_run().status == "STOPPED"
    assert list(stopped.glob("unfrozen/*/*/checkpoint/0*"))
    assert "the same command continues" in (tmp_path / "log").read_text()


def test_demo_data_writes_a_corpus(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo-data", str(tmp_path / "corpus"), "--utterances", "40"])
    assert not ended.value.code
    assert len(list((tmp_path / "corpus").rglob("*.wav"))) >= 30
