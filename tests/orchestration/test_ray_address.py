"""Joining a cluster: an address that nobody, or not Ray, answers at is one sentence, soon."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cvrunner.config.sections import ClusterConfig
from cvrunner.errors import ClusterError
from cvrunner.orchestration import ray_cluster, ray_executor
from cvrunner.orchestration.machine import DEFAULT_TEMP, UNIX_PATH_LIMIT, ray_temp, socket_path_bytes
from cvrunner.orchestration.ray_cluster import bypass_proxy, check_address


def test_an_address_at_which_nobody_listens_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ClusterError, match=rf"RAY_ADDRESS {address}: nobody answers there within 1 s; .* unset it"):
        check_address(address)


def test_a_program_that_listens_but_is_not_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "HEALTH_S", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ClusterError, match="no Ray answers within 1 s"):
            check_address(f"127.0.0.1:{silent.getsockname()[1]}")


def test_the_address_for_jobs_is_none_to_train_at() -> None:
    with pytest.raises(ClusterError, match=r"`cvrunner submit` sends jobs; .* host:port"):
        check_address("http://127.0.0.1:8265")


@pytest.mark.parametrize("address", ["", "local"])
def test_an_empty_address_is_none_before_ray_is_imported(address: str) -> None:
    code = (
        "import os, cvrunner.orchestration.ray_executor; "
        "print('RAY_ADDRESS' in os.environ, os.environ['RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'])"
    )
    env = os.environ | {"RAY_ADDRESS": address}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "0"]


@pytest.mark.parametrize(
    "raised",
    [
        Exception("The current node timed out during startup. This could happen because some of the raylet failed."),
        RuntimeError("Failed to start GCS.  Last 1 lines of error files:\n\n C \n.Please check gcs_server.out"),
    ],
)
def test_a_ray_that_does_not_start_is_one_sentence(raised: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise raised

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_executor.ray, "init", fail)
    with pytest.raises(ClusterError, match=r"^Ray did not start on this machine: .+\. The same .+/logs$") as error:
        ray_executor.connect("run", ClusterConfig())
    assert "\n" not in str(error.value)


def test_a_long_temporary_folder_is_known_before_ray_fails_with_it() -> None:
    assert ray_temp({"RAY_TMPDIR": "/short/"}) == "/short"
    assert socket_path_bytes(ray_temp({"RAY_TMPDIR": "/x" * 40})) > UNIX_PATH_LIMIT
    assert socket_path_bytes(DEFAULT_TEMP) < UNIX_PATH_LIMIT


def test_requests_to_this_machine_go_past_the_proxies_of_the_environment() -> None:
    environment = {"no_proxy": "example.org, 127.0.0.1"}
    bypass_proxy(environment)
    for name in ("no_proxy", "NO_PROXY"):
        assert {"localhost", "127.0.0.1", "::1"} <= set(environment[name].replace(" ", "").split(","))
    assert environment["no_proxy"].startswith("example.org")


@pytest.mark.suites("ci", "all")
def test_sigterm_is_heard_while_a_cluster_is_asked(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        code = "from cvrunner.orchestration.ray_cluster import check_address as check; print(1, flush=True); "
        code += f"check({address!r})"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as asking:
            assert asking.stdout is not None
            asking.stdout.readline()
            time.sleep(1)
            asking.terminate()
            assert asking.wait(5) == -15
            # What it had asked ends by itself only after a minute.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(asking.pid, signal.SIGKILL)
