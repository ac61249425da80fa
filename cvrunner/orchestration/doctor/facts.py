"""What is known of the machine: plain values, so that every check can be tried on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cvrunner.config.schema import Config

Service = Literal["Ray", "MLflow"]


@dataclass(frozen=True)
class Packages:
    """Versions, by the package's name."""

    installed: Mapping[str, str | None]
    """None: not installed. `python` is among them."""
    wanted: Mapping[str, str]
    """Version ranges as in pyproject.toml, such as `>=2.7`."""
    tested: Mapping[str, str]
    """Versions of constraints.txt; empty outside of the repository."""
    torch_cuda: str | None
    """CUDA version that torch was built for; None: a CPU build."""


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
class Store:
    """A folder that must outlive the run, by its key in the configuration."""

    key: str
    path: Path
    error: str | None
    """Why nothing can be written there."""
    disk: int = 0
    """Number of the file system: stores with the same one share its free space."""
    free_bytes: int = 0


@dataclass(frozen=True)
class Encoder:
    """The speech encoder; sizes are 0 where there is an error."""

    name: str
    error: str | None
    on_hub: bool
    """A hub name whose files are not on this machine yet."""
    weights_bytes: int = 0
    width: int = 0
    hidden_states: int = 0
    """Transformer layers and their input."""
    conv_channels: int = 0


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


@dataclass(frozen=True)
class Facts:
    """All that the checks look at."""

    config: Config
    packages: Packages
    token: Token
    listeners: tuple[Listener, ...] | None
    """None: the system does not tell them to this user."""
    cluster: Cluster | None
    """None: RAY_ADDRESS is not set and no Ray runs here."""
    hardware: Hardware
    encoder: Encoder
    corpus_there: bool
    speech_synthesis: bool
    """espeakng-loader is installed."""
    stores: tuple[Store, ...]
    tracking_answers: bool | None
    """Whether somebody listens at a tracking server; None: `tracking.uri` is not one."""
