"""Checkpoints: written by a thread, hashed while written, the best weights stored once."""

from __future__ import annotations

import hashlib
import io
import threading
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import load

from cvrunner.training import checkpoint
from cvrunner.training.checkpoint import Checkpoints, LoopState, Tensors, write_tensors


def tensors(value: float, averages: bool = False) -> Tensors:
    weights = {"a": torch.full((3, 5), value), "b": torch.full((), -value)}
    kept = {name: t + 1 for name, t in weights.items()} if averages else {}
    return Tensors(weights, {"0.exp_avg": torch.ones(2), "0.step": torch.tensor(7.0)}, kept)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_what_is_written_is_what_safetensors_reads_and_the_hash_is_that_of_the_file(dtype: torch.dtype) -> None:
    written = {
        "x": torch.randn(4, 3).to(dtype).T,
        "ü": torch.ones((), dtype=dtype),
        "0": torch.empty(0, 2, dtype=dtype),
    }
    file = io.BytesIO()
    digest = write_tensors(file, written)
    assert digest == hashlib.sha256(file.getvalue()).hexdigest()
    assert equal(load(file.getvalue()), written)


@pytest.mark.parametrize("averages", [False, True])
def test_the_best_weights_are_one_file_with_two_names(tmp_path: Path, averages: bool) -> None:
    checkpoints, state = Checkpoints(tmp_path), LoopState(key="k", batch_size=1, epoch=2, best_epoch=1)
    saved = tensors(1.0, averages)
    checkpoints.save(state, saved, best=True)
    checkpoints.wait()
    name = "averages" if averages else "weights"
    assert (tmp_path / f"0002-000000/{name}.safetensors").samefile(tmp_path / "best-0001.safetensors")
    found, loaded, note = Checkpoints(tmp_path).load("k")
    assert (found, note) == (state, None)
    assert loaded is not None
    assert all(equal(vars(loaded)[group], vars(saved)[group]) for group in checkpoint.GROUPS)
    assert equal(checkpoints.load_best(state), saved.averages if averages else saved.weights)


def test_without_hard_links_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    checkpoints, state = Checkpoints(tmp_path), LoopState(key="k", batch_size=1, epoch=2, best_epoch=1)
    checkpoints.save(state, tensors(1.0), best=True)
    checkpoints.wait()
    found, _, note = Checkpoints(tmp_path).load("k")
    assert (found, note) == (state, None)


def test_training_goes_on_while_a_copy_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, write = threading.Event(), checkpoint.write_tensors

    def blocked(file: BinaryIO, group: dict[str, torch.Tensor]) -> str:
        release.wait()
        return write(file, group)

    monkeypatch.setattr(checkpoint, "write_tensors", blocked)
    checkpoints, state, live = Checkpoints(tmp_path), LoopState(key="k", batch_size=1), tensors(1.0)
    checkpoints.save(state, live)
    live.weights["a"].zero_()
    state.add(0.5, {})
    assert Checkpoints(tmp_path).load("k")[0] is None
    release.set()
    checkpoints.wait()
    found, loaded, _ = Checkpoints(tmp_path).load("k")
    assert found == LoopState(key="k", batch_size=1)
    assert loaded is not None
    assert equal(loaded.weights, tensors(1.0).weights)


def test_an_error_of_the_writer_is_raised_by_the_next_wait_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    checkpoints, state = Checkpoints(tmp_path), LoopState(key="k", batch_size=1)
    checkpoints.save(state, tensors(1.0))
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(state, tensors(2.0))
    checkpoints.wait()
    checkpoints.close()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
