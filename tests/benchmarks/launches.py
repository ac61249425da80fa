"""Count what a GPU is asked to do in one update of WavLM-large, without a GPU: `python -m tests.benchmarks.launches`.

Counted on tensors without data, as `cvrunner/plan/counting.py` describes it, for `plan --card` too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import WavLMConfig, WavLMModel

from cvrunner.config.adaptation import Adaptation
from cvrunner.config.sections import ModelConfig
from cvrunner.encoders.waveform import WaveformEncoder
from cvrunner.model.mamba_ema import MambaEMAModel
from cvrunner.plan.counting import counted
from cvrunner.text import Table, tables_as_text
from cvrunner.training.accumulation import MicroBatch, exact_backward

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

    with counted(model.encoder):
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
    with counted(model.encoder) as calls:
        exact_backward(model, batches, labels, [1] * len(SECONDS), range(len(SECONDS)))
    return calls.counts


def _batches(seconds: Sequence[float], batch_size: int) -> Iterator[MicroBatch]:
    for first in range(0, len(seconds), batch_size):
        frames = [int(50 * s) - 1 for s in seconds[first : first + batch_size]]
        features = torch.empty(sum(frames), LARGE["conv_dim"][-1], device="meta")
        # An array: a tensor on `meta` has no values.
        lengths: Any = np.array(frames)
        yield MicroBatch(features, lengths, tuple(range(first, first + len(frames))))


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
