"""The feature cache: addressed by content, complete or missing, and filled once by any number of processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from cvrunner.data import features as features_module
from cvrunner.data.features import Features, FeatureStore, Recipe, all_finite
from cvrunner.data.utterance import Utterance
from cvrunner.errors import EncoderError
from tests.corpora import corpus

RECIPE = Recipe("conv", "weights", normalize=False)
# Two minutes each, so that there are several shards.
UTTERANCES = [replace(u, samples=120 * 16_000) for u in corpus(sessions=3, turns=2).utterances]


def frames(samples: int) -> int:
    return samples // 160_000


def compute(utterances: Sequence[Utterance]) -> Iterator[Features]:
    for u in utterances:
        yield np.full((frames(u.samples), 3), int(u.audio_digest[:2], 16), dtype=np.float16)


def store(folder: Path, utterances: Sequence[Utterance] = UTTERANCES, recipe: Recipe = RECIPE) -> FeatureStore:
    return FeatureStore(folder, recipe, utterances, frames)


def fill(one: FeatureStore) -> int:
    return sum(1 for _ in one.fill(compute))


def test_each_utterance_reads_back_its_own_features(tmp_path: Path) -> None:
    one = store(tmp_path)
    assert len(one.shards) > 1
    fill(one)
    for u in UTTERANCES:
        (expected,) = compute([u])
        assert np.array_equal(one.read(u), expected)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_named_before_they_are_written(tmp_path: Path, broken: float) -> None:
    one = store(tmp_path)
    bad = one.shards[0].utterances[-1]

    def computed(utterances: Sequence[Utterance]) -> Iterator[Features]:
        for u, features in zip(utterances, compute(utterances), strict=True):
            if u is bad:
                features[-1, -1] = broken
            yield features

    with pytest.raises(EncoderError, match=rf"features \(conv\) of utterance {bad.id} .* are not finite"):
        list(one.fill(computed))
    assert not one.shards[0].path.exists()


def test_cached_features_that_are_not_finite_are_named_with_their_file(tmp_path: Path) -> None:
    fill(store(tmp_path))
    one = store(tmp_path)
    first, *_, bad = one.shards[0].utterances
    packed = np.load(one.shards[0].path)
    packed[-1, 0] = np.nan
    np.save(one.shards[0].path, packed)
    one.read(first)
    with pytest.raises(EncoderError, match=rf"utterance {bad.id} are not finite: .*{one.shards[0].path.name}.*delete"):
        one.read(bad)


@pytest.mark.parametrize(
    ("value", "finite"),
    [(65504, True), (-65504, True), (0, True), (6e-8, True), (np.nan, False), (np.inf, False), (-np.inf, False)],
)
def test_finite_is_what_numpy_calls_finite(value: float, finite: bool) -> None:
    for features in (np.array([[1, value]], np.float16), np.asfortranarray(np.array([[1, value], [2, 3]], np.float16))):
        assert all_finite(features) == finite == np.isfinite(features).all()


def test_present_features_are_not_computed_again_whatever_the_order_or_the_names(tmp_path: Path) -> None:
    fill(store(tmp_path))
    renamed = [replace(u, id=f"other-{u.id}", path=Path("elsewhere")) for u in reversed(UTTERANCES)]
    assert store(tmp_path, renamed).missing() == []


@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b[:50], lambda b: b"", lambda b: b"\x00" * len(b)])
def test_a_truncated_shard_is_made_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    fill(store(tmp_path))
    truncated = store(tmp_path)
    path = truncated.shards[0].path
    path.write_bytes(damage(path.read_bytes()))
    assert truncated.missing() == [truncated.shards[0]]
    fill(truncated)
    for u in UTTERANCES:
        assert np.array_equal(truncated.read(u), next(compute([u])))


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_digest": "x"},
        {"normalize": True},
        {"window": "30s"},
        {"layers": (1,)},
        {"frame_rate_hz": 25.0},
        {"precision": "bfloat16"},
    ],
)
def test_another_recipe_has_other_features(tmp_path: Path, changes: dict[str, object]) -> None:
    fill(store(tmp_path))
    other = store(tmp_path, recipe=replace(RECIPE, **changes))  # type: ignore[arg-type]
    assert other.missing() == list(other.shards)


@pytest.mark.parametrize("limit_s", [0, 3600])
def test_progress_is_reported_shard_by_shard_but_not_too_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit_s: float
) -> None:
    monkeypatch.setattr(features_module, "PROGRESS_S", limit_s)
    count = len(store(tmp_path).shards)
    assert count > 1
    seen = [(present, count) for present in range(count)]
    assert list(store(tmp_path).fill(compute)) == (seen if limit_s == 0 else seen[:1])


def test_who_waits_for_another_process_reports_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "PROGRESS_S", 0)
    one, waits = store(tmp_path), []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        # The other process is slow.
        if len(waits) == 3:
            lock.release()

    monkeypatch.setattr("cvrunner.data.features.time.sleep", wait)
    one.folder.mkdir(parents=True)
    with FileLock(one.shards[0].path.with_suffix(".lock")) as lock:
        seen = list(store(tmp_path).fill(compute))
    assert len(waits) == 3
    assert seen == [(present, len(one.shards)) for present in range(len(one.shards))]


def test_identical_audio_is_stored_once(tmp_path: Path) -> None:
    twice = [*UTTERANCES, replace(UTTERANCES[0], id="again")]
    assert sum(len(shard.utterances) for shard in store(tmp_path, twice).shards) == len(UTTERANCES)


def test_a_shard_whose_computation_fails_is_missing(tmp_path: Path) -> None:
    def breaks(utterances: Sequence[Utterance]) -> Iterator[Features]:
        yield from compute(utterances[:1])
        raise RuntimeError("killed")

    one = store(tmp_path)
    with pytest.raises(RuntimeError):
        list(one.fill(breaks))
    assert one.missing() == list(one.shards)
    fill(one)
    assert one.missing() == []


def test_concurrent_processes_compute_each_shard_once(tmp_path: Path) -> None:
    computed: list[str] = []

    def slow(utterances: Sequence[Utterance]) -> Iterator[Features]:
        computed.append(utterances[0].id)
        threading.Event().wait(0.05)
        yield from compute(utterances)

    threads = [threading.Thread(target=lambda: list(store(tmp_path).fill(slow))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(computed) == sorted(shard.utterances[0].id for shard in store(tmp_path).shards)
