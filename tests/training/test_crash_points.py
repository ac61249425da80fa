"""SIGKILL at every single point where a trial makes something durable: what follows is as if nothing had happened."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

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
