"""The commands for jobs on a Ray cluster: submit, status, logs, stop. `cli.py` parses their arguments."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

from cvrunner import paths
from cvrunner.errors import ClusterError, UsageError
from cvrunner.jobs import jobs
from cvrunner.jobs.jobs import Job
from cvrunner.orchestration.ray_cluster import STOP_WAIT
from cvrunner.text import DASH, Table, line_printer, tables_as_text

if TYPE_CHECKING:
    from rich.console import Console

    from cvrunner.jobs.ray_jobs import RayJobs

DETACHED = 130
"""Exit code of Ctrl-C, as in a shell; the job's own is not known."""
NO_PROGRAM = 127
"""Exit code of a shell that does not find the program."""


def submit(
    arguments: Sequence[str],
    address: str | None,
    folder: Path,
    runtime_env: Path | None,
    wait: bool,
    python: str,
    console: Console,
) -> int:
    """Run a cvrunner command as a job and follow it to its end; returns its exit code, without `wait` 0.

    If the same command with the same configuration is running already, it is followed and not started again.
    """
    if not folder.is_dir():
        raise UsageError(f"working directory {folder}: there is no such folder")
    settings = jobs.runtime_environment(runtime_env or paths.default_runtime_env(), os.environ)
    command, folder = jobs.full_command(arguments), folder.absolute()
    cluster = _cluster(address)
    job_id, job = jobs.free_id(jobs.usual_id(command, folder), cluster.all())
    how = "runs already"
    if job is None:
        job, how = cluster.submit(job_id, python, command, folder, settings), "submitted"
    line_printer(console)(f"{job.id}: {how} on {cluster.address}")
    if wait:
        return _follow(cluster, job, console)
    line_printer(console)(_next_commands(job))
    return 0


def status(job_id: str | None, address: str | None, as_json: bool, console: Console) -> int:
    """Print cvrunner's jobs on the cluster, newest first, or one of them."""
    cluster = _cluster(address)
    newest_first = reversed(cluster.all().values())
    chosen = [cluster.find(job_id)] if job_id else [job for job in newest_first if job.is_cvrunner]
    folders = {job.id: _results(cluster, job) for job in chosen}
    if as_json:
        text = json.dumps([_record(job, folders[job.id]) for job in chosen], indent=2)
    elif chosen:
        text = _table(chosen, folders, console.width)
    else:
        text = f"no jobs of cvrunner's on {cluster.address}"
    line_printer(console)(text)
    return 0


def stop(job_id: str, address: str | None, console: Console) -> int:
    """Ask a job to save and end, and wait until it has."""
    print_line = line_printer(console)
    cluster = _cluster(address)
    job = cluster.find(job_id)
    if not job.ended:
        cluster.ask_to_stop(job_id)
        print_line(f"{job_id}: asked to stop; it has {job.stop_wait_s:g} s to save ({STOP_WAIT})")
        with _detaching(console, f"{job_id}: is still stopping"):
            job = cluster.wait_until_stopped(job)
    line = f"{job_id}: {job.outcome}"
    if folder := _results(cluster, job):
        line += f"; its results are in {folder}"
    print_line(line)
    return 0


def logs(job_id: str, address: str | None, follow: bool, console: Console) -> int:
    """Print what a job has printed; with `follow`, to its end, and return its exit code."""
    cluster = _cluster(address)
    job = cluster.find(job_id)
    if follow:
        return _follow(cluster, job, console)
    _write(console, cluster.log(job_id))
    return 0


# --- parts ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _detaching(console: Console, last: str) -> Iterator[None]:
    """On Ctrl-C, print `last` and exit; the job keeps running."""
    try:
        yield
    except KeyboardInterrupt:
        console.print()
        line_printer(console)(last)
        raise SystemExit(DETACHED) from None


def _cluster(address: str | None) -> RayJobs:
    found = jobs.cluster_address(address, os.environ)
    # It imports requests, and then Ray, which takes half a second; a wrong address is refused before.
    from cvrunner.jobs.ray_jobs import RayJobs

    return RayJobs(found)


def _follow(cluster: RayJobs, job: Job, console: Console) -> int:
    """Print the log to its end and how the job ended; returns the job's exit code."""
    print_line = line_printer(console)
    with _detaching(console, f"{job.id}: continues without this terminal\n{_next_commands(job)}"):
        if not job.ended:
            print_line("Ctrl-C leaves it running; its log:")
        for text in cluster.follow(job.id):
            _write(console, text)
        job = cluster.find(job.id)
    print_line(f"{job.id}: {job.outcome}, after {_duration(job)}")
    if job.exit_code and job.process_code == NO_PROGRAM:
        remedy = "--python PATH, or start Ray in cvrunner's environment"
        print_line(f"the cluster's shell did not find the program: {remedy}")
    elif job.status == "FAILED" and job.process_code is None:
        # The program never started, so the log does not contain the reason.
        print_line(job.message.strip())
    return job.exit_code


def _next_commands(job: Job) -> str:
    return f"  cvrunner logs {job.id} --follow\n  cvrunner stop {job.id}"


def _results(cluster: RayJobs, job: Job) -> str | None:
    """Return the job's results folder on the cluster, if its log still exists and names one."""
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
    rows = [
        [job.id, job.outcome, _clock(job.started_s) or DASH, _duration(job), job.command, folders[job.id] or DASH]
        for job in chosen
    ]
    table = Table("Jobs", ["job", "status", "started", "duration", "command", "results"], rows)
    return tables_as_text([table], width).rstrip("\n")


def _clock(seconds: float | None) -> str | None:
    """Return a Unix time as local date and time."""
    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds") if seconds else None


def _duration(job: Job) -> str:
    return str(timedelta(seconds=round((job.ended_s or time()) - (job.started_s or time()))))


def _write(console: Console, text: str) -> None:
    """Print a log as it is, without rich's formatting."""
    console.file.write(text)
    console.file.flush()
