"""Files of an encoder: where they are and whether they may be used. Imports no torch, so that checks are quick.

A folder has `config.json`, `preprocessor_config.json` and `model.safetensors` (or shards). No other file is opened: a
pickled `pytorch_model.bin` could run code.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cvrunner import paths
from cvrunner.errors import EncoderError

DEMO = Path(__file__).parent.parent / "demo_encoder"
HUB_TIMEOUT_S = 10.0
MASK_TIME_PROB = 0.05
"""Default of transformers for a config.json that does not set it."""
TUNED_ON_EMOTION = ("*iemocap*", "superb/*-er", "3loi/*", "audeering/*", "*speech-emotion*", "*emotion-recognition*")


@dataclass(frozen=True)
class EncoderFiles:
    """A verified encoder folder."""

    name: str
    """The name in the configuration."""
    folder: Path
    digest: str
    """SHA-256 of configuration, preprocessing and weights."""
    normalize: bool
    """Whether waveforms are scaled to mean 0 and variance 1, as the checkpoint's preprocessor configuration says."""
    revision: str | None = None
    """Commit of a hub encoder."""


def find_encoder(name: str, revision: str | None = None) -> EncoderFiles:
    """Return the encoder called `demo`, in a local folder, or on the hub (downloaded once, safetensors and JSON only).

    Raises EncoderError if it is missing, is not a WavLM, has only pickled, broken or foreign weights, or was tuned for
    emotion.
    """
    local = _local(name)
    folder = local or _from_hub(name, revision, ("*.json", "*.safetensors", "README.md"))
    config, preprocessing = _checked_settings(folder, name)
    weights = _weights(folder, name)
    _check_weights(weights, config, name)
    digest = hashlib.sha256()
    for path in (folder / "config.json", folder / "preprocessor_config.json", *weights):
        digest.update(path.name.encode())
        status = path.stat()
        digest.update(_file_digest(path, status.st_size, status.st_mtime_ns))
    # The hub's cache has one folder per commit.
    commit = None if local else folder.name
    return EncoderFiles(name, folder, digest.hexdigest(), bool(preprocessing.get("do_normalize", True)), commit)


def check_encoder(name: str, revision: str | None, layers: Sequence[int], masks_input: bool = False) -> None:
    """Raise EncoderError as `find_encoder` does, but check a hub encoder without its weights: seconds, not gigabytes.

    `layers`: hidden states that the encoder must have. `masks_input`: SpecAugment will mask its frames.
    """
    local = _local(name)
    config, _ = _checked_settings(local or _from_hub(name, revision, ("*.json",)), name)
    if local:
        find_encoder(name)
    if max(layers, default=0) > config["num_hidden_layers"]:
        there = f"the encoder {name} has hidden states 0..{config['num_hidden_layers']}"
        raise EncoderError(f"model.layers {max(layers)}: {there}")
    if masks_input:
        check_masking(name, config.get("mask_time_prob", MASK_TIME_PROB))


def check_masking(name: str, mask_time_prob: object) -> None:
    """Raise EncoderError if SpecAugment would mask nothing; such an encoder has no embedding for masked frames."""
    if not isinstance(mask_time_prob, int | float) or mask_time_prob <= 0:
        raise EncoderError(
            f"model.spec_augment true: mask_time_prob in config.json of the encoder {name} is {mask_time_prob!r}, must "
            "be above 0; set model.spec_augment to false, or use an encoder that was pretrained with masking"
        )


def encoder_depth(name: str, revision: str | None) -> int:
    """Return the number of transformer layers; only the settings of a hub encoder are needed. Raises EncoderError."""
    config, _ = _checked_settings(_local(name) or _from_hub(name, revision, ("*.json",)), name)
    return int(config["num_hidden_layers"])


def receptive_field(name: str, revision: str | None) -> int:
    """Return the samples at 16 kHz that one frame needs; only the settings of a hub encoder are needed.

    Raises EncoderError.
    """
    config, _ = _checked_settings(_local(name) or _from_hub(name, revision, ("*.json",)), name)
    kernels = config.get("conv_kernel", [10, 3, 3, 3, 3, 2, 2])
    strides = config.get("conv_stride", [5, 2, 2, 2, 2, 2, 2])
    samples = 1
    try:
        for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
            samples = (samples - 1) * stride + kernel
        return int(samples)
    except (TypeError, ValueError):
        rule = "must be lists of numbers, of the same length"
        raise EncoderError(f"model.encoder {name}: conv_kernel and conv_stride in config.json {rule}") from None


def is_local(name: str) -> bool:
    """Return whether an encoder comes with cvrunner or is in a folder, not on the hub. Raises EncoderError."""
    return _local(name) is not None


