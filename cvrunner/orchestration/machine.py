"""This machine as Ray will find it: GPUs, hardware, listening programs, token and cluster. Reads only."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil

from cvrunner.orchestration.ray_cluster import ask_nodes

CONNECT_S = 1.0
"""Longest time to connect to an address."""
ANSWER_S = 8.0
"""Longest time to ask a cluster for its size, including the start of a process that imports Ray."""
DEFAULT_PORTS = {"http": 80, "https": 443, "ray": 10001, "": 6379}
UNIX_PATH_LIMIT = 103 if sys.platform == "darwin" else 107
MIB = 2**20
Service = Literal["Ray", "MLflow"]


@dataclass(frozen=True)
class Gpu:
    """One GPU at one moment, as NVIDIA's driver reports it."""

    name: str
    used_mib: float
    total_mib: float
    utilisation: int | None
    """Percent of the last moments that it was busy; None: not reported."""
    others_mib: dict[int, float | None]
    """Memory of each other process by its pid; None: not reported."""


@dataclass(frozen=True)
class Token:
    """Whether Ray asks for a token, and where that is. The token itself is never read."""

    auth_mode: str | None
    """RAY_AUTH_MODE."""
    in_environment: bool
    """RAY_AUTH_TOKEN is set and not empty."""
    file: Path
    """RAY_AUTH_TOKEN_PATH, or Ray's default."""
    file_mode: int | None
    """Permission bits; None: no file."""
    file_chosen: bool
    """RAY_AUTH_TOKEN_PATH is set."""


@dataclass(frozen=True)
class Listener:
    """A program on this machine that waits for connections."""

    host: str
    port: int
    pid: int | None
    """None: belongs to another user."""
    program: str
    """gcs_server, raylet, dashboard, mlflow, or the process's name."""
    service: Service | None
    """None: neither Ray nor MLflow."""


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster at RAY_ADDRESS, else one that runs on this machine."""

    address: str
    chosen: bool
    """RAY_ADDRESS is set."""
    error: str | None
    """Why its size is unknown."""
    nodes: int = 0
    gpus: float = 0.0
    cpus: float = 0.0


@dataclass(frozen=True)
class Hardware:
    """Cores, memory, GPUs and temporary folders of this machine."""

    host: str
    cores: int
    available_bytes: int
    """Main memory available without swapping."""
    gpus: tuple[str, ...]
    """Names, from NVIDIA's driver; empty without a driver or a GPU."""
    shm_bytes: int | None
    """Free in /dev/shm, where Ray keeps objects; None: this system has none."""
    temp: str
    """Folder in which Ray creates its session folder."""
    temp_used: float
    """Used share of that disk, 0..1."""
    socket_path_limit: int
    """Longest path of a Unix socket here, in bytes."""


def find_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs of this machine; empty without a driver."""
    try:
        import pynvml  # may be missing, and most commands do not need it

        pynvml.nvmlInit()
    except Exception:  # no library, no driver, no permission: all the same here
        return ()
    try:
        return tuple(_gpus(pynvml))
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def _gpus(nvml: Any) -> Iterator[Gpu]:
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        try:
            utilisation = int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        except nvml.NVMLError:  # not reported for a MIG slice
            utilisation = None
        try:
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except nvml.NVMLError:
            processes = []
        used = {process.pid: process.usedGpuMemory for process in processes if process.pid != os.getpid()}
        others = {pid: None if amount is None else amount / MIB for pid, amount in used.items()}
        name = str(nvml.nvmlDeviceGetName(handle))
        yield Gpu(name, memory.used / MIB, memory.total / MIB, utilisation, others)


def gpu_lines(gpus: Sequence[Gpu]) -> list[str]:
    """Return a line for each GPU, or one for none. In MiB, as nvidia-smi."""
    if not gpus:
        return ["no GPU on this machine"]
    lines = []
    for index, gpu in enumerate(gpus):
        line = f"GPU {index}: {gpu.name}, {gpu.used_mib:,.0f} of {gpu.total_mib:,.0f} MiB used"
        if gpu.utilisation is not None:
            line += f", {gpu.utilisation} % busy"
        if gpu.others_mib:
            others = []
            for pid, mib in gpu.others_mib.items():
                amount = "unknown" if mib is None else f"{mib:,.0f} MiB"
                others.append(f"process {pid}: {amount}")
            line += f", used by others ({', '.join(others)})"
        lines.append(line)
    return lines


def find_token(environment: Mapping[str, str], home: Path) -> Token:
    """Return Ray's token, looked up in Ray's order: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    chosen = environment.get("RAY_AUTH_TOKEN_PATH")
    file = Path(chosen).expanduser() if chosen else home / ".ray" / "auth_token"
    mode = None
    with contextlib.suppress(OSError):
        if file.is_file():
            mode = file.stat().st_mode & 0o777
    in_environment = bool(environment.get("RAY_AUTH_TOKEN"))
    return Token(environment.get("RAY_AUTH_MODE"), in_environment, file, mode, chosen is not None)


