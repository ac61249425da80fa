"""A run written by version 6286ee9 is read with the names of this version."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cvrunner.api import load_model, load_run
from cvrunner.config.reading import load_config
from cvrunner.errors import ConfigError, ResultsError
from cvrunner.inference import command as predict_commands
from cvrunner.inference.ensemble import find_members
from cvrunner.records import legacy
from cvrunner.records.results import RunRecord, TrialResult
from cvrunner.records.run_directory import RunDirectory, read_events
from cvrunner.run import commands
from cvrunner.tune.store import SweepRecord

pytestmark = pytest.mark.filterwarnings("ignore")
STORED = Path(__file__).parent / "run_6286ee9"
"""Trained by that version on cvrunner's synthetic corpus; the weights of `top`, figures and report are left out."""
OLD_NAMES = {
    "change_over", "warmup", "early_stopping", "weights_ema", "length_pool", "samples", "space", "grace_epochs",
    "unfreeze_layers", "lost", "numbers",
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(shutil.copytree(STORED, tmp_path / "results" / "old-dd2267e2"))


def screen() -> Console:
    return Console(file=io.StringIO(), width=200)


def shown(console: Console) -> str:
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_its_configuration_has_the_new_keys_and_the_old_values(run: RunDirectory) -> None:
    written = run.config.read_text()
    assert all(f" {name}:" in written for name in OLD_NAMES)
    config = run.read_config()
    train, tune = config.train, config.tune
    assert (train.warmup_ratio, train.early_stopping_patience, train.length_bucket_batches) == (0.2, 2, 2)
    assert train.ema_decay == 0.8
    assert not config.cluster.preempt
    assert (config.cluster.retries.worker_died, config.cluster.retries.non_finite) == (5, 2)
    assert (tune.num_samples, tune.grace_period) == (4, 1)
    assert set(tune.search_space) == {"train.warmup_ratio", "model.unfreeze_top_layers"}
    top = config.for_condition("top")
    assert (top.model.unfreeze_top_layers, top.train.ema_decay, top.train.warmup_ratio) == (1, 0.5, 0.3)


def test_the_same_keys_in_a_users_own_configuration_are_an_error(run: RunDirectory) -> None:
    with pytest.raises(ConfigError, match="change_over"):
        load_config(run.config)


def test_failures_and_weight_changes_arrive_under_their_new_names(run: RunDirectory) -> None:
    record = run.read_run()
    assert record.trials["top/fold-2/seed-0"].failures == {"worker_died": 2, "non_finite": 1}
    results = run.results(record)
    assert len(results) == 6
    for name, result in results.items():
        epochs = list(read_events(run.path / name / "journal.jsonl", "epoch"))
        assert len(epochs) == 2
        last = {group: values["weight_change"] for group, values in epochs[-1]["groups"].items()}
        assert last == result.weight_change


def test_report_compare_and_sync_read_it(run: RunDirectory, tmp_path: Path) -> None:
    console = screen()
    assert commands.report(run.path, console) == 0
    assert "frozen" in shown(console)
    assert run.report.is_file()
    assert "worker_died 2" in run.comparison.read_text() + run.report.read_text()
    console = screen()
    assert commands.compare(run.path, run.path, "frozen", "top", False, False, console) == 0
    assert "top" in shown(console)
    console = screen()
    assert commands.sync(run.path, f"sqlite:///{tmp_path}/mlflow.db", console) == 0
    assert "old-dd2267e2 is in sqlite" in shown(console)


def test_its_tables_have_their_columns(run: RunDirectory) -> None:
    found = load_run(run.path)
    assert len(found.trials) == 6
    assert len(found.epochs) == 12
    assert found.epochs["weight_change_head"].notna().all()
    assert len(found.predictions) == 2 * 36
    assert found.verdict


def test_its_models_are_rebuilt_and_rate_speech(run: RunDirectory) -> None:
    members = find_members(run, "frozen")
    assert members.missing == ()
    for folder in members.folders:
        model = folder.read().model
        assert (model.unfreeze_top_layers, model.layer_norm) == (None, "mix")
    top = run.trial("top", 1, 0).model
    top.weights.touch()
    assert top.read().model.unfreeze_top_layers == 1
    rated = load_model(members.folders[0].path, "cpu")
    samples = np.random.default_rng(0).normal(0, 0.1, 16000)
    assert set(rated.predict(samples)) == {"valence", "arousal"}


def test_its_models_are_exported(run: RunDirectory, tmp_path: Path) -> None:
    assert predict_commands.export(run.path, tmp_path / "model", "frozen", None, False, screen()) == 0
    assert (tmp_path / "model" / "MLmodel").is_file()


def test_a_sweeps_searched_keys_are_renamed() -> None:
    old = json.loads((STORED / "run.json").read_text()) | {
        "condition": "unfrozen", "folds": [1], "seed": 0, "epochs": 2, "searched": ["train.lr", "train.warmup"],
        "settings": {"setting-01": {"values": {"train.warmup": 0.1, "model.unfreeze_layers": 2}}},
    }  # fmt: skip
    record = SweepRecord.from_json(json.dumps(old), "sweep.json")
    assert record.searched == ["train.lr", "train.warmup_ratio"]
    assert (record.conditions, record.epochs) == (["unfrozen"], {"unfrozen": 2})
    assert record.settings["setting-01"].condition == "unfrozen"
    assert record.settings["setting-01"].values == {"train.warmup_ratio": 0.1, "model.unfreeze_top_layers": 2}


@pytest.mark.parametrize("data", [None, 1, [], {"model": 3}, {"conditions": [1]}, {"tune": {"space": "x"}}])
def test_what_has_another_shape_is_left_to_the_check_of_the_record(data: object) -> None:
    expected = {"tune": {"search_space": "x"}} if isinstance(data, dict) and "tune" in data else data
    assert legacy.with_current_names(data, legacy.CONFIG) == expected


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, b"\xff"])
def test_damaged_files_are_one_sentence(text: str | bytes) -> None:
    for kind in (RunRecord, TrialResult):
        with pytest.raises(ResultsError, match="here: not a"):
            kind.from_json(text, "here")
