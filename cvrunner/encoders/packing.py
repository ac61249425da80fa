"""Utterances of unlike length one after the other, without padding.

Layers that work frame by frame see nothing but real frames. Where utterances must be kept apart they are padded: in
small groups of neighbours of like length for attention and positional convolution, all together for a scan over time.

`S` frames of all utterances together, `B` utterances, `F` frames of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

GROUP_PADDING = 0.1
"""Padding that a group may have, as a share of its real frames: a larger group makes fewer, larger products."""


@dataclass(frozen=True)
class Group:
    """Neighbouring utterances that are padded together."""

    start: int
    """Their first frame among the `S`."""
    lengths: tuple[int, ...]
    device: torch.device

    @property
    def frames(self) -> int:
        """F of the longest."""
        return max(self.lengths)

    @property
    def size(self) -> tuple[int, int]:
        """`(B, F)` when padded."""
        return len(self.lengths), self.frames

    @cached_property
    def real(self) -> Tensor | None:
        """`[B, F]`, True where a frame is real; None where all are."""
        if len(set(self.lengths)) == 1:
            return None
        ends = torch.tensor(self.lengths)[:, None]
        return (torch.arange(self.frames) < ends).to(self.device, non_blocking=True)

    @cached_property
    def places(self) -> Tensor | None:
        """Where the real frames are among the `B * F`; None where all are real."""
        if self.real is None:
            return None
        rows = [torch.arange(n) + i * self.frames for i, n in enumerate(self.lengths)]
        return torch.cat(rows).to(self.device, non_blocking=True)

    def pad(self, x: Tensor) -> Tensor:
        """This group of `[S, D]`, as `[B, F, D]` with 0 for padding."""
        x = x[self.start : self.start + sum(self.lengths)]
        count, frames = self.size
        if self.places is not None:
            x = x.new_zeros(count * frames, x.shape[1]).index_copy(0, self.places, x)
        return x.view(count, frames, -1)

    def pack(self, x: Tensor) -> Tensor:
        """The real frames of `[B, F, ...]`, as `[s, D]`."""
        count, frames = self.size
        x = x.reshape(count * frames, -1)
        return x if self.places is None else x.index_select(0, self.places)


class Packing:
    """How utterances of these lengths lie one after the other; best by length, for then groups are large."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.device = device
        self.whole = Group(0, self.lengths, device)
        """All utterances padded together."""

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Neighbours of like length, padded together."""
        groups: list[Group] = []
        start, members = 0, [self.lengths[0]]
        for length in self.lengths[1:]:
            together = [*members, length]
            if max(together) * len(together) > (1 + GROUP_PADDING) * sum(together):
                groups.append(Group(start, tuple(members), self.device))
                start, together = start + sum(members), [length]
            members = together
        return (*groups, Group(start, tuple(members), self.device))

    @property
    def frames(self) -> int:
        """F of the longest."""
        return max(self.lengths)

    @property
    def padded_frames(self) -> int:
        """All frames where utterances are kept apart, padding with them."""
        return sum(len(group.lengths) * group.frames for group in self.groups)

    @cached_property
    def owned(self) -> Tensor:
        """`[B, S]`, True where a frame is the utterance's."""
        owners = torch.repeat_interleave(torch.tensor(self.lengths))
        return (torch.arange(len(self.lengths))[:, None] == owners).to(self.device, non_blocking=True)

    @cached_property
    def backwards(self) -> Tensor:
        """`[S]`, the frames of each utterance from its last to its first."""
        ends = itertools.accumulate(self.lengths)
        order = [torch.arange(end - 1, end - n - 1, -1) for n, end in zip(self.lengths, ends, strict=True)]
        return torch.cat(order).to(self.device, non_blocking=True)

    def averaged(self, states: Sequence[Tensor], group: int) -> Tensor:
        """Means of `group` neighbouring frames of each utterance: L times `[S, D]` to `[sum of N, L, D]`, in float32 or
        better.

        N = ceil(F / group). The last mean of an utterance is over the frames that it has.
        """
        steps = [-(-n // group) for n in self.lengths]
        first = itertools.accumulate(steps, initial=0)
        slots = torch.cat([torch.arange(n) // group + start for n, start in zip(self.lengths, first, strict=False)])
        slots, counts = (x.to(self.device, non_blocking=True) for x in (slots, torch.bincount(slots)))
        precise = torch.promote_types(states[0].dtype, torch.float32)
        empty = states[0].new_zeros(sum(steps), states[0].shape[1], dtype=precise)
        means = [empty.index_add(0, slots, x.to(empty.dtype)) / counts[:, None] for x in states]
        return torch.stack(means, dim=1)
