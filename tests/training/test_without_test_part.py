"""A trial without a test part, as in a sweep: it ends after its last epoch, whatever became of the test audio."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cvrunner.records.results import EpochRecord, TrainingFinished
from tests.trials import pick, tiny_trials, train

pytestmark = pytest.mark.filterwarnings("ignore")


def test_it_trains_without_the_test_audio_and_leaves_no_result(tmp_path: Path) -> None:
    whole = pick(tiny_trials(tmp_path), "unfrozen")
    events = train(whole, tmp_path, "whole")
    trial = replace(whole, fold=replace(whole.fold, test=()))
    for utterance in whole.fold.test:
        utterance.path.unlink()
    cut = train(trial, tmp_path / "fresh", "cut")  # with a cache of its own
    assert isinstance(cut[-1], TrainingFinished)
    assert cut[-1].epochs_run == 3
    scores = [[e.validation_ccc for e in some if isinstance(e, EpochRecord)] for some in (events, cut)]
    # To rounding: the statistics of the linear path were computed in the company of other utterances.
    for with_test, without in zip(*scores, strict=True):
        assert without == pytest.approx(with_test, abs=1e-4)
    left = {path.name for path in (tmp_path / "fresh" / "cut" / trial.name).iterdir() if not path.name.startswith(".")}
    assert left == {"journal.jsonl", "checkpoint"}
    assert [type(event) for event in train(trial, tmp_path / "fresh", "cut") if isinstance(event, EpochRecord)] == []
