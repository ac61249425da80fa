"""Whose models speak: chosen by validation alone, and what is missing is named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cvrunner.config.sections import ModelConfig
from cvrunner.errors import ResultsError, UsageError
from cvrunner.files import write_atomically
from cvrunner.inference import emotion_model
from cvrunner.inference.ensemble import best_condition, find_members, load_groups
from cvrunner.records.run_directory import RunDirectory
from tests.runs import make_run

LOST = "unfrozen/fold-2/seed-0"


def with_models(directory: RunDirectory) -> RunDirectory:
    """A stand-in for a model wherever there is a result."""
    for name in directory.results(directory.read_run()):
        write_atomically(directory.path / name / "model" / "config.json", "{}")
    return directory


def test_the_test_set_has_no_say_in_the_choice(tmp_path: Path) -> None:
    directory = make_run(tmp_path, folds=2)
    run, results = directory.read_run(), directory.results(directory.read_run())
    assert best_condition(run, results)[0] == "unfrozen"
    for name, result in results.items():
        better_in_validation = 0.9 if name.startswith("frozen") else 0.1
        results[name] = result.model_copy(update={"validation_ccc": {"avg": better_in_validation}})
    chosen, reason = best_condition(run, results)
    assert chosen == "frozen"
    assert reason == "mean validation CCC-Avg 0.9000; unfrozen 0.1000"


def test_an_incomplete_condition_is_not_chosen_but_may_be_named(tmp_path: Path) -> None:
    directory = with_models(make_run(tmp_path, folds=3, missing=[LOST]))
    assert find_members(directory).condition == "frozen"
    members = find_members(directory, "unfrozen")
    assert [folder.path.parent.parent.name for folder in members.folders] == ["fold-1", "fold-3"]
    assert members.missing == (LOST,)


def test_without_a_complete_condition_one_has_to_be_named(tmp_path: Path) -> None:
    directory = make_run(tmp_path, folds=2, missing=[LOST, "frozen/fold-1/seed-0"])
    with pytest.raises(UsageError, match=r"choose the condition \(frozen, unfrozen\)"):
        find_members(directory)


def test_a_condition_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="condition thawed: the run has frozen, unfrozen"):
        find_members(make_run(tmp_path, folds=2), "thawed")


def test_a_run_whose_models_were_removed_says_so(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="condition frozen has no trained models"):
        find_members(make_run(tmp_path, folds=2), "frozen")


def test_models_share_a_frozen_encoder_if_they_need_the_same_hidden_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def folder(name: str, **model: Any) -> Any:
        described = SimpleNamespace(model=ModelConfig(**model), precision="auto")
        return SimpleNamespace(path=Path(name), read=lambda: described)

    monkeypatch.setattr(emotion_model, "load_models", lambda paths, *_: [path.name for path in paths])
    frozen = [folder("1"), folder("2", layers=(1, 2)), folder("3", width=64)]
    assert list(load_groups(frozen, torch.device("cpu"))) == [["1", "3"], ["2"]]
    unfrozen = [folder("1", freeze_speech_encoder=False), folder("2", freeze_speech_encoder=False)]
    assert list(load_groups(unfrozen, torch.device("cpu"))) == [["1"], ["2"]]
