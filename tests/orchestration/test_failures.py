"""Kinds of failures by type, and what follows from each: the table of docs/reliability.md, without a cluster."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cvrunner.config.sections import RetriesConfig
from cvrunner.errors import (
    ConfigError,
    CorpusError,
    EncoderError,
    MemoryLimitError,
    NonFiniteError,
    Stopped,
    TrialInUseError,
    WeightChangeError,
)
from cvrunner.orchestration.attempt import attempt, classify
from cvrunner.orchestration.failures import KINDS, Decision, Failure, decide
from cvrunner.records.results import TrialStarted
from cvrunner.training.fold_trainer import TrialContext
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
        (OSError(errno.ENOSPC, "x"), "permanent"),
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
    assert (last.kind, decide(last, [], RETRIES)) == ("permanent", Decision.FAIL)
    assert "No space left on device" in last.message
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
