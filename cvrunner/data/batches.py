"""The utterances of each update, from (seed, fold, epoch) alone: no loader state, so a resumed epoch is the same.

An update is an effective batch. It is encoded in micro-batches of at most `batch_size` utterances of similar length, at
most `max_batch_s` seconds of audio and, on a GPU, no more than fits into its memory. The conditions of a fold with the
same effective batch and seed get the same updates in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import numpy as np

from cvrunner.data.utterance import Utterance


class MemoryFormula(NamedTuple):
    """Memory of a micro-batch by the durations `d` in seconds: `constant + linear sum(d) + quadratic sum(d^2)`."""

    constant: float
    """In bytes, as the other terms."""
    linear: float
    quadratic: float
    limit: float
    """Bytes that a micro-batch may take."""

    def fits(self, durations_s: Sequence[float]) -> bool:
        """Whether utterances of these durations can be encoded at once."""
        total = self.linear * sum(durations_s) + self.quadratic * sum(d * d for d in durations_s)
        return self.constant + total <= self.limit


@dataclass(frozen=True)
class Update:
    """One effective batch."""

    utterances: tuple[Utterance, ...]
    """In the order of the predictions; dialogues one after the other, each in the order of its turns."""
    turns: tuple[int, ...]
    """Number of utterances per dialogue, in order; 1 each if utterances are predicted by themselves."""
    micro_batches: tuple[tuple[int, ...], ...]
    """Positions in `utterances` of those that are encoded together."""


def training_updates(
    utterances: Sequence[Utterance],
    *,
    effective_batch: int,
    batch_size: int,
    max_batch_s: float | None = None,
    memory: MemoryFormula | None = None,
    length_bucket_batches: int,
    by_dialogue: bool,
    seed: int,
    fold: int,
    epoch: int,
) -> list[Update]:
    """Return the updates of one epoch; every utterance is in exactly one.

    Utterances are shuffled, sorted by length within buckets of `length_bucket_batches` effective batches (not for 1),
    divided into effective batches, and these shuffled again. `by_dialogue`: whole dialogues are shuffled and joined
    until they reach the effective batch.
    """
    random = np.random.default_rng([seed, fold, epoch])
    if by_dialogue:
        groups = _pack_dialogues(dialogues(utterances), effective_batch, random)
        return [_update(group, batch_size, max_batch_s, memory, by_dialogue=True) for group in groups]
    order = random.permutation(len(utterances))
    bucket = effective_batch * length_bucket_batches
    groups = []
    for start in range(0, len(order), bucket):
        members = [utterances[i] for i in order[start : start + bucket]]
        if length_bucket_batches > 1:
            members.sort(key=lambda u: (u.samples, u.id))
        groups += [members[i : i + effective_batch] for i in range(0, len(members), effective_batch)]
    groups = _without_single(groups)
    # Otherwise the updates of a bucket would run from its shortest utterances to its longest.
    shuffled = [groups[i] for i in random.permutation(len(groups))]
    return [_update(group, batch_size, max_batch_s, memory, by_dialogue=False) for group in shuffled]


def evaluation_update(
    utterances: Sequence[Utterance],
    batch_size: int,
    by_dialogue: bool,
    max_batch_s: float | None = None,
    memory: MemoryFormula | None = None,
) -> Update:
    """Return all utterances as one update, in micro-batches sorted by length, the longest first."""
    ordered = [u for dialogue in dialogues(utterances) for u in dialogue]
    update = _update(ordered, batch_size, max_batch_s, memory, by_dialogue)
    # Longest first: all later micro-batches fit into memory that the allocator already holds.
    return replace(update, micro_batches=update.micro_batches[::-1])


def dialogues(utterances: Sequence[Utterance]) -> list[list[Utterance]]:
    """Return the utterances of each dialogue in the order of its turns, dialogues sorted by name."""
    grouped: dict[str, list[Utterance]] = {}
    for u in sorted(utterances, key=lambda u: (u.dialogue, u.turn, u.id)):
        grouped.setdefault(u.dialogue, []).append(u)
    return list(grouped.values())


def _pack_dialogues(
    groups: list[list[Utterance]], effective: int, random: np.random.Generator
) -> list[list[Utterance]]:
    packed: list[list[Utterance]] = []
    current: list[Utterance] = []
    for i in random.permutation(len(groups)):
        current += groups[i]
        if len(current) >= effective:
            packed.append(current)
            current = []
    if current:
        packed.append(current)
    return _without_single(packed)


def _without_single(groups: list[list[Utterance]]) -> list[list[Utterance]]:
    """Join a last group of one utterance to the group before it: the CCC of one utterance is undefined."""
    if len(groups) > 1 and len(groups[-1]) == 1:
        return [*groups[:-2], groups[-2] + groups[-1]]
    return groups


def _update(
    members: Sequence[Utterance],
    batch_size: int,
    max_batch_s: float | None,
    memory: MemoryFormula | None,
    by_dialogue: bool,
) -> Update:
    micro = micro_batches(members, batch_size, max_batch_s or math.inf, memory)
    turns = [1] * len(members)
    if by_dialogue:
        # Members come dialogue after dialogue, so equal neighbours are one dialogue.
        turns = [len(list(run)) for _, run in groupby(members, key=lambda u: u.dialogue)]
    return Update(tuple(members), tuple(turns), tuple(micro))


def micro_batches(
    members: Sequence[Utterance], batch_size: int, max_batch_s: float, memory: MemoryFormula | None = None
) -> list[tuple[int, ...]]:
    """Return positions sorted by length, in groups within `batch_size` utterances, `max_batch_s` seconds and `memory`;
    a group of one utterance may exceed the latter two.
    """
    batches: list[list[int]] = []
    # `plan` cuts all updates of all epochs, so durations are added only if there is a limit for them.
    limited = memory is not None or max_batch_s < math.inf
    # Similar lengths together: padding costs time. Utterances of equal length keep their order.
    for i in sorted(range(len(members)), key=lambda i: (members[i].samples, i)):
        full = not batches or len(batches[-1]) == batch_size
        if limited and not full:
            durations = [members[j].duration_s for j in (*batches[-1], i)]
            full = sum(durations) > max_batch_s or not (memory is None or memory.fits(durations))
        if full:
            batches.append([])
        batches[-1].append(i)
    return [tuple(batch) for batch in batches]
