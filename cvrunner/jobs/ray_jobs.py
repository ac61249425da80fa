"""Submit and query jobs on a Ray cluster over the port of its dashboard, without a driver."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import requests

from cvrunner import __version__
from cvrunner.errors import ClusterError, UsageError
from cvrunner.jobs.jobs import Job, user_name
from cvrunner.orchestration.machine import find_token
from cvrunner.orchestration.ray_cluster import RAY_STOP_WAIT_S, STOP_WAIT, bypass_proxy
from cvrunner.text import format_bytes

ANSWER_S = 15.0
"""Time limit for a query."""
UPLOAD_S = 90.0
"""Time limit for an upload."""
PATIENCE_S = 60.0
"""How long a follower waits for a cluster that does not answer: a tunnel breaks, a laptop sleeps."""
POLL_S = 1.0
LOG_PER_S = 200_000
"""Characters of log to read per second: Ray sends the whole log each time, so a long one is read less often."""
LARGEST = 5
"""Number of files that are named if an upload is too large."""
STOP_GRACE_S = 30.0
"""Time for Ray to end a job after its time to save is over."""


class RayJobs:
    """The jobs of the cluster at `address`. Every method raises ClusterError, with a message of one sentence."""

    def __init__(self, address: str) -> None:
        """Connect, with the cluster's token if there is one; what Ray would end the program for is refused before."""
        self.address = address
        token = find_token(os.environ, Path.home())
        if token.in_environment or token.file_mode is not None:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        elif token.file_chosen:
            raise ClusterError(f"RAY_AUTH_TOKEN_PATH {token.file}: no such file; unset it, or write the token there")
        elif token.auth_mode == "token":
            raise ClusterError(
                f"RAY_AUTH_MODE is token and there is none: put the cluster's token into {token.file} or RAY_AUTH_TOKEN"
            )
        # Ray prefers this variable to the address given as an argument.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
        with _in_one_sentence(address):
            self._client = _client(address)

    def all(self) -> dict[str, Job]:
        """Return the submitted jobs by id, oldest first."""
        with _in_one_sentence(self.address):
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return {job.id: job for job in sorted(found, key=lambda job: job.started_s or 0.0)}

    def find(self, job_id: str) -> Job:
        """Return a job by its id. The error for an unknown id names the nearest ones."""
        jobs = self.all()
        if job_id in jobs:
            return jobs[job_id]
        names = [name for name, job in jobs.items() if job.is_cvrunner]
        if not names:
            raise ClusterError(f"{job_id}: no such job on {self.address}; there are none of cvrunner's at all")
        near = difflib.get_close_matches(job_id, names, n=3, cutoff=0.3) or names[-3:]
        raise ClusterError(f"{job_id}: no such job on {self.address}; did you mean {' or '.join(near)}?")

    def submit(self, job_id: str, python: str, command: Sequence[str], folder: Path, settings: dict[str, Any]) -> Job:
        """Upload the folder and start the job, or return the job if another process has started it meanwhile."""
        check_upload(folder, settings.get("excludes", []))
        try:
            with _in_one_sentence(self.address):
                self._client.submit_job(
                    # A line for the cluster's shell, hence quoted.
                    entrypoint=shlex.join([python, "-m", "cvrunner", *command]),
                    submission_id=job_id,
                    runtime_env={**settings, "working_dir": str(folder)},
                    metadata={"cvrunner": __version__, "user": user_name(), "command": shlex.join(command)},
                )
        except ClusterError:
            # Ray refuses an id that is taken: another process may have submitted the same command since it was chosen.
            if job_id not in self.all():
                raise
        return self.find(job_id)

    def log(self, job_id: str) -> str:
        """Return everything that the job has printed so far."""
        with _in_one_sentence(self.address):
            text: str = self._client.get_job_logs(job_id)
        return text

    def follow(self, job_id: str) -> Iterator[str]:
        """Yield what the job prints, from its beginning to its end."""
        seen, answered = 0, time.monotonic()
        while True:
            try:
                # The status is read before the log: if the job has ended, the log is complete.
                ended, text = self._info(job_id).ended, self.log(job_id)
            except ClusterError:
                if time.monotonic() - answered > PATIENCE_S:
                    raise
            else:
                answered = time.monotonic()
                yield text[seen:]
                seen = max(seen, len(text))
                if ended:
                    return
            time.sleep(max(POLL_S, seen / LOG_PER_S))

    def ask_to_stop(self, job_id: str) -> None:
        """Ask a job to stop; returns at once."""
        with _in_one_sentence(self.address):
            self._client.stop_job(job_id)

    def wait_until_stopped(self, job: Job) -> Job:
        """Wait for a job to end and return it. Raises ClusterError if it has not ended in its time."""
        end = time.monotonic() + job.stop_wait_s + STOP_GRACE_S
        while time.monotonic() < end:
            now = self._info(job.id)
            if now.ended:
                return now
            time.sleep(POLL_S)
        raise ClusterError(f"{job.id}: still {now.status} {job.stop_wait_s + STOP_GRACE_S:g} s after it was asked")

    def _info(self, job_id: str) -> Job:
        with _in_one_sentence(self.address):
            return _job(self._client.get_job_info(job_id))


