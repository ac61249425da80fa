"""`plan` as a user types it: one screen of output, and no files left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cvrunner.run.estimate import RAY_AND_REPORT_S
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
    assert data["trials"] == 10
    assert data["runs"][0]["start_s"] > RAY_AND_REPORT_S
    assert all(condition["probe"]["load_s"] > 0 for condition in data["conditions"])
    assert data["runs"][0]["makespan_s"] >= data["runs"][0]["lower_bound_s"] > 0
    for name in ("results", "cache", "mlruns", "mlflow.db"):
        assert not list(tmp_path.rglob(name)), name
    assert not list(temporary.glob("cvrunner-plan-*"))
