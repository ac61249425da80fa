"""What a probe measures is a real update of the right utterances, and nothing of it stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvrunner.data.batches import Update
from cvrunner.errors import MemoryLimitError
from cvrunner.model import mamba
from cvrunner.training import probe as probe_module
from cvrunner.training.learner import Learner, updates_of
from cvrunner.training.probe import (
    ConditionProbe,
    TimedUpdate,
    hardest,
    largest_batch_size,
    longest_batch,
    memory_weight,
    probe,
    typical_batch,
)
from tests.probes import made_up
from tests.training import test_fold_trainer
from tests.trials import pick, tiny_trials

CPU = torch.device("cpu")


def probed(folder: Path, condition: str, enlarge: bool = False, **sections: Any) -> ConditionProbe:
    return probe(pick(tiny_trials(folder, **sections), condition), CPU, folder / "probe", enlarge=enlarge)


def limit(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    test_fold_trainer.TestOutOfMemory.limit(monkeypatch, largest)


@pytest.mark.parametrize("protocol", ["utterance", "dialogue"])
@pytest.mark.parametrize("condition", ["frozen", "unfrozen"])
def test_a_probe_measures_time_memory_features_and_what_a_checkpoint_takes(
    tmp_path: Path, condition: str, protocol: str
) -> None:
    found = probed(tmp_path, condition, model={"protocol": protocol})
    assert (found.condition, found.device, found.precision, found.memory) == (condition, "cpu", "float32", "host")
    assert min(found.typical.step_s, found.longest.step_s, found.validation_s) > 0
    assert found.peak_memory_mib >= 0
    assert [one.kind for one in found.features] == ["conv", "hidden" if condition == "frozen" else "statistics"]
    assert all(one.cost > 0 and one.size > 0 for one in found.features)
    assert found.checkpoint_bytes == 3 * found.trained_bytes > 0
    assert (found.batch_size, found.configured, found.fits, found.larger_mib) == (2, 2, None, {})


def test_nothing_is_written_outside_of_the_folder_and_only_few_features_in_it(tmp_path: Path) -> None:
    trial = pick(tiny_trials(tmp_path), "frozen")
    before = sorted(tmp_path.rglob("*"))
    probe(trial, CPU, tmp_path / "probe")
    assert sorted(p for p in tmp_path.rglob("*") if tmp_path / "probe" not in (p, *p.parents)) == before
    assert {p.suffix for p in (tmp_path / "probe").rglob("*") if p.is_file()} <= {".npy", ".lock"}


@pytest.mark.parametrize("protocol", ["utterance", "dialogue"])
def test_the_hardest_batch_is_one_that_an_epoch_draws_and_none_needs_more_memory(tmp_path: Path, protocol: str) -> None:
    trial = pick(tiny_trials(tmp_path, model={"protocol": protocol}), "unfrozen")
    drawn = [update for epoch in (1, 2, 3) for update in updates_of(trial, 2, epoch)]
    found = longest_batch(trial)
    assert found in drawn
    assert memory_weight(found) == max(map(memory_weight, drawn))
    longest = max(u.duration_s for u in trial.fold.train)
    assert longest in [u.duration_s for u in found.utterances]
    probed = probe(trial, CPU, tmp_path / "probe")
    assert probed.longest.audio_s == pytest.approx(sum(u.duration_s for u in found.utterances))


def test_the_typical_batch_holds_the_utterances_in_the_middle(tmp_path: Path) -> None:
    trial = pick(tiny_trials(tmp_path), "unfrozen")
    by_length = sorted((u.samples for u in trial.fold.train), reverse=True)
    middle = (len(by_length) - 4) // 2
    assert [u.samples for u in typical_batch(trial)] == by_length[middle : middle + 4]


def test_a_long_utterance_weighs_more_than_two_of_half_its_length(tmp_path: Path) -> None:
    one, two, *_ = pick(tiny_trials(tmp_path), "unfrozen").fold.train
    long, short = replace(one, samples=320_000), [replace(u, samples=160_000) for u in (one, two)]
    assert memory_weight(Update((long,), (1,), ((0,),))) > memory_weight(Update(tuple(short), (1, 1), ((0, 1),)))


def test_of_a_condition_the_trial_with_the_hardest_batch_is_probed(tmp_path: Path) -> None:
    trials = [trial for trial in tiny_trials(tmp_path) if not trial.config.adaptation.trains_encoder]
    weights = [memory_weight(longest_batch(trial)) for trial in trials]
    assert hardest(trials) is trials[weights.index(max(weights))]


def test_on_a_gpu_the_typical_update_is_timed_without_the_mamba_kernels_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[bool] = []
    timed = probe_module._timed_update

    def recorded(learner: Learner, batch: Any, size: int) -> TimedUpdate:
        used.append(mamba.KERNELS)
        return timed(learner, batch, size)

    monkeypatch.setattr(probe_module, "_timed_update", recorded)
    monkeypatch.setattr(mamba, "KERNELS", True)
    assert probed(tmp_path, "frozen").plain_mamba_s is None
    monkeypatch.setattr(probe_module, "compares_kernels", lambda device: True)
    found = probed(tmp_path / "again", "frozen")
    assert used == [True, True, True, True, False]
    assert found.plain_mamba_s is not None
    assert found.plain_mamba_s > 0
    assert mamba.KERNELS


class TestBatchSize:
    @given(st.integers(0, 70), st.integers(1, 64), st.integers(1, 64))
    def test_the_largest_one_found_fits_and_the_next_one_does_not(self, room: int, start: int, more: int) -> None:
        limit = start + more
        tried: list[int] = []

        def fits(size: int) -> bool:
            tried.append(size)
            return size <= room

        found = largest_batch_size(fits, start, limit)
        assert found <= min(room, limit)
        if found < start:
            assert room < start
            assert found == 0 or 2 * found >= room // 2
        else:
            assert found == limit or min(2 * found, limit) > room
        assert len(tried) == len(set(tried))

    def test_what_does_not_fit_is_halved_as_in_training_and_measured_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limit(monkeypatch, 1)
        found = probed(tmp_path, "unfrozen")
        assert (found.configured, found.batch_size, found.fits) == (2, 1, 1)

    @pytest.mark.parametrize(("largest", "fits"), [(2, 2), (3, 2), (4, 4), (99, 4)])
    def test_it_is_doubled_until_memory_runs_out_or_the_whole_batch_is_in_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int, fits: int
    ) -> None:
        limit(monkeypatch, largest)
        found = probed(tmp_path, "unfrozen", enlarge=True)
        assert (found.batch_size, found.fits, list(found.larger_mib)) == (2, fits, [4] if fits == 4 else [])

    def test_where_not_one_utterance_fits_it_says_what_to_change(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limit(monkeypatch, 0)
        with pytest.raises(MemoryLimitError, match=r"unfrozen: out of memory .* train\.batch_size 1: use a GPU with"):
            probed(tmp_path, "unfrozen")


class TestTime:
    @pytest.mark.parametrize(("audio_s", "step_s"), [(5, 1.0), (10, 1.5), (15, 2.0), (20, 2.5), (0, 0.5)])
    def test_a_step_lies_on_the_line_through_the_two_measured_ones(self, audio_s: float, step_s: float) -> None:
        assert made_up().step_s(audio_s) == pytest.approx(step_s)

    def test_where_longer_is_not_slower_every_step_takes_the_mean(self) -> None:
        faster = made_up(longest=replace(made_up().longest, step_s=0.5))
        assert faster.step_s(5) == faster.step_s(100) == 0.75

    def test_an_epoch_is_its_real_batches_and_validation_and_a_trial_loading_path_all_epochs_and_test(
        self, tmp_path: Path
    ) -> None:
        trial, found = pick(tiny_trials(tmp_path), "unfrozen"), made_up()
        durations = [u.duration_s for u in trial.fold.train]
        constant_s = 0.5 * -(-len(durations) // 4)
        trained_s = found.epoch_s(trial) - 0.01 * len(trial.fold.validation)
        assert sum(durations) < (trained_s - constant_s) / 0.1 < max(durations) * len(durations)
        test_s = 0.01 * len(trial.fold.test)
        assert found.trial_s(trial) == pytest.approx(0.25 + 3.0 + 3 * found.epoch_s(trial) + test_s)
