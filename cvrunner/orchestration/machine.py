"""This machine as Ray will find it: hardware, listening programs, token and cluster. Reads only."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psutil

from cvrunner.orchestration.gpus import gpu_names
from cvrunner.orchestration.ray_cluster import ask_nodes

CONNECT_S = 1.0
"""How long a connection may take."""
ANSWER_S = 8.0
"""How long a cluster may take to tell its size, with the start of a process that imports Ray."""
DEFAULT_PORTS = {"http": 80, "https": 443, "ray": 10001, "": 6379}
UNIX_PATH_LIMIT = 103 if sys.platform == "darwin" else 107
Service = Literal["Ray", "MLflow"]


@dataclass(frozen=True)
class Token:
    """How Ray is told to ask for a token, and where it is. The token itself is never read."""

    auth_mode: str | None
    """RAY_AUTH_MODE."""
    in_environment: bool
    """RAY_AUTH_TOKEN is set and not empty."""
    file: Path
    """RAY_AUTH_TOKEN_PATH, or Ray's own place."""
    file_mode: int | None
    """Permission bits; None: there is no file."""
    file_chosen: bool
    """By RAY_AUTH_TOKEN_PATH."""


@dataclass(frozen=True)
class Listener:
    """A program of this machine that waits for connections."""

    host: str
    port: int
    pid: int | None
    """None: of another user."""
    program: str
    """gcs_server, raylet, dashboard, mlflow, or the process's name."""
    service: Service | None
    """None: neither Ray nor MLflow."""


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster of RAY_ADDRESS, else one that runs on this machine."""

    address: str
    chosen: bool
    """By RAY_ADDRESS."""
    error: str | None
    """Why its size is not known."""
    nodes: int = 0
    gpus: float = 0.0
    cpus: float = 0.0


@dataclass(frozen=True)
class Hardware:
    """The machine itself."""

    host: str
    cores: int
    available_bytes: int
    """Memory that programs can have without swapping."""
    gpus: tuple[str, ...]
    """Names, from NVIDIA's driver; empty: no driver or no GPU."""
    shm_bytes: int | None
    """Free in /dev/shm, where Ray keeps objects; None: there is none on this system."""
    temp: str
    """Under which Ray makes its session folder."""
    temp_used: float
    """Share of that disk that is full, 0..1."""
    socket_path_limit: int
    """Longest path of a Unix socket here, in bytes."""


def find_token(environment: Mapping[str, str], home: Path) -> Token:
    """Ray's order: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    chosen = environment.get("RAY_AUTH_TOKEN_PATH")
    file = Path(chosen).expanduser() if chosen else home / ".ray" / "auth_token"
    try:
        mode = file.stat().st_mode & 0o777 if file.is_file() else None
    except OSError:
        mode = None
    return Token(
        environment.get("RAY_AUTH_MODE"), bool(environment.get("RAY_AUTH_TOKEN")), file, mode, chosen is not None
    )


def find_listeners() -> tuple[Listener, ...] | None:
    """All listening TCP sockets. None where the system does not tell."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return None
    return tuple(
        _listener(connection.laddr.ip, connection.laddr.port, connection.pid)
        for connection in connections
        if connection.status == psutil.CONN_LISTEN and connection.laddr
    )


def _listener(host: str, port: int, pid: int | None) -> Listener:
    name, command = "another program", []
    if pid is not None:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            name, command = process.name(), process.cmdline()
    program, service = recognise(name, command, port)
    return Listener(host, port, pid, program, service)


def recognise(name: str, command: Sequence[str], port: int) -> tuple[str, Service | None]:
    """Program and service of a process, by its command line; Ray's workers rename theirs to `ray::...`."""
    line = " ".join(command)
    start = os.path.basename(command[0]) if command else name
    if start in ("gcs_server", "raylet"):
        return start, "Ray"
    if start.startswith("ray::"):
        return start.removeprefix("ray::").split()[0], "Ray"
    if "/ray/dashboard/dashboard.py" in line:
        return ("dashboard" if f"--port={port}" in command else "dashboard metrics"), "Ray"
    if found := re.search(r"/ray/(?:autoscaler|dashboard|util|_private)/[\w/]*?(\w+)\.py\b| -m ray\.([\w.]+)", line):
        return found.group(1) or found.group(2), "Ray"
    if re.search(r"\bmlflow(?:\.server|[\w.:]* +(?:ui|server)\b)", line):
        return "mlflow", "MLflow"
    return name, None


def find_cluster(environment: Mapping[str, str], listeners: Sequence[Listener]) -> Cluster | None:
    """The cluster of RAY_ADDRESS, else the one whose dashboard listens here, with its size."""
    chosen = environment.get("RAY_ADDRESS")
    if chosen == "local":
        return None
    dashboards = sorted(listener.port for listener in listeners if listener.program == "dashboard")
    if chosen and chosen != "auto":
        address = chosen
    elif dashboards:
        address = f"http://127.0.0.1:{8265 if 8265 in dashboards else dashboards[0]}"
    else:
        return Cluster("auto", True, "no Ray runs on this machine") if chosen else None
    if not answers(address):
        return Cluster(address, bool(chosen), f"nobody answers there within {CONNECT_S:g} s")
    nodes, error = ask_nodes(address, ANSWER_S)
    gpus, cpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("GPU", "CPU"))
    return Cluster(address, bool(chosen), error, len(nodes), gpus, cpus)


def answers(address: str) -> bool:
    """Whether somebody listens at `host:port` or a URL."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        port = parts.port or DEFAULT_PORTS.get(parts.scheme, 0)
        with socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S):
            return True
    except (OSError, ValueError):
        return False


def find_hardware(environment: Mapping[str, str]) -> Hardware:
    """Cores, memory, GPUs and the places that Ray uses."""
    temp = environment.get("RAY_TMPDIR") or (environment.get("TMPDIR") if sys.platform == "linux" else None) or "/tmp"  # noqa: S108 (Ray's own)
    shm = Path("/dev/shm")  # noqa: S108 (Ray's own)
    used = shutil.disk_usage(existing_folder(Path(temp)))
    return Hardware(
        host=socket.gethostname(),
        cores=os.cpu_count() or 1,
        available_bytes=psutil.virtual_memory().available,
        gpus=gpu_names(),
        shm_bytes=shutil.disk_usage(shm).free if shm.is_dir() else None,
        temp=temp.rstrip("/"),
        temp_used=1 - used.free / used.total if used.total else 0.0,
        socket_path_limit=UNIX_PATH_LIMIT,
    )


def existing_folder(path: Path) -> Path:
    """The path or the nearest one above it that is there."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))
