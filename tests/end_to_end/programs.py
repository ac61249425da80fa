"""Run the program as a user does: in separate processes, with a separate Ray, folders and ports."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cvrunner.records.run_directory import RunDirectory
from tests.tiny_encoders import save_encoder

REPOSITORY = Path(__file__).parent.parent.parent
RAY = str(Path(sys.executable).parent / "ray")
TOKEN = "0123456789abcdef0123456789abcdef0123456789abcdef"
TIME_LIMIT_S = 240
CLUSTER_LIMIT_S = 3600
TINY = """
base: {base}
corpus: {{root: {root}, demo: {{utterances: 60}}}}
model: {{encoder: {encoder}, width: 16, mamba: {{state_size: 4, head_dim: 8, layers: 1}}}}
train: {{epochs: {epochs}, seeds: [0], lr: 1e-3, encoder_lr: 1e-4}}
cluster: {{cache_dir: {cache}}}
"""


@dataclass(frozen=True)
class FinishedRun:
    """A run that `all-folds` trained, shared by the tests that only read it."""

    folder: Path
    """Working directory: corpus, encoder, cache, configuration and results."""
    config: Path
    directory: RunDirectory
    stdout: str
    stderr: str


def tiny_config(folder: Path, epochs: int = 2, name: str = "tiny.yaml") -> Path:
    """Write the demo's configuration for a smaller corpus, encoder and head to `folder`/`name`."""
    save_encoder(folder / "wavlm")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        TINY.format(
            base=REPOSITORY / "configs" / "demo.yaml",
            root=folder / "corpus",
            encoder=folder / "wavlm",
            cache=folder / "cache",
            epochs=epochs,
        )
    )
    return path


def environment(home: Path) -> dict[str, str]:
    """The user's environment with a separate home and without a Ray cluster to join."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CVRUNNER_"))}
    return {**keep, "HOME": str(home), "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200", "NO_COLOR": "1"}


def cvrunner(*arguments: str | Path, folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m cvrunner ...` in `folder` and capture its output."""
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env={**environment(folder), **settings},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "cvrunner", *map(str, arguments)]


@contextlib.contextmanager
def started(
    arguments: Sequence[str], folder: Path, env: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in its own group; the whole group is ended afterwards."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


@contextlib.contextmanager
def ray_cluster(folder: Path, gpus: int, token: str | None) -> Iterator[dict[str, str]]:
    """A Ray head with its own ports and folders, ended afterwards; gives the environment to use it from.

    `python` is this interpreter there, as in an activated environment. Results go to `folder`/home.
    """
    temporary, options, address = head_options()
    env = {
        **environment(folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CVRUNNER_HOME": str(folder / "home"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens to this machine alone, whatever its address
        "RAY_TMPDIR": str(temporary),
        **({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}),
    }
    # If the tests are killed, the head must not outlive them for long.
    limit = ["timeout", "--foreground", str(CLUSTER_LIMIT_S)] if shutil.which("timeout") else []
    head = [*limit, RAY, "start", "--head", "--num-gpus", str(gpus), *options]
    with started(head, folder, env, folder / "head.log"):
        used = {**env, "RAY_ADDRESS": address}
        # The agent that starts jobs comes up after the head answers.
        wait_until(lambda: ray_says(used, "job", "submit", "--", "true").returncode == 0, "the cluster")
        yield used
    shutil.rmtree(temporary, ignore_errors=True)


def head_options() -> tuple[Path, list[str], str]:
    """For `ray start --head`: a temporary folder, options that name it and free ports, and the dashboard's address."""
    port, dashboard, client, agent, agent_grpc, runtime_env, metrics = free_ports(7)
    # Ray puts its sockets below its temporary folder, and their paths may not be long.
    temporary = Path(f"/tmp/cvr-{os.getpid()}-{port}")
    options = [
        "--block", "--num-cpus", "8", f"--port={port}",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--runtime-env-agent-port={runtime_env}",
        f"--metrics-export-port={metrics}", f"--temp-dir={temporary}", "--disable-usage-stats",
    ]  # fmt: skip
    return temporary, options, f"http://127.0.0.1:{dashboard}"


def ray_says(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `ray ...` in the repository and capture its output."""
    return subprocess.run(
        [RAY, *arguments], env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False
    )


def wait_until(condition: object, what: str, limit_s: float = 120) -> None:
    """Poll `condition()` until it is true. Raises TimeoutError that names `what`."""
    assert callable(condition)
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen in {limit_s} s")
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
