"""Scheduling: pure decisions about failures, and a loop that needs no cluster to be tested."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from cvrunner.config.sections import RetriesConfig
from cvrunner.errors import CorpusError, LeakError, Stopped
from cvrunner.orchestration.failures import Decision, Failure
from cvrunner.orchestration.scheduler import run_trials
from cvrunner.orchestration.trials import run_key
from cvrunner.records.results import EpochRecord, FeatureProgress, TrialResult
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


def test_a_lost_trial_is_tried_again_next_and_the_others_go_on() -> None:
    notes = play(Script(1, a=[LOST, RESULT]), "a", "b")
    assert notes.attempts == [("a", 1), ("a", 2), ("b", 1)]
    assert notes.failures == [("a", "worker_died", Decision.RETRY)]


def test_after_the_last_attempt_a_trial_has_failed_and_the_others_go_on() -> None:
    notes = play(Script(1, a=[LOST] * 3), "a", "b")
    assert [d for _, _, d in notes.failures] == [Decision.RETRY, Decision.RETRY, Decision.FAIL]
    assert ("b", "TrialResult") in notes.events


def test_told_to_stop_it_starts_nothing_more_and_waits_for_what_runs() -> None:
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


def test_where_the_hosts_memory_ran_out_fewer_trials_run_at_a_time() -> None:
    script = Script(3, a=[Failure("host_memory", "memory monitor"), RESULT])
    seen: list[int] = []
    start = script.start
    script.start = lambda t, d: (start(t, d), seen.append(len(script.running)))  # type: ignore[assignment, func-returns-value]
    play(script, "a", "b", "c", "d", "e")
    assert seen == [1, 2, 3, 2, 2, 2]


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

    def test_conditions_may_use_encoders_of_their_own(self, tmp_path: Path) -> None:
        from tests.tiny_encoders import save_encoder

        other = save_encoder(tmp_path / "other", stable=True)
        trials = tiny_trials(tmp_path, conditions={"base": {}, "large": {"model": {"encoder": str(other)}}})
        assert len({t.encoder.digest for t in trials}) == 2
