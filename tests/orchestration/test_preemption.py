"""Which trial pauses for which: pure decisions, and the loop that carries them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cvrunner.config.sections import RetriesConfig
from cvrunner.orchestration.failures import Decision, Failure
from cvrunner.orchestration.preemption import Preemption, makespan_without_pauses_s, pause_ends_run_earlier
from cvrunner.orchestration.scheduler import run_trials
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.training.trial import Trial
from tests.benchmarks import makespan
from tests.orchestration.test_gauges import epoch
from tests.orchestration.test_scheduler import Notes
from tests.trials import tiny_trials

EPOCH_S = {"a": 100.0, "b": 100.0, "c": 100.0}


def test_without_pauses_the_longest_trial_starts_on_the_first_free_gpu() -> None:
    assert makespan_without_pauses_s([10.0, 30.0], [5.0, 40.0]) == 50.0


def test_a_trial_with_little_left_pauses_for_one_with_much_left() -> None:
    assert pause_ends_run_earlier("a", ["a", "b"], ["c"], {"a": 400.0, "b": 400.0, "c": 1000.0}, EPOCH_S)


@pytest.mark.parametrize(
    "left_s",
    [
        {"a": 500.0, "b": 500.0, "c": 1000.0},  # c leads by exactly five epochs
        {"a": 400.0, "b": 4000.0, "c": 1000.0},  # the run lasts as long as b in any case
        {"a": 0.0, "b": 400.0, "c": 1000.0},  # a has finished
        {"a": 2.0, "b": 2.0, "c": 5.0},  # the gain is a few seconds
    ],
)
def test_a_trial_does_not_pause_if_the_run_would_not_end_earlier(left_s: dict[str, float]) -> None:
    assert not pause_ends_run_earlier(
        "a", ["a", "b"], ["c"], left_s, EPOCH_S if left_s["b"] > 10 else dict.fromkeys("abc", 0.1)
    )


def two_of_three_running(folder: Path, done: int, epochs: int, seconds: float) -> tuple[Preemption, list[Trial]]:
    """Three trials on two slots: two have `done` of their epochs, of this many seconds, and one waits."""
    trials = [t for t in tiny_trials(folder, train={"epochs": epochs}) if t.config.adaptation.trains_encoder]
    preemption = Preemption(trials, slots=2)
    for trial in trials[:2]:
        for number in range(1, done + 1):
            preemption.event(trial, epoch(number, epochs, seconds=seconds))
    return preemption, trials


def test_only_one_trial_pauses_for_each_waiting_one(tmp_path: Path) -> None:
    preemption, trials = two_of_three_running(tmp_path, 14, 20, seconds=100.0)
    running, waiting = [t.name for t in trials[:2]], [trials[2].name]
    assert preemption.should_pause(running[0], running, waiting, asked=[])
    assert not preemption.should_pause(running[0], running, waiting, asked=running[:1])
    assert not preemption.should_pause(running[1], running, waiting, asked=running[:1])


@pytest.mark.parametrize(("epochs_done", "pauses"), [(17, True), (18, False), (19, False)])
def test_no_trial_pauses_in_its_last_tenth(tmp_path: Path, epochs_done: int, pauses: bool) -> None:
    preemption, trials = two_of_three_running(tmp_path, epochs_done, 20, seconds=100.0)
    running, waiting = [t.name for t in trials[:2]], [trials[2].name]
    assert preemption.should_pause(running[0], running, waiting, asked=[]) is pauses


def test_no_trial_pauses_twice_within_a_minute_of_training(tmp_path: Path) -> None:
    preemption, trials = two_of_three_running(tmp_path, 40, 100, seconds=10.0)
    running, waiting = [t.name for t in trials[:2]], [trials[2].name]
    assert preemption.should_pause(running[0], running, waiting, asked=[])
    preemption.failed(trials[0], Failure("stopped", "paused"), Decision.PAUSE)
    decisions = []
    for number in range(41, 48):
        preemption.event(trials[0], epoch(number, 100, seconds=10.0))
        decisions.append(preemption.should_pause(running[0], running, waiting, asked=[]))
    assert decisions == [False] * 5 + [True] * 2


def test_no_trial_pauses_for_a_condition_without_a_measured_epoch(tmp_path: Path) -> None:
    trials = tiny_trials(tmp_path, train={"epochs": 20})
    unfrozen = [t for t in trials if t.config.adaptation.trains_encoder]
    frozen = next(t for t in trials if not t.config.adaptation.trains_encoder)
    preemption = Preemption([*unfrozen[:2], frozen], slots=2)
    for trial in unfrozen[:2]:
        for number in range(1, 15):
            preemption.event(trial, epoch(number, 20, seconds=100.0))
    running = [t.name for t in unfrozen[:2]]
    assert not preemption.should_pause(running[0], running, [frozen.name], asked=[])


def test_a_paused_trial_resumes_the_same_attempt_later_and_all_trials_end(tmp_path: Path) -> None:
    trials = makespan.plan(seeds=2)
    notes, gpus = Notes(), makespan.VirtualGpus(makespan.random.Random(0), loss_share=0.0)
    preemption: Any = Preemption(trials, makespan.GPUS)
    directory = lambda trial: TrialDirectory(tmp_path / trial.name)  # noqa: E731
    assert run_trials(trials, directory, gpus, [notes], RetriesConfig(), preemption=preemption) is None
    assert gpus.pauses == len(notes.failures) > 0
    assert {decision for _, _, decision in notes.failures} == {Decision.PAUSE}
    assert {number for _, number in notes.attempts} == {1}
    ended = [name for name, kind in notes.events if kind == "TrialResult"]
    assert sorted(ended) == sorted(trial.name for trial in trials)
    whole = makespan.VirtualGpus(makespan.random.Random(0), loss_share=0.0)
    run_trials(trials, directory, whole, [], RetriesConfig())
    assert gpus.now < 0.95 * whole.now
