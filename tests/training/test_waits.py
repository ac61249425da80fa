"""How often an update waits for a GPU, counted without one: on the device `meta`, whose values nobody can read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cvrunner.encoders.encoder import Boundary, Encoded, Features
from cvrunner.plan.counting import META, autocast
from cvrunner.training.checkpoint import Position
from cvrunner.training.learner import Learner
from tests.trials import learner, pick, tiny_trials

MOST = 3
WAITING = {"nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
"""Calls whose result has a shape, or is a number, that depends on the values."""


class Waits(TorchDispatchMode):
    """Notes what lets the host wait for the device `meta`. What it reads from there is 1.

    Not seen: `torch.tensor([1.0], device=...)` and an index that is a list.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        on_device = any(x.device == META for x in tensors)
        if on_device and name == "_local_scalar_dense":
            self.found.append("item")
            return 1
        if on_device and name == "_to_copy" and torch.device(kwargs.get("device") or META) != META:
            self.found.append(f"copy from the device: {tuple(tensors[0].shape)}")
            return torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        out = func(*args, **kwargs)
        copied = name == "_to_copy" and tensors[0].device != out.device
        # An index on the host is copied, and one of truth values is counted first.
        indexed = name in ("index", "index_put", "index_put_") and tensors[0].device == META
        slow_index = indexed and any(x.device != META or x.dtype == torch.bool for x in tensors[1:])
        if (copied and not kwargs.get("non_blocking")) or slow_index or (on_device and name in WAITING):
            self.found.append(f"{name}: {tuple(tensors[0].shape)}")
        return out


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: x.tolist(), "copy from the device"),
        (lambda x: x.cpu(), "copy from the device"),
        (lambda x: x.to("cpu"), "copy from the device"),
        (lambda x: float(x.sum()), "item"),
        (lambda x: bool(x.any()), "item"),
        (lambda x: torch.ones(3).to(x.device), "_to_copy"),
        (lambda x: x[torch.tensor([0, 2])], "index"),
    ],
)
def test_each_way_to_wait_is_noticed(read: Any, name: str) -> None:
    x = torch.empty(3, device=META)
    with Waits() as waits:
        read(x)
    assert [found.partition(":")[0] for found in waits.found] == [name]


def on_device(features: Features) -> Features:
    """As the reader of a GPU copies them: without waiting."""
    if isinstance(features, Tensor):
        return features.to(META, non_blocking=True)
    if isinstance(features, Encoded):
        return features._replace(states=on_device(features.states), statistics=on_device(features.statistics))
    return Boundary(on_device(features.hidden), features.mixed and on_device(features.mixed))


@pytest.mark.parametrize(
    ("condition", "model", "train"),
    [
        ("frozen", {}, {}),
        ("unfrozen", {}, {}),
        ("unfrozen", {"protocol": "dialogue"}, {"ema_decay": 0.9}),
        ("unfrozen", {"unfreeze_top_layers": 1}, {}),
        ("unfrozen", {"lora": {"rank": 2}}, {}),
        ("unfrozen", {"spec_augment": True}, {}),
    ],
)
def test_an_update_in_several_micro_batches_waits_at_most_three_times(
    condition: str, model: dict[str, Any], train: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"batch_size": 1, "accumulation_steps": 6, "precision": "bfloat16", **train}
    trial = pick(tiny_trials(tmp_path, model=model, train=train), condition)
    assert all(learner(trial, tmp_path).inputs.fill_cache())
    # The fused kernel, which does not wait, does not exist on `meta`.
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused: torch.optim.SGD(groups))
    with mock.patch("torch.autocast", autocast), Waits() as waits:
        placed = Learner(trial, tmp_path / "cache", META)
        placed.begin_epoch(1)
        read = placed.inputs.batches
        monkeypatch.setattr(
            placed.inputs, "batches", lambda update: (replace(b, features=on_device(b.features)) for b in read(update))
        )
        update = placed.updates(1)[0]
        assert len(update.micro_batches) == 6
        waits.found.clear()
        placed.update(update, Position(1, 0, 0))
    assert 1 <= len(waits.found) <= MOST, waits.found
