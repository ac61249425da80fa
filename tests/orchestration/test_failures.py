"""Kinds of failures by type, and what follows from each: the table of docs/reliability.md, without a cluster."""

from __future__ import annotations

import errno
import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cvrunner.config.sections import RetriesConfig
from cvrunner.errors import (
    ConfigError,
    CorpusError,
    DeviceError,
    EncoderError,
    MemoryLimitError,
    NonFiniteError,
    Stopped,
    TrialInUseError,
    WeightChangeError,
)
from cvrunner.orchestration import attempt as module
from cvrunner.orchestration.attempt import InlineExecutor, attempt, classify, training_device
from cvrunner.orchestration.failures import KINDS, Decision, Failure, decide
from cvrunner.orchestration.machine import Driver, Gpu
from cvrunner.records.results import TrialStarted
from cvrunner.training.fold_trainer import TrialContext
from cvrunner.training.trial import Trial
from tests.training.test_fold_trainer import directory, outcome
from tests.trials import pick, tiny_trials, train

RETRIES = RetriesConfig(worker_died=3, host_memory=2, gpu_memory=1, gpu=2, io=3, non_finite=1, bug=2)
LIMITED = tuple(RetriesConfig.model_fields)
TABLE = Path(__file__).parent.parent.parent / "docs" / "reliability.md"


@pytest.mark.parametrize("kind", LIMITED)
def test_a_kind_is_tried_again_as_often_as_the_configuration_says(kind: Any) -> None:
    allowed: int = getattr(RETRIES, kind)
    failures = [Failure(kind, "", place=str(i)) for i in range(allowed + 1)]
    decisions = [decide(failure, failures[:i], RETRIES) for i, failure in enumerate(failures)]
    assert decisions == [Decision.RETRY] * allowed + [Decision.FAIL]


@pytest.mark.parametrize("kind", LIMITED)
def test_a_limit_of_none_means_at_once(kind: Any) -> None:
    assert decide(Failure(kind, ""), [], RetriesConfig(**{kind: 0})) is Decision.FAIL


def test_kinds_do_not_use_up_each_others_tries() -> None:
    earlier = [Failure("worker_died", "")] * 3 + [Failure("io", "")] * 3
    assert decide(Failure("gpu", ""), earlier, RETRIES) is Decision.RETRY


def test_the_same_bug_twice_is_the_end_and_another_one_is_not() -> None:
    first, other = Failure("bug", "KeyError", place="a.py:1"), Failure("bug", "KeyError", place="b.py:2")
    assert decide(first, [], RETRIES) is Decision.RETRY
    assert decide(first, [first], RETRIES) is Decision.FAIL
    assert decide(other, [first], RETRIES) is Decision.RETRY


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("stopped", Decision.STOP),
        ("configuration", Decision.ABORT),
        ("permanent", Decision.FAIL),
        ("preempted", Decision.RETRY),
    ],
)
def test_kinds_without_a_limit(kind: Any, expected: Decision) -> None:
    assert decide(Failure(kind, ""), [Failure(kind, "")] * 100, RETRIES) is expected


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Stopped("x"), "stopped"),
        (ConfigError("x"), "configuration"),
        (CorpusError("x", ["y"]), "configuration"),
        (EncoderError("x"), "configuration"),
        (WeightChangeError("x"), "permanent"),
        (MemoryLimitError("x"), "permanent"),
        (NonFiniteError("x"), "non_finite"),
        (TrialInUseError("x"), "io"),
        (torch.OutOfMemoryError("x"), "gpu_memory"),
        (torch.AcceleratorError("CUDA error: out of memory", 2), "gpu_memory"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700), "gpu"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "gpu_memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "gpu_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"), "bug"),
        (MemoryError(), "host_memory"),
        (OSError(errno.ESTALE, "x"), "io"),
        (OSError(errno.EIO, "x"), "io"),
        (OSError(errno.ENOSPC, "x"), "disk_full"),
        (OSError(errno.EDQUOT, "x"), "disk_full"),
        (PermissionError(errno.EACCES, "x"), "permanent"),
        (FileNotFoundError(errno.ENOENT, "x"), "bug"),
        (KeyError("x"), "bug"),
        (RuntimeError("CUDA out of memory, said by somebody else"), "bug"),
    ],
)
def test_failures_are_told_apart_by_type(error: Exception, kind: str) -> None:
    assert classify(error).kind == kind


