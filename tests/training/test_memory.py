"""Micro-batches by memory: a formula of the lengths, fitted once per trial, kept in its checkpoint and result."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from cvrunner.data.batches import MemoryFormula, micro_batches
from cvrunner.data.utterance import Utterance
from cvrunner.records.results import EpochRecord, TrialResult
from cvrunner.training import learner as learner_module
from cvrunner.training.checkpoint import Checkpoints
from cvrunner.training.memory import MARGIN, fit_memory
from tests.trials import learner, pick, tiny_trials, train, trainer

TRUE = MemoryFormula(3e9, 2e7, 5e5, 0)


def needed(batch: Sequence[Utterance], true: MemoryFormula = TRUE) -> float:
    durations = [u.duration_s for u in batch]
    return true.constant + true.linear * sum(durations) + true.quadratic * sum(d * d for d in durations)


def utterances(tmp_path: Path) -> list[Utterance]:
    return list(pick(tiny_trials(tmp_path), "unfrozen").fold.train)


def test_the_formula_recovers_what_four_micro_batches_need(tmp_path: Path) -> None:
    found = fit_memory(needed, utterances(tmp_path), room=8e9)
    assert found is not None
    assert found == pytest.approx(TRUE._replace(limit=8e9 * (1 - MARGIN)), rel=1e-3)


def test_the_formula_never_says_less_than_was_measured(tmp_path: Path) -> None:
    measured: list[tuple[list[float], float]] = []
    random = np.random.default_rng(0)

    def noisy(batch: Sequence[Utterance]) -> float:
        measured.append(([u.duration_s for u in batch], needed(batch) * random.uniform(0.8, 1.2)))
        return measured[-1][1]

    found = fit_memory(noisy, utterances(tmp_path), room=1e10)
    assert found is not None
    assert min(found[:3]) >= 0
    for durations, size in measured:
        assert not found._replace(limit=size * 0.999).fits(durations)


def test_a_micro_batch_that_does_not_fit_is_left_out_and_too_few_give_no_formula(tmp_path: Path) -> None:
    def limited(count: int) -> Callable[[Sequence[Utterance]], float]:
        left = [count]

        def measure(batch: Sequence[Utterance]) -> float:
            left[0] -= 1
            if left[0] < 0:
                raise torch.OutOfMemoryError("full")
            return needed(batch)

        return measure

    assert fit_memory(limited(3), utterances(tmp_path), room=8e9) is not None
    assert fit_memory(limited(2), utterances(tmp_path), room=8e9) is None


def test_micro_batches_hold_as_much_as_fits_and_long_utterances_go_alone(tmp_path: Path) -> None:
    members = utterances(tmp_path)
    limit = max(needed([u]) for u in members) - 1
    formula = TRUE._replace(limit=limit)
    cut = micro_batches(members, 100, np.inf, formula)
    assert sorted(i for micro in cut for i in micro) == list(range(len(members)))
    for micro in cut:
        assert len(micro) == 1 or needed([members[i] for i in micro]) <= limit
    for one, following in itertools.pairwise(cut):
        assert needed([members[i] for i in (*one, following[0])]) > limit
    assert micro_batches(members, 2, np.inf, TRUE._replace(limit=1e15)) == micro_batches(members, 2, np.inf)


def stub_gpu(monkeypatch: pytest.MonkeyPatch, room: float) -> list[int]:
    """Let the CPU look like a GPU with `room`; return the sizes of the batches that are measured."""
    sizes: list[int] = []

    def growth(device: torch.device, work: Callable[[], object]) -> float:
        work()
        return measured[-1]

    measured: list[float] = []
    real = learner_module.Inputs.batches

    def batches(self: learner_module.Inputs, update: learner_module.Update) -> object:
        sizes.append(len(update.utterances))
        measured.append(needed(update.utterances))
        return real(self, update)

    monkeypatch.setattr(learner_module.Inputs, "batches", batches)
    monkeypatch.setattr(learner_module, "free_bytes", lambda *_: room)
    monkeypatch.setattr(learner_module, "memory_growth", growth)
    return sizes


def test_on_a_gpu_a_trial_cuts_by_memory_and_gives_the_same_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = pick(tiny_trials(tmp_path, train={"batch_size": 8, "accumulation_steps": 1, "epochs": 2}), "unfrozen")
    by_count = train(trial, tmp_path, "by count")
    longest = max(needed([u]) for u in trial.fold.train)
    stub_gpu(monkeypatch, (longest + 0.2 * (longest - TRUE.constant)) / (1 - MARGIN))
    by_memory = train(trial, tmp_path, "by memory")
    results = [events[-1] for events in (by_count, by_memory)]
    assert all(isinstance(result, TrialResult) for result in results)
    assert [set(result.memory) for result in results] == [set(), {"training", "prediction"}]
    losses = [[e.train_loss for e in events if isinstance(e, EpochRecord)] for events in (by_count, by_memory)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_fitting_changes_no_weight_and_leaves_no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = learner(pick(tiny_trials(tmp_path), "unfrozen"), tmp_path)
    list(one.inputs.fill_cache())
    before = {name: weight.detach().clone() for name, weight in one.weights.items()}
    sizes = stub_gpu(monkeypatch, 1e10)
    assert set(one.fit_memory()) == {"training", "prediction"}
    assert sizes == [1, 1, 2, 1] * 2
    assert all(torch.equal(before[name], weight) and weight.grad is None for name, weight in one.weights.items())


def test_a_frozen_encoder_and_averaged_accumulation_are_cut_by_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_gpu(monkeypatch, 1e10)
    averaged = tiny_trials(tmp_path, train={"accumulation": "averaged"})
    for trial in (pick(averaged, "unfrozen"), pick(tiny_trials(tmp_path), "frozen")):
        one = learner(trial, tmp_path)
        list(one.inputs.fill_cache())
        assert one.fit_memory() == {}


def test_a_resumed_trial_keeps_its_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = pick(tiny_trials(tmp_path), "unfrozen")
    stub_gpu(monkeypatch, 1e10)
    first = trainer(trial, tmp_path)
    events = first.run()
    while not isinstance(next(events), EpochRecord):
        pass
    events.close()
    state, _, _ = Checkpoints(first.context.directory.checkpoint).load(trial.key)
    assert state is not None
    assert state.memory == first.learner.memory
    # Another GPU, or one that is fuller now.
    monkeypatch.setattr(learner_module, "free_bytes", lambda *_: 5e9)
    again = trainer(trial, tmp_path)
    *_, result = again.run()
    assert again.learner.memory == state.memory
    assert isinstance(result, TrialResult)
    assert result.memory == json.loads(json.dumps(state.memory))
