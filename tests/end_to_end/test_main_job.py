"""`all-folds` from speech to verdict, in a process of its own, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cvrunner.records.run_directory import RunDirectory, read_events
from tests.end_to_end.programs import command, cvrunner, environment, started, tiny_config, wait_until

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(600)]
TRIALS = [f"{condition}/fold-{fold}/seed-0" for condition in ("frozen", "unfrozen") for fold in range(1, 6)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    """One finished run: its folder's parent, its config, what it printed."""
    folder = tmp_path_factory.mktemp("main")
    config = tiny_config(folder)
    finished = cvrunner("all-folds", "--config", config, folder=folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder, config, finished


def run_of(folder: Path) -> RunDirectory:
    (path,) = (folder / "results").glob("tiny-*/run.json")
    return RunDirectory(path.parent)


def test_it_says_what_it_does_and_ends_with_the_comparison(done: Any) -> None:
    folder, _, finished = done
    out = finished.stdout
    assert "synthetic" in out
    assert "10 trials, 0 done, 10 to train" in out
    assert "unfrozen/fold-1/seed-0  epoch 2/2" in out
    assert "ETA" in out
    assert "on synthetic data" in out
    assert f"report   {run_of(folder).report}" in out
    assert finished.stderr == ""


def test_every_file_of_the_contract_is_there(done: Any) -> None:
    folder, _, _ = done
    run = run_of(folder)
    record = run.read_run()
    assert record.status == "COMPLETE"
    assert sorted(record.trials) == TRIALS
    assert {state.status for state in record.trials.values()} == {"DONE"}
    for path in (run.config, run.split, run.summary_file, run.comparison, run.report):
        assert path.stat().st_size > 100, path
    assert {p.suffix for p in run.figures.iterdir()} == {".png", ".svg"}
    for state in record.trials.values():
        trial = run.trial(state.condition, state.fold, state.seed)
        assert trial.result(state.key) is not None
        assert len(list(read_events(trial.journal, "epoch"))) == 2
        assert not trial.checkpoint.exists()
    assert run.name in (folder / "results" / "experiment_comparison.md").read_text()


def test_the_second_time_nothing_is_trained_and_it_says_so(done: Any) -> None:
    folder, config, first = done
    run = run_of(folder)
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file() and p.name != ".lock"}
    again = cvrunner("all-folds", "--config", config, folder=folder)
    assert again.returncode == 0
    assert "all 10 trials are done: nothing to train" in again.stdout
    assert again.stdout[again.stdout.index("Test CCC") :] == first.stdout[first.stdout.index("Test CCC") :]
    assert {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_the_report_is_made_again_from_the_files_alone(done: Any) -> None:
    folder, _, _ = done
    run = run_of(folder)
    comparison, summary = run.comparison.read_bytes(), run.summary_file.read_bytes()
    for path in (run.comparison, run.summary_file, run.report):
        path.unlink()
    made = cvrunner("report", run.name, folder=folder)
    assert made.returncode == 0, made.stderr
    assert run.comparison.read_bytes() == comparison
    assert run.summary_file.read_bytes() == summary
    assert run.report.stat().st_size > 10_000


def test_mlflow_holds_parents_trials_and_the_comparison(done: Any) -> None:
    folder, _, _ = done
    script = """
import json, sys, mlflow
client = mlflow.MlflowClient(sys.argv[1])
(experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
runs = client.search_runs([experiment.experiment_id], max_results=100)
print(json.dumps([experiment.name, [[r.info.run_name, r.info.status, r.data.tags.get("cvrunner.role"),
      r.data.params.get("condition"), r.data.metrics] for r in runs]]))
"""
    import sys

    uri = f"sqlite:///{folder / 'results' / 'mlflow.db'}"
    read = subprocess.run([sys.executable, "-c", script, uri], capture_output=True, text=True, check=True, timeout=120)
    experiment, runs = json.loads(read.stdout.splitlines()[-1])
    assert experiment == "cvrunner-utterance"
    roles = sorted(role for _, _, role, _, _ in runs)
    assert roles == ["comparison"] + ["parent"] * 2 + ["trial"] * 10
    assert {status for _, status, _, _, _ in runs} == {"FINISHED"}
    assert {condition for _, _, role, condition, _ in runs if role == "trial"} == {"frozen", "unfrozen"}
    assert {condition for _, _, role, condition, _ in runs if role != "trial"} == {None}
    run = run_of(folder)
    for state in run.read_run().trials.values():
        result = run.trial(state.condition, state.fold, state.seed).result()
        assert result is not None
        values = [m["test/ccc_avg"] for _, _, role, c, m in runs if role == "trial" and c == state.condition]
        assert any(v == pytest.approx(result.test_ccc["avg"]) for v in values)


def test_one_fold_without_ray_gives_the_same_numbers_bit_for_bit(done: Any, tmp_path: Path) -> None:
    folder, config, _ = done
    finished = cvrunner(
        "fold", "--fold", "3", "--condition", "unfrozen", "--config", config, "--set", f"results.root={tmp_path}",
        folder=folder,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (other,) = tmp_path.glob("tiny-*")
    one, two = (RunDirectory(p).trial("unfrozen", 3, 0) for p in (run_of(folder).path, other))
    assert one.predictions.read_bytes() == two.predictions.read_bytes()
    first, second = one.result(), two.result()
    assert first is not None
    assert second is not None
    assert first.test_ccc == second.test_ccc
    assert RunDirectory(other).read_run().status == "INCOMPLETE"
    assert "unfrozen/fold-4/seed-0" in (other / "comparison.md").read_text()


def test_ctrl_c_saves_and_the_exit_code_says_stopped(done: Any, tmp_path: Path) -> None:
    folder, config, _ = done
    arguments = command(
        "all-folds", "--config", config, "--set", f"results.root={tmp_path}", "--set", "train.epochs=500"
    )
    with started(arguments, folder, environment(folder), tmp_path / "log") as process:
        wait_until(lambda: "epoch 1/500" in (tmp_path / "log").read_text(), "the first epoch")
        # As a terminal does it: to the whole process group, Ray's processes too.
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 143
    (stopped,) = tmp_path.glob("tiny-*")
    assert RunDirectory(stopped).read_run().status == "STOPPED"
    assert list(stopped.glob("unfrozen/*/*/checkpoint/0*"))
    assert "the same command continues" in (tmp_path / "log").read_text()


def test_a_cluster_that_is_too_small_is_one_sentence_and_leaves_nothing(done: Any, tmp_path: Path) -> None:
    folder, config, _ = done
    needs = ("--set", f"results.root={tmp_path}", "--set", "cluster.cpus_per_trial=999")
    finished = cvrunner("all-folds", "--config", config, *needs, folder=folder)
    assert finished.returncode == 2, finished.stdout + finished.stderr
    assert "needs 1 GPU and 999 CPU" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not list(tmp_path.iterdir())


def test_audit_trains_nothing_and_shows_the_floor(done: Any) -> None:
    folder, config, _ = done
    finished = cvrunner("audit", "--config", config, folder=folder)
    assert finished.returncode == 0, finished.stderr
    assert "scenario" in finished.stdout
    assert "fold" in finished.stdout.lower()


def test_demo_data_writes_a_corpus(tmp_path: Path) -> None:
    finished = cvrunner("demo-data", tmp_path / "corpus", "--utterances", "40", folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert len(list((tmp_path / "corpus").rglob("*.wav"))) >= 30
