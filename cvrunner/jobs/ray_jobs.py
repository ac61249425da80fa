"""Submitting jobs to a Ray cluster and asking about them, over the port of its dashboard. Registers no driver."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import requests

from cvrunner.errors import ClusterError
from cvrunner.jobs.jobs import Job, entrypoint, unknown_job
from cvrunner.orchestration.machine import find_token
from cvrunner.orchestration.ray_cluster import RAY_STOP_WAIT_S, STOP_WAIT

ANSWER_S = 15.0
"""How long the cluster may take to answer a question."""
UPLOAD_S = 90.0
"""How long it may take to take what is sent to it."""
PATIENCE_S = 60.0
"""How long a job is followed that cannot be asked about: a tunnel breaks, a laptop sleeps."""
LOOK_EVERY_S = 1.0
LOG_PER_S = 200_000
"""Characters of log that a look may cost a second: a long log is looked at less often."""
STOP_GRACE_S = 30.0
"""What Ray may take to end a job after the time that it leaves it."""


class RayJobs:
    """The jobs of the cluster at `address`. All of its methods raise ClusterError in one sentence."""

    def __init__(self, address: str) -> None:
        self.address = address
        _authenticate()
        # Ray takes this before any address that it is given.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
        with _in_one_sentence(address):
            self._client = _client(address)

    def all(self) -> dict[str, Job]:
        """The jobs that were submitted, by id, the oldest first."""
        with _in_one_sentence(self.address):
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return {job.id: job for job in sorted(found, key=lambda job: job.started_s or 0.0)}

    def find(self, job_id: str) -> Job:
        jobs = self.all()
        if job_id not in jobs:
            raise unknown_job(job_id, jobs, self.address)
        return jobs[job_id]

    def submit(self, job_id: str, python: str, command: Sequence[str], folder: Path, settings: dict[str, Any]) -> Job:
        """Upload the folder and start the job; where somebody else was faster, that job."""
        from cvrunner import __version__

        try:
            with _in_one_sentence(self.address):
                self._client.submit_job(
                    entrypoint=entrypoint(python, command),
                    submission_id=job_id,
                    runtime_env={**settings, "working_dir": str(folder)},
                    metadata={"cvrunner": __version__, "command": shlex.join(command)},
                )
        except ClusterError:
            if job_id not in self.all():
                raise
        return self.find(job_id)

    def log(self, job_id: str) -> str:
        """All that the job has printed so far."""
        with _in_one_sentence(self.address):
            text: str = self._client.get_job_logs(job_id)
        return text

    def follow(self, job_id: str) -> Iterator[str]:
        """What the job prints, from its beginning to its end, as it comes."""
        seen, answered = 0, time.monotonic()
        while True:
            try:
                # First whether it has ended: the log that is read then is the whole one.
                ended, text = self._look(job_id).ended, self.log(job_id)
            except ClusterError:
                if time.monotonic() - answered > PATIENCE_S:
                    raise
            else:
                answered = time.monotonic()
                yield text[seen:]
                seen = max(seen, len(text))
                if ended:
                    return
            time.sleep(max(LOOK_EVERY_S, seen / LOG_PER_S))

    def ask_to_stop(self, job_id: str) -> None:
        with _in_one_sentence(self.address):
            self._client.stop_job(job_id)

    def wait_until_stopped(self, job: Job) -> Job:
        """The job once it has ended. Raises ClusterError where it has not in the time that it is left."""
        end = time.monotonic() + job.stop_wait_s + STOP_GRACE_S
        while time.monotonic() < end:
            now = self._look(job.id)
            if now.ended:
                return now
            time.sleep(LOOK_EVERY_S)
        raise ClusterError(f"{job.id}: still {now.status} {job.stop_wait_s + STOP_GRACE_S:g} s after it was asked")

    def _look(self, job_id: str) -> Job:
        with _in_one_sentence(self.address):
            return _job(self._client.get_job_info(job_id))


def _authenticate() -> None:
    """Have Ray send the token where there is one. Raises ClusterError where Ray would end the program instead."""
    token = find_token(os.environ, Path.home())
    if token.in_environment or token.file_mode is not None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    elif token.file_chosen:
        raise ClusterError(f"RAY_AUTH_TOKEN_PATH {token.file}: no such file; unset it, or write the token there")
    elif token.auth_mode == "token":
        raise ClusterError(
            f"RAY_AUTH_MODE is token and there is none: put the cluster's token into {token.file} or RAY_AUTH_TOKEN"
        )


def _client(address: str) -> Any:
    """Ray's own, whose every request has a time limit."""
    from ray.job_submission import JobSubmissionClient

    # Its lines about what it uploads and leaves out; what matters comes as an exception.
    for name in (
        "dashboard.modules.dashboard_sdk",
        "_private.runtime_env.packaging",
        "_private.runtime_env.working_dir",
    ):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **settings: Any) -> Any:
            limit_s = ANSWER_S if method == "GET" else UPLOAD_S
            return super()._do_request(method, endpoint, **{"timeout": limit_s, **settings})

    return Client(address)


@contextlib.contextmanager
def _in_one_sentence(address: str) -> Iterator[None]:
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        how = "RAY_AUTH_TOKEN or ~/.ray/auth_token"
        if os.environ.get("RAY_AUTH_MODE") != "token":
            how = f"export RAY_AUTH_MODE=token, with the token in {how}"
        else:
            how = f"it is not the token in {how}"
        raise ClusterError(f"{address}: the cluster wants its token: {how}") from None
    except requests.exceptions.Timeout:
        raise ClusterError(f"{address}: something listens there but does not answer; is it Ray's dashboard?") from None
    except (ConnectionError, requests.exceptions.ConnectionError):
        raise ClusterError(
            f"{address}: no Ray cluster answers; start one with `ray start --head`, open the tunnel to it, or give "
            "--address"
        ) from None
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ClusterError(f"{address}: {last}") from None


def _job(details: Any) -> Job:
    environment = (details.runtime_env or {}).get("env_vars") or {}
    return Job(
        id=details.submission_id,
        status=details.status.value,
        entrypoint=details.entrypoint,
        marked="cvrunner" in (details.metadata or {}),
        started_s=_seconds(details.start_time),
        ended_s=_seconds(details.end_time),
        process_code=details.driver_exit_code,
        message=details.message or "",
        stop_wait_s=_number(environment.get(STOP_WAIT)),
    )


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None


def _number(text: str | None) -> float:
    try:
        return float(text or RAY_STOP_WAIT_S)
    except ValueError:
        return RAY_STOP_WAIT_S
