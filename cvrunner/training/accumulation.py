"""Gradients of the loss over a whole effective batch, encoded in micro-batches.

The CCC is not additive: means of micro-batch CCCs are not the CCC of the batch. Exact accumulation is gradient caching
(Gao et al. 2021, arXiv 2101.06983) cut at the utterance vector `z`:

    1. each micro-batch but the last: encode without gradient, keep `z`
    2. the last micro-batch: encode with gradient
    3. all `z` together -> predictions -> loss -> backward, to the head's gradients and to `dL/dz`
    4. each earlier micro-batch again, with gradient; backward from its `dL/dz`

Dropout is drawn from a key per utterance (`encoders/dropout.py`), so it is the same in both encodings and in every cut.
So `batch_size` affects memory only: at any time one micro-batch has a graph through the encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cvrunner.encoders.encoder import Features

EPSILON = 1e-8
"""Added to the denominator of the loss, so that constant columns divide by more than zero."""


class Encodes(Protocol):
    """The part of a model that accumulation uses; see `MambaEMAModel`."""

    def encode(self, features: Features, lengths: Tensor, keys: Sequence[int]) -> Tensor: ...

    def predict(self, z: Tensor, turns: list[int], keys: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True)
class MicroBatch:
    """`b` utterances that are encoded at once."""

    features: Features
    """On the device, in float32: conv features `[S, C]`, the boundary of an encoder whose top layers train, or what a
    frozen encoder returns."""
    lengths: Tensor
    """`[b]` real frames, on the CPU."""
    positions: tuple[int, ...]
    """Places of the utterances in the effective batch."""


def batch_ccc(predicted: Tensor, true: Tensor) -> Tensor:
    """Return the CCC of each column: `[B, K]`, `[B, K]` to `[K]`, in float32 or better, for gradients only.

    `2 cov(p, t) / (var(p) + var(t) + (mean(p) - mean(t))^2)` with moments divided by N (Lin 1989, Biometrics 45).
    Reported numbers come from `verdict/ccc.py`. Constant truth and an equal constant prediction give 0, not NaN.
    """
    predicted, true = (x if x.dtype.itemsize >= 4 else x.float() for x in (predicted, true))
    shift = true.mean(0, keepdim=True)
    # Both are moved to the same centre first: labels around 1e6 must not cancel.
    predicted, true = predicted - shift, true - shift
    mean_p, mean_t = predicted.mean(0), true.mean(0)
    p, t = predicted - mean_p, true - mean_t
    covariance = (p * t).mean(0)
    spread = p.square().mean(0) + t.square().mean(0) + (mean_p - mean_t).square()
    return 2 * covariance / (spread + EPSILON)


def ccc_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """`1 - mean over dimensions of CCC`, a scalar in 0..2. `true [B, K]`; `predicted` `[B, K]`, or `[B, P, K]` of `P`
    paths, over which the mean is taken, too."""
    if predicted.ndim > true.ndim:
        true = true[:, None].expand_as(predicted)
    return 1 - batch_ccc(predicted, true).mean()


def exact_backward(
    model: Encodes, batches: Sequence[MicroBatch], labels: Tensor, turns: list[int], keys: Sequence[int]
) -> Tensor:
    """Add the gradients of `ccc_loss` over all micro-batches together; return the loss, detached.

    `labels [B, K]`, `turns` and `keys` (what dropout is drawn from, per utterance) in the order of prediction.
    """

    def encode(batch: MicroBatch) -> Tensor:
        return model.encode(batch.features, batch.lengths, [keys[i] for i in batch.positions])

    *earlier, last = batches
    with torch.no_grad():
        leaves = [encode(batch) for batch in earlier]
    leaves = [z.requires_grad_() for z in leaves]
    z = torch.cat([*leaves, encode(last)])
    # `z` is in the order of the micro-batches; labels and turns are in the order of the effective batch.
    loss = ccc_loss(model.predict(z[in_order((batch.positions for batch in batches), z.device)], turns, keys), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    for batch, leaf in zip(earlier, leaves, strict=True):
        encode(batch).backward(leaf.grad)  # type: ignore[no-untyped-call]
    return loss.detach()


def averaged_backward(
    model: Encodes, batches: Sequence[MicroBatch], labels: Tensor, turns: list[int], keys: Sequence[int]
) -> Tensor:
    """Add the mean of the CCC gradients of each micro-batch, as the old script did; return the mean loss, detached."""
    total = torch.zeros((), device=labels.device)
    for batch in batches:
        own = [keys[i] for i in batch.positions]
        z = model.encode(batch.features, batch.lengths, own)
        loss = ccc_loss(model.predict(z, [turns[i] for i in batch.positions], own), labels[list(batch.positions)])
        (loss / len(batches)).backward()  # type: ignore[no-untyped-call]
        total += loss.detach() / len(batches)
    return total


def in_order(micro_batches: Iterable[Sequence[int]], device: torch.device) -> Tensor:
    """Return the indices that bring the utterances of all micro-batches, given by their places in the effective batch,
    into its order."""
    order = torch.tensor([i for positions in micro_batches for i in positions]).argsort()
    return order.to(device, non_blocking=True)
