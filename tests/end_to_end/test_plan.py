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
    text, data = (
        cvrunner("plan", "--config", config, "--gpus", "8", *json_, folder=tmp_path, TMPDIR=str(temporary))
        for json_ in ([], ["--json"])
    )
    assert text.returncode == data.returncode == 0, text.stderr + data.stderr
    assert text.stdout.rstrip().splitlines()[-1].endswith("on 8 GPUs")
    assert "4 nodes: 32 GPUs" in text.stdout
    assert "Memory is host memory" in text.stdout.replace("\n", " ")
    assert "frozen: a few real updates on cpu" in text.stderr
    assert {c["probe"]["condition"] for c in json.loads(data.stdout)["conditions"]} == {"frozen", "unfrozen"}
    for name in ("results", "cache", "mlruns", "mlflow.db"):
        assert not list(tmp_path.rglob(name)), name
    assert not list(temporary.glob("cvrunner-plan-*"))


def test_a_wrong_setting_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    refused = cvrunner("plan", "--config", tiny_config(tmp_path), "--set", "train.epoch=3", folder=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: train.epoch: unknown key")
    assert refused.stdout == ""