def stated_licence(files: EncoderFiles) -> str | None:
    """Return the licence in the front matter of the encoder's README.md, if there is one."""
    # The hub's client takes 0.3 s to import, and only a finished trial asks for a licence.
    import yaml
    from huggingface_hub import metadata_load

    try:
        data = metadata_load(files.folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        # A broken card must not cost a trained model.
        return None
    return str(data["license"]) if data.get("license") else None


# --- where ------------------------------------------------------------------------------------------------------------


def _local(name: str) -> Path | None:
    """Return the folder of a local encoder; None for a name on the hub.

    Raises EncoderError for a missing folder and for names of encoders tuned for emotion.
    """
    if name == "demo":
        return DEMO
    local = paths.expanded(name, "model.encoder")
    is_there = os.path.isdir(local)
    # Only the last part of a local path is the model's name: a parent folder may well be called iemocap.
    _refuse_tuned(local.name if is_there else name, name)
    if is_there:
        return local.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise EncoderError(f"model.encoder {name}: no such folder")
    return None


def _refuse_tuned(model: str, name: str) -> None:
    for pattern in TUNED_ON_EMOTION:
        if fnmatch.fnmatch(model.lower(), pattern):
            made_from = "" if name.endswith(model) else f"config.json says that it is {model}, which "
            raise EncoderError(
                f"model.encoder {name}: {made_from}matches {pattern}: encoders tuned on emotion data have heard the "
                "test speakers, so every fold would be invalid; use a self-supervised WavLM"
            )


def _from_hub(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Return the folder of a hub encoder in the local cache; missing files are downloaded if the hub answers."""
    # Local encoders do not need the hub's client, which takes 0.3 s to import.
    from huggingface_hub import HfApi, snapshot_download

    trouble: Exception | None = None
    try:
        # `snapshot_download` asks the same, but without a time limit.
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
    except Exception as error:
        trouble = error
    offline = trouble is not None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=offline))
    except Exception as error:
        reason = str(trouble or error).strip().partition("\n")[0]
        raise EncoderError(
            f"model.encoder {name}: no such folder, and the hub does not give it: {reason} (check the name and the "
            "network, or give a local folder)"
        ) from None


# --- what -------------------------------------------------------------------------------------------------------------


def _checked_settings(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `config.json` and `preprocessor_config.json`. Raises EncoderError if they are not those of a WavLM."""
    config = _json(folder / "config.json", name)
    if config.get("model_type") != "wavlm":
        kind = repr(config["model_type"]) if "model_type" in config else "model of unknown type"
        raise EncoderError(f"model.encoder {name}: is a {kind}, must be a wavlm (model_type in config.json)")
    _refuse_tuned(str(config.get("_name_or_path", "")), name)
    if "SequenceClassification" in str(config.get("architectures")):
        raise EncoderError(f"model.encoder {name}: is a classifier, already tuned; use the model it was made from")
    for key, default in (("num_hidden_layers", 12), ("hidden_size", 768)):
        value = config.setdefault(key, default)
        if not isinstance(value, int) or value < 1:
            raise EncoderError(f"model.encoder {name}: {key} is {value!r} in config.json, must be a whole number")
    preprocessing = _json(folder / "preprocessor_config.json", name)
    if (rate_hz := preprocessing.get("sampling_rate", 16000)) != 16000:
        raise EncoderError(f"model.encoder {name}: expects audio of {rate_hz} Hz, must be 16000")
    return config, preprocessing


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise EncoderError(f"model.encoder {name}: {path.name} is missing in {path.parent}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise EncoderError(f"model.encoder {name}: {path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise EncoderError(f"model.encoder {name}: {path} must hold a JSON object")
    return data


def _weights(folder: Path, name: str) -> list[Path]:
    weights = sorted(path for path in folder.glob("model*.safetensors") if path.is_file())
    if not weights:
        raise EncoderError(
            f"model.encoder {name}: no model.safetensors in {folder} (pickled weights are not loaded); make one with "
            "WavLMModel.from_pretrained(...).save_pretrained(FOLDER) where you trust the source"
        )
    return weights


def _check_weights(weights: Sequence[Path], config: dict[str, Any], name: str) -> None:
    """Raise EncoderError if the headers of the files are broken or lack a known weight of a layer."""
    shapes = {key.removeprefix("wavlm."): shape for path in weights for key, shape in _shapes(path, name).items()}
    expected = [config["hidden_size"]] * 2
    other = f"{weights[0].name} is not of the model that config.json describes"
    for layer in range(config["num_hidden_layers"]):
        key = f"encoder.layers.{layer}.attention.q_proj.weight"
        shape = shapes.get(key)
        if shape is None:
            raise EncoderError(f"model.encoder {name}: weights are missing in its files, first {key}; {other}")
        if shape != expected:
            raise EncoderError(f"model.encoder {name}: {key} has shape {shape}, must be {expected}; {other}")


def _shapes(path: Path, name: str) -> dict[str, list[int]]:
    """Return the shapes of all weights of a file, from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise EncoderError(f"model.encoder {name}: {path} cannot be read, copy it again: {error}") from None


@cache
def _file_digest(path: Path, size: int, mtime_ns: int) -> bytes:
    """Return the SHA-256 of a file. Every condition asks for it; it is read again only if its size or time changes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
