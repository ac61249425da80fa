"""Files of an encoder: where they are and whether they may be used. Imports no torch, so that checks are quick.

A folder has `config.json`, `preprocessor_config.json` and `model.safetensors` (or shards). No other file is opened: a
pickled `pytorch_model.bin` could run code. `cvrunner encoder` makes such a folder of one.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml

from cvrunner import paths
from cvrunner.encoders.hub import DESCRIPTION, PICKLED, SAFETENSORS, conversion, download, from_hub, matching
from cvrunner.errors import EncoderError

DEMO = Path(__file__).parent.parent / "demo_encoder"
SAMPLE_RATE_HZ, FRAME_SAMPLES = 16_000, 320
"""All families hear 16 kHz and have a frame every 20 ms."""
PREPROCESSING = "preprocessor_config.json"
MASK_TIME_PROB = 0.05
CONVOLUTIONS = {
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_dim": [512] * 7,
}
"""Defaults of transformers for a config.json that does not set them."""
FAMILIES = {
    "wavlm": "WavLM",
    "wav2vec2": "wav2vec 2.0 (also XLS-R and MMS)",
    "hubert": "HuBERT",
    "data2vec-audio": "data2vec-audio",
    "whisper": "Whisper's encoder",
}
"""Name by `model_type` in config.json."""
WEIGHT_PREFIXES = ("wavlm.", "wav2vec2.", "hubert.", "data2vec_audio.", "model.")
"""What transformers puts before the names of an encoder's weights in a checkpoint that has a head, too."""
ONLY_IN = {
    "wavlm": "encoder.layers.0.attention.rel_attn_embed.weight",
    "data2vec-audio": "encoder.pos_conv_embed.layers.0.conv.weight",
}
"""Weight that only one family has."""
TUNED_ON_EMOTION = ("*emotion*", "*iemocap*", "*msp-podcast*", "*msp_podcast*", "*superb*-er", "*3loi*", "*audeering*")
"""Names of encoders that were tuned on emotion data. So is one with `ser` as a whole word."""


@dataclass(frozen=True)
class EncoderSettings:
    """What the JSON files of an encoder say; its weights are not needed."""

    model_type: str
    """Key of `FAMILIES`."""
    depth: int
    """Number of transformer layers; there is one hidden state more."""
    width: int
    front_end_width: int
    """Width of the cached features of the front-end."""
    shortest_samples: int
    """Receptive field of one frame, in samples at 16 kHz: the shortest utterance that can be used."""
    longest_samples: int | None
    """Longest utterance that can be used; None: no limit."""
    normalize: bool
    """Whether waveforms are scaled to mean 0 and variance 1, as the checkpoint's preprocessor configuration says."""
    mask_time_prob: object
    """Share of frames that SpecAugment masks; 0 for an encoder that has no embedding for masked frames."""


@dataclass(frozen=True)
class EncoderFiles:
    """A verified encoder folder."""

    name: str
    """The name in the configuration."""
    folder: Path
    digest: str
    """SHA-256 of configuration, preprocessing and weights."""
    settings: EncoderSettings
    revision: str | None = None
    """Commit of a hub encoder."""
    tuned: str | None = None
    """Why it was probably tuned on emotion data, if that was allowed."""


def find_encoder(name: str, revision: str | None = None, allow_tuned: bool = False) -> EncoderFiles:
    """Return the encoder called `demo`, in a local folder, or on the hub (downloaded once, safetensors and JSON only).

    `allow_tuned`: accept one that was tuned for emotion. Raises EncoderError if it is missing, is of no known family,
    has only pickled, broken or foreign weights, or was tuned for emotion.
    """
    # By its name first: what is refused need not be downloaded.
    _check_tuned(name, {}, allow_tuned)
    local = local_folder(name)
    folder = local or from_hub(name, revision, DESCRIPTION + SAFETENSORS)
    config, settings = _read_settings(folder, name)
    tuned = _check_tuned(name, config, allow_tuned)
    weights = _weights(folder, name)
    _check_weights(weights, settings, name)
    digest = hashlib.sha256()
    for path in (folder / "config.json", folder / "preprocessor_config.json", *weights):
        digest.update(path.name.encode())
        status = path.stat()
        digest.update(_file_digest(path, status.st_size, status.st_mtime_ns))
    # The hub's cache has one folder per commit.
    return EncoderFiles(name, folder, digest.hexdigest(), settings, None if local else folder.name, tuned)


def check_encoder(
    name: str, revision: str | None, layers: Sequence[int], masks_input: bool = False, allow_tuned: bool = False
) -> None:
    """Raise EncoderError as `find_encoder` does, but check a hub encoder without its weights: seconds, not gigabytes.

    `layers`: hidden states that the encoder must have. `masks_input`: SpecAugment will mask its frames.
    """
    _check_tuned(name, {}, allow_tuned)
    local = local_folder(name)
    config, settings = _read_settings(local or from_hub(name, revision, DESCRIPTION), name)
    _check_tuned(name, config, allow_tuned)
    if local:
        find_encoder(name, None, allow_tuned)
    if max(layers, default=0) > settings.depth:
        raise EncoderError(f"model.layers {max(layers)}: the encoder {name} has hidden states 0..{settings.depth}")
    if masks_input:
        check_masking(name, settings)


