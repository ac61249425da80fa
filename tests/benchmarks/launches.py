"""Count what a GPU is asked to do in one update of WavLM-large, without a GPU: `python -m tests.benchmarks.launches`.

Tensors are on the device `meta`: they have a shape, but no data. An aten call that is neither a view nor an allocation
counts as one launch of a kernel. Autocast does not know that device, so its rules for CUDA are applied here: products
in bfloat16, norms and softmax in float32, and one cast per weight while the outermost autocast context lives. Optimizer
and clipping are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import WavLMConfig, WavLMModel

from cvrunner.config.adaptation import Adaptation
from cvrunner.config.sections import ModelConfig
from cvrunner.encoders.waveform import WaveformEncoder
from cvrunner.model.mamba_ema import MambaEMAModel
from cvrunner.text import Table, tables_as_text
from cvrunner.training.accumulation import exact_backward

SECONDS = (1.8, 2.4, 3.0, 3.6, 4.4, 5.2, 6.6, 9.6)
"""Lengths of eight utterances, as IEMOCAP has them."""
LARGE: dict[str, Any] = {
    "conv_dim": (512,) * 7,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "layerdrop": 0.0,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
}
NO_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view", "lift_fresh"}
BFLOAT16 = {functional.linear, torch.conv1d, functional.conv1d, torch.bmm, torch.matmul, torch.baddbmm, Tensor.matmul}
FLOAT32 = {functional.layer_norm, torch.softmax, Tensor.softmax, functional.softplus, torch.cumsum, Tensor.cumsum}


@dataclass(frozen=True)
class MicroBatch:
    """Utterances that are encoded at once."""

    features: Tensor
    lengths: Any
    """An array of the numbers of frames: a tensor on `meta` has no values."""
    positions: tuple[int, ...]


class Autocast(TorchFunctionMode):
    """Autocast's rules for CUDA, and its cache of weights."""

    depth = 0
    weights: dict[int, Tensor] = {}  # noqa: RUF012 (as global as the original)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            query, key, value = (self.cast(x, torch.bfloat16) for x in args[:3])
            mask = self.cast(kwargs["attn_mask"], torch.bfloat16)
            kernel = torch.ops.aten._scaled_dot_product_efficient_attention
            return kernel(query, key, value, mask, True, kwargs["dropout_p"])[0]
        if func in BFLOAT16 or func in FLOAT32:
            dtype = torch.bfloat16 if func in BFLOAT16 else torch.float32
            args = tuple(self.cast(x, dtype) for x in args)
            kwargs = {name: self.cast(x, dtype) for name, x in kwargs.items()}
        return func(*args, **kwargs)

    def cast(self, x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == dtype:
            return x
        if dtype == torch.bfloat16 and x.is_leaf and x.requires_grad:
            if id(x) not in self.weights:
                self.weights[id(x)] = x.to(dtype)
            return self.weights[id(x)]
        return x.to(dtype)


@contextmanager
def autocast(_: str, dtype: torch.dtype | None = None, enabled: bool = True) -> Iterator[None]:
    """Stand in for torch.autocast."""
    Autocast.depth += 1
    try:
        if enabled:
            with Autocast():
                yield
        else:
            yield
    finally:
        Autocast.depth -= 1
        if Autocast.depth == 0:
            Autocast.weights.clear()


class Calls(TorchDispatchMode):
    """Counts aten calls by name; a change of type on the device is a `cast`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        # A call for many tensors returns nothing: it changes its first argument.
        results = args[0] if out is None else out if isinstance(out, tuple | list) else [out]
        on_gpu = any(isinstance(x, Tensor) and x.device.type == "meta" for x in results)
        if on_gpu and not func.is_view and name not in NO_LAUNCH:
            if name == "_foreach_copy_" or (name == "_to_copy" and args[0].device == out.device):
                name = "cast"
            self.counts[name] += 1
        return out


def large_model() -> MambaEMAModel:
    """Return WavLM-large with a head, on `meta`, all of which trains in bfloat16."""
    with torch.device("meta"):
        wavlm = WavLMModel(WavLMConfig(**LARGE))
        encoder = WaveformEncoder(wavlm, adaptation=Adaptation("full", start_epoch=1), precision=torch.bfloat16)
        return MambaEMAModel(encoder, ModelConfig(), 2).train()


def saved_bytes(seconds: Sequence[float]) -> int:
    """Count what the graph of a forward pass keeps of utterances that are encoded at once, without weights."""
    model, kept = large_model(), dict[int, torch.UntypedStorage]()
    (batch,) = _batches(seconds, len(seconds))

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with mock.patch("torch.autocast", autocast), model.encoder.casts.kept():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model.predict(model.encode(batch.features, batch.lengths, range(len(seconds))), [1] * len(seconds), ())
        weights = [*model.parameters(), *(w.cast for part in model.encoder.casts._parts.values() for w in part)]
    for weight in weights:
        kept.pop(weight.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


def count(batch_size: int) -> Counter[str]:
    """Count the calls of one update of eight utterances, `batch_size` encoded at once."""
    model = large_model()
    batches = list(_batches(SECONDS, batch_size))
    labels = torch.empty(len(SECONDS), 2, device="meta")
    with mock.patch("torch.autocast", autocast), model.encoder.casts.kept(), Calls() as calls:
        exact_backward(model, batches, labels, [1] * len(SECONDS), range(len(SECONDS)))
    return calls.counts


def _batches(seconds: Sequence[float], batch_size: int) -> Iterator[MicroBatch]:
    for first in range(0, len(seconds), batch_size):
        frames = [int(50 * s) - 1 for s in seconds[first : first + batch_size]]
        features = torch.empty(sum(frames), LARGE["conv_dim"][-1], device="meta")
        yield MicroBatch(features, np.array(frames), tuple(range(first, first + len(frames))))


if __name__ == "__main__":
    columns = ["WavLM-large, 8 utterances", "launches", "casts among them", "attention", "matrix products"]
    rows = []
    for size in (8, 4, 1):
        found = count(size)
        products = sum(found[name] for name in ("mm", "addmm", "bmm", "baddbmm"))
        attention = sum(number for name, number in found.items() if "attention" in name)
        rows.append([f"{size} x {8 // size}", *map(str, (found.total(), found["cast"], attention, products))])
    print(tables_as_text([Table("Forward and backward pass of one update", columns, rows)], 100))
    for lengths in ([15.0] * 4, [15.0], [30.0]):
        text = " + ".join(f"{s:g} s" for s in lengths)
        print(f"Kept for the backward pass of {text}: {saved_bytes(lengths) / 1e9:.2f} GB")
