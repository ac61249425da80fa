"""This machine as Ray will find it: GPUs, hardware, listening programs, token and cluster. Reads only."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil

from cvrunner.orchestration.ray_cluster import CONNECT_S, answers, ask_nodes

ANSWER_S = 8.0
"""Longest time to ask a cluster for its size, including the start of a process that imports Ray."""
CONTROL_GROUPS = Path("/sys/fs/cgroup")
"""Where a container sees its own limits."""
UNIX_PATH_LIMIT = 103 if sys.platform == "darwin" else 107
DEFAULT_TEMP = "/tmp"  # noqa: S108 (Ray's default)
SESSION = "/ray/session_2026-11-25_00-00-00_000000_4194304/sockets/plasma_store"
"""What Ray appends to the temporary folder."""
MIB = 2**20
Service = Literal["Ray", "MLflow"]
Answer = TypeVar("Answer")


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
    uuid: str = ""
    """Such as `GPU-8f2c...`: CUDA's indices can differ from those of the driver, this cannot."""


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver."""

    version: str
    """Such as 580.65.06."""
    cuda: str
    """Newest CUDA version that it supports, such as 13.0."""


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
    """Names of the GPUs that CUDA may use, from NVIDIA's driver; empty without a driver or a GPU."""
    shm_bytes: int | None
    """Free in /dev/shm, where Ray keeps objects; None: this system has none."""
    temp: str
    """Folder in which Ray creates its session folder."""
    temp_used: float
    """Used share of that disk, 0..1."""
    socket_path_limit: int
    """Longest path of a Unix socket here, in bytes."""
    driver: Driver | None = None
    hidden_gpus: int = 0
    """Number of GPUs that CUDA_VISIBLE_DEVICES hides."""
    limits: tuple[str, ...] = ()
    """What a control group takes away: cores, memory."""


def find_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs of this machine, in the order of nvidia-smi; empty without a driver."""
    return _ask_driver(_gpus) or ()


def find_driver() -> Driver | None:
    """Return NVIDIA's driver; None without one."""
    return _ask_driver(_driver)


def _ask_driver(question: Callable[[Any], Answer]) -> Answer | None:
    try:
        import pynvml  # may be missing, and most commands do not need it

        pynvml.nvmlInit()
    except Exception:  # no library, no driver, no permission: all the same here
        return None
    try:
        return question(pynvml)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _driver(nvml: Any) -> Driver:
    cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
    return Driver(str(nvml.nvmlSystemGetDriverVersion()), f"{cuda // 1000}.{cuda % 1000 // 10}")


def _gpus(nvml: Any) -> tuple[Gpu, ...]:
    gpus = []
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
        name, uuid = str(nvml.nvmlDeviceGetName(handle)), str(nvml.nvmlDeviceGetUUID(handle))
        gpus.append(Gpu(name, memory.used / MIB, memory.total / MIB, utilisation, others, uuid))
    return tuple(gpus)


def visible_gpus(gpus: Sequence[Gpu], environment: Mapping[str, str]) -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES, a list of indices or of beginnings of UUIDs, leaves to CUDA."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return list(gpus)
    found: list[Gpu] = []
    for entry in chosen.split(","):
        name = entry.strip()
        if name.isdecimal():
            gpu = gpus[int(name)] if int(name) < len(gpus) else None
        else:
            gpu = next((gpu for gpu in gpus if name and gpu.uuid.startswith(name)), None)
        # CUDA ignores everything from the first entry on that is no GPU, such as -1.
        if gpu is None:
            break
        found.append(gpu)
    return found


def gpu_lines(gpus: Sequence[Gpu], environment: Mapping[str, str]) -> list[str]:
    """Return a line for each GPU, or one for none, with index and MiB as in nvidia-smi."""
    if not gpus:
        return ["no GPU on this machine"]
    lines, visible = [], visible_gpus(gpus, environment)
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
        if gpu not in visible:
            line += ", hidden by CUDA_VISIBLE_DEVICES"
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
        name, command, process = "another program", [], None
        if connection.pid is not None:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(connection.pid)
                name, command = process.name(), process.cmdline()
        program, service = recognise(name, command, connection.laddr.port)
        if service is None and process is not None:
            # The workers of MLflow's server share its socket, and their command lines do not name it.
            with contextlib.suppress(psutil.Error):
                for parent in process.parents():
                    if recognise(parent.name(), parent.cmdline(), connection.laddr.port)[1] == "MLflow":
                        program, service = "mlflow", "MLflow"
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


def ray_temp(environment: Mapping[str, str]) -> str:
    """Return the folder in which Ray creates its session folder."""
    temp = environment.get("RAY_TMPDIR")
    if not temp and sys.platform == "linux":  # Ray reads TMPDIR only there
        temp = environment.get("TMPDIR")
    return (temp or DEFAULT_TEMP).rstrip("/")


def socket_path_bytes(temp: str) -> int:
    """Length of the paths of Ray's sockets, at most UNIX_PATH_LIMIT, for a temporary folder."""
    return len((temp + SESSION).encode())


def find_hardware(environment: Mapping[str, str]) -> Hardware:
    """Return cores, memory, GPUs and the folders that Ray uses."""
    temp = ray_temp(environment)
    shm = Path("/dev/shm")  # noqa: S108 (Ray's default)
    gpus, memory = find_gpus(), psutil.virtual_memory()
    visible, cores, available = visible_gpus(gpus, environment), available_cores(), available_memory(memory.available)
    limits = []
    if cores < (os.cpu_count() or 1):
        limits.append(f"{cores} of {os.cpu_count()} cores")
    if available < memory.available:
        limits.append(f"{available / 1e9:.1f} of {memory.available / 1e9:.1f} GB of memory")
    used = shutil.disk_usage(existing_folder(Path(temp)))
    return Hardware(
        host=socket.gethostname(),
        cores=cores,
        available_bytes=available,
        gpus=tuple(gpu.name for gpu in visible),
        shm_bytes=shutil.disk_usage(shm).free if shm.is_dir() else None,
        temp=temp,
        temp_used=1 - used.free / used.total if used.total else 0.0,
        socket_path_limit=UNIX_PATH_LIMIT,
        driver=find_driver(),
        hidden_gpus=len(gpus) - len(visible),
        limits=tuple(limits),
    )


def available_cores(groups: Path = CONTROL_GROUPS) -> int:
    """Number of cores that this process may use: by affinity, and by the quota of its control group, rounded down."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = len(os.sched_getaffinity(0))
    # Version 2 has quota and period in one file, version 1 in two; no quota is "max" or -1.
    quota = _numbers(groups / "cpu.max") or [
        number for name in ("quota", "period") for number in _numbers(groups / f"cpu/cpu.cfs_{name}_us")
    ]
    if len(quota) == 2 and quota[0] > 0:
        cores = min(cores, quota[0] // quota[1])
    return max(1, cores)


def available_memory(of_machine: int, groups: Path = CONTROL_GROUPS) -> int:
    """Return the bytes left below the limit of this process's control group, at most those of the machine."""
    for files in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        numbers = [number for name in files for number in _numbers(groups / name)]
        if len(numbers) == 2:
            of_machine = min(of_machine, max(0, numbers[0] - numbers[1]))
    return of_machine


def _numbers(file: Path) -> list[int]:
    """Return the whole numbers in a file of a control group; none if there is no such file or it says `max`."""
    try:
        return [int(word) for word in file.read_text().split()]
    except (OSError, ValueError):
        return []


def existing_folder(path: Path) -> Path:
    """Return the path or its nearest parent that exists."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))
