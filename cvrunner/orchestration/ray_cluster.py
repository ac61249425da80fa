"""Whether a Ray cluster answers, and its size, asked in a subprocess: a cluster that listens but does not answer blocks
its callers for most of a minute.

Only reads: no driver is registered and no Ray is started.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path
from urllib.parse import urlsplit

from cvrunner.errors import ClusterError
from cvrunner.paths import in_ray_session

RAY_STOP_WAIT_S = 3.0
"""Time that Ray leaves a stopped job, unless its runtime environment sets STOP_WAIT."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"

CONNECT_S = 1.0
"""Longest time to connect to an address."""
HEALTH_S = 8.0
"""Longest time for a cluster to answer before it is joined, including the start of a process that imports Ray."""
DEFAULT_PORTS = {"http": 80, "https": 443, "ray": 10001, "": 6379}
LOCAL = ("localhost", "127.0.0.1", "::1")


def bypass_proxy(environment: MutableMapping[str, str]) -> None:
    """Exempt this machine from the proxies of the environment: requests to it may hold Ray's token."""
    for name in ("no_proxy", "NO_PROXY"):
        exempt = [host for host in environment.get(name, "").split(",") if host.strip()]
        environment[name] = ",".join(dict.fromkeys([*exempt, *LOCAL]))


def answers(address: str) -> bool:
    """Whether a program listens at `host:port` or a URL."""
    if "://" not in address:
        address = f"//{address}"
    try:
        parts = urlsplit(address)
        port = parts.port or DEFAULT_PORTS.get(parts.scheme, 0)
        with socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S):
            return True
    except (OSError, ValueError):
        return False


def check_address(address: str) -> None:
    """Raise ClusterError unless a cluster answers at RAY_ADDRESS: `ray.init` waits for minutes, deaf to SIGTERM."""
    remedy = "start it, correct RAY_ADDRESS, or unset it to use this machine alone"
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS {address}: is where `cvrunner submit` sends jobs; to train from here, give host:port of the "
            "cluster's head, or unset RAY_ADDRESS to use this machine alone"
        )
    if address != "auto" and not answers(address):
        raise ClusterError(f"RAY_ADDRESS {address}: nobody answers there within {CONNECT_S:g} s; {remedy}")
    # A job runs on the cluster that started it.
    if in_ray_session(Path.cwd()) or address.startswith("ray://"):
        return
    check = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(check, capture_output=True, text=True, timeout=HEALTH_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise ClusterError(f"RAY_ADDRESS {address}: no Ray answers within {HEALTH_S:g} s; {remedy}") from None
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise ClusterError(f"RAY_ADDRESS {address}: Ray does not answer: {reason}; {remedy}")


def ask_nodes(address: str, limit_s: float) -> tuple[list[dict[str, float]], str | None]:
    """Return the resources of each live node, or none and the reason in one line. `address` as in RAY_ADDRESS."""
    try:
        asked = subprocess.run(  # noqa: S603 (our own program)
            [sys.executable, "-m", __name__, address],
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [], f"no answer within {limit_s:g} s"
    try:
        # Ray may print above the answer, which is the last line.
        nodes, error = json.loads(asked.stdout.strip().rpartition("\n")[2])
    except ValueError:
        return [], "its answer cannot be read"
    return nodes, error


def read_nodes(address: str, limit_s: float) -> tuple[list[dict[str, float]], str | None]:
    """Do what `ask_nodes` does, but in this process."""
    from ray.util.state import list_nodes  # takes a second, which only the subprocess pays

    try:
        nodes = list_nodes(address=address, filters=[("state", "=", "ALIVE")], timeout=int(limit_s), detail=True)
    except Exception as error:  # wrong token, no dashboard, not a Ray: each is an answer
        return [], f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return [dict(node.resources_total or {}) for node in nodes], None


if __name__ == "__main__":
    print(json.dumps(read_nodes(sys.argv[1], 5.0)))
