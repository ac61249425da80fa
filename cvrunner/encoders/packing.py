"""Utterances of different lengths, concatenated without padding.

Layers that work frame by frame process real frames only. Where utterances must be kept apart they are padded: in small
groups of neighbours of similar length for attention and positional convolution, all together for a scan over time.

`S` frames of all utterances together, `B` utterances, `F` frames of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvrunner.encoders.dropout import Draws

GROUP_PADDING = 0.1
"""Largest padding of a group, as a share of its real frames: more padding would give fewer, larger matrix products."""
LAYERS_AT_ONCE = 12
"""Layers whose states are summarised together: fewer calls, for a copy of their states meanwhile."""


@dataclass(frozen=True)
class Group:
    """Neighbouring utterances that are padded together."""

    first: int
    """Number of the first utterance."""
    lengths: tuple[int, ...]
    device: torch.device

    @property
    def frames(self) -> int:
        """F of the longest utterance."""
        return max(self.lengths)

    @cached_property
    def real(self) -> Tensor | None:
        """Mask `[B, F]`, True for real frames; None if all frames are real."""
        if len(set(self.lengths)) == 1:
            return None
        ends = torch.tensor(self.lengths)[:, None]
        return (torch.arange(self.frames) < ends).to(self.device, non_blocking=True)

    @cached_property
    def places(self) -> Tensor | None:
        """Indices of the real frames among the `B * F`; None if all are real."""
        if self.real is None:
            return None
        rows = [torch.arange(n) + i * self.frames for i, n in enumerate(self.lengths)]
        return torch.cat(rows).to(self.device, non_blocking=True)

    def pad(self, x: Tensor) -> Tensor:
        """Return the frames of this group `[s, D]` as `[B, F, D]`, padded with 0."""
        count, frames = len(self.lengths), self.frames
        if self.places is not None:
            x = x.new_zeros(count * frames, x.shape[1]).index_copy(0, self.places, x)
        return x.view(count, frames, -1)

    def pack(self, x: Tensor) -> Tensor:
        """Return the real frames of `[B, F, ...]` as `[s, D]`."""
        count, frames = len(self.lengths), self.frames
        x = x.reshape(count * frames, -1)
        if self.places is not None:
            x = x.index_select(0, self.places)
        return x


class Packing:
    """Layout of concatenated utterances. Sort them by length before: groups are then larger.

    `keys`: what the dropout of each utterance is drawn from; see `dropout.py`.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, keys: Sequence[int] = ()) -> None:
        self.lengths = tuple(lengths)
        self.device = device
        self.draws = Draws(keys, lengths, device)
        self.whole = Group(0, self.lengths, device)
        """All utterances padded together."""

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Neighbours of similar length that are padded together."""
        groups: list[Group] = []
        first, members = 0, [self.lengths[0]]
        for number, length in enumerate(self.lengths[1:], start=1):
            together = [*members, length]
            if max(together) * len(together) > (1 + GROUP_PADDING) * sum(together):
                groups.append(Group(first, tuple(members), self.device))
                first, together = number, [length]
            members = together
        return (*groups, Group(first, tuple(members), self.device))

    @cached_property
    def singles(self) -> tuple[Group, ...]:
        """Each utterance by itself."""
        return tuple(Group(i, (n,), self.device) for i, n in enumerate(self.lengths))

    def parts(self, x: Tensor, groups: Sequence[Group]) -> tuple[Tensor, ...]:
        """Split `[S, D]` into the frames of each group. The gradient of one split is one concatenation; that of a slice
        for each group would be a tensor of zeros for each, and their sum."""
        return torch.split(x, [sum(group.lengths) for group in groups])

    @cached_property
    def owned(self) -> Tensor:
        """Mask `[B, S]`, True for the frames of each utterance."""
        owners = torch.repeat_interleave(torch.tensor(self.lengths))
        return (torch.arange(len(self.lengths))[:, None] == owners).to(self.device, non_blocking=True)

    @cached_property
    def backwards(self) -> Tensor:
        """Indices `[S]` that reverse the frames of each utterance."""
        ends = itertools.accumulate(self.lengths)
        order = [torch.arange(end - 1, end - n - 1, -1) for n, end in zip(self.lengths, ends, strict=True)]
        return torch.cat(order).to(self.device, non_blocking=True)

    def averaged(self, states: Sequence[Tensor], group: int) -> Tensor:
        """Average `group` neighbouring frames of each utterance: L times `[S, D]` to `[sum of N, L, D]`, in float32 or
        better, with N = ceil(F / group). The last mean of an utterance is over its remaining frames.
        """
        steps = [-(-n // group) for n in self.lengths]
        # Each utterance is padded to whole means with zeros, which change no sum. `index_add` would need no padding,
        # but on a GPU it adds in an order that differs between runs.
        first = itertools.accumulate(steps, initial=0)
        frames = np.concatenate([np.arange(n) + i * group for n, i in zip(self.lengths, first, strict=False)])
        counts = np.bincount(frames // group)[:, None, None]
        divisor, places = (torch.from_numpy(x).to(self.device, non_blocking=True) for x in (counts, frames))
        sums = []
        for together in self._together(states):
            x = _stacked(together)
            padded = x.new_zeros(sum(steps) * group, *x.shape[1:])
            sums.append(padded.index_copy_(0, places, x).view(-1, group, *x.shape[1:]).sum(1))
        return torch.cat(sums, dim=1) / divisor

    def statistics(self, states: Sequence[Tensor]) -> Tensor:
        """Return mean and standard deviation (divided by F) over each utterance's frames: L times `[S, D]` to
        `[B, L, 2, D]`, in float32 or better.
        """
        owned = self.owned.to(torch.promote_types(states[0].dtype, torch.float32))
        share = owned / owned.sum(1, keepdim=True)
        found = [_Statistics.apply(owned, share, *together) for together in self._together(states)]  # type: ignore[no-untyped-call]
        return torch.cat(found, dim=1)

    def _together(self, states: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """Return the states of layers that are summarised together, on a CPU of one layer at a time: there, the shape
        of a product decides the order of its additions."""
        count = 1 if self.device.type == "cpu" else LAYERS_AT_ONCE
        return (states[i : i + count] for i in range(0, len(states), count))


def _stacked(states: Sequence[Tensor]) -> Tensor:
    """Return states `[S, D]` of `l` layers as `[S, l, D]`, in float32 or better."""
    return torch.stack(tuple(states), dim=1).to(torch.promote_types(states[0].dtype, torch.float32))


class _Statistics(torch.autograd.Function):
    """Mean and standard deviation `[B, l, 2, D]` per utterance of the states `[S, D]` of `l` layers. `owned [B, S]`: 1
    for its frames; `share`: 1 / F.

    Autograd would keep the centred states of every layer; here they are computed again from the states, which other
    steps keep anyway.
    """

    @staticmethod
    def forward(ctx: Any, owned: Tensor, share: Tensor, *states: Tensor) -> Tensor:
        x = _stacked(states).flatten(1)
        mean = share @ x
        # Around the mean, in a second pass: E[x^2] - E[x]^2 would cancel in float32.
        deviation = torch.sqrt(share @ x.sub_(owned.T @ mean).square_())
        ctx.save_for_backward(owned, share, mean, deviation, *states)
        return torch.stack([part.view(len(owned), len(states), -1) for part in (mean, deviation)], dim=2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        owned, share, mean, deviation, *states = ctx.saved_tensors
        of_mean, of_deviation = (part.flatten(1) for part in gradient.unbind(2))
        # A state that is constant over an utterance has deviation 0, and centred values of 0.
        scale = of_deviation / deviation.clamp_min(torch.finfo(deviation.dtype).tiny)
        centred = _stacked(states).flatten(1).sub_(owned.T @ mean)
        found = (share.T @ of_mean).add_(centred.mul_(share.T @ scale)).to(states[0].dtype)
        return None, None, *found.view(len(found), len(states), -1).unbind(1)
