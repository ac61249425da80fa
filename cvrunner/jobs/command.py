"""The commands for jobs on a Ray cluster: submit, status, logs, stop. `cli.py` parses their arguments."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

from cvrunner import paths
from cvrunner.config.reading import load_config
from cvrunner.encoders.files import check_encoder
from cvrunner.errors import ClusterError, ConfigError, UsageError
from cvrunner.jobs import jobs
from cvrunner.jobs.jobs import Job, LogState
from cvrunner.orchestration.machine import find_listeners
from cvrunner.orchestration.ray_cluster import STOP_WAIT
from cvrunner.text import DASH, Table, line_printer, tables_as_text

if TYPE_CHECKING:
    from rich.console import Console

    from cvrunner.jobs.ray_jobs import RayJobs

DETACHED = 130
"""Exit code of Ctrl-C, as in a shell; the job's own is not known."""
NO_PROGRAM = 127
"""Exit code of a shell that does not find the program."""
NEXT_COMMANDS = "  cvrunner logs {0} --follow\n  cvrunner stop {0}"
"""Printed with the job's id when cvrunner leaves a running job."""


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
    jobs.check_for_secrets(command)
    here = jobs.is_here(jobs.cluster_address(address, os.environ), find_listeners() or ())
    check_configuration(command, folder, here)
    cluster = _cluster(address)
    job_id, job = jobs.free_id(jobs.usual_id(command, folder, os.environ, runtime_env, python), cluster.all())
    if job is None:
        job, how = cluster.submit(job_id, python, command, folder, settings), "submitted"
    else:
        how = f"runs already, submitted by {job.user or 'somebody'}"
        if job.started_s:
            how += f" and started at {datetime.fromtimestamp(job.started_s).isoformat(' ', 'seconds')}"
    line_printer(console)(f"{job.id}: {how} on {cluster.address}")
    if wait:
        return _follow(cluster, job, console)
    line_printer(console)(NEXT_COMMANDS.format(job.id))
    return 0


def check_configuration(command: Sequence[str], folder: Path, here: bool = False) -> None:
    """Raise ConfigError or EncoderError for a configuration, an override or a path that the cluster would refuse.

    `here`: the cluster's head is this machine, so that files outside of `folder`, such as corpus and encoder, can be
    looked at; else they may exist on the cluster only. An encoder on the hub is not looked for.
    """
    given: dict[str, list[str]] = {"--config": [], "--set": []}
    names = {"-c": "--config", "-s": "--set", "--config": "--config", "--set": "--set"}
    for word, value in zip(command, [*command[1:], ""], strict=True):
        name, separator, joined = word.partition("=")
        if word in names:
            given[names[word]].append(value)
        elif separator and name in ("--config", "--set"):
            given[name].append(joined)
    if not given["--config"]:
        return
    path = folder / given["--config"][-1]
    if not here and not path.is_relative_to(folder):
        return
    config = load_config(path, given["--set"])
    root = Path(config.corpus.root).expanduser()
    if here and config.corpus.format != "demo" and root.is_absolute() and not root.exists():
        raise ConfigError(f"corpus.root: {root} does not exist on this machine, where the cluster's head runs")
    models = [config.for_condition(condition).model for condition in config.conditions]
    for encoder, revision, allowed in {(m.encoder, m.revision, m.allow_tuned_encoder) for m in models}:
        if here and Path(encoder).expanduser().is_absolute():
            check_encoder(encoder, revision, (), allow_tuned=allowed)