def check_upload(folder: Path, excludes: Sequence[str]) -> None:
    """Raise UsageError, with the largest files, if Ray would refuse what it uploads of a folder as too large."""
    from ray._private.runtime_env import packaging  # late, as in `_client`

    sizes: dict[Path, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            sizes[path] = path.stat().st_size

    # Ray's own rules for what is left out; it packs files without compressing them.
    respects_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    packaging._dir_travel(folder, [packaging._get_excludes(folder, list(excludes))], add, respects_gitignore)
    if (total := sum(sizes.values())) >= packaging.GCS_STORAGE_MAX_SIZE:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:LARGEST]
        named = ", ".join(f"{path.relative_to(folder)} ({format_bytes(sizes[path])})" for path in largest)
        limit = format_bytes(packaging.GCS_STORAGE_MAX_SIZE)
        raise UsageError(
            f"{folder}: {format_bytes(total)} would be uploaded, Ray takes less than {limit}; the largest files are "
            f"{named}. Move them out of the folder, or add them to .gitignore or to `excludes` in jobs/runtime_env.yaml"
        )


def _client(address: str) -> Any:
    """Return Ray's client with a time limit for each request, which Ray itself does not set."""
    bypass_proxy(os.environ)
    # Ray reads RAY_AUTH_MODE when it is imported, so this must come after RayJobs has set it.
    from ray.job_submission import JobSubmissionClient

    # Ray logs what it uploads and leaves out; what matters is raised as an exception.
    for name in (
        "dashboard.modules.dashboard_sdk",
        "_private.runtime_env.packaging",
        "_private.runtime_env.working_dir",
    ):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **settings: Any) -> Any:
            limit_s = {"GET": ANSWER_S}.get(method, UPLOAD_S)
            # Without encryption, a proxy of the environment would read the token.
            proxies = {} if address.startswith("https:") else {"http": None, "all": None}
            return super()._do_request(method, endpoint, **{"timeout": limit_s, "proxies": proxies, **settings})

    return Client(address)


@contextlib.contextmanager
def _in_one_sentence(address: str) -> Iterator[None]:
    """Turn what Ray and requests raise into ClusterError."""
    # Imported late, as in `_client`.
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        how = "it is not the token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        if os.environ.get("RAY_AUTH_MODE") != "token":
            how = "export RAY_AUTH_MODE=token, with the token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        raise ClusterError(f"{address}: the cluster wants its token: {how}") from None
    except requests.exceptions.Timeout:
        raise ClusterError(f"{address}: something listens there but does not answer; is it Ray's dashboard?") from None
    except (ConnectionError, requests.exceptions.ConnectionError):
        raise ClusterError(
            f"{address}: no Ray cluster answers; start one with `ray start --head`, open the tunnel to it, or give "
            "another address"
        ) from None
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ClusterError(f"{address}: {last}") from None


def _job(details: Any) -> Job:
    """Convert Ray's details of a job."""
    environment = (details.runtime_env or {}).get("env_vars") or {}
    stop_wait_s = RAY_STOP_WAIT_S
    # The submitter may have written anything into this variable.
    with contextlib.suppress(ValueError):
        stop_wait_s = float(environment.get(STOP_WAIT) or RAY_STOP_WAIT_S)
    return Job(
        id=details.submission_id,
        status=details.status.value,
        entrypoint=details.entrypoint,
        marked="cvrunner" in (details.metadata or {}),
        user=(details.metadata or {}).get("user"),
        # Milliseconds; None and 0 both mean that there is no time.
        started_s=(details.start_time or 0) / 1000 or None,
        ended_s=(details.end_time or 0) / 1000 or None,
        process_code=details.driver_exit_code,
        message=details.message or "",
        stop_wait_s=stop_wait_s,
    )
