"""Updates: every utterance once, reproducible from seed, fold and epoch, dialogues kept together."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvrunner.data.batches import Update, evaluation_update, training_updates
from cvrunner.data.utterance import Utterance
from tests.corpora import corpus

UTTERANCES = [replace(u, samples=8000 + 997 * i % 20_000) for i, u in enumerate(corpus(sessions=3, turns=7).utterances)]


def updates(utterances: list[Utterance] | None = None, **changes: Any) -> list[Update]:
    settings: dict[str, Any] = {
        "effective_batch": 8, "batch_size": 4, "length_bucket_batches": 1, "by_dialogue": False, "seed": 0, "fold": 1,
        "epoch": 1,
    }  # fmt: skip
    return training_updates(UTTERANCES if utterances is None else utterances, **{**settings, **changes})


@given(
    count=st.integers(1, 42),
    effective=st.integers(1, 12),
    batch_size=st.integers(1, 12),
    pool=st.integers(1, 4),
    by_dialogue=st.booleans(),
    epoch=st.integers(1, 3),
)
def test_every_utterance_is_in_one_update_and_one_micro_batch_of_it(
    count: int, effective: int, batch_size: int, pool: int, by_dialogue: bool, epoch: int
) -> None:
    found = updates(
        UTTERANCES[:count],
        effective_batch=effective,
        batch_size=batch_size,
        length_bucket_batches=pool,
        by_dialogue=by_dialogue,
        epoch=epoch,
    )
    assert Counter(u.id for update in found for u in update.utterances) == Counter(u.id for u in UTTERANCES[:count])
    for update in found:
        assert sorted(i for micro in update.micro_batches for i in micro) == list(range(len(update.utterances)))
        assert max(map(len, update.micro_batches)) <= batch_size
        assert sum(update.turns) == len(update.utterances)
        assert len(update.utterances) > 1 or count == 1 or effective == 1


@pytest.mark.parametrize("by_dialogue", [True, False])
def test_order_comes_from_seed_fold_and_epoch_alone(by_dialogue: bool) -> None:
    def order(**changes: int) -> list[list[str]]:
        return [[u.id for u in update.utterances] for update in updates(by_dialogue=by_dialogue, **changes)]

    assert order() == order()
    assert order(seed=1) != order()
    assert order(fold=2) != order()
    assert order(epoch=2) != order()


def test_micro_batches_do_not_change_the_content_of_an_effective_batch() -> None:
    one, other = (updates(batch_size=size) for size in (8, 2))
    assert [u.utterances for u in one] == [u.utterances for u in other]


def test_micro_batches_have_similar_lengths() -> None:
    for update in updates(batch_size=2):
        lengths = [update.utterances[i].samples for micro in update.micro_batches for i in micro]
        assert lengths == sorted(lengths)


@given(batch_size=st.integers(1, 8), max_batch_s=st.floats(0.1, 10))
def test_micro_batches_keep_the_limit_in_seconds_or_have_one_utterance(batch_size: int, max_batch_s: float) -> None:
    whole, cut = updates(batch_size=batch_size), updates(batch_size=batch_size, max_batch_s=max_batch_s)
    assert [u.utterances for u in whole] == [u.utterances for u in cut]
    for update in cut:
        assert sorted(i for micro in update.micro_batches for i in micro) == list(range(len(update.utterances)))
        for micro in update.micro_batches:
            audio_s = sum(update.utterances[i].duration_s for i in micro)
            assert len(micro) == 1 or (audio_s <= max_batch_s and len(micro) <= batch_size)


def test_a_length_bucket_gives_effective_batches_of_similar_length() -> None:
    def spread(pool: int) -> float:
        found = updates(length_bucket_batches=pool)
        ranges = [max(u.samples for u in b.utterances) - min(u.samples for u in b.utterances) for b in found]
        return sum(ranges) / len(ranges)

    assert spread(8) < spread(1) / 2


def test_dialogues_stay_whole_and_in_order() -> None:
    for update in updates(by_dialogue=True, effective_batch=10):
        start = 0
        for turns in update.turns:
            members = update.utterances[start : start + turns]
            assert len({u.dialogue for u in members}) == 1
            assert [u.turn for u in members] == list(range(7))
            start += turns


def test_evaluation_is_one_update_sorted_by_length_inside() -> None:
    update = evaluation_update(UTTERANCES, 5, by_dialogue=True)
    assert {u.id for u in update.utterances} == {u.id for u in UTTERANCES}
    assert set(update.turns) == {7}
