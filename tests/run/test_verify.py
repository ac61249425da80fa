"""`verify`: one fold in the run of `all-folds`, its validation CCC compared with the target; claims are claims."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from cvrunner.config.reading import load_config
from cvrunner.errors import TARGET_MISSED, ConfigError, TrialError
from cvrunner.orchestration import ray_executor
from cvrunner.orchestration.machine import Gpu, gpu_lines
from cvrunner.records.results import TrialResult
from cvrunner.run.verify import missed, verify
from cvrunner.text import format_score
from cvrunner.verdict.ledger import read_ledger
from tests.run.test_commands import Inline, all_folds, config

__all__ = ["config"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "RayExecutor", Inline)


def run(config: Path, *overrides: str, test: bool = False) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    code = verify(config, overrides, False, console, test)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return code, text


def folder(config: Path) -> Path:
    """The folder of the verified trial."""
    (path,) = (config.parent / "results").glob("tiny-*/unfrozen/fold-1/seed-0")
    return path


def test_one_fold_of_unfrozen_is_trained_without_scoring_its_test_session(config: Path) -> None:
    code, text = run(config)
    assert code == 0
    assert "1 trials, 0 done, 1 to train: unfrozen/fold-1/seed-0" in text
    assert "no target is set (verify.target)" in text
    assert " test " not in text[text.index("quantity") :]
    assert not (folder(config) / "result.json").exists()
    assert not (folder(config) / "predictions.csv").exists()
    assert read_ledger(config.parent / "results") == []
    assert "nothing to train" in run(config)[1]


def test_all_folds_scores_the_verified_fold_without_training_it_again(config: Path) -> None:
    run(config)
    journal = (folder(config) / "journal.jsonl").read_text()
    assert all_folds(config)[0] == 0
    added = (folder(config) / "journal.jsonl").read_text().removeprefix(journal)
    assert '"event": "result"' in added
    assert '"event": "epoch"' not in added
    (look,) = read_ledger(config.parent / "results")
    assert len(look.scores) == 6


def test_the_result_is_that_of_a_fold_that_was_never_verified(config: Path) -> None:
    run(config)
    all_folds(config)
    verified = (folder(config) / "predictions.csv").read_bytes()
    shutil.rmtree(config.parent / "results")
    all_folds(config)
    assert (folder(config) / "predictions.csv").read_bytes() == verified


def test_with_test_the_session_is_scored_and_the_look_is_counted_once(config: Path) -> None:
    validation = run(config)[1]
    code, text = run(config, "verify.target.ccc_avg=-1", test=True)
    assert code == 0
    assert "one look at the test session; this corpus had 0 looks before" in text
    (look,) = read_ledger(config.parent / "results")
    assert list(look.scores) == ["unfrozen/fold-1/seed-0"]
    result = TrialResult.from_json((folder(config) / "result.json").read_bytes(), "test")
    row = next(line for line in text.splitlines() if line.split()[:1] == ["CCC-Avg"])
    assert row.split()[1:3] == [format_score(result.validation_ccc["avg"]), format_score(result.test_ccc["avg"])]
    assert row.split()[1] in validation
    assert "nothing to train" in run(config, test=True)[1]
    assert len(read_ledger(config.parent / "results")) == 1
    # Once the fold is tested, the quick check still shows and judges validation alone.
    assert format_score(result.test_ccc["avg"]) not in run(config)[1]


def test_the_target_decides_the_exit_code_and_no_training_is_repeated_for_it(config: Path) -> None:
    assert run(config, "verify.target.ccc_valence=-1")[0] == 0
    code, text = run(config, "verify.target={ccc_valence: 0.99, ccc_arousal: -1}")
    assert code == TARGET_MISSED == 3
    assert "nothing to train" in text
    assert "target missed on validation: CCC-V" in text
    assert "is below 0.99, CCC-A" in text


def test_claims_stand_beside_the_result_with_their_source(config: Path) -> None:
    config.write_text(
        config.read_text()
        + "reference: {source: somebody's record, claims: "
        + "[{name: v1, condition: frozen, quantity: ccc_valence, low: 0.5896}]}\n"
    )
    text = run(config, "verify.condition=frozen")[1]
    assert "frozen, fold 1: epoch" in text
    assert "0.5896 (frozen, v1)" in text
    assert "Claimed by somebody's record; not measured here" in text


def test_a_trial_that_fails_is_neither_met_nor_missed(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inline, "broken", ("unfrozen/fold-1/seed-0",))
    with pytest.raises(TrialError, match="the loss went away"):
        run(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("verify.condition=thawed", "verify.condition thawed: unknown condition; choose one of frozen, unfrozen"),
        ("verify.fold=4", "verify.fold 4: there are folds 1 to 3"),
        ("verify.target.ccc_dominance=0.5", "verify.target.ccc_dominance: dominance is not predicted"),
    ],
)
def test_what_cannot_be_checked_is_refused_before_training(config: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(config, override)
    assert not (config.parent / "results").exists()


def test_verify_and_tune_settings_change_no_trial(config: Path) -> None:
    changed = load_config(config, ["verify.fold=2", "verify.target.ccc_avg=0.1", "tune.num_samples=3"])
    assert changed.numerics == load_config(config).numerics


def test_an_undefined_score_misses_its_target() -> None:
    assert missed({"valence": 0.6, "avg": 0.1}, {"valence": None, "arousal": 0.1, "avg": 0.3}) == ["valence"]


def test_the_gpus_are_shown_with_who_else_uses_them() -> None:
    gpus = [
        Gpu("RTX 4090", 2048.0, 24564.0, 97, {71: 1024.0, 72: None}, "GPU-a"),
        Gpu("RTX 4090", 3.0, 24564.0, None, {}, "GPU-b"),
    ]
    assert gpu_lines(gpus, {}) == [
        "GPU 0: RTX 4090, 2,048 of 24,564 MiB used, 97 % busy, "
        "used by others (process 71: 1,024 MiB, process 72: unknown)",
        "GPU 1: RTX 4090, 3 of 24,564 MiB used",
    ]
    assert gpu_lines(gpus, {"CUDA_VISIBLE_DEVICES": "0"})[1].endswith("MiB used, hidden by CUDA_VISIBLE_DEVICES")
    assert gpu_lines([], {}) == ["no GPU on this machine"]