def test_a_full_disk_fails_the_trial_and_what_was_saved_before_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = pick(tiny_trials(tmp_path), "unfrozen")
    train(trial, tmp_path, "whole")
    place = TrialContext(directory(tmp_path, trial, "full"), tmp_path / "cache", torch.device("cpu"))
    calls, fsync = itertools.count(), os.fsync

    def full(descriptor: int) -> None:
        if next(calls) > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        *_, last = attempt(trial, place)
    assert isinstance(last, Failure)
    assert (last.kind, decide(last, [], RETRIES)) == ("disk_full", Decision.FAIL)
    assert "No space left on device; free some space" in last.message
    again = list(attempt(trial, place))
    assert next(e for e in again if isinstance(e, TrialStarted)).resumed_epoch > 1
    assert outcome(tmp_path, trial, "full") == outcome(tmp_path, trial, "whole")


def test_a_bug_brings_its_traceback_and_its_place() -> None:
    def fails(key: str) -> None:
        {}[key]

    failures = []
    for key in ("one", "another"):
        try:
            fails(key)
        except KeyError as error:
            failures.append(classify(error))
    first, second = failures
    assert "in fails" in first.details
    assert first.message != second.message
    assert first.place == second.place


@pytest.mark.parametrize("kind", KINDS)
def test_the_documentation_has_a_row_for_each_kind(kind: str) -> None:
    assert f"| `{kind}` |" in TABLE.read_text()


class TestDevice:
    """A trial for a GPU never trains on a CPU."""

    GPU = Gpu("NVIDIA GeForce RTX 4090", 3.0, 24564.0, 0, {}, "GPU-8f2c")

    def trial(self, folder: Path, monkeypatch: pytest.MonkeyPatch, planned: Any, gpus: Any, **sections: Any) -> Trial:
        monkeypatch.setattr(module, "find_gpus", lambda: gpus)
        monkeypatch.setattr(module, "find_driver", lambda: Driver("550.54.15", "12.4"))
        return replace(pick(tiny_trials(folder, **sections), "frozen"), device=planned)

    def test_that_torch_cannot_use_fails_with_both_versions(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trial = self.trial(tmp_path, monkeypatch, "cuda", (self.GPU,))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        with pytest.raises(
            DeviceError, match=r"CUDA 13\.0, can use none; the driver, 550\.54\.15 for CUDA up to 12\.4"
        ):
            training_device(trial)
        executor = InlineExecutor(tmp_path / "cache")
        executor.start(trial, directory(tmp_path, trial))
        ((_, failure),) = executor.poll(0.0)
        assert isinstance(failure, Failure)
        assert decide(failure, [], RETRIES) is Decision.FAIL

    def test_that_torch_can_use_is_the_first_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trial = self.trial(tmp_path, monkeypatch, "cuda", (self.GPU,))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert training_device(trial) == torch.device("cuda:0")

    def test_that_the_plan_missed_is_not_held_by_a_trial_on_a_cpu(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trial = self.trial(tmp_path, monkeypatch, "cpu", (self.GPU,))
        with pytest.raises(DeviceError, match=r"here is NVIDIA GeForce RTX 4090: --set train\.device=cuda, or cpu"):
            training_device(trial)
        requested = self.trial(tmp_path, monkeypatch, "cpu", (self.GPU,), train={"device": "cpu"})
        assert training_device(requested) == torch.device("cpu")
        assert training_device(self.trial(tmp_path, monkeypatch, "cpu", ())) == torch.device("cpu")


def test_the_key_has_the_device_that_a_trial_gets_and_not_how_it_was_requested(tmp_path: Path) -> None:
    auto, requested = (pick(tiny_trials(tmp_path, train={"device": d}), "frozen") for d in ("auto", "cpu"))
    assert auto.key == requested.key
    assert replace(auto, device="cuda").key != auto.key
