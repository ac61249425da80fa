"""Which utterances make up each update, from (seed, epoch) alone: no loader state, so a resumed epoch is the same.

An update is an effective batch; it is encoded in micro-batches of at most `batch_size` utterances of like length and at
most `max_batch_s` seconds of audio.
Conditions with the same effective batch, seed and epoch get the same updates in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cvrunner.data.utterance import Utterance


@dataclass(frozen=True)
class Update:
    """One effective batch."""

    utterances: tuple[Utterance, ...]
    """In the order of prediction: for dialogues, turn after turn and dialogue after dialogue."""
    turns: tuple[int, ...]
    """How many of them belong to each dialogue, in order; for single utterances, 1 each."""
    micro_batches: tuple[tuple[int, ...], ...]
    """Positions in `utterances` that are encoded together."""


def training_updates(
    utterances: Sequence[Utterance],
    *,
    effective_batch: int,
    batch_size: int,
    max_batch_s: float | None = None,
    length_bucket_batches: int,
    by_dialogue: bool,
    seed: int,
    epoch: int,
) -> list[Update]:
    """The updates of one epoch; every utterance is in exactly one.

    By utterance: shuffled, sorted by length within buckets of `length_bucket_batches` effective batches (1: not), cut,
    and shuffled again. By dialogue: whole dialogues, shuffled, as many as reach the effective batch.
    """
    random = np.random.default_rng([seed, epoch])
    if by_dialogue:
        groups = _pack_dialogues(dialogues(utterances), effective_batch, random)
        return [_update(group, batch_size, max_batch_s, by_dialogue=True) for group in groups]
    order = random.permutation(len(utterances))
    pool = effective_batch * length_bucket_batches
    cut: list[list[Utterance]] = []
    for start in range(0, len(order), pool):
        members = [utterances[i] for i in order[start : start + pool]]
        if length_bucket_batches > 1:
            members.sort(key=lambda u: (u.samples, u.id))
        cut += [members[i : i + effective_batch] for i in range(0, len(members), effective_batch)]
    cut = _without_single(cut)
    return [_update(cut[i], batch_size, max_batch_s, by_dialogue=False) for i in random.permutation(len(cut))]


def evaluation_update(
    utterances: Sequence[Utterance], batch_size: int, by_dialogue: bool, max_batch_s: float | None = None
) -> Update:
    """All utterances as one update, encoded in micro-batches sorted by length, the longest first: the others fit into
    the memory that they leave."""
    ordered = [u for dialogue in dialogues(utterances) for u in dialogue]
    update = _update(ordered, batch_size, max_batch_s, by_dialogue)
    return replace(update, micro_batches=update.micro_batches[::-1])


def dialogues(utterances: Sequence[Utterance]) -> list[list[Utterance]]:
    """The utterances by dialogue (sorted by name), each in the order of its turns."""
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
    return _without_single([*packed, current] if current else packed)


def _without_single(groups: list[list[Utterance]]) -> list[list[Utterance]]:
    """A last group of one joins the group before it: the CCC of one utterance says nothing."""
    if len(groups) > 1 and len(groups[-1]) == 1:
        return [*groups[:-2], groups[-2] + groups[-1]]
    return groups


def _update(members: Sequence[Utterance], batch_size: int, max_batch_s: float | None, by_dialogue: bool) -> Update:
    micro = micro_batches(members, batch_size, max_batch_s or math.inf)
    turns = [len(d) for d in dialogues_in_order(members)] if by_dialogue else [1] * len(members)
    return Update(tuple(members), tuple(turns), tuple(micro))


def micro_batches(members: Sequence[Utterance], batch_size: int, max_batch_s: float) -> list[tuple[int, ...]]:
    """Positions by length, cut where the next utterance would make too many, or too many seconds."""
    batches: list[list[int]] = []
    for i in sorted(range(len(members)), key=lambda i: (members[i].samples, i)):
        full = not batches or len(batches[-1]) == batch_size
        if full or sum(members[j].duration_s for j in (*batches[-1], i)) > max_batch_s:
            batches.append([])
        batches[-1].append(i)
    return [tuple(batch) for batch in batches]


def dialogues_in_order(members: Sequence[Utterance]) -> list[list[Utterance]]:
    """Runs of utterances of the same dialogue, as they come."""
    runs: list[list[Utterance]] = []
    for u in members:
        if runs and runs[-1][-1].dialogue == u.dialogue:
            runs[-1].append(u)
        else:
            runs.append([u])
    return runs
