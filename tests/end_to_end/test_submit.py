"""`submit`, `status`, `logs`, `stop` and jobs/*.sh on real clusters, with and without a token."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from cvrunner.records.run_directory import RunDirectory
from tests.end_to_end.programs import (
    REPOSITORY,
    TIME_LIMIT_S,
    TOKEN,
    command,
    ray_cluster,
    started,
    tiny_config,
    wait_until,
)

pytestmark = [pytest.mark.end_to_end, pytest.mark.cluster, pytest.mark.timeout(600)]


class Cluster(NamedTuple):
    """A cluster: a folder for everything, and the environment to use it from."""

    folder: Path
    env: dict[str, str]

    def says(self, *arguments: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m cvrunner ...` from the repository."""
        return self.run(command(*arguments), **settings)

    def run(self, words: list[str], **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=REPOSITORY, env={**self.env, **settings}, capture_output=True, text=True,
            timeout=TIME_LIMIT_S, check=False,
        )  # fmt: skip

    def row(self, job: str) -> dict[str, object]:
        """The job's entry in `status --json`."""
        (found,) = json.loads(self.says("status", job, "--json").stdout)
        assert isinstance(found, dict)
        return found


@pytest.fixture(scope="module")
def guarded(token_cluster: tuple[Path, dict[str, str]]) -> Cluster:
    """It requires a token, and RAY_AUTH_MODE is not set where it is used from."""
    folder, env = token_cluster
    return Cluster(folder, {name: value for name, value in env.items() if name != "RAY_AUTH_MODE"})


@pytest.fixture(scope="module")
def unguarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("open")
    with ray_cluster(folder, 2, None) as env:
        yield Cluster(folder, env)


def submitted(output: str) -> str:
    """The job's id in the first line."""
    found = re.match(r"(cvrunner-[a-z-]+-[0-9a-f]{10}[-0-9]*): (submitted on http|runs already, submitted by )", output)
    assert found, output
    return found[1]


@pytest.mark.suites("ci", "all")
def test_the_script_and_submit_follow_one_job_to_its_end(guarded: Cluster) -> None:
    words = ["--config", str(tiny_config(guarded.folder)), "--set", "train.epochs=1"]
    log = guarded.folder / "script.log"
    with started([str(REPOSITORY / "jobs" / "all_folds.sh"), *words], REPOSITORY, guarded.env, log) as script:
        wait_until(lambda: "10 to train" in log.read_text(), "the job of the script")
        done = guarded.says("submit", "--", "all-folds", *words)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert script.wait(60) == 0, log.read_text()[-3000:]
    job = submitted(done.stdout)
    assert done.stdout.startswith(f"{job}: runs already")
    assert f"{job}: complete, after" in done.stdout.splitlines()[-1]
    assert TOKEN not in done.stdout + done.stderr + log.read_text()
    (run,) = (guarded.folder / "home" / "results").glob("tiny-*")
    assert RunDirectory(run).read_run().status == "COMPLETE"
    row = guarded.row(job)
    assert (row["outcome"], row["exit_code"], row["results"]) == ("complete", 0, str(run))


@pytest.mark.suites("ci", "all")
def test_a_second_submission_follows_the_first_and_both_end_stopped(guarded: Cluster) -> None:
    words = ("submit", "--", "all-folds", "--config", tiny_config(guarded.folder, epochs=300))
    logs = [guarded.folder / "first.log", guarded.folder / "second.log"]
    with started(command(*words), REPOSITORY, guarded.env, logs[0]) as first:
        wait_until(lambda: "epoch 1/300" in logs[0].read_text(), "the first epoch")
        job = submitted(logs[0].read_text())
        with started(command(*words), REPOSITORY, guarded.env, logs[1]) as second:
            wait_until(lambda: "epoch 1/300" in logs[1].read_text(), "the log in the second terminal")
            assert logs[1].read_text().startswith(f"{job}: runs already")
            second.send_signal(signal.SIGINT)
            assert second.wait(30) == 130
        assert f"{job}: continues without this terminal" in logs[1].read_text()
        assert guarded.row(job)["status"] == "RUNNING"
        stopped = guarded.says("stop", job)
        assert stopped.returncode == 0, stopped.stderr
        assert "it has 60 s to save (RAY_JOB_STOP_WAIT_TIME_S)" in stopped.stdout
        assert first.wait(60) == 143
    run = RunDirectory(Path(str(guarded.row(job)["results"])))
    assert run.read_run().status == "STOPPED"
    assert list(run.path.glob("unfrozen/*/*/checkpoint/0*"))
    assert guarded.says("logs", job, "--follow").returncode == 143
    assert "stopped" in guarded.says("stop", job).stdout


