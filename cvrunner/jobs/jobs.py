"""Jobs on a Ray cluster: what is known of one, its id, its exit code, what goes with it. Asks no cluster."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from cvrunner.errors import TARGET_MISSED, ClusterError, Stopped, UsageError
from cvrunner.orchestration.ray_cluster import RAY_STOP_WAIT_S

JobStatus = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
DEFAULT_COMMAND = "all-folds"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TAKEN_ALONG = ("CVRUNNER_HOME", "MLFLOW_TRACKING_URI", "HF_HUB_OFFLINE")
"""The variables of the submitter's environment that a job gets. None may hold a secret: Ray shows them to everyone."""
TERMINATED = {-15, 128 + 15}
"""SIGTERM, as Python and as a shell put it."""
OUTCOMES = {0: "complete", TARGET_MISSED: "target missed, exit code 3", Stopped.exit_code: "stopped"}
LARGEST_OWN_CODE = 125
"""Above it, a shell says that the program was not found or was killed."""
RESULTS = re.compile(r"^(?:run \S+ in|results ) (/.+)$", flags=re.MULTILINE)
"""The lines of `all-folds` that name the run's folder."""


@dataclass(frozen=True)
class Job:
    """A job that was submitted to a cluster, as Ray knows it."""

    id: str
    status: JobStatus
    entrypoint: str
    marked: bool = False
    """Submitted by cvrunner."""
    started_s: float | None = None
    """Unix time."""
    ended_s: float | None = None
    process_code: int | None = None
    """Exit code of its program; None: still running, stopped, or never begun."""
    message: str = ""
    stop_wait_s: float = RAY_STOP_WAIT_S
    """What `stop` leaves it to save in."""

    @property
    def ended(self) -> bool:
        return self.status not in ("PENDING", "RUNNING")

    @property
    def is_cvrunner(self) -> bool:
        """Also where somebody submitted it with `ray job submit`."""
        return self.marked or " -m cvrunner" in self.entrypoint

    @property
    def command(self) -> str:
        """What cvrunner was told to do."""
        return self.entrypoint.partition(" -m cvrunner ")[2] or self.entrypoint

    @property
    def exit_code(self) -> int:
        """0 complete, 2 refused, 3 target missed, 143 stopped, else the program's own code or 1. Of an ended job."""
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED" or self.process_code in TERMINATED:
            return Stopped.exit_code
        return self.process_code if self.process_code and 0 < self.process_code <= LARGEST_OWN_CODE else 1

    @property
    def outcome(self) -> str:
        """One word, and the exit code where the word does not say it."""
        if not self.ended:
            return self.status.lower()
        return OUTCOMES.get(self.exit_code, f"failed, exit code {self.exit_code}")


# --- what goes with a job ---------------------------------------------------------------------------------------------


def full_command(arguments: Sequence[str]) -> list[str]:
    """The arguments of cvrunner, with the main command where none is named."""
    return list(arguments) if arguments and not arguments[0].startswith("-") else [DEFAULT_COMMAND, *arguments]


def entrypoint(python: str, command: Sequence[str]) -> str:
    """What the cluster runs, as a line for its shell."""
    return shlex.join([python, "-m", "cvrunner", *command])


def runtime_environment(file: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """The file's settings, with the variables that are taken along. Raises UsageError."""
    try:
        settings = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--runtime-env {file}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("env_vars", {}), dict):
        raise UsageError(f"--runtime-env {file}: must hold keys with values, env_vars among them names with values")
    taken = {name: environment[name] for name in TAKEN_ALONG if name in environment}
    secret = [name for name, value in taken.items() if "@" in urlsplit(value).netloc]
    if secret:
        raise UsageError(f"{secret[0]} holds a user name or password, and Ray shows a job's variables to everyone")
    return settings | {"env_vars": {**settings.get("env_vars", {}), **taken}}


# --- names ------------------------------------------------------------------------------------------------------------


def usual_id(command: Sequence[str], folder: Path) -> str:
    """The id of a command with its configuration, as `jobs/submit.sh` makes it too.

    A hash of the arguments, of the files that they name and of `configs/*.yaml`, which those may be based on.
    """
    found = hashlib.sha256("".join(f"{word}\n" for word in command).encode())
    named = [folder / word for word in command]
    for file in (*named, *sorted(folder.glob("configs/*.yaml"))):
        if os.path.isfile(file):  # not Path.is_file, which raises where a name is too long
            found.update(file.read_bytes())
    return f"cvrunner-{command[0]}-{found.hexdigest()[:10]}"


def free_id(usual: str, jobs: Mapping[str, Job]) -> tuple[str, Job | None]:
    """The id to submit under, or the id and the job that already runs: `usual`, then `usual-2` and so on."""
    name, count = usual, 1
    while name in jobs:
        if not jobs[name].ended:
            return name, jobs[name]
        count += 1
        name = f"{usual}-{count}"
    return name, None


def unknown_job(job_id: str, jobs: Mapping[str, Job], address: str) -> ClusterError:
    """What to say about an id that the cluster does not have."""
    names = [name for name, job in jobs.items() if job.is_cvrunner]
    near = difflib.get_close_matches(job_id, names, n=3, cutoff=0.3) or names[-3:]
    there = f"; did you mean {' or '.join(near)}?" if near else "; there are none of cvrunner's at all"
    return ClusterError(f"{job_id}: no such job on {address}{there}")


def results_in(log: str) -> str | None:
    """The folder of results that a job's log names last."""
    found = RESULTS.findall(log)
    return found[-1] if found else None


# --- the cluster ------------------------------------------------------------------------------------------------------


def cluster_address(given: str | None, environment: Mapping[str, str]) -> str:
    """Where the cluster answers HTTP: as given, RAY_ADDRESS where it is one, RAY_API_SERVER_ADDRESS, this machine.

    Raises ClusterError for what is given and is no address of that kind.
    """
    ray_address = environment.get("RAY_ADDRESS", "")
    inherited = ray_address if ray_address.startswith(("http://", "https://")) else ""
    address = given or inherited or environment.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    full = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(full)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        usable = False
    if not usable:
        raise ClusterError(f"{address}: must be where Ray's dashboard answers, such as {DEFAULT_ADDRESS}")
    return full.rstrip("/")
