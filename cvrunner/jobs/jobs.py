"""Jobs on a Ray cluster: their state, ids, exit codes, and what is uploaded with them. Contacts no cluster."""

from __future__ import annotations

import hashlib
import os
import pwd
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from cvrunner.errors import TARGET_MISSED, ClusterError, Stopped, UsageError
from cvrunner.orchestration.machine import Listener
from cvrunner.orchestration.ray_cluster import LOCAL, RAY_STOP_WAIT_S
from cvrunner.paths import default_runtime_env

JobStatus = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
DEFAULT_COMMAND = "all-folds"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
PASSED_ON = ("CVRUNNER_HOME", "MLFLOW_TRACKING_URI", "HF_HUB_OFFLINE")
"""Variables of the submitter's environment passed to a job. None may hold a secret: Ray shows them to everyone."""
TERMINATED = {-15, 128 + 15}
"""Exit codes of SIGTERM, as Python and as a shell report it."""
KILLED = {-9, 128 + 9}
"""Exit codes of SIGKILL: by a person, the kernel or Ray, for memory or because the node went away."""
OUTCOMES = {0: "complete", TARGET_MISSED: "target missed, exit code 3", Stopped.exit_code: "stopped"}
LARGEST_OWN_CODE = 125
"""Higher codes are the shell's: the program was not found, or was killed by a signal."""
RESULTS = re.compile(r"^(?:run \S+ in|results ) (/.+)$", flags=re.MULTILINE)
"""Lines of `all-folds` that name the run's folder."""
TRIALS = re.compile(r"^(\d+) trials, (\d+) done", flags=re.MULTILINE)
DONE = re.compile(r"^[\d:]+  (\S+)  done: ", flags=re.MULTILINE)
EPOCHS = re.compile(r"\| (\d+ of \d+) epochs(?:, ETA (.+))?$", flags=re.MULTILINE)
VALIDATION = re.compile(r"^[\d:]+  (\S+?)(/\S+)  epoch .*validation .*CCC-Avg (-?\d\.\d+)", flags=re.MULTILINE)
ERROR = re.compile(r"^error: (.*)$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Job:
    """A job submitted to a cluster, as Ray reports it."""

    id: str
    status: JobStatus
    entrypoint: str
    marked: bool = False
    """Submitted with `cvrunner submit`."""
    user: str | None = None
    """Who submitted it, if the submitter said so."""
    started_s: float | None = None
    """Unix time."""
    ended_s: float | None = None
    process_code: int | None = None
    """Exit code of its program; None: still running, stopped, or never started."""
    message: str = ""
    stop_wait_s: float = RAY_STOP_WAIT_S
    """Time to save after `stop`."""

    @property
    def ended(self) -> bool:
        return self.status not in ("PENDING", "RUNNING")

    @property
    def is_cvrunner(self) -> bool:
        """Whether it runs cvrunner, also if it was submitted with `ray job submit`."""
        return self.marked or " -m cvrunner" in self.entrypoint

    @property
    def command(self) -> str:
        """The arguments of cvrunner."""
        return self.entrypoint.partition(" -m cvrunner ")[2] or self.entrypoint

    @property
    def exit_code(self) -> int:
        """Exit code of an ended job: 0 complete, 2 refused, 3 target missed, 143 stopped, else the program's or 1."""
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED" or self.process_code in TERMINATED:
            return Stopped.exit_code
        if self.process_code is not None and 0 < self.process_code <= LARGEST_OWN_CODE:
            return self.process_code
        return 1

    @property
    def outcome(self) -> str:
        """One word, and the exit code if the word does not imply it."""
        if not self.ended:
            return self.status.lower()
        if self.process_code in KILLED:
            return "interrupted, exit code 1"
        return OUTCOMES.get(self.exit_code, f"failed, exit code {self.exit_code}")


@dataclass(frozen=True)
class LogState:
    """What the log of `all-folds` says about its run so far."""

    results: str | None = None
    trials: str | None = None
    """Such as `4 of 20`."""
    epochs: str | None = None
    """Such as `70 of 320`."""
    eta: str | None = None
    validation_ccc: Mapping[str, float] = field(default_factory=dict)
    """Mean CCC-Avg of the last epochs of each condition's trials."""
    error: str | None = None


def read_log(text: str) -> LogState:
    """Read the state of a run from the lines that it has printed; of several runs in one log, the last counts."""
    trials, counts = None, list(TRIALS.finditer(text))
    if counts:
        done = int(counts[-1][2]) + len(set(DONE.findall(text, counts[-1].end())))
        trials = f"{done} of {counts[-1][1]}"
    # Per trial the last epoch, also of a trial that was repeated.
    last = {(condition, name): float(value) for condition, name, value in VALIDATION.findall(text)}
    by_condition: dict[str, list[float]] = {}
    for (condition, _), value in last.items():
        by_condition.setdefault(condition, []).append(value)
    epochs, eta = next(reversed(EPOCHS.findall(text)), (None, None))
    return LogState(
        results=next(reversed(RESULTS.findall(text)), None),
        trials=trials,
        epochs=epochs,
        eta=eta or None,
        validation_ccc={condition: fmean(values) for condition, values in by_condition.items()},
        error=next(reversed(ERROR.findall(text)), "").strip() or None,
    )


# --- what goes with a job ---------------------------------------------------------------------------------------------


def full_command(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of cvrunner, with the main command if none is named."""
    if arguments and not arguments[0].startswith("-"):
        return list(arguments)
    return [DEFAULT_COMMAND, *arguments]


def runtime_environment(file: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Read Ray's runtime environment and add the variables that are passed on. Raises UsageError."""
    try:
        settings = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"runtime environment {file}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("env_vars", {}), dict):
        raise UsageError(f"runtime environment {file}: must hold keys with values, and env_vars names with values")
    passed_on = {name: environment[name] for name in PASSED_ON if name in environment}
    for name, value in passed_on.items():
        if "@" in urlsplit(value).netloc:
            raise UsageError(f"{name} holds a user name or password, and Ray shows a job's variables to everyone")
    return settings | {"env_vars": {**settings.get("env_vars", {}), **passed_on}}


def check_for_secrets(command: Sequence[str]) -> None:
    """Raise UsageError if an argument has an address with a password: Ray shows a job's command to everyone."""
    for word in command:
        name, _, value = word.partition("=")
        # An address may itself contain the sign.
        if not value or "://" in name:
            name, value = "an argument", word
        if "@" in urlsplit(value).netloc:
            raise UsageError(
                f"{name} holds a user name or password, and Ray shows a job's command to "
                "everyone; MLflow also reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster"
            )


# --- names ------------------------------------------------------------------------------------------------------------


def user_name() -> str:
    """Return the name of this user, as `id -un` prints it."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # in a container whose user has no name
        return str(os.geteuid())


def usual_id(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] = os.environ,
    runtime_env: Path | None = None,
    python: str = "python",
) -> str:
    """Return the job id of a command with all that changes its outcome; `jobs/submit.sh` computes the same one.

    It is a hash of the arguments, the user, the variables that are passed on, the Python program, the files that the
    arguments name, `configs/*.yaml`, which may be their bases, the runtime environment and the code.
    """
    words = [*command, user_name(), *(f"{name}={environment.get(name, '')}" for name in PASSED_ON), python]
    found = hashlib.sha256("".join(f"{word}\n" for word in words).encode())
    named = [folder / word for word in command]
    code = sorted(folder.glob("cvrunner/**/*.py"), key=lambda file: os.fsencode(file))
    for file in (*named, *sorted(folder.glob("configs/*.yaml")), runtime_env or default_runtime_env(), *code):
        if os.path.isfile(file):  # Path.is_file raises for a name that is too long
            found.update(file.read_bytes())
    return f"cvrunner-{command[0]}-{found.hexdigest()[:10]}"


def free_id(usual: str, jobs: Mapping[str, Job]) -> tuple[str, Job | None]:
    """Return the id to submit under (`usual`, then `usual-2` and so on), and the job if one already runs under it."""
    name, count = usual, 1
    while name in jobs:
        if not jobs[name].ended:
            return name, jobs[name]
        count += 1
        name = f"{usual}-{count}"
    return name, None


# --- the cluster ------------------------------------------------------------------------------------------------------


def is_here(address: str, listeners: Iterable[Listener]) -> bool:
    """Whether Ray's dashboard at this address runs on this machine, rather than behind a tunnel."""
    parts = urlsplit(address)
    # The program of another user is not known; a tunnel to a cluster is usually one's own.
    at_port = [one for one in listeners if one.port == parts.port]
    return parts.hostname in LOCAL and any(one.service == "Ray" or one.pid is None for one in at_port)


def cluster_address(given: str | None, environment: Mapping[str, str]) -> str:
    """Return the address of the dashboard: `given`, RAY_ADDRESS if it is HTTP, RAY_API_SERVER_ADDRESS, this machine.

    Raises ClusterError if it is not an HTTP address.
    """
    inherited = environment.get("RAY_ADDRESS", "")
    # RAY_ADDRESS may also be `auto` or a host and port of Ray's own protocol, which jobs cannot use.
    if not inherited.startswith(("http://", "https://")):
        inherited = ""
    address = given or inherited or environment.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    full = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(full)
        # The port is checked as it is read: one that is no number raises ValueError, and none at all is no error.
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        usable = False
    if not usable:
        raise ClusterError(f"{address}: must be where Ray's dashboard answers, such as {DEFAULT_ADDRESS}")
    return full.rstrip("/")
