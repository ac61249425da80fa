"""`jobs/all_folds.sbatch` on a real Slurm of one node, which the test starts with its own ports, folders and key."""

from __future__ import annotations

import contextlib
import getpass
import math
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cvrunner.records.run_directory import RunDirectory
from tests.end_to_end.programs import (
    CLUSTER_LIMIT_S,
    REPOSITORY,
    FinishedRun,
    environment,
    free_ports,
    started,
    wait_until,
)
from tests.runs import numbers

pytestmark = [pytest.mark.suites("all"), pytest.mark.end_to_end, pytest.mark.cluster, pytest.mark.timeout(3600)]
SCRIPT = REPOSITORY / "jobs" / "all_folds.sbatch"
TRAINING_S = 150
DAEMONS = f"/usr/sbin{os.pathsep}{os.environ['PATH']}"
SLURM = """
ClusterName=cvrunner-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=10
NodeName={names} NodeHostname={host} NodeAddr=127.0.0.1 Port={nodes} CPUs=2 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
MUNGE = ["--force", "--foreground", "--key-file=key", "--seed-file=seed", "--socket=munge.socket"]


@contextlib.contextmanager
def slurm_cluster(folder: Path, nodes: int = 1) -> Iterator[dict[str, str]]:
    """Slurm with `nodes` nodes of two logical GPUs on this machine, ended afterwards; gives the environment for it."""
    programs = {name: shutil.which(name, path=DAEMONS) for name in ("munged", "slurmctld", "slurmd", "sbatch")}
    missing = [name for name, found in programs.items() if found is None]
    assert not missing, f"{', '.join(missing)}: not installed; on Debian: apt-get install slurm-wlm munge"
    controller, *ports = free_ports(1 + nodes)
    names = [f"node{number}" for number in range(1, 1 + nodes)]
    settings = {"host": socket.gethostname().partition(".")[0], "user": getpass.getuser(), "folder": folder}
    (folder / "slurm.conf").write_text(
        SLURM.format(**settings, controller=controller, names=",".join(names), nodes=",".join(map(str, ports)))
    )
    (folder / "gres.conf").write_text("AutoDetect=off\nName=gpu File=/dev/null,/dev/zero\n")
    (folder / "state").mkdir()
    (folder / "key").write_bytes(secrets.token_bytes(128))
    (folder / "key").chmod(0o600)
    env = {
        **environment(folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{DAEMONS}",
        "SLURM_CONF": str(folder / "slurm.conf"),
    }
    daemons = [
        ("munged", [*MUNGE, "--pid-file=munge.pid", "--log-file=munged.log"]),
        ("slurmctld", ["-D", "-i"]),
        *(("slurmd", ["-D", "-N", name]) for name in names),
    ]
    with contextlib.ExitStack() as stack:
        for number, (name, arguments) in enumerate(daemons):
            log = folder / f"{number}-{name}.log"
            # If the tests are killed, the daemons must not outlive them for long.
            limited = ["timeout", "--foreground", str(CLUSTER_LIMIT_S), str(programs[name]), *arguments]
            stack.enter_context(started(limited, folder, env, log))
            if name == "munged":
                wait_until((folder / "munge.socket").exists, "munged")
        wait_until(lambda: slurm(env, "sinfo", "--noheader", "--format=%D %t") == f"{nodes} idle", "Slurm")
        yield env


def slurm(env: dict[str, str], *command: str) -> str:
    """Output of a command of Slurm; empty if it fails, as while the controller starts."""
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False).stdout.strip()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as env:
        yield env


class Job:
    """`jobs/all_folds.sbatch` submitted from `folder`, for both GPUs of the node."""

    def __init__(self, env: dict[str, str], folder: Path, *options: str, arguments: tuple[str | Path, ...]) -> None:
        size = ("--gpus-per-node=2", "--cpus-per-task=2", "--mem=0")
        words = ["sbatch", "--parsable", f"--chdir={folder}", *size, *options, str(SCRIPT), *map(str, arguments)]
        self.env, self.number = env, slurm(env, *words)
        assert self.number.isdigit(), words
        self.log_file = folder / f"cvrunner-{self.number}.log"

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def field(self, name: str) -> str:
        """Value of a field of `scontrol show job`."""
        words = slurm(self.env, "scontrol", "show", "job", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)[name]

    def wait(self) -> tuple[str, str]:
        """Wait for the end; return the state and the exit code as CODE:SIGNAL."""
        active = ("PENDING", "RUNNING", "COMPLETING")
        wait_until(lambda: self.field("JobState") not in active, f"the end of job {self.number}", 1800)
        return self.field("JobState"), self.field("ExitCode")


def only_run(folder: Path) -> RunDirectory:
    (record,) = (folder / "results").glob("*/run.json")
    return RunDirectory(record.parent)


def test_at_its_time_limit_a_job_saves_is_queued_again_and_finishes_bit_identical(
    cluster: dict[str, str], finished: FinishedRun, tmp_path: Path
) -> None:
    results = finished.directory.results(finished.directory.read_run()).values()
    # Long enough to be interrupted on this machine, where two trials run at a time.
    epochs = math.ceil(TRAINING_S / (sum(result.train_s for result in results) / 2 / 2))
    jobs = {}
    for name, limit in (("whole", "--time=60"), ("interrupted", "--time=2")):
        folder = tmp_path / name
        folder.mkdir()
        arguments = ("--config", finished.config, "--set", f"train.epochs={epochs}")
        # A time limit is in minutes, and Slurm may send the signal half a minute too early.
        jobs[name] = Job(cluster, folder, limit, "--signal=B:USR1@30", arguments=arguments)
    for name, job in jobs.items():
        assert job.wait() == ("COMPLETED", "0:0"), job.log[-3000:]
        assert only_run(tmp_path / name).read_run().status == "COMPLETE"
        restarts = int(job.field("Restarts"))
        assert job.log.count("the job is queued again") == restarts
        assert (restarts > 0) == (name == "interrupted")
        folders = re.findall(r"its token in (/tmp/cvr-\w+)/token", job.log)
        assert len(folders) == 1 + restarts
        wait_until(lambda folders=folders: not any(map(os.path.exists, folders)), "the removal of Ray's folders")
    assert numbers(only_run(tmp_path / "interrupted")) == numbers(only_run(tmp_path / "whole"))


def test_stopped_by_scancel_a_job_saves_and_is_not_queued_again(
    cluster: dict[str, str], finished: FinishedRun, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, arguments=("--config", finished.config, "--set", "train.epochs=500"))
    wait_until(lambda: "epoch 1/500" in job.log, "the first epoch")
    slurm(cluster, "scancel", "--batch", "--signal=TERM", job.number)
    assert job.wait() == ("FAILED", "143:0"), job.log[-3000:]
    assert job.field("Restarts") == "0"
    assert only_run(tmp_path).read_run().status == "STOPPED"
    assert list(only_run(tmp_path).path.glob("unfrozen/*/*/checkpoint/0*"))


def test_a_run_that_is_refused_fails_its_job_with_the_exit_code(cluster: dict[str, str], tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, arguments=("--set", "train.epochs=0"))
    assert job.wait() == ("FAILED", "2:0"), job.log
    assert "train.epochs" in job.log
