"""Encoders by hub name where the hub does not answer."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from cvrunner.encoders import files as encoder_files
from cvrunner.encoders import hub
from cvrunner.encoders.files import check_encoder, find_encoder, stated_licence
from cvrunner.errors import EncoderError
from tests.encoders.hub_server import hub_with
from tests.tiny_encoders import save_encoder

NAME = "nobody/wavlm"
COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of hub encoders."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def silent_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that takes the question and gives no answer."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "HUB_TIMEOUT_S", 0.3)
        yield


def save_in_cache(cache: Path) -> Path:
    """A downloaded encoder."""
    home = cache / "models--nobody--wavlm"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    return save_encoder(home / "snapshots" / COMMIT)


@pytest.mark.usefixtures("silent_hub")
def test_a_hub_that_does_not_answer_is_not_waited_for() -> None:
    with pytest.raises(EncoderError, match=r"nobody/wavlm: no such folder, and the hub .*timed out \(check the name"):
        check_encoder(NAME, None, ())


@pytest.mark.usefixtures("silent_hub")
def test_a_downloaded_encoder_is_used_where_the_hub_does_not_answer(cache: Path) -> None:
    folder = save_in_cache(cache)
    check_encoder(NAME, None, (0, 2))
    assert find_encoder(NAME).folder == folder


def test_a_downloaded_encoder_is_used_offline(cache: Path) -> None:
    folder = save_in_cache(cache)
    assert find_encoder(NAME).digest == find_encoder(str(folder)).digest
    assert find_encoder(NAME).revision == COMMIT
    assert find_encoder(str(folder)).revision is None


def test_a_licence_is_told_where_the_encoders_own_files_state_it(tmp_path: Path) -> None:
    assert stated_licence(find_encoder("demo")) == "mit"
    files = find_encoder(str(save_encoder(tmp_path / "wavlm")))
    for text in (None, "no front matter", "---\nlanguage: en\n---\n", "---\n: [\n---\n"):
        if text is not None:
            (files.folder / "README.md").write_text(text)
        assert stated_licence(files) is None


def test_an_incomplete_download_is_reported_as_such_before_the_corpus_is_read(cache: Path) -> None:
    weights = save_in_cache(cache) / "model.safetensors"
    weights.unlink()
    for check in (lambda: check_encoder(NAME, None, ()), lambda: find_encoder(NAME)):
        with pytest.raises(EncoderError, match=rf"its download is incomplete: .* `hf download {NAME} --incl"):
            check()
    # A link into the cache whose file is gone.
    weights.symlink_to("../../blobs/gone")
    with pytest.raises(EncoderError, match="its download is incomplete"):
        find_encoder(NAME)


def test_a_shard_that_is_missing_is_named(cache: Path) -> None:
    folder = save_in_cache(cache)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(EncoderError, match=r"incomplete: model-00002-of-00002\.safetensors is missing"):
        find_encoder(NAME)


def test_a_checkpoint_without_safetensors_leads_to_the_conversion(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = rf"`python -m cvrunner encoder {NAME} FOLDER --trust-pickle`"
    source = save_encoder(tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with hub_with(NAME, source, monkeypatch) as asked:
        with pytest.raises(EncoderError, match=rf"has no model\.safetensors on the hub .* {command}"):
            check_encoder(NAME, None, ())
        assert not any("pytorch_model.bin" in path for path in asked)
        (source / "pytorch_model.bin").unlink()
        with pytest.raises(EncoderError, match="on the hub: use another checkpoint"):
            check_encoder(NAME, None, ())
    # Downloaded by another program, and no network.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = save_in_cache(cache)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match=rf"no model\.safetensors in .* {command}"):
        check_encoder(NAME, None, ())


def test_a_file_is_read_once_as_long_as_it_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(save_encoder(tmp_path / "wavlm"))
    first = find_encoder(name)
    monkeypatch.setattr(encoder_files.hashlib, "file_digest", None)
    assert find_encoder(name) == first
