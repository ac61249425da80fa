"""Scheduling: pure decisions about failures, and a loop that needs no cluster to be tested."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from cvrunner.errors import ConfigError, CorpusError, LeakError, MovementError, Stopped
from cvrunner.orchestration.plan import run_key
from cvrunner.orchestration.scheduler import Decision, Failure, classify, decide, run_trials
from cvrunner.records.results import FeatureProgress, TrialResult
from cvrunner.records.run_directory import TrialDirectory
from tests.trials import tiny_trials

LOST = Failure("lost", "its process is gone")
RESULT = TrialResult.model_construct()


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

    def attempt(self, trial: Any, number: int) -> None:
        self.attempts.append((trial.name, number))

    def event(self, trial: Any, event: Any) -> None:
        self.events.append((trial.name, type(event).__name__))

    def failed(self, trial: Any, failure: Failure, decision: Decision) -> None:
        self.failures.append((trial.name, failure.kind, decision))


class Named:
    def __init__(self, name: str) -> None:
        self.name = name


def play(script: Script, *names: str, **settings: Any) -> Notes:
    notes = Notes()
    run_trials([Named(n) for n in names], lambda t: TrialDirectory(Path(t.name)), script, [notes], 3, **settings)  # type: ignore[misc]
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
    assert notes.failures == [("a", "lost", Decision.RETRY)]


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


@pytest.mark.parametrize(
    ("kind", "attempts", "expected"),
    [
        ("lost", 1, Decision.RETRY),
        ("lost", 2, Decision.RETRY),
        ("lost", 3, Decision.FAIL),
        ("trial", 1, Decision.FAIL),
        ("user", 1, Decision.FAIL),
        ("bug", 1, Decision.FAIL),
        ("stopped", 1, Decision.STOP),
    ],
)
def test_the_decision_table(kind: Any, attempts: int, expected: Decision) -> None:
    assert decide(Failure(kind, ""), attempts, max_attempts=3) is expected


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MovementError("x"), "trial"),
        (ConfigError("x"), "user"),
        (CorpusError("x", ["y"]), "user"),
        (Stopped("x"), "stopped"),
        (KeyError("x"), "bug"),
    ],
)
def test_failures_are_told_apart_by_type(error: Exception, kind: str) -> None:
    failure = classify(error)
    assert failure.kind == kind
    assert (kind == "bug") == bool(failure.details)


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
        from tests.encoders import save_encoder

        other = save_encoder(tmp_path / "other", stable=True)
        trials = tiny_trials(tmp_path, conditions={"base": {}, "large": {"model": {"encoder": str(other)}}})
        assert len({t.encoder.digest for t in trials}) == 2
