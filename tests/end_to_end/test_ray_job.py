"""A job submitted with `ray job submit` itself, and what Ray's own commands show of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cvrunner.records.run_directory import RunDirectory
from tests.end_to_end.programs import REPOSITORY, ray_says, tiny_config, wait_until

pytestmark = [pytest.mark.suites("all"), pytest.mark.end_to_end, pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster(
    token_cluster: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """A folder for this module, and the environment to use the shared cluster."""
    return tmp_path_factory.mktemp("ray-job"), token_cluster[1]


def submit(
    env: dict[str, str], home: Path, *arguments: str | Path, wait: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `ray job submit --working-dir . -- python -m cvrunner ...` from the repository."""
    runtime = yaml.safe_load((REPOSITORY / "jobs" / "runtime_env.yaml").read_text())
    runtime["env_vars"]["CVRUNNER_HOME"] = str(home)
    settings = json.dumps(runtime)
    options = [] if wait else ["--no-wait"]
    return ray_says(
        env, "job", "submit", "--working-dir", ".", "--runtime-env-json", settings, *options, "--",
        sys.executable, "-m", "cvrunner", *map(str, arguments),
    )  # fmt: skip


def test_a_submitted_job_leaves_its_results_outside_rays_folders(cluster: tuple[Path, dict[str, str]]) -> None:
    folder, env = cluster
    config = tiny_config(folder)
    submitted = submit(env, folder / "home", "all-folds", "--config", config)
    assert submitted.returncode == 0, submitted.stdout[-3000:] + submitted.stderr[-3000:]
    (path,) = (folder / "home" / "results").glob("tiny-*")
    record = RunDirectory(path).read_run()
    assert record.status == "COMPLETE"
    assert len(record.trials) == 10
    assert (folder / "home" / "results" / "mlflow.db").stat().st_size > 0
    assert "nothing to train" not in submitted.stdout
    again = submit(env, folder / "home", "all-folds", "--config", config)
    assert again.returncode == 0
    assert "nothing to train" in again.stdout


def test_actors_hold_one_gpu_each_and_have_readable_names(cluster: tuple[Path, dict[str, str]]) -> None:
    folder, env = cluster
    config = tiny_config(folder, epochs=300)
    two = ("--set", "cluster.max_concurrent=2")
    submitted = submit(env, folder / "home", "all-folds", "--config", config, *two, wait=False)
    assert submitted.returncode == 0, submitted.stderr
    job = next(word.strip("'") for word in submitted.stdout.split() if word.startswith("'raysubmit_"))
    rows: list[dict[str, object]] = []

    def alive() -> bool:
        listed = ray_says(env, "list", "actors", "--detail", "--format", "json", "--filter", "state=ALIVE")
        assert listed.returncode == 0, listed.stderr
        rows[:] = [row for row in json.loads(listed.stdout or "[]") if row["class_name"] == "FoldActor"]
        return len(rows) == 2

    wait_until(alive, "two actors")
    assert {row["name"] for row in rows} == {"fold-trainer-1", "fold-trainer-2"}
    assert {row["required_resources"]["GPU"] for row in rows} == {1.0}  # type: ignore[index]
    run = next(
        p for p in (folder / "home" / "results").glob("tiny-*") if RunDirectory(p).read_run().status == "RUNNING"
    )
    assert {row["ray_namespace"] for row in rows} == {run.name}
    assert {row["repr_name"] for row in rows} == {row["name"] for row in rows}
    wait_until(lambda: any(run.rglob("journal.jsonl")), "the first epoch")
    running = ray_says(env, "list", "tasks", "--format", "json", "--filter", "state=RUNNING").stdout
    assert {row["name"] for row in json.loads(running)} <= set(RunDirectory(run).read_run().trials)
    assert "unfrozen/fold-" in running
    ray_says(env, "job", "stop", job)
    wait_until(lambda: RunDirectory(run).read_run().status != "RUNNING", "the end of the run")
    assert "was stopped" in ray_says(env, "job", "status", job).stdout
    assert RunDirectory(run).read_run().status == "STOPPED"
    assert list(run.glob("unfrozen/*/*/checkpoint/0*"))
