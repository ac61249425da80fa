"""Following a job over a connection that breaks, and asking what does not answer. No cluster."""

from __future__ import annotations

import contextlib
import itertools
import shlex
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import yaml
from ray._private.runtime_env import packaging
from ray.job_submission import JobStatus

from cvrunner.errors import ClusterError, UsageError
from cvrunner.jobs import ray_jobs
from cvrunner.jobs.ray_jobs import RayJobs

REPOSITORY = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "POLL_S", 0.0)


def details(status: str, **more: Any) -> SimpleNamespace:
    fields = {"runtime_env": {}, "metadata": {}, "start_time": 1000, "end_time": None, "driver_exit_code": None}
    return SimpleNamespace(
        submission_id="a", status=JobStatus(status), entrypoint="x", message=None, **{**fields, **more}
    )


class Client:
    """Stands in for Ray's; each look takes the next of `looks`: how the job stands and its log so far, or an error."""

    def __init__(self, looks: list[tuple[str, str] | Exception]) -> None:
        self.looks = iter(looks)
        self.text = ""
        self.submitted: list[SimpleNamespace] = []

    def list_jobs(self) -> list[SimpleNamespace]:
        return self.submitted

    def submit_job(self, entrypoint: str, submission_id: str, **more: Any) -> None:
        new = details("PENDING", metadata=more["metadata"])
        new.entrypoint, new.submission_id = entrypoint, submission_id
        self.submitted.append(new)

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        look = next(self.looks)
        if isinstance(look, Exception):
            raise look
        status, self.text = look
        return details(status)

    def get_job_logs(self, job_id: str) -> str:
        return self.text


def cluster(monkeypatch: pytest.MonkeyPatch, client: Client) -> RayJobs:
    monkeypatch.setattr(ray_jobs, "_client", lambda address: client)
    return RayJobs("http://127.0.0.1:1")


def test_a_log_is_given_once_also_where_the_connection_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = requests.exceptions.ConnectionError()
    looks = [
        ("PENDING", ""),
        ("RUNNING", "one\n"),
        gone,
        gone,
        ("RUNNING", "one\ntwo\n"),
        ("FAILED", "one\ntwo\nend\n"),
    ]
    given = list(cluster(monkeypatch, Client(looks)).follow("a"))
    assert "".join(given) == "one\ntwo\nend\n"


def test_an_unknown_id_is_answered_with_the_nearest_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs = cluster(monkeypatch, Client([]))
    with pytest.raises(ClusterError, match=r"x: no such job on .*; there are none of cvrunner's at all"):
        jobs.find("x")
    for job_id in ("cvrunner-all-folds-0123456789", "cvrunner-audit-0123456789"):
        jobs.submit(job_id, "python", ["audit"], tmp_path, {})
    with pytest.raises(ClusterError) as caught:
        jobs.find("cvrunner-all-fold")
    assert str(caught.value).startswith(
        "cvrunner-all-fold: no such job on http://127.0.0.1:1; did you mean cvrunner-all-folds-0123456789"
    )


def test_the_shell_gets_the_arguments_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs = cluster(monkeypatch, Client([]))
    job = jobs.submit("a", "python", ["all-folds", "--set", "a=b c"], tmp_path, {})
    assert shlex.split(job.entrypoint) == ["python", "-m", "cvrunner", "all-folds", "--set", "a=b c"]


def test_a_cluster_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "PATIENCE_S", 0.05)
    looks = itertools.chain([("RUNNING", "one\n")], itertools.repeat(requests.exceptions.ConnectionError()))
    jobs = cluster(monkeypatch, Client(looks))  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        list(jobs.follow("a"))


def test_a_job_that_does_not_stop_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "STOP_GRACE_S", -2.95)
    jobs = cluster(monkeypatch, Client(itertools.repeat(("RUNNING", ""))))  # type: ignore[arg-type]
    job = ray_jobs._job(details("RUNNING"))
    with pytest.raises(ClusterError, match="a: still RUNNING"):
        jobs.wait_until_stopped(job)


