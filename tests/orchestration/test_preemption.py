"""Who gives way to whom: pure decisions, and the loop that carries them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cvrunner.config.sections import RetriesConfig
from cvrunner.orchestration.failures import Decision
from cvrunner.orchestration.preemption import Preemption, gain, whole_trials_s
from cvrunner.orchestration.scheduler import run_trials
from cvrunner.records.run_directory import TrialDirectory
from tests.benchmarks import makespan
from tests.orchestration.test_gauges import epoch
from tests.orchestration.test_scheduler import Notes
from tests.trials import tiny_trials

EPOCH_S = {"a": 100.0, "b": 100.0, "c": 100.0}


def test_whole_trials_begin_longest_first_where_a_gpu_is_free_first() -> None:
    assert whole_trials_s([10.0, 30.0], [5.0, 40.0]) == 50.0


def test_the_one_with_little_left_gives_way_to_one_with_much() -> None:
    assert gain("a", ["a", "b"], ["c"], {"a": 400.0, "b": 400.0, "c": 1000.0}, EPOCH_S)


@pytest.mark.parametrize(
    "left_s",
    [
        {"a": 500.0, "b": 500.0, "c": 1000.0},  # a lead of five epochs and no more
        {"a": 400.0, "b": 4000.0, "c": 1000.0},  # the run lasts as long as b in any case
        {"a": 0.0, "b": 400.0, "c": 1000.0},  # it is at its end
        {"a": 2.0, "b": 2.0, "c": 5.0},  # seconds
    ],
)
def test_where_nothing_is_to_be_gained_it_goes_on(left_s: dict[str, float]) -> None:
    assert not gain("a", ["a", "b"], ["c"], left_s, EPOCH_S if left_s["b"] > 10 else dict.fromkeys("abc", 0.1))


def test_each_waiting_trial_takes_one_place_only(tmp_path: Path) -> None:
    trials = [t for t in tiny_trials(tmp_path, train={"epochs": 20}) if t.adaptation.trains_encoder]
    preemption = Preemption(trials, slots=2)
    for trial in trials[:2]:
        for number in range(1, 15):
            preemption.event(trial, epoch(number, 20, seconds=100.0))
    running, waiting = [t.name for t in trials[:2]], [trials[2].name]
    assert preemption.pauses(running[0], running, waiting)
    assert not preemption.pauses(running[0], running, waiting)
    assert not preemption.pauses(running[1], running, waiting)


def test_a_trial_that_gave_way_goes_on_later_with_the_same_attempt_and_all_end(tmp_path: Path) -> None:
    trials = makespan.plan(seeds=2)
    notes, gpus = Notes(), makespan.VirtualGpus(makespan.random.Random(0), loss_share=0.0)
    preemption: Any = Preemption(trials, makespan.GPUS)
    directory = lambda trial: TrialDirectory(tmp_path / trial.name)  # noqa: E731
    assert run_trials(trials, directory, gpus, [notes], RetriesConfig(), preemption=preemption) is None
    assert gpus.changes == len(notes.failures) > 0
    assert {decision for _, _, decision in notes.failures} == {Decision.PAUSE}
    assert {number for _, number in notes.attempts} == {1}
    ended = [name for name, kind in notes.events if kind == "TrialResult"]
    assert sorted(ended) == sorted(trial.name for trial in trials)
    whole = makespan.VirtualGpus(makespan.random.Random(0), loss_share=0.0)
    run_trials(trials, directory, whole, [], RetriesConfig())
    assert gpus.now < 0.95 * whole.now
