"""Where an encoder's files are and whether they may be used; without torch, so that it costs nothing to ask.

A folder holds `config.json`, `preprocessor_config.json` and `model.safetensors` (or its shards).
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvrunner.errors import EncoderError

DEMO = Path(__file__).parent.parent / "demo_encoder"
TUNED_ON_EMOTION = ("*iemocap*", "superb/*-er", "3loi/*", "audeering/*", "*speech-emotion*", "*emotion-recognition*")


@dataclass(frozen=True)
class EncoderFiles:
    """A checked encoder folder."""

    name: str
    """As in the configuration."""
    folder: Path
    digest: str
    """SHA-256 of configuration, preprocessing and weights."""
    normalize: bool
    """Whether each waveform is scaled to mean 0, variance 1 first, as the checkpoint's preprocessor says."""


def find_encoder(name: str, revision: str | None = None) -> EncoderFiles:
    """The encoder called `demo`, in a local folder, or on the hub (downloaded once, safetensors and JSON only).

    Raises EncoderError: not found, not a WavLM, pickled weights only, or tuned for emotion already.
    """
    folder = _folder(name, revision)
    config = _json(folder / "config.json", name)
    if config.get("model_type") != "wavlm":
        raise EncoderError(f"model.encoder {name}: is a {config.get('model_type')!r}, must be a wavlm")
    _refuse_tuned(str(config.get("_name_or_path", "")))
    if any("SequenceClassification" in str(a) for a in config.get("architectures") or ()):
        raise EncoderError(f"model.encoder {name}: is a classifier, already tuned; use the model it was made from")
    preprocessing = _json(folder / "preprocessor_config.json", name)
    if rate_hz := preprocessing.get("sampling_rate", 16000) != 16000:
        raise EncoderError(f"model.encoder {name}: wants audio of {rate_hz} Hz, must be 16000")
    return EncoderFiles(name, folder, _digest(folder, name), bool(preprocessing.get("do_normalize", True)))


def _refuse_tuned(name: str) -> None:
    for pattern in TUNED_ON_EMOTION:
        if fnmatch.fnmatch(name.lower(), pattern):
            raise EncoderError(
                f"model.encoder {name}: matches {pattern}: encoders tuned on emotion data have heard the test "
                "speakers, so every fold would be invalid; use a self-supervised WavLM"
            )


def _folder(name: str, revision: str | None) -> Path:
    if name == "demo":
        return DEMO
    local = Path(name).expanduser()
    # Of a local path only the last part is the model's name: the data may well lie under a folder called iemocap.
    _refuse_tuned(local.name if local.is_dir() else name)
    if local.is_dir():
        return local.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise EncoderError(f"model.encoder {name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise EncoderError(f"model.encoder {name}: no such folder, and the hub does not give it: {reason}") from None


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise EncoderError(f"model.encoder {name}: {path.name} is missing in {path.parent}") from None
    except (OSError, ValueError) as error:
        raise EncoderError(f"model.encoder {name}: {path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise EncoderError(f"model.encoder {name}: {path} must hold a JSON object")
    return data


def _digest(folder: Path, name: str) -> str:
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise EncoderError(
            f"model.encoder {name}: no model.safetensors in {folder} (pickled weights are not loaded); make one with "
            "WavLMModel.from_pretrained(...).save_pretrained(FOLDER) where you trust the source"
        )
    total = hashlib.sha256()
    for path in (folder / "config.json", folder / "preprocessor_config.json", *weights):
        total.update(path.name.encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