def find_listeners() -> tuple[Listener, ...] | None:
    """Return all listening TCP sockets; None if the system does not show them to this user."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return None
    listeners = []
    for connection in connections:
        if connection.status != psutil.CONN_LISTEN or not connection.laddr:
            continue
        name, command = "another program", []
        if connection.pid is not None:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(connection.pid)
                name, command = process.name(), process.cmdline()
        program, service = recognise(name, command, connection.laddr.port)
        listeners.append(Listener(connection.laddr.ip, connection.laddr.port, connection.pid, program, service))
    return tuple(listeners)


def recognise(name: str, command: Sequence[str], port: int) -> tuple[str, Service | None]:
    """Return program and service of a process from its command line; Ray's workers rename theirs to `ray::...`."""
    line = " ".join(command)
    start = os.path.basename(command[0]) if command else name
    if start in ("gcs_server", "raylet"):
        return start, "Ray"
    if start.startswith("ray::"):
        return start.removeprefix("ray::").split()[0], "Ray"
    if "/ray/dashboard/dashboard.py" in line:
        if f"--port={port}" in command:
            return "dashboard", "Ray"
        return "dashboard metrics", "Ray"  # its second port
    if found := re.search(r"/ray/(?:autoscaler|dashboard|util|_private)/[\w/]*?(\w+)\.py\b| -m ray\.([\w.]+)", line):
        return found.group(1) or found.group(2), "Ray"
    if re.search(r"\bmlflow(?:\.server|[\w.:]* +(?:ui|server)\b)", line):
        return "mlflow", "MLflow"
    return name, None


def find_cluster(environment: Mapping[str, str], listeners: Sequence[Listener]) -> Cluster | None:
    """Return the cluster at RAY_ADDRESS, else the one whose dashboard listens here, with its size."""
    chosen = environment.get("RAY_ADDRESS")
    if chosen == "local":
        return None
    # The default port first, if several dashboards listen.
    dashboards = sorted((one.port for one in listeners if one.program == "dashboard"), key=lambda p: (p != 8265, p))
    if chosen and chosen != "auto":
        address = chosen
    elif dashboards:
        address = f"http://127.0.0.1:{dashboards[0]}"
    elif chosen:
        return Cluster("auto", True, "no Ray runs on this machine")
    else:
        return None
    if not answers(address):
        return Cluster(address, bool(chosen), f"nobody answers there within {CONNECT_S:g} s")
    nodes, error = ask_nodes(address, ANSWER_S)
    gpus, cpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("GPU", "CPU"))
    return Cluster(address, bool(chosen), error, len(nodes), gpus, cpus)


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


def find_hardware(environment: Mapping[str, str]) -> Hardware:
    """Return cores, memory, GPUs and the folders that Ray uses."""
    temp = environment.get("RAY_TMPDIR")
    if not temp and sys.platform == "linux":  # Ray reads TMPDIR only there
        temp = environment.get("TMPDIR")
    temp = temp or "/tmp"  # noqa: S108 (Ray's default)
    shm = Path("/dev/shm")  # noqa: S108 (Ray's default)
    used = shutil.disk_usage(existing_folder(Path(temp)))
    return Hardware(
        host=socket.gethostname(),
        cores=os.cpu_count() or 1,
        available_bytes=psutil.virtual_memory().available,
        gpus=tuple(gpu.name for gpu in find_gpus()),
        shm_bytes=shutil.disk_usage(shm).free if shm.is_dir() else None,
        temp=temp.rstrip("/"),
        temp_used=1 - used.free / used.total if used.total else 0.0,
        socket_path_limit=UNIX_PATH_LIMIT,
    )


def existing_folder(path: Path) -> Path:
    """Return the path or its nearest parent that exists."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))
