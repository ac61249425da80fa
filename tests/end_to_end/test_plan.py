"""`plan` as a user types it: an answer on one screen, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.programs import cvrunner, tiny_config

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(300)]


def test_it_measures_plans_and_leaves_nothing(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    planned = cvrunner("plan", "--config", config, "--gpus", "8", "--json", folder=tmp_path, TMPDIR=str(temporary))
    assert planned.returncode == 0, planned.stderr
    assert "unfrozen: a few real updates on cpu" in planned.stderr
    data = json.loads(planned.stdout)
    assert [c["probe"]["condition"] for c in data["conditions"]] == ["frozen", "unfrozen"]
    assert [run["resources"]["gpus"] for run in data["runs"]] == [8, 32]
    assert data["trials"] == len(data["runs"][0]["schedule"]["assignments"]) == 10
    assert data["runs"][0]["makespan_s"] >= data["runs"][0]["lower_bound_s"] > 0
    for name in ("results", "cache", "mlruns", "mlflow.db"):
        assert not list(tmp_path.rglob(name)), name
    assert not list(temporary.glob("cvrunner-plan-*"))


def test_a_wrong_setting_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    refused = cvrunner("plan", "--config", tiny_config(tmp_path), "--set", "train.epoch=3", folder=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: train.epoch: unknown key")
    assert refused.stdout == ""
