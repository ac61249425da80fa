"""Scheduling: a pure queue of trials, and the loop that carries its decisions out, without a cluster."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from cvrunner.config.sections import RetriesConfig
from cvrunner.errors import CorpusError, LeakError, Stopped
from cvrunner.orchestration.failures import Decision, Failure
from cvrunner.orchestration.preemption import Preemption
from cvrunner.orchestration.scheduler import TrialQueue, run_trials
from cvrunner.orchestration.trials import run_key
from cvrunner.records.results import EpochRecord, FeatureProgress, TrainingFinished, TrialResult
from cvrunner.records.run_directory import TrialDirectory
from tests.trials import tiny_trials

LOST = Failure("worker_died", "its process is gone")
RESULT = TrialResult.model_construct()
EPOCH = EpochRecord.model_construct()


class Script:
    """An executor that plays a script: for each trial, what its attempts end with."""

    def __init__(self, slots: int, **endings: list[Any]) -> None:
        self.slots = slots
        self.endings = endings
        self.running: list[Any] = []
        self.most = 0
        self.order: list[str] = []
        self.paused: list[str] = []
        self.stopped = False

    def start(self, trial: Any, directory: TrialDirectory) -> None:
        self.running.append(trial)
        self.order.append(trial.name)
        self.most = max(self.most, len(self.running))

    def poll(self, timeout_s: float) -> list[Any]:
        trial = self.running[0]
        ending = Failure("stopped", "stopped") if self.stopped else self.endings.get(trial.name, [RESULT]).pop(0)
        if isinstance(ending, (TrialResult, Failure)):
            self.running.remove(trial)
        return [(trial, ending)]

    def pause(self, trial: Any) -> None:
        self.paused.append(trial.name)

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None: ...


class Notes:
    def __init__(self) -> None:
        self.attempts: list[tuple[str, int]] = []
        self.events: list[tuple[str, str]] = []
        self.failures: list[tuple[str, str, Decision]] = []
        self.aborted: Failure | None = None

    def attempt(self, trial: Any, number: int) -> None:
        self.attempts.append((trial.name, number))

    def event(self, trial: Any, event: Any) -> None:
        self.events.append((trial.name, type(event).__name__))

    def failed(self, trial: Any, failure: Failure, decision: Decision) -> None:
        self.failures.append((trial.name, failure.kind, decision))


class Named:
    def __init__(self, name: str) -> None:
        self.name = name


def play(script: Script, *names: str, lost: int = 2, **settings: Any) -> Notes:
    notes, trials = Notes(), [Named(n) for n in names]
    notes.aborted = run_trials(
        trials,  # type: ignore[arg-type]
        lambda t: TrialDirectory(Path(t.name)),
        script,
        [notes],
        RetriesConfig(worker_died=lost),
        **settings,
    )
    return notes


def test_all_trials_run_in_order_with_no_more_than_the_slots() -> None:
    script = Script(2)
    notes = play(script, "a", "b", "c", "d", "e")
    assert script.order == ["a", "b", "c", "d", "e"]
    assert script.most == 2
    assert [name for name, _ in notes.events] == ["a", "b", "c", "d", "e"]


def test_a_lost_trial_is_tried_again_next_and_the_others_continue() -> None:
    notes = play(Script(1, a=[LOST, RESULT]), "a", "b")
    assert notes.attempts == [("a", 1), ("a", 2), ("b", 1)]
    assert notes.failures == [("a", "worker_died", Decision.RETRY)]


def test_after_the_last_attempt_a_trial_has_failed_and_the_others_continue() -> None:
    notes = play(Script(1, a=[LOST] * 3), "a", "b")
    assert [d for _, _, d in notes.failures] == [Decision.RETRY, Decision.RETRY, Decision.FAIL]
    assert ("b", "TrialResult") in notes.events


def test_when_asked_to_stop_it_starts_nothing_more_and_waits_for_what_runs() -> None:
    progress = FeatureProgress(kind="conv", done=0, shards=1)
    polls = iter([False, False, True, True, True])
    notes = play(Script(1, a=[progress, progress, progress]), "a", "b", should_stop=lambda: next(polls))
    assert notes.attempts == [("a", 1)]
    assert notes.failures == [("a", "stopped", Decision.STOP)]


def test_failures_count_since_the_trial_last_finished_an_epoch() -> None:
    endings = [LOST, LOST, EPOCH, LOST, LOST, EPOCH, LOST, LOST, LOST]
    notes = play(Script(1, a=endings), "a")
    assert [d for _, _, d in notes.failures] == [Decision.RETRY] * 6 + [Decision.FAIL]


def test_the_loss_of_a_node_is_never_the_end() -> None:
    notes = play(Script(1, a=[Failure("preempted", "its node is gone")] * 50 + [RESULT]), "a")
    assert notes.attempts[-1] == ("a", 51)
    assert ("a", "TrialResult") in notes.events


def test_a_wrong_configuration_ends_the_run_and_lets_the_others_save() -> None:
    progress = FeatureProgress(kind="conv", done=0, shards=1)
    wrong = Failure("configuration", "model.encoder x: is a 'bert'")
    notes = play(Script(2, a=[wrong], b=[progress] * 9), "a", "b", "c")
    assert notes.failures == [("a", "configuration", Decision.ABORT), ("b", "stopped", Decision.STOP)]
    assert notes.aborted == wrong
    assert "c" not in dict(notes.attempts)


def test_after_the_host_ran_out_of_memory_fewer_trials_run_at_a_time() -> None:
    script = Script(3, a=[Failure("host_memory", "memory monitor"), RESULT])
    seen: list[int] = []
    start = script.start
    script.start = lambda t, d: (start(t, d), seen.append(len(script.running)))  # type: ignore[assignment, func-returns-value]
    play(script, "a", "b", "c", "d", "e")
    assert seen == [1, 2, 3, 2, 2, 2]


class FirstPauses(Preemption):
    """Trial `a` is asked to pause after its first epoch, if another one waits; `c` has the most time left."""

    def __init__(self) -> None:
        super().__init__([], slots=1)
        self.calls: list[tuple[str, str]] = []

    def attempt(self, trial: Any, number: int) -> None:
        self.calls.append(("attempt", trial.name))

    def event(self, trial: Any, event: Any) -> None:
        self.calls.append(("event", trial.name))

    def failed(self, trial: Any, failure: Failure, decision: Decision) -> None:
        self.calls.append((decision.value, trial.name))

    def remaining_training_s(self, name: str) -> float:
        return {"c": 3.0, "a": 2.0}.get(name, 1.0)

    def should_pause(self, trial: str, running: Any, waiting: Any, asked: Any) -> bool:
        return trial == "a" and ("pause", "a") not in self.calls and bool(waiting)


STOPPED = Failure("stopped", "stopped")


class TestQueue:
    """No executor, no observers, no clock."""

    def queue(self, *names: str, preemption: Preemption | None = None) -> tuple[TrialQueue, dict[str, Any]]:
        trials: dict[str, Any] = {name: Named(name) for name in names}
        return TrialQueue(list(trials.values()), RetriesConfig(worker_died=1), preemption), trials

    def starts(self, queue: TrialQueue, slots: int) -> list[tuple[str, int]]:
        started = []
        while one := queue.start(slots):
            started.append((one[0].name, one[1]))
        return started

    def test_it_starts_as_many_trials_as_there_are_slots_and_ends_with_the_last_result(self) -> None:
        queue, trials = self.queue("a", "b", "c")
        assert self.starts(queue, slots=2) == [("a", 1), ("b", 1)]
        assert queue.handle(trials["a"], EPOCH) is Decision.CONTINUE
        assert queue.handle(trials["a"], RESULT) is Decision.FINISHED
        assert self.starts(queue, slots=2) == [("c", 1)]
        assert not queue.is_finished
        assert [queue.handle(trials[name], RESULT) for name in "bc"] == [Decision.FINISHED] * 2
        assert queue.is_finished

    def test_training_without_a_test_part_ends_a_trial_too(self) -> None:
        queue, trials = self.queue("a")
        self.starts(queue, slots=1)
        assert queue.handle(trials["a"], TrainingFinished.model_construct()) is Decision.FINISHED
        assert queue.is_finished

    def test_a_retried_trial_is_next_with_a_new_attempt_until_its_retries_are_used_up(self) -> None:
        queue, trials = self.queue("a", "b")
        self.starts(queue, slots=1)
        assert queue.handle(trials["a"], LOST) is Decision.RETRY
        assert self.starts(queue, slots=1) == [("a", 2)]
        assert queue.handle(trials["a"], LOST) is Decision.FAIL
        assert self.starts(queue, slots=1) == [("b", 1)]

    def test_it_starts_nothing_once_stopping_and_ends_when_nothing_runs(self) -> None:
        queue, trials = self.queue("a", "b")
        self.starts(queue, slots=1)
        queue.stopping = True
        assert queue.handle(trials["a"], STOPPED) is Decision.STOP
        assert self.starts(queue, slots=2) == []
        assert queue.is_finished

    def test_the_first_failure_that_concerns_all_trials_is_kept(self) -> None:
        queue, trials = self.queue("a", "b")
        self.starts(queue, slots=2)
        first = Failure("configuration", "no such folder")
        assert queue.handle(trials["a"], first) is Decision.ABORT
        assert queue.handle(trials["b"], Failure("configuration", "another")) is Decision.ABORT
        assert queue.aborted == first

    def test_after_host_memory_ran_out_only_as_many_start_as_still_ran(self) -> None:
        queue, trials = self.queue("a", "b", "c", "d")
        self.starts(queue, slots=3)
        assert queue.handle(trials["a"], Failure("host_memory", "memory monitor")) is Decision.RETRY
        assert self.starts(queue, slots=3) == []
        queue.handle(trials["b"], RESULT)
        assert self.starts(queue, slots=3) == [("a", 2)]

    def test_a_preempted_trial_waits_behind_longer_ones_and_resumes_the_same_attempt(self) -> None:
        preemption = FirstPauses()
        queue, trials = self.queue("a", "b", "c", preemption=preemption)
        self.starts(queue, slots=1)
        assert queue.handle(trials["a"], EPOCH) is Decision.PREEMPT
        assert queue.handle(trials["a"], STOPPED) is Decision.PAUSE
        assert self.starts(queue, slots=3) == [("c", 1), ("a", 1), ("b", 1)]
        expected = ["attempt", "event", "pause", "attempt", "attempt", "attempt"]
        assert [what for what, _ in preemption.calls] == expected

    def test_a_preempted_trial_that_fails_otherwise_is_treated_like_any_failure(self) -> None:
        queue, trials = self.queue("a", "b", preemption=FirstPauses())
        self.starts(queue, slots=1)
        assert queue.handle(trials["a"], EPOCH) is Decision.PREEMPT
        assert queue.handle(trials["a"], LOST) is Decision.RETRY
        assert self.starts(queue, slots=1) == [("a", 2)]

    def test_a_preempted_trial_does_not_come_back_in_a_run_that_is_stopping(self) -> None:
        queue, trials = self.queue("a", "b", preemption=FirstPauses())
        self.starts(queue, slots=1)
        assert queue.handle(trials["a"], EPOCH) is Decision.PREEMPT
        queue.stopping = True
        assert queue.handle(trials["a"], STOPPED) is Decision.STOP
        assert queue.is_finished


def test_a_preempted_trial_is_paused_once_and_resumes_after_the_longer_one() -> None:
    script = Script(1, a=[EPOCH, STOPPED, EPOCH, RESULT], b=[EPOCH, RESULT])
    notes = play(script, "a", "b", "c", preemption=FirstPauses())
    assert script.paused == ["a"]
    assert script.order == ["a", "c", "a", "b"]
    assert notes.attempts == [("a", 1), ("c", 1), ("a", 1), ("b", 1)]
    assert notes.failures == [("a", "stopped", Decision.PAUSE)]


@pytest.mark.parametrize("error", [CorpusError("here", ["a", "b"]), LeakError("here", ["a"]), Stopped("x")])
def test_errors_survive_the_way_between_processes(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)


class TestPlan:
    def test_every_condition_fold_and_seed_is_there_once_and_the_long_ones_come_first(self, tmp_path: Path) -> None:
        trials = tiny_trials(tmp_path, train={"seeds": [0, 7]})
        assert len({t.name for t in trials}) == len(trials) == 2 * 3 * 2
        assert [t.condition for t in trials] == ["unfrozen"] * 6 + ["frozen"] * 6

    def test_the_run_key_depends_on_the_trials_and_not_on_their_order(self, tmp_path: Path) -> None:
        trials = tiny_trials(tmp_path)
        assert run_key(trials) == run_key(trials[::-1])
        assert run_key(trials) != run_key(trials[1:])
        assert run_key(trials) != run_key(tiny_trials(tmp_path, train={"lr": 0.5}))

    def test_conditions_may_use_different_encoders(self, tmp_path: Path) -> None:
        from tests.tiny_encoders import save_encoder

        other = save_encoder(tmp_path / "other", stable=True)
        trials = tiny_trials(tmp_path, conditions={"base": {}, "large": {"model": {"encoder": str(other)}}})
        assert len({t.encoder.digest for t in trials}) == 2
