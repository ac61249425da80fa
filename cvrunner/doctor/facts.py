"""What is known of the machine: plain values, so that every check can be tried on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cvrunner.config.schema import Config
from cvrunner.orchestration.machine import Cluster, Hardware, Listener, Token


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
