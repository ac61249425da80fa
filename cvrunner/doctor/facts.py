"""Facts about the machine, what a check finds in them, and their collection.

Facts are plain values, so every check can be tested with the facts of any machine. Collecting only reads, except for a
nameless temporary file in each store, and connects only to loopback and to the addresses that RAY_ADDRESS and
`tracking.uri` name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

from packaging.requirements import Requirement

from cvrunner import paths
from cvrunner.config.schema import Config
from cvrunner.config.sections import ModelConfig
from cvrunner.encoders.files import find_encoder, local_folder
from cvrunner.encoders.hub import ask_hub
from cvrunner.errors import ConfigError, EncoderError
from cvrunner.orchestration.machine import (
    Cluster,
    Hardware,
    Listener,
    Token,
    existing_folder,
    find_cluster,
    find_hardware,
    find_listeners,
    find_token,
)
from cvrunner.orchestration.ray_cluster import answers

CHECKED_PACKAGES = ("python", "torch", "transformers", "ray", "mlflow")
Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Packages:
    """Versions by package name."""

    installed: Mapping[str, str | None]
    """None: not installed. Includes `python`."""
    required: Mapping[str, str]
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
    """The speech encoder; sizes are 0 if there is an error."""

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
    """Everything that the checks use."""

    config: Config
    packages: Packages
    token: Token
    listeners: tuple[Listener, ...] | None
    """None: the system does not show them to this user."""
    cluster: Cluster | None
    """None: RAY_ADDRESS is not set and no Ray runs here."""
    hardware: Hardware
    encoder: Encoder
    corpus_exists: bool
    speech_synthesis: bool
    """espeakng-loader is installed."""
    stores: tuple[Store, ...]
    tracking_answers: bool | None
    """Whether the tracking server answers; None: `tracking.uri` is not a server."""
    proxies: Mapping[str, str] = field(default_factory=dict)
    """Proxy of the environment by scheme."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    level: Level
    """problem: the run will fail, or others can reach it; warning: it may fail, or will be slow."""
    what: str
    do: str = ""
    """What to type or to change; empty if all is well."""


def ok(subject: str, what: str) -> Finding:
    """Return a finding that needs nothing."""
    return Finding(subject, "ok", what)


def warning(subject: str, what: str, do: str) -> Finding:
    """Return a finding that is worth a look; the exit code stays 0."""
    return Finding(subject, "warning", what, do)


def problem(subject: str, what: str, do: str) -> Finding:
    """Return a finding that must be fixed first; the exit code is 1."""
    return Finding(subject, "problem", what, do)


def short(path: Path) -> str:
    """Return the path with ~ for the home folder."""
    home = Path.home()
    if home in path.parents:
        return f"~/{path.relative_to(home)}"
    return str(path)


# --- collecting -------------------------------------------------------------------------------------------------------


def collect_facts(config: Config, alone: bool = False) -> Facts:
    """Collect everything the checks need. `alone`: this machine by itself, without asking Ray or MLflow."""
    listeners = cluster = tracking_answers = None
    if not alone:
        listeners = find_listeners()
        cluster = find_cluster(os.environ, listeners or ())
        uri = config.tracking.uri
        if config.tracking.enabled and uri is not None and urlsplit(uri).scheme in ("http", "https"):
            tracking_answers = answers(uri)
    return Facts(
        config=config,
        packages=find_packages(),
        token=find_token(os.environ, Path.home()),
        listeners=listeners,
        cluster=cluster,
        hardware=find_hardware(os.environ),
        encoder=find_encoder_facts(config.model),
        corpus_exists=os.path.exists(paths.corpus_root(config.corpus.root)),
        speech_synthesis=importlib.util.find_spec("espeakng_loader") is not None,
        stores=tuple(find_stores(config)),
        tracking_answers=tracking_answers,
        proxies={name: uri for name, uri in getproxies_environment().items() if name != "no"},
    )


def find_packages() -> Packages:
    """Return versions from the packages' metadata: nothing is imported."""
    required = {}
    with contextlib.suppress(metadata.PackageNotFoundError):
        own = metadata.distribution("cvrunner")
        # Requirements with a marker belong to extras.
        requirements = [Requirement(line) for line in own.requires or ()]
        required = {one.name: str(one.specifier) for one in requirements if one.marker is None}
        required["python"] = own.metadata["Requires-Python"]
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for name in CHECKED_PACKAGES[1:]:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = None
    tested = {}
    with contextlib.suppress(OSError):  # constraints.txt exists only in the repository
        text = (paths.default_config().parent.parent / "constraints.txt").read_text()
        tested = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, flags=re.MULTILINE))
    return Packages(installed, required, tested, _torch_cuda())


def _torch_cuda() -> str | None:
    """Read torch's version.py, since importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=]*= *['\"]([\d.]+)['\"]", text, flags=re.MULTILINE)
    return found and found.group(1)


def find_encoder_facts(model: ModelConfig) -> Encoder:
    """Look for the encoder as `all-folds` does, but without a download."""
    name = model.encoder
    try:
        where: str | None = name
        if local_folder(name) is None:
            where = _cached(model)
        if where is None and ask_hub(name, model.revision) is None:
            return Encoder(name, None, True)
        # Without an answer of the hub, the search for its name shows what is missing.
        files = find_encoder(where or name, model.revision, model.allow_tuned_encoder)
    except EncoderError as error:
        return Encoder(name, str(error), False)
    return Encoder(
        name,
        None,
        False,
        weights_bytes=sum(path.stat().st_size for path in files.folder.glob("model*.safetensors")),
        width=files.settings.width,
        hidden_states=files.settings.depth + 1,
        conv_channels=files.settings.front_end_width,
    )


def _cached(model: ModelConfig) -> str | None:
    """Return the local folder of a hub encoder; None if its weights are not on this machine. Raises EncoderError."""
    # Only encoders of the hub need it, and it takes a while to import.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(model.encoder, revision=model.revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    except Exception as error:  # a name that the hub cannot have, a broken cache
        raise EncoderError(f"model.encoder {model.encoder}: {str(error).strip().partition(chr(10))[0]}") from None
    return folder if any(Path(folder).glob("model*.safetensors")) else None


def find_stores(config: Config) -> Iterator[Store]:
    """Yield the folders that the run writes to, after writing to each."""
    named = {
        "results.root": config.results.root,
        "cluster.cache_dir": config.cluster.cache_dir,
        "cluster.node_dir": config.cluster.node_dir,
    }
    for key, text in named.items():
        if text is not None:
            yield find_store(key, text)


def find_store(key: str, text: str) -> Store:
    """Write a nameless file there, or in the nearest parent that exists: nothing is left behind."""
    try:
        path = paths.lasting(text, key)
    except ConfigError as error:
        return Store(key, Path(text), str(error).removeprefix(f"{key}: "))
    if reason := paths.not_writable(path):
        return Store(key, path, f"{path} cannot be written: {reason}")
    place = existing_folder(path)
    return Store(key, path, None, place.stat().st_dev, shutil.disk_usage(place).free)