@pytest.mark.suites("all")
def test_a_refused_configuration_is_not_submitted(unguarded: Cluster) -> None:
    words = ("--", "all-folds", "--config", tiny_config(unguarded.folder), "--set", "train.lr=-1")
    for options in ((), ("--no-wait",)):
        refused = unguarded.says("submit", *options, *words)
        assert refused.returncode == 2, refused.stderr
        assert "train.lr: " in refused.stderr
    assert "all-folds" not in unguarded.says("status").stdout


@pytest.mark.suites("all")
def test_a_refused_job_ends_with_2_and_its_next_try_has_an_id_of_its_own(unguarded: Cluster) -> None:
    words = ("--", "report", "nowhere")
    refused = unguarded.says("submit", *words)
    assert refused.returncode == 2, refused.stderr
    assert "nowhere" in refused.stdout
    job = submitted(refused.stdout)
    assert submitted(unguarded.says("submit", "--no-wait", *words).stdout) == f"{job}-2"
    assert unguarded.says("logs", f"{job}-2", "--follow").returncode == 2
    listed = unguarded.says("status")
    assert listed.stdout.index(f"{job}-2 ") < listed.stdout.index(f"{job} ")
    assert listed.stdout.count("failed, exit code 2") == 2


@pytest.mark.suites("all")
def test_other_commands_are_jobs_too(unguarded: Cluster) -> None:
    done = unguarded.says("submit", "audit", "--config", tiny_config(unguarded.folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 utterances" in done.stdout


@pytest.mark.suites("all")
def test_a_target_that_is_missed_is_told_from_a_failure(unguarded: Cluster) -> None:
    words = ("--set", "train.epochs=1", "--set", "verify.target={ccc_valence: 0.999}")
    done = unguarded.says("submit", "verify", "--config", tiny_config(unguarded.folder), *words)
    assert done.returncode == 3, done.stdout + done.stderr
    job = submitted(done.stdout)
    assert f"{job}: target missed, exit code 3, after" in done.stdout.splitlines()[-1]
    (run,) = (unguarded.folder / "home" / "results").glob("tiny-*")
    assert [path.parent.parent.parent.name for path in run.glob("*/*/*/journal.jsonl")] == ["unfrozen"]
    assert list(run.glob("*/*/*/result.json")) == []


@pytest.mark.suites("ci", "all")
def test_what_cannot_be_asked_is_one_sentence_and_exit_code_2(guarded: Cluster) -> None:
    wrong, none = {"RAY_AUTH_TOKEN": TOKEN[::-1]}, {"RAY_AUTH_TOKEN": ""}
    for arguments, settings, sentence in [
        (("status",), wrong, "the cluster wants its token: it is not the token in RAY_AUTH_TOKEN"),
        (("status",), none, "the cluster wants its token: export RAY_AUTH_MODE=token"),
        (("status", "--address", "http://127.0.0.1:9"), {}, "no Ray cluster answers; start one"),
        (("logs", "cvrunner-all-fold"), {}, "no such job on http"),
    ]:
        refused = guarded.says(*arguments, **settings)
        assert refused.returncode == 2, refused.stderr
        assert refused.stderr.startswith("error: ")
        assert sentence in refused.stderr
        assert refused.stderr.count("\n") == 1
