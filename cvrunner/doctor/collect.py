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
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from cvrunner import paths
from cvrunner.config.schema import Config
from cvrunner.config.sections import ModelConfig
from cvrunner.doctor.facts import Encoder, Facts, Packages, Store
from cvrunner.doctor.machine import CHECKED_PACKAGES
from cvrunner.encoders.files import find_encoder
from cvrunner.errors import ConfigError, EncoderError
from cvrunner.orchestration.machine import (
    answers,
    existing_folder,
    find_cluster,
    find_hardware,
    find_listeners,
    find_token,
)


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
    place = existing_folder(path)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Store(key, path, f"{path} cannot be written: {place}: {error.strerror}")
    return Store(key, path, None, place.stat().st_dev, shutil.disk_usage(place).free)


def _tracking_answers(config: Config) -> bool | None:
    uri = config.tracking.uri
    if not config.tracking.enabled or uri is None or urlsplit(uri).scheme not in ("http", "https"):
        return None
    return answers(uri)
