"""SIGKILL at every single point where a trial makes something durable: what follows is as if nothing had happened."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from torch import Tensor

from cvrunner.training import checkpoint
from cvrunner.training.learner import Learner
from cvrunner.training.trial import Trial
from tests.training.test_fold_trainer import directory, outcome
from tests.trials import pick, tiny_trials, train, trainer

SETTINGS = {"train": {"epochs": 2, "batch_size": 4, "accumulation_steps": 1}, "cluster": {"checkpoint_every_s": 0.0}}


def train_and_die(trial: Trial, folder: Path, name: str, at: int) -> None:
    """In a process of its own: train, and be killed at the `at`-th fsync, after what it would have made durable."""
    count, fsync = itertools.count(1), os.fsync

    def counting(descriptor: int) -> None:
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = counting
    list(trainer(trial, folder, name).run())


def killed_at(trial: Trial, folder: Path, name: str, at: int) -> bool:
    """Whether the process was killed; it was not where it needed fewer than `at` fsyncs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trials"])
    process = context.Process(target=train_and_die, args=(trial, folder, name, at))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.suites("test", "all")
@pytest.mark.parametrize("condition", ["frozen", "unfrozen"])
def test_killed_wherever_something_becomes_durable_it_ends_bit_identical(
    tmp_path: Path, condition: str, suite: str
) -> None:
    trial = pick(tiny_trials(tmp_path, **SETTINGS), condition)
    train(trial, tmp_path, "whole")
    whole = outcome(tmp_path, trial, "whole")
    # All points take a minute; every few in turn find most of what all of them find.
    step = 1 if suite == "all" else {"frozen": 7, "unfrozen": 11}[condition]
    points = 0
    for at in itertools.count(1, step):
        name = f"killed-{at}"
        if not killed_at(trial, tmp_path, name, at):
            break
        points += 1
        train(trial, tmp_path, name)
        files = directory(tmp_path, trial, name)
        assert {p for p in files.path.rglob("*") if p.is_file()} == {files.path / ".lock", *files.kept}
        assert outcome(tmp_path, trial, name) == whole, f"killed at fsync {at}"
    assert points * step > 50


def train_and_die_while_writing(trial: Trial, folder: Path, number: int) -> None:
    """In a process of its own: train, and be killed in an update while checkpoint `number` is half written."""
    writes, half_written, write = itertools.count(1), threading.Event(), checkpoint.write_tensors

    def slow(file: BinaryIO, tensors: Mapping[str, Tensor]) -> str:
        if next(writes) == number:
            file.write(b"half")
            file.flush()
            half_written.set()
            threading.Event().wait()
        return write(file, tensors)

    def update(self: Learner, *arguments: Any) -> Any:
        if half_written.is_set():
            os.kill(os.getpid(), signal.SIGKILL)
        return take_update(self, *arguments)

    take_update = Learner.update
    checkpoint.write_tensors, Learner.update = slow, update  # type: ignore[assignment, method-assign]
    # No checkpoint within an epoch, which would wait for the one that is never finished.
    list(trainer(trial, folder, "killed").run())


@pytest.mark.parametrize("number", [4, 5, 6])
def test_killed_in_an_update_while_a_checkpoint_is_half_written_it_ends_bit_identical(
    tmp_path: Path, number: int
) -> None:
    """Files 1 to 3 are those of the start; 4 holds the best weights of the first epoch."""
    settings = {"train": {"epochs": 3, "batch_size": 2, "accumulation_steps": 1}}
    trial = pick(tiny_trials(tmp_path, **settings), "unfrozen")
    train(trial, tmp_path, "whole")
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=train_and_die_while_writing, args=(trial, tmp_path, number))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    train(trial, tmp_path, "killed")
    assert outcome(tmp_path, trial, "killed") == outcome(tmp_path, trial, "whole")
