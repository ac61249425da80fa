"""Reading ahead of a GPU, with a stubbed one: the same batches, read by a thread, in order, and none on a CPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cvrunner.training import inputs as inputs_module
from cvrunner.training.inputs import Inputs, Reader, _tensors, one_ahead
from tests.trials import learner, pick, tiny_trials


class StubStream:
    """Records what waits for what."""

    def __init__(self, *_: Any) -> None:
        self.waited: list[object] = []

    def record_event(self) -> object:
        return object()

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> StubStream:
    stream = StubStream()
    monkeypatch.setattr(torch.cuda, "Stream", StubStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, _: used.append(self.data_ptr()))
    used: list[int] = []
    stream.used = used  # type: ignore[attr-defined]
    return stream


def both(tmp_path: Path, condition: str, **model: Any) -> tuple[Any, Inputs]:
    """A learner on the CPU, and inputs that read ahead."""
    one = learner(pick(tiny_trials(tmp_path, model=model), condition), tmp_path)
    list(one.inputs.fill_cache())
    ahead = learner(one.trial, tmp_path).inputs
    ahead._reader = Reader(torch.device("cpu"))
    return one, ahead


def parts(batch: Any) -> list[Tensor]:
    return [*_tensors(batch.features), batch.lengths, torch.tensor(batch.positions)]


@pytest.mark.parametrize(
    ("condition", "model"), [("frozen", {}), ("unfrozen", {}), ("unfrozen", {"unfreeze_top_layers": 1})]
)
def test_what_is_read_ahead_is_what_would_be_read(
    tmp_path: Path, current: StubStream, condition: str, model: dict[str, Any]
) -> None:
    one, ahead = both(tmp_path, condition, **model)
    updates = one.updates(1)
    for number, update in enumerate(updates):
        found = list(ahead.batches(update))
        if number + 1 < len(updates):
            ahead.read_ahead(updates[number + 1])
        for batch, expected in zip(found, one.inputs.batches(update), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(parts(batch), parts(expected), strict=True))
    batches = sum(len(u.micro_batches) for u in updates)
    assert len(current.waited) == batches, "the main stream waits for each copy"
    assert len(current.used) >= batches  # type: ignore[attr-defined]


def test_the_next_update_is_read_by_a_thread_before_it_is_asked_for(
    tmp_path: Path, current: StubStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, ahead = both(tmp_path, "unfrozen")
    read, batch = threading.Event(), Inputs._batch
    threads: list[str] = []

    def recorded(self: Inputs, *arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        found = batch(self, *arguments)
        read.set()
        return found

    monkeypatch.setattr(Inputs, "_batch", recorded)
    first, second, *_ = one.updates(1)
    ahead.read_ahead(second)
    assert read.wait(10)
    # Another update than expected, as after a split: what was read ahead is dropped.
    assert [b.positions for b in ahead.batches(first)] == list(first.micro_batches)
    assert all(name.startswith("reader") for name in threads)


def test_an_error_of_the_thread_is_raised_where_the_batch_is_used(tmp_path: Path, current: StubStream) -> None:
    one, ahead = both(tmp_path, "frozen")

    def broken(_: Any) -> Any:
        raise OSError("gone")

    ahead.hidden.read = broken  # type: ignore[method-assign]
    update = one.updates(1)[0]
    ahead.read_ahead(update)
    with pytest.raises(OSError, match="gone"):
        list(ahead.batches(update))


def test_a_micro_batch_is_taken_one_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(3):
            taken.append(i)
            yield i

    found = one_ahead(items())
    assert (next(found), taken) == (0, [0, 1])
    assert ([*found], taken) == ([1, 2], [0, 1, 2])
    assert not list(one_ahead([]))


@pytest.mark.parametrize(("share", "kept"), [(2, True), (1.9, False)])
def test_frozen_hidden_states_stay_on_the_gpu_if_they_take_half_of_its_room(
    tmp_path: Path, share: float, kept: bool
) -> None:
    one = learner(pick(tiny_trials(tmp_path), "frozen"), tmp_path)
    list(one.inputs.fill_cache())
    sizes = {u.audio_digest: one.inputs.hidden.read(u).nbytes for u in one.trial.fold.utterances}
    update = one.updates(1)[0]
    before = [parts(batch) for batch in one.inputs.batches(update)]
    assert one.inputs.keep_on_gpu(share * sum(sizes.values())) == kept
    for _ in range(2):
        for batch, expected in zip(one.inputs.batches(update), before, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(parts(batch), expected, strict=True))
    if kept:
        one.inputs.hidden.read = None  # type: ignore[assignment, method-assign]
        list(one.inputs.batches(update))


def test_on_a_cpu_nothing_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = learner(pick(tiny_trials(tmp_path), "frozen"), tmp_path)
    monkeypatch.setattr(inputs_module, "ThreadPoolExecutor", None)
    one.inputs.read_ahead(one.updates(1)[0])
    assert not one.inputs.keep_on_gpu(one.free_bytes())
    unfrozen = learner(pick(tiny_trials(tmp_path), "unfrozen"), tmp_path)
    assert not unfrozen.inputs.keep_on_gpu(1e15), "only hidden states of a frozen encoder"
