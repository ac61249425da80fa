"""Dropout drawn per utterance, so that an update is the same however it is cut into micro-batches.

torch draws the dropout of a whole batch from one stream, in which the draws of an utterance depend on its neighbours.
Here each utterance of an update has a key (`training/learner.py`: seed, fold, epoch, update, utterance), and its draws
depend on that key and on the place in the model alone: not on the micro-batch, and not on whether it is encoded for the
first or the second time. One call of the generator fills the masks of an utterance for all places of one kind.

To use it in a module that sees packed rows `[S, ...]`: a `Dropout` instead of `nn.Dropout`, with a `kind` that all
dropouts of the same width share, such as `lora`. `SpeechEncoder.train` numbers those below it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

STEPS = 2**16
"""A draw is a random integer of 16 bits, of which 64 are a single draw of torch: on a CPU, 10 times faster than
`bernoulli_`. A dropout probability is rounded to a multiple of 1 / STEPS."""
_PER_INTEGER = 4


class Draws:
    """Random draws for the utterances of one forward pass.

    `keys` per utterance; without keys, all dropouts draw from torch's own stream. `lengths`: rows per utterance.
    """

    active: Draws | None = None
    """The draws that dropouts use now. A plain global: autograd may run a layer again in its own thread."""

    def __init__(self, keys: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        self.keys = tuple(keys)
        self.starts = tuple(itertools.accumulate(lengths, initial=0))
        self.device = device
        self._masks: dict[tuple[str, float], Tensor] = {}

    def seed(self, utterance: int, kind: str) -> int:
        """Return the seed of the utterance with this number for one kind of draws."""
        digest = hashlib.blake2b(f"{self.keys[utterance]} {kind}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) >> 1

    def generator(self, utterance: int, kind: str, device: torch.device | str = "cpu") -> torch.Generator | None:
        """Return a generator for one utterance; None, which is torch's own, without keys."""
        if not self.keys:
            return None
        return torch.Generator(device).manual_seed(self.seed(utterance, kind))

    def mask(self, place: Place, width: int) -> Tensor:
        """Return `[S, width]`, True for what a dropout keeps."""
        kind = (place.kind, place.p)
        if kind not in self._masks:
            noise = _integers(place.places, self.starts[-1], width, device=self.device)
            for i, (start, end) in enumerate(itertools.pairwise(self.starts)):
                self._fill(noise[:, start:end], i, f"{place.kind} {place.p}")
            self._masks[kind] = _kept(noise, width, place.p)
        return self._masks[kind][place.number]

    def attention_mask(self, place: Place, first: int, lengths: Sequence[int], heads: int) -> Tensor:
        """Return `[B, H, F, F]`, True for the attention weights to keep, for utterances from number `first` on."""
        frames = max(lengths)
        noise = _integers(len(lengths), heads, frames, frames, device=self.device)
        for row, length in enumerate(lengths):
            # The draws for real frames must not depend on the padding.
            real = _integers(heads, length, length, device=self.device)
            self._fill(real, first + row, f"{place.kind} {place.number}")
            noise[row, :, :length, : real.shape[2]] = real
        return _kept(noise, frames, place.p)

    def _fill(self, noise: Tensor, utterance: int, kind: str) -> None:
        device = self.device if self.device.type == "cuda" else "cpu"
        noise.random_(-(2**63), None, generator=self.generator(utterance, kind, device))

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let all dropouts inside the `with` block draw from here."""
        before, Draws.active = Draws.active, self if self.keys else None
        try:
            yield
        finally:
            Draws.active = before


class Place(nn.Module):
    """A place of the model where something is dropped with probability `p`."""

    def __init__(self, p: float, kind: str) -> None:
        super().__init__()
        self.p = p
        self.kind = kind
        self.number, self.places = 0, 1
        """Number of this place among all of its kind and probability, and how many there are."""

    @property
    def drops(self) -> bool:
        """Whether something is dropped here at all."""
        return self.training and self.p > 0


class Dropout(Place):
    """`nn.Dropout` for rows `[S, ...]` of all utterances, utterance after utterance."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.drops:
            return x
        if Draws.active is None or self.p == 1:
            return functional.dropout(x, self.p)
        return drop(x, Draws.active.mask(self, x[0].numel()).view(x.shape), self.p)


class _Masked(torch.autograd.Function):
    """`x * mask * scale` in one kernel, whose graph keeps the mask alone, one byte per value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return torch.ops.aten.native_dropout_backward(x, mask, scale)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.aten.native_dropout_backward(gradients[0], *ctx.saved_tensors, ctx.scale), None, None


def drop(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """Return `x` where `mask` is True, scaled so that the mean stays the same, and else 0."""
    return _Masked.apply(x, mask, STEPS / (STEPS - _threshold(p)))  # type: ignore[no-any-return, no-untyped-call]


def replace_dropouts(module: nn.Module, kind: Callable[[str], str]) -> None:
    """Replace each `nn.Dropout` below a module; `kind` maps the name of a module to its kind."""
    for name, dropout in list(module.named_modules()):
        if type(dropout) is nn.Dropout:
            module.set_submodule(name, Dropout(dropout.p, kind(name)))


def number_places(module: nn.Module) -> None:
    """Number the places below a module that drop something: those of one kind and probability share their draws."""
    groups: dict[tuple[str, float], list[Place]] = defaultdict(list)
    for place in module.modules():
        if isinstance(place, Place) and place.drops:
            groups[place.kind, place.p].append(place)
    for places in groups.values():
        for number, place in enumerate(places):
            place.number, place.places = number, len(places)


def _threshold(p: float) -> int:
    """Return how many of the STEPS values of a draw mean that a value is dropped."""
    return min(round(p * STEPS), STEPS - 1)


def _integers(*shape: int, device: torch.device) -> Tensor:
    """Return room for `shape` draws; the last dimension is rounded up to whole integers of 64 bits."""
    *rows, width = shape
    return torch.empty(*rows, -(-width // _PER_INTEGER), dtype=torch.int64, device=device)


def _kept(noise: Tensor, width: int, p: float) -> Tensor:
    return noise.view(torch.int16)[..., :width] >= _threshold(p) - STEPS // 2
