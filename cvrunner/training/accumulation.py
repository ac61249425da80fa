"""Gradients of the loss over a whole effective batch, encoded in micro-batches.

The CCC is not additive: means of micro-batch CCCs are not the CCC of the batch. Exact accumulation is gradient caching
(Gao et al. 2021, arXiv 2101.06983) cut at the utterance vector `z`:

    1. each micro-batch but the last: encode without gradient, keep `z` and the random state before it
    2. the last micro-batch: encode with gradient
    3. all `z` together -> predictions -> loss -> backward, to the head's gradients and to `dL/dz`
    4. each earlier micro-batch again, from its random state, with gradient; backward from its `dL/dz`

So `batch_size` is a matter of memory alone: at any time one micro-batch has a graph through the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cvrunner.encoders.wavlm import Boundary
from cvrunner.training.loss import ccc_loss


class Encodes(Protocol):
    """What accumulation needs of a model; see `MambaEMAModel`."""

    def encode(self, features: Tensor | Boundary, lengths: Tensor) -> Tensor: ...

    def predict(self, z: Tensor, turns: list[int]) -> Tensor: ...


class MicroBatch(Protocol):
    """Some utterances to be encoded at once."""

    @property
    def features(self) -> Tensor | Boundary: ...

    @property
    def lengths(self) -> Tensor: ...

    @property
    def positions(self) -> Tensor:
        """`[b]`: where these utterances stand in the effective batch."""
        ...


def exact_backward(model: Encodes, batches: Sequence[MicroBatch], labels: Tensor, turns: list[int]) -> Tensor:
    """Add to the gradients those of `ccc_loss` over all micro-batches together; returns the loss, detached.

    `labels [B, K]` and `turns` in the order of prediction. Dropout repeats itself exactly in the second encoding.
    """
    *earlier, last = batches
    states, leaves = [], []
    for batch in earlier:
        states.append(_random_state())
        with torch.no_grad():
            leaves.append(model.encode(batch.features, batch.lengths))
    leaves = [z.requires_grad_() for z in leaves]
    z = torch.cat([*leaves, model.encode(last.features, last.lengths)])
    loss = ccc_loss(model.predict(z[_order(batches)], turns), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    after = _random_state()
    for batch, state, leaf in zip(earlier, states, leaves, strict=True):
        _set_random_state(state)
        model.encode(batch.features, batch.lengths).backward(leaf.grad)  # type: ignore[no-untyped-call]
    _set_random_state(after)
    return loss.detach()


def averaged_backward(model: Encodes, batches: Sequence[MicroBatch], labels: Tensor, turns: list[int]) -> Tensor:
    """Add the mean of the micro-batches' own CCC gradients, as the old script did; returns the mean loss, detached."""
    total = torch.zeros((), device=labels.device)
    for batch in batches:
        z = model.encode(batch.features, batch.lengths)
        loss = ccc_loss(model.predict(z, [turns[i] for i in batch.positions.tolist()]), labels[batch.positions])
        (loss / len(batches)).backward()  # type: ignore[no-untyped-call]
        total += loss.detach() / len(batches)
    return total


def _order(batches: Sequence[MicroBatch]) -> Tensor:
    """Where each utterance of the effective batch stands among the concatenated micro-batches."""
    return torch.cat([batch.positions for batch in batches]).argsort()


def _random_state() -> tuple[Tensor, Tensor | None]:
    """torch's random state, of the CPU and of the current GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
