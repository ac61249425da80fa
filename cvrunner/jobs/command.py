"""The commands for a Ray cluster: submit a job, see how it goes, stop it. What is parsed is in `cli.py`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

from cvrunner import paths
from cvrunner.errors import ClusterError, UsageError
from cvrunner.jobs import jobs
from cvrunner.jobs.jobs import Job
from cvrunner.orchestration.ray_cluster import STOP_WAIT

if TYPE_CHECKING:
    from rich.console import Console

    from cvrunner.jobs.ray_jobs import RayJobs

DETACHED = 130
"""Exit code of Ctrl-C, as in a shell: how the job ends is not known."""
NO_PROGRAM = 127
"""What a shell ends with where it does not find the program."""


@dataclass(frozen=True)
class Submission:
    """What is to run on the cluster, and with what."""

    command: list[str]
    folder: Path
    """Uploaded; the job's working directory."""
    settings: dict[str, Any]
    """Ray's runtime environment."""
    python: str

    @classmethod
    def prepare(
        cls, arguments: Sequence[str], folder: Path, file: Path | None, python: str, environment: Mapping[str, str]
    ) -> Submission:
        """Raises UsageError."""
        if not folder.is_dir():
            raise UsageError(f"--working-dir {folder}: there is no such folder")
        settings = jobs.runtime_environment(file or paths.default_runtime_env(), environment)
        return cls(jobs.full_command(arguments), folder.absolute(), settings, python)


def submit(
    arguments: Sequence[str],
    address: str | None,
    folder: Path,
    runtime_env: Path | None,
    wait: bool,
    python: str,
    console: Console,
) -> int:
    """Run a command of cvrunner as a job and follow it to its end; its exit code, 0 with `wait` off.

    The same command with the same configuration that runs already is followed, not started again.
    """
    wanted = Submission.prepare(arguments, folder, runtime_env, python, os.environ)
    cluster = _cluster(address)
    job, running = _submitted(cluster, wanted)
    _say(console, f"{job.id}: {'runs already' if running else 'submitted'} on {cluster.address}")
    if wait:
        return _follow(cluster, job, console)
    _say(console, *_ways_on(job))
    return 0


def _submitted(cluster: RayJobs, wanted: Submission) -> tuple[Job, bool]:
    """The job, and whether it was there before."""
    job_id, running = jobs.free_id(jobs.usual_id(wanted.command, wanted.folder), cluster.all())
    if running is not None:
        return running, True
    return cluster.submit(job_id, wanted.python, wanted.command, wanted.folder, wanted.settings), False


def status(job_id: str | None, address: str | None, as_json: bool, console: Console) -> int:
    """cvrunner's jobs on the cluster, the newest first, or one of them."""
    cluster = _cluster(address)
    found = cluster.all()
    chosen = [cluster.find(job_id)] if job_id else [job for job in found.values() if job.is_cvrunner][::-1]
    folders = {job.id: _results(cluster, job) for job in chosen}
    if as_json:
        _say(console, json.dumps([_record(job, folders[job.id]) for job in chosen], indent=2))
    else:
        nothing = f"no jobs of cvrunner's on {cluster.address}"
        _say(console, _table(chosen, folders, console.width) if chosen else nothing)
    return 0


def stop(job_id: str, address: str | None, console: Console) -> int:
    """Ask a job to save and end, and wait until it has."""
    cluster = _cluster(address)
    job = cluster.find(job_id)
    if not job.ended:
        cluster.ask_to_stop(job_id)
        _say(console, f"{job_id}: asked to stop; it has {job.stop_wait_s:g} s to save ({STOP_WAIT})")
        with _detaching(console, f"{job_id}: goes on stopping"):
            job = cluster.wait_until_stopped(job)
    folder = _results(cluster, job)
    _say(console, f"{job_id}: {job.outcome}" + (f"; what there is lies in {folder}" if folder else ""))
    return 0


def logs(job_id: str, address: str | None, follow: bool, console: Console) -> int:
    """What a job has printed; with `follow`, to its end, and its exit code."""
    cluster = _cluster(address)
    job = cluster.find(job_id)
    if follow:
        return _follow(cluster, job, console)
    _write(console, cluster.log(job_id))
    return 0


# --- the parts of a command -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _detaching(console: Console, *last: str) -> Iterator[None]:
    """Ctrl-C ends us, not the job."""
    try:
        yield
    except KeyboardInterrupt:
        console.print()
        _say(console, *last)
        raise SystemExit(DETACHED) from None


def _cluster(address: str | None) -> RayJobs:
    found = jobs.cluster_address(address, os.environ)
    from cvrunner.jobs.ray_jobs import RayJobs

    return RayJobs(found)


def _follow(cluster: RayJobs, job: Job, console: Console) -> int:
    """Show the log to its end and say how it ended; the job's exit code."""
    with _detaching(console, f"{job.id}: goes on without this terminal", *_ways_on(job)):
        if not job.ended:
            _say(console, "Ctrl-C leaves it running; its log:")
        for text in cluster.follow(job.id):
            _write(console, text)
        job = cluster.find(job.id)
    _say(console, f"{job.id}: {job.outcome}, after {_duration(job)}", *_reasons(job))
    return job.exit_code


def _reasons(job: Job) -> list[str]:
    """What the log does not say about a job that failed."""
    if job.exit_code and job.process_code == NO_PROGRAM:
        return ["the cluster's shell did not find the program: --python PATH, or start Ray in cvrunner's environment"]
    if job.status == "FAILED" and job.process_code is None:
        return [job.message.strip()]
    return []


def _ways_on(job: Job) -> tuple[str, str]:
    return f"  cvrunner logs {job.id} --follow", f"  cvrunner stop {job.id}"


def _results(cluster: RayJobs, job: Job) -> str | None:
    """The folder of its results, on the cluster, where its log is there and names one."""
    with contextlib.suppress(ClusterError):
        return jobs.results_in(cluster.log(job.id))
    return None


def _record(job: Job, folder: str | None) -> dict[str, Any]:
    return {
        "id": job.id,
        "status": job.status,
        "outcome": job.outcome,
        "exit_code": job.exit_code if job.ended else None,
        "command": job.command,
        "started": _clock(job.started_s),
        "ended": _clock(job.ended_s),
        "results": folder,
    }


def _table(chosen: Sequence[Job], folders: Mapping[str, str | None], width: int) -> str:
    from cvrunner.text import DASH, Table, tables_as_text

    rows = [
        [job.id, job.outcome, _clock(job.started_s) or DASH, _duration(job), job.command, folders[job.id] or DASH]
        for job in chosen
    ]
    table = Table("Jobs", ["job", "status", "started", "duration", "command", "results"], rows)
    return tables_as_text([table], width, "").rstrip("\n")


def _clock(seconds: float | None) -> str | None:
    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds") if seconds else None


def _duration(job: Job) -> str:
    return str(timedelta(seconds=round((job.ended_s or time()) - (job.started_s or time()))))


def _say(console: Console, *lines: str) -> None:
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _write(console: Console, text: str) -> None:
    """The log as it is."""
    console.file.write(text)
    console.file.flush()