def test_the_time_to_save_is_that_of_the_jobs_own_settings() -> None:
    settings = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}
    assert ray_jobs._job(details("RUNNING", runtime_env=settings)).stop_wait_s == 60
    assert ray_jobs._job(details("RUNNING", runtime_env=None)).stop_wait_s == 3
    odd = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "long"}}
    assert ray_jobs._job(details("RUNNING", runtime_env=odd)).stop_wait_s == 3


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """Accepts connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_what_listens_but_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "ANSWER_S", 0.2)
    with silent() as address, pytest.raises(ClusterError, match="something listens there but does not answer"):
        RayJobs(address)


def test_a_token_that_is_not_there_is_said_before_ray_ends_the_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ClusterError, match=r"RAY_AUTH_TOKEN_PATH .*none: no such file"):
        RayJobs("http://127.0.0.1:1")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ClusterError, match="RAY_AUTH_MODE is token and there is none"):
        RayJobs("http://127.0.0.1:1")


class Recorder(BaseHTTPRequestHandler):
    """Notes each request and answers as a Ray without jobs."""

    def do_GET(self) -> None:
        self.server.seen.append(self.path)  # type: ignore[attr-defined]
        body = b"[]" if self.path == "/api/jobs/" else b'{"version": "4", "ray_version": "2.60.0", "ray_commit": "x"}'
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def recorder(host: str) -> Iterator[tuple[str, list[str]]]:
    with ThreadingHTTPServer((host, 0), Recorder) as server:
        server.seen = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://{host}:{server.server_port}", server.seen  # type: ignore[attr-defined]
        finally:
            server.shutdown()


# 127.0.0.2 stands for another machine: it is in no list of exceptions.
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_no_proxy_sees_a_request_to_a_cluster_without_encryption(
    monkeypatch: pytest.MonkeyPatch, host: str, variable: str
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    with recorder("127.0.0.1") as (proxy, through_proxy), recorder(host) as (address, direct):
        monkeypatch.setenv(variable, proxy)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 48)
        assert RayJobs(address).all() == {}
    assert "/api/jobs/" in direct
    assert through_proxy == []


def test_an_upload_that_is_too_large_names_the_largest_files_that_would_be_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray._private.runtime_env.packaging.GCS_STORAGE_MAX_SIZE", 100_000_000)
    sizes = {"small.txt": 1, "model.big": 60, "data/table.csv": 50, "a.wav": 900, "b.dat": 900}
    for name, megabytes in sizes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(megabytes * 1_000_000)  # sparse: it takes no space
    (tmp_path / ".gitignore").write_text("b.dat\n")
    with pytest.raises(UsageError, match=r"111 MB would .* less than 100 MB; .* model\.big .*, data/t") as raised:
        ray_jobs.check_upload(tmp_path, ["*.wav"])
    assert "a.wav" not in str(raised.value)
    assert "b.dat" not in str(raised.value)
    ray_jobs.check_upload(tmp_path, ["*.wav", "/data/"])


def test_what_holds_audio_checkpoints_or_archives_is_not_uploaded(tmp_path: Path) -> None:
    excludes = yaml.safe_load((REPOSITORY / "jobs" / "runtime_env.yaml").read_text())["excludes"]
    match = packaging._get_excludes(tmp_path, excludes)
    for name in (
        "a.ckpt",
        "a.tar",
        "a.tar.gz",
        "a.tgz",
        "a.zip",
        "a.wav",
        "x/a.flac",
        "a.opus",
        "a.safetensors",
    ):
        assert match(tmp_path / name), name
    for name in ("a.yaml", "cvrunner/cli.py", "cvrunner/demo_encoder/model.safetensors", "table.csv"):
        assert not match(tmp_path / name), name
