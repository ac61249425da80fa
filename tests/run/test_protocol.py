"""The protocol and the ledger of real runs: written before the first trial, counted after the last."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cvrunner.orchestration import ray_executor
from cvrunner.records.run_directory import RunDirectory, TrialDirectory
from cvrunner.run import commands, session
from cvrunner.training.trial import LinearProbe, Trial
from cvrunner.verdict.ledger import read_ledger
from cvrunner.verdict.protocol import ProtocolFile, read_protocol
from tests.run.test_commands import Inline, all_folds, config

__all__ = ["config"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore")
ONE_EPOCH = "train.epochs=1"


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "RayExecutor", Inline)


def runs(config: Path) -> list[RunDirectory]:
    """The runs in the results folder, oldest first."""
    files = sorted((config.parent / "results").glob("*/run.json"), key=lambda file: file.stat().st_ctime_ns)
    return sorted((RunDirectory(file.parent) for file in files), key=lambda run: _file(run).versions[0].time)


def _file(run: RunDirectory) -> ProtocolFile:
    file = read_protocol(run)
    assert file is not None
    return file


def test_the_protocol_is_on_disk_with_its_hash_before_the_first_trial_starts(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Watching(Inline):
        def start(self, trial: Trial, directory: TrialDirectory) -> None:
            # Linear probes are no trials, and come after all of them.
            if not isinstance(trial, LinearProbe):
                run = RunDirectory(directory.path.parent.parent.parent)
                seen.append((_file(run).versions[0].sha256, run.read_run().protocol_sha256, directory.result()))
            super().start(trial, directory)

    monkeypatch.setattr(ray_executor, "RayExecutor", Watching)
    assert all_folds(config, ONE_EPOCH)[0] == 0
    assert len(seen) == 6
    hashes = {one for one, other, _ in seen} | {other for _, other, _ in seen}
    assert len(hashes) == 1
    assert seen[0][2] is None
    (run,) = runs(config)
    version = _file(run).versions[0]
    assert version.protocol.sha256 == version.sha256 == hashes.pop()
    assert (version.test_scores, version.looks, version.changes) == (0, 0, [])


def test_a_look_is_counted_once_and_finding_the_same_files_or_reporting_them_is_none(config: Path) -> None:
    code, text = all_folds(config, ONE_EPOCH)
    assert code == 0
    assert "looked at 0 times in this results folder before" in text
    results = config.parent / "results"
    (look,) = read_ledger(results)
    (run,) = runs(config)
    record = run.read_run()
    assert (look.run, look.seeds, list(look.conditions)) == (record.run, [0], ["frozen", "unfrozen"])
    assert (look.corpus_digest, look.split_digest) == (record.corpus_digest, record.split_digest)
    assert set(look.scores) == set(record.trials)
    assert "looked at 0 times" in all_folds(config, ONE_EPOCH)[1]
    commands.report(run.path, Console(file=io.StringIO()))
    assert len(read_ledger(results)) == 1
    assert "looked at 1 time in" in all_folds(config, ONE_EPOCH, new=True)[1]
    assert len(read_ledger(results)) == 2
    assert "looked at 1 time in this results folder before" in runs(config)[1].comparison.read_text()


def test_scores_of_a_driver_that_was_killed_are_counted_by_the_next_invocation(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "close", killed)
        with pytest.raises(KeyboardInterrupt):
            all_folds(config, ONE_EPOCH)
    assert read_ledger(config.parent / "results") == []
    assert "nothing to train" in all_folds(config, ONE_EPOCH)[1]
    (look,) = read_ledger(config.parent / "results")
    assert len(look.scores) == 6


def test_a_margin_changed_after_the_scores_is_appended_used_and_shown(config: Path) -> None:
    all_folds(config, ONE_EPOCH)
    (run,) = runs(config)
    before = run.comparison.read_text()
    assert "| later changes | none |" in before
    assert "before the first test score of the run" in before
    text = all_folds(config, ONE_EPOCH, "verdict.margin=0.05")[1]
    assert "nothing to train" in text
    first, second = _file(run).versions
    assert (first.protocol.margin, second.protocol.margin) == (0.02, 0.05)
    assert (second.test_scores, second.looks, second.changes) == (6, 1, ["margin: 0.02 -> 0.05"])
    assert run.read_run().protocol_sha256 == first.sha256
    assert run.read_config().verdict.margin == 0.05
    after = run.comparison.read_text()
    assert "after 6 trials of the run had test scores | margin: 0.02 -> 0.05 |" in after
    assert first.sha256 in after
    all_folds(config, ONE_EPOCH, "verdict.margin=0.05")
    assert len(_file(run).versions) == 2
    assert len(read_ledger(config.parent / "results")) == 1


def test_seeds_and_conditions_added_after_a_look_are_named_in_the_new_run(config: Path) -> None:
    all_folds(config, ONE_EPOCH)
    conditions = "conditions={frozen: {}, unfrozen: {model: {freeze_speech_encoder: false}}, fast: {train: {lr: 2e-3}}}"
    all_folds(config, ONE_EPOCH, "train.seeds=[0, 1]", conditions)
    first, second = runs(config)
    assert _file(first).added_after_look == []
    assert _file(second).added_after_look == ["seed 1", "condition fast"]
    assert "seed 1, condition fast |" in second.comparison.read_text()


def test_a_moved_encoder_is_the_same_protocol(config: Path) -> None:
    all_folds(config, ONE_EPOCH)
    moved = config.parent / "elsewhere" / "wavlm"
    moved.parent.mkdir()
    (config.parent / "wavlm").rename(moved)
    assert "nothing to train" in all_folds(config, ONE_EPOCH, f"model.encoder={moved}")[1]
    (run,) = runs(config)
    assert len(_file(run).versions) == 1


def test_the_command_prints_the_protocol_of_the_run_and_writes_nothing(config: Path) -> None:
    before = sorted(config.parent.rglob("*"))
    console = Console(file=io.StringIO(), width=200)
    assert commands.protocol(config, [ONE_EPOCH], console) == 0
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert sorted(config.parent.rglob("*")) == before
    assert max(map(len, text.splitlines())) < 100
    as_json = Console(file=io.StringIO(), width=200)
    assert commands.protocol(config, [ONE_EPOCH], as_json, as_json=True) == 0
    printed = json.loads(as_json.file.getvalue())  # type: ignore[attr-defined]
    all_folds(config, ONE_EPOCH)
    (run,) = runs(config)
    assert printed["sha256"] == run.read_run().protocol_sha256
    assert printed["sha256"] in text
    assert printed["protocol"] == _file(run).current.model_dump(mode="json")