def check_masking(name: str, settings: EncoderSettings) -> None:
    """Raise EncoderError if SpecAugment would mask nothing; such an encoder has no embedding for masked frames."""
    share = settings.mask_time_prob
    if not isinstance(share, int | float) or share <= 0:
        raise EncoderError(
            f"model.spec_augment true: mask_time_prob in config.json of the encoder {name} is {share!r}, must be above "
            "0; set model.spec_augment to false, or use an encoder that was pretrained with masking"
        )


def encoder_settings(name: str, revision: str | None) -> EncoderSettings:
    """Return what the JSON files of an encoder say; a hub encoder is not downloaded. Raises EncoderError."""
    return _read_settings(local_folder(name) or from_hub(name, revision, DESCRIPTION), name)[1]


def stated_licence(files: EncoderFiles) -> str | None:
    """Return the licence in the front matter of the encoder's README.md, if there is one."""
    try:
        data = huggingface_hub.metadata_load(files.folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        # A broken card must not cost a trained model.
        return None
    if not data.get("license"):
        return None
    return str(data["license"])


# --- where ------------------------------------------------------------------------------------------------------------


def local_folder(name: str) -> Path | None:
    """Return the folder of a local encoder; None for a name on the hub. Raises EncoderError for a missing folder."""
    if name == "demo":
        return DEMO
    local = paths.expanded(name, "model.encoder")
    if os.path.isdir(local):
        return local.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise EncoderError(
            f"model.encoder {name}: no such folder; `python -m cvrunner encoder CHECKPOINT {name}` writes it, from a "
            "name on the hub"
        )
    return None


# --- what -------------------------------------------------------------------------------------------------------------


def _check_tuned(name: str, config: Mapping[str, Any], allowed: bool) -> str | None:
    """Return why an encoder was probably tuned on emotion data, or None. Raises EncoderError unless that is allowed."""
    # Only the last part of a local path is the model's name: a parent folder may well be called iemocap.
    local = local_folder(name)
    names = [local.name if local else name, str(config.get("_name_or_path", ""))]
    reason = None
    for model, source in zip(names, ("", "config.json says that it is {}, which "), strict=True):
        matched = [pattern for pattern in TUNED_ON_EMOTION if fnmatch.fnmatch(model.lower(), pattern)]
        if re.search(r"(?<![a-z])ser(?![a-z])", model.lower()):
            matched.append("the word ser")
        if matched and reason is None:
            reason = f"{source.format(model)}matches {matched[0]}"
    if reason is None and re.search("(Sequence|Audio)Classification", str(config.get("architectures"))):
        reason = "is a classifier, already tuned"
    if reason is not None and not allowed:
        raise EncoderError(
            f"model.encoder {name}: {reason}: encoders tuned on emotion data have heard the test speakers, so every "
            "fold would be invalid; use a self-supervised encoder, or, if this one has not heard them, set "
            "model.allow_tuned_encoder to true, which the report will state"
        )
    return reason


def _read_settings(folder: Path, name: str) -> tuple[dict[str, Any], EncoderSettings]:
    """Return `config.json` and what it and `preprocessor_config.json` say. Raises EncoderError."""
    files = {file: _json(folder / file, name) for file in ("config.json", PREPROCESSING)}
    config, preprocessing = files.values()
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        what = "model of unknown type" if kind is None else repr(kind)
        raise EncoderError(
            f"model.encoder {name}: is a {what}, must be one of {', '.join(FAMILIES.values())} "
            f"(model_type in config.json: {', '.join(FAMILIES)})"
        )
    if (rate_hz := preprocessing.get("sampling_rate", SAMPLE_RATE_HZ)) != SAMPLE_RATE_HZ:
        raise EncoderError(f"model.encoder {name}: expects audio of {rate_hz} Hz, must be {SAMPLE_RATE_HZ}")

    def number(key: str, default: int, file: str = "config.json") -> int:
        value = files[file].get(key, default)
        if type(value) is not int or value < 1:
            raise EncoderError(f"model.encoder {name}: {key} is {value!r} in {file}, must be a whole number above 0")
        return value

    if kind == "whisper":
        window, hop = (number(key, default, PREPROCESSING) for key, default in (("n_fft", 400), ("hop_length", 160)))
        mels = number("num_mel_bins", 80)
        _check_frame(2 * hop, "2 x hop_length in preprocessor_config.json", name)
        if (size := preprocessing.get("feature_size", 80)) != mels:
            rule = f"must be feature_size in preprocessor_config.json, {size!r}"
            raise EncoderError(f"model.encoder {name}: num_mel_bins is {mels} in config.json, {rule}")
        width, depth = number("d_model", 384), number("encoder_layers", 4)
        longest = number("max_source_positions", 1500) * FRAME_SAMPLES
        normalize = preprocessing.get("do_normalize") is True
        return config, EncoderSettings(kind, depth, width, width, window, longest, normalize, 0)
    for key in ("adapter_attn_dim", "add_adapter", "conv_adapter"):
        if config.get(key):
            raise EncoderError(
                f"model.encoder {name}: has adapters ({key} in config.json), which cvrunner does not run; use the "
                "checkpoint that it was adapted from"
            )
    layers = [config.get(key, default) for key, default in CONVOLUTIONS.items()]
    # Not bool, which is an int.
    fine = all(isinstance(one, list) and all(type(size) is int and 0 < size < 10_000 for size in one) for one in layers)
    if not fine or len(set(map(len, layers))) > 1 or not 0 < len(layers[0]) < 100:
        rule = "must be lists of whole numbers above 0, of the same length"
        raise EncoderError(f"model.encoder {name}: {', '.join(CONVOLUTIONS)} in config.json {rule}")
    kernels, strides, widths = layers
    _check_frame(math.prod(strides), "the product of conv_stride in config.json", name)
    samples = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return config, EncoderSettings(
        model_type=kind,
        depth=number("num_hidden_layers", 12),
        width=number("hidden_size", 768),
        front_end_width=widths[-1],
        shortest_samples=samples,
        longest_samples=None,
        normalize=bool(preprocessing.get("do_normalize", True)),
        mask_time_prob=config.get("mask_time_prob", MASK_TIME_PROB),
    )


def _check_frame(samples: int, key: str, name: str) -> None:
    if samples != FRAME_SAMPLES:
        rate_hz = SAMPLE_RATE_HZ / samples
        raise EncoderError(
            f"model.encoder {name}: has {rate_hz:g} frames per second ({key} is {samples}), must have "
            f"{SAMPLE_RATE_HZ / FRAME_SAMPLES:g} ({FRAME_SAMPLES})"
        )


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
    # A link of the hub's cache may lead nowhere.
    weights = sorted(folder / file for file in matching(folder, SAFETENSORS))
    whole, index = folder / SAFETENSORS[0], folder / f"{SAFETENSORS[0]}.index.json"
    if not weights:
        remedy = conversion(name) if matching(folder, PICKLED) else ": copy the folder again"
        raise EncoderError(f"model.encoder {name}: no model.safetensors in {folder}{remedy}")
    # A repository may have both.
    if whole in weights:
        return [whole]
    shards = _json(index, name).get("weight_map") if index.is_file() else None
    needed = {str(file) for file in shards.values()} if isinstance(shards, dict) else set()
    if missing := needed - {path.name for path in weights}:
        raise EncoderError(
            f"model.encoder {name}: its download is incomplete: {min(missing)} is missing in {folder}"
            f"{': copy the folder again' if local_folder(name) else download(name)}"
        )
    return weights


def _check_weights(weights: Sequence[Path], settings: EncoderSettings, name: str) -> None:
    """Raise EncoderError if the headers of the files are broken, or do not have the layers that config.json describes.

    Quick, before anything is loaded; `load_backbone` compares all weights.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for path in weights:
        try:
            with safe_open(path, framework="numpy") as file:
                # Not a mapping, so it must be asked for its keys.
                shapes |= {plain_name(key): file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise EncoderError(f"model.encoder {name}: {path} cannot be read, copy it again: {error}") from None
    expected = [settings.width] * 2
    kind = settings.model_type
    attention = "self_attn" if kind == "whisper" else "attention"
    other = f"{weights[0].name} is not of the model that config.json describes"
    for layer in range(settings.depth):
        key = f"encoder.layers.{layer}.{attention}.q_proj.weight"
        shape = shapes.get(key)
        if shape is None:
            raise EncoderError(f"model.encoder {name}: weights are missing in its files, first {key}; {other}")
        if shape != expected:
            raise EncoderError(f"model.encoder {name}: {key} has shape {shape}, must be {expected}; {other}")
    for family, key in ONLY_IN.items():
        if (key in shapes) != (family == kind):
            has = "have" if key in shapes else "lack"
            raise EncoderError(f"model.encoder {name}: its weights {has} {key}, so {other}")
    if (key := f"encoder.layers.{settings.depth}.{attention}.q_proj.weight") in shapes:
        raise EncoderError(f"model.encoder {name}: its files have weights that would not be used, first {key}; {other}")


def plain_name(key: str) -> str:
    """Return the name of a weight as in an encoder's own checkpoint, which has no head."""
    for prefix in WEIGHT_PREFIXES:
        key = key.removeprefix(prefix)
    return key


@cache
def _file_digest(path: Path, size: int, mtime_ns: int) -> bytes:
    """Return the SHA-256 of a file. Every condition asks for it; it is read again only if its size or time changes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
