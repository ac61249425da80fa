"""Looking at this machine. Reads only, but for a nameless temporary file in each store; no network but loopback and the
addresses that RAY_ADDRESS and `tracking.uri` name."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from packaging.requirements import Requirement

from cvrunner import paths
from cvrunner.config.schema import Config
from cvrunner.config.sections import ModelConfig
from cvrunner.errors import ConfigError, EncoderError
from cvrunner.model.encoder_files import find_encoder
from cvrunner.orchestration.doctor.facts import (
    Cluster,
    Encoder,
    Facts,
    Hardware,
    Listener,
    Packages,
    Service,
    Store,
    Token,
)
from cvrunner.orchestration.doctor.gpus import gpu_names
from cvrunner.orchestration.doctor.machine import CHECKED_PACKAGES
from cvrunner.orchestration.ray_cluster import ask_nodes

CONNECT_S = 1.0
"""How long a connection may take."""
ANSWER_S = 8.0
"""How long a cluster may take to tell its size, with the start of a process that imports Ray."""
DEFAULT_PORTS = {"http": 80, "https": 443, "ray": 10001, "": 6379}
UNIX_PATH_LIMIT = 103 if sys.platform == "darwin" else 107


def collect_facts(config: Config) -> Facts:
    """Everything the checks need."""
    listeners = find_listeners()
    return Facts(
        config=config,
        packages=find_packages(),
        token=find_token(os.environ, Path.home()),
        listeners=listeners,
        cluster=find_cluster(os.environ, listeners or ()),
        hardware=find_hardware(os.environ),
        encoder=find_encoder_facts(config.model),
        corpus_there=os.path.exists(paths.corpus_root(config.corpus.root)),
        speech_synthesis=importlib.util.find_spec("espeakng_loader") is not None,
        stores=tuple(find_stores(config)),
        tracking_answers=_tracking_answers(config),
    )


def find_packages() -> Packages:
    """From the packages' metadata: nothing is imported."""
    wanted = {}
    with contextlib.suppress(metadata.PackageNotFoundError):
        own = metadata.distribution("cvrunner")
        needed = [Requirement(line) for line in own.requires or ()]
        wanted = {one.name: str(one.specifier) for one in needed if one.marker is None}
        wanted["python"] = own.metadata["Requires-Python"]
    installed = {name: _version(name) for name in CHECKED_PACKAGES if name != "python"}
    return Packages({"python": platform.python_version(), **installed}, wanted, _tested(), _torch_cuda())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _tested() -> dict[str, str]:
    """constraints.txt, where the program runs from the repository."""
    try:
        text = (paths.default_config().parent.parent / "constraints.txt").read_text()
    except OSError:
        return {}
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, flags=re.MULTILINE))


def _torch_cuda() -> str | None:
    """From torch's version.py, since importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=]*= *['\"]([\d.]+)['\"]", text, flags=re.MULTILINE)
    return found.group(1) if found else None


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
    used = shutil.disk_usage(_existing(Path(temp)))
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


def find_encoder_facts(model: ModelConfig) -> Encoder:
    """The encoder as `all-folds` would find it, but without a download."""
    name = model.encoder
    try:
        where = _cached(model) if _is_hub_name(name) else name
        if where is None:
            return Encoder(name, None, True)
        folder = find_encoder(where).folder
    except EncoderError as error:
        return Encoder(name, str(error), False)
    shape: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    return Encoder(
        name,
        None,
        False,
        weights_bytes=sum(path.stat().st_size for path in folder.glob("model*.safetensors")),
        width=int(shape.get("hidden_size", 0)),
        hidden_states=int(shape.get("num_hidden_layers", 0)) + 1,
        conv_channels=int((shape.get("conv_dim") or [0])[-1]),
    )


def _cached(model: ModelConfig) -> str | None:
    """The folder of a hub encoder on this machine; None unless its weights are there. Raises EncoderError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(model.encoder, revision=model.revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    except Exception as error:  # a name that the hub cannot have, a broken cache
        raise EncoderError(f"model.encoder {model.encoder}: {str(error).strip().partition(chr(10))[0]}") from None
    return folder if any(Path(folder).glob("model*.safetensors")) else None


def _is_hub_name(name: str) -> bool:
    there = os.path.isdir(paths.expanded(name, "model.encoder"))
    return name != "demo" and not there and not name.startswith((".", "/", "~")) and name.count("/") <= 1


def find_stores(config: Config) -> Iterator[Store]:
    """The folders that the run writes to, tried out."""
    named = {
        "results.root": config.results.root,
        "cluster.cache_dir": config.cluster.cache_dir,
        "cluster.node_dir": config.cluster.node_dir,
    }
    for key, text in named.items():
        if text is not None:
            yield find_store(key, text)


def find_store(key: str, text: str) -> Store:
    """Tries a file without a name there, or in the nearest folder above that exists: nothing is left behind."""
    try:
        path = paths.lasting(text, key)
    except ConfigError as error:
        return Store(key, Path(text), str(error).removeprefix(f"{key}: "))
    place = _existing(path)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Store(key, path, f"{path} cannot be written: {place}: {error.strerror}")
    return Store(key, path, None, place.stat().st_dev, shutil.disk_usage(place).free)


def _existing(path: Path) -> Path:
    """The path or the nearest one above it that is there."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def _tracking_answers(config: Config) -> bool | None:
    uri = config.tracking.uri
    if not config.tracking.enabled or uri is None or urlsplit(uri).scheme not in ("http", "https"):
        return None
    return answers(uri)