def status(job_id: str | None, address: str | None, as_json: bool, console: Console) -> int:
    """Print cvrunner's jobs on the cluster, newest first, or one of them."""
    cluster = _cluster(address)
    chosen = [job for job in reversed(cluster.all().values()) if job.is_cvrunner]
    if job_id:
        chosen = [cluster.find(job_id)]
    records, rows, notes = [], [], ["`cvrunner status JOB` shows its command, its results folder and why it failed"]
    for job in chosen:
        started, ended = (
            datetime.fromtimestamp(seconds).isoformat(" ", "seconds") if seconds else None
            for seconds in (job.started_s, job.ended_s)
        )
        found = _read_log(cluster, job)
        reason = None
        if job.ended and job.process_code in jobs.KILLED:
            reason = "its process was killed; the same command continues the run"
        elif job.ended and job.exit_code not in jobs.OUTCOMES:
            reason = found.error or job.message.strip() or None
        record: dict[str, Any] = {
            "id": job.id,
            "status": job.status,
            "outcome": job.outcome,
            "exit_code": None,
            "command": job.command,
            "started": started,
            "ended": ended,
            "results": found.results,
            "owner": job.user,
            "trials": found.trials,
            "epochs": found.epochs,
            "eta": found.eta,
            "validation_ccc": found.validation_ccc,
            "reason": reason,
        }
        if job.ended:
            record |= {"exit_code": job.exit_code, "eta": None}
        records.append(record)
        ccc = ", ".join(f"{name} {value:.4f}" for name, value in found.validation_ccc.items())
        progress = [found.trials, found.epochs, ccc, record["eta"]]
        cells = [job.id, job.user, job.outcome, started, _duration(job), Path(found.results or "").name, *progress]
        rows.append([str(cell or DASH) for cell in cells])
        if job_id:
            notes = [f"command  {job.command}", f"results  {found.results or DASH}"]
            if reason:
                notes.append(f"reason   {reason}; `cvrunner logs {job.id}` has the whole log")
    text = f"no jobs of cvrunner's on {cluster.address}"
    if as_json:
        text = json.dumps(records, indent=2)
    elif rows:
        columns = [
            "job",
            "owner",
            "status",
            "started",
            "duration",
            "run",
            "trials",
            "epochs",
            "validation CCC-Avg",
            "ETA",
        ]
        text = tables_as_text([Table("Jobs", columns, rows)], console.width, "\n".join(notes)).rstrip("\n")
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
    if folder := _read_log(cluster, job).results:
        line += f"; its results are in {folder}"
    print_line(line)
    return 0


def logs(job_id: str, address: str | None, follow: bool, console: Console) -> int:
    """Print what a job has printed; with `follow`, to its end, and return its exit code."""
    cluster = _cluster(address)
    job = cluster.find(job_id)
    if follow:
        return _follow(cluster, job, console)
    # Not through rich, which would wrap the log and read its brackets as markup.
    console.file.write(cluster.log(job_id))
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
    with _detaching(console, f"{job.id}: continues without this terminal\n{NEXT_COMMANDS.format(job.id)}"):
        if not job.ended:
            print_line("Ctrl-C leaves it running; its log:")
        for text in cluster.follow(job.id):
            console.file.write(text)
            # A pipe holds back what is short, and the next part may come only after an epoch.
            console.file.flush()
        job = cluster.find(job.id)
    print_line(f"{job.id}: {job.outcome}, after {_duration(job)}")
    if job.exit_code and job.process_code == NO_PROGRAM:
        remedy = "--python PATH, or start Ray in cvrunner's environment"
        print_line(f"the cluster's shell did not find the program: {remedy}")
    elif job.status == "FAILED" and job.process_code is None:
        # The program never started, so the log does not contain the reason.
        print_line(job.message.strip())
    return job.exit_code


def _read_log(cluster: RayJobs, job: Job) -> LogState:
    """Return what the job's log says about its run; nothing if the log is gone, while the job is still listed."""
    with contextlib.suppress(ClusterError):
        return jobs.read_log(cluster.log(job.id))
    return LogState()


def _duration(job: Job) -> str:
    """Return how long a job has run, up to now if it has not ended."""
    return str(timedelta(seconds=round((job.ended_s or time()) - (job.started_s or time()))))
