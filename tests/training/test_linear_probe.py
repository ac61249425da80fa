"""The linear probe as a trial: its features, its files, its key."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cvrunner.errors import EncoderError, Stopped
from cvrunner.orchestration.trials import plan_probes
from cvrunner.records.results import FeatureProgress, ProbeResult
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.training import linear_probe, ridge
from cvrunner.training.fold_trainer import TrialContext
from cvrunner.training.inputs import hidden_states_and_statistics
from cvrunner.training.linear_probe import fit_fold
from cvrunner.training.ridge import PENALTIES
from cvrunner.training.trial import PACKAGE, PROBE_HASHED, LinearProbe, code_digest
from cvrunner.verdict.ccc import ccc
from tests.tiny_encoders import tiny_encoder
from tests.trials import pick, tiny_trials, train


def tiny_probe(folder: Path, **sections: Any) -> LinearProbe:
    trials = tiny_trials(folder, **sections)
    return plan_probes(trials, trials[-1].condition)[0]


def fit(probe: LinearProbe, folder: Path, name: str = "run", **place: Any) -> list[Any]:
    directory = TrialDirectory(folder / name / probe.name)
    return list(fit_fold(probe, TrialContext(directory, folder / "cache", torch.device("cpu"), **place)))


def outcome(probe: LinearProbe, folder: Path, name: str) -> tuple[dict[str, Any], bytes]:
    """Everything that must be bit-identical."""
    files = TrialDirectory(folder / name / probe.name)
    result = json.loads(files.result_file.read_bytes())
    del result["total_s"]
    return result, files.predictions.read_bytes()


# --- the features -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, (1,)])
@pytest.mark.parametrize("stable", [False, True])
def test_statistics_are_of_all_layers_at_the_encoders_frame_rate_and_leave_the_hidden_states_alone(
    stable: bool, layers: tuple[int, ...] | None
) -> None:
    encoder = tiny_encoder(stable, layers=layers, frame_rate_hz=12.5).eval()
    conv = [encoder.conv_features(torch.randn(n)).half().numpy() for n in (16000, 400, 11111)]
    cpu = torch.device("cpu")
    found = hidden_states_and_statistics(encoder, conv, cpu)
    packed = torch.from_numpy(np.concatenate(conv)).float()
    with torch.no_grad():
        encoded = encoder(packed, torch.tensor([len(one) for one in conv]))
    assert np.array_equal(np.concatenate([hidden for hidden, _ in found]), encoded.states.half().numpy())
    stored = np.concatenate([statistics[:, encoder.layers] for _, statistics in found])
    assert np.array_equal(stored, encoded.statistics.numpy())
    everything = tiny_encoder(stable, frame_rate_hz=50.0).eval()
    for (_, statistics), one in zip(found, conv, strict=True):
        with torch.no_grad():
            states = everything(torch.from_numpy(one).float(), torch.tensor([len(one)]))[0].double().numpy()
        assert statistics.shape == (1, 3, 2, 16)
        assert statistics.dtype == np.float32
        np.testing.assert_allclose(statistics[0, :, 0], states.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(statistics[0, :, 1], states.std(axis=0), atol=1e-5)


@pytest.mark.parametrize("layers", ["all", [1]])
def test_a_frozen_trial_leaves_the_same_statistics_as_the_probe_makes_itself(tmp_path: Path, layers: Any) -> None:
    probe = tiny_probe(tmp_path, model={"layers": layers})
    alone = fit(probe, tmp_path / "alone")
    assert [event.kind for event in alone if isinstance(event, FeatureProgress)][-1] == "statistics"
    train(pick(tiny_trials(tmp_path, model={"layers": layers}), "frozen"), tmp_path)
    after = fit(probe, tmp_path)
    assert [type(event) for event in after] == [ProbeResult]
    assert outcome(probe, tmp_path / "alone", "run") == outcome(probe, tmp_path, "run")
    written = [next((folder / "cache" / "statistics").rglob("*.npy")) for folder in (tmp_path, tmp_path / "alone")]
    assert written[0].read_bytes() == written[1].read_bytes()


def test_frozen_features_that_an_earlier_version_wrote_are_used_and_not_written_again(tmp_path: Path) -> None:
    trial = pick(tiny_trials(tmp_path), "frozen")
    train(trial, tmp_path)
    (hidden,) = (tmp_path / "cache" / "hidden").rglob("*.npy")
    written = hidden.stat().st_mtime_ns
    for path in (tmp_path / "cache" / "statistics").rglob("*.npy"):
        path.unlink()
    assert isinstance(fit(tiny_probe(tmp_path), tmp_path)[-1], ProbeResult)
    assert hidden.stat().st_mtime_ns == written


def test_the_probe_does_not_depend_on_head_layers_frame_rate_or_conditions(tmp_path: Path) -> None:
    one = tiny_probe(tmp_path)
    conditions = {"full": {"model": {"freeze_speech_encoder": False}}}
    settings = {"model": {"layers": [2], "frame_rate_hz": 25.0, "width": 32}, "train": {"lr": 0.01, "seeds": [3]}}
    other = tiny_probe(tmp_path, conditions=conditions, **settings)
    assert one.key == other.key
    fit(one, tmp_path, "one")
    assert isinstance(fit(other, tmp_path / "elsewhere", "run")[-1], ProbeResult)
    assert outcome(one, tmp_path, "one") == outcome(other, tmp_path / "elsewhere", "run")


# --- one fold ---------------------------------------------------------------------------------------------------------


def test_a_result_is_not_made_again_and_a_result_of_other_code_or_data_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = tiny_probe(tmp_path)
    first = fit(probe, tmp_path)[-1]
    with monkeypatch.context() as patched:
        patched.setattr(linear_probe, "fit", lambda *_: pytest.fail("fitted again"))
        assert fit(probe, tmp_path) == [first]
    other = replace(probe, corpus_digest="another")
    assert other.key != probe.key
    assert fit(other, tmp_path)[-1].key == other.key


def test_the_result_has_the_scores_of_the_predictions_and_all_that_was_chosen(tmp_path: Path) -> None:
    probe = tiny_probe(tmp_path)
    result = fit(probe, tmp_path)[-1]
    rows = np.genfromtxt(
        TrialDirectory(tmp_path / "run" / probe.name).predictions, delimiter=",", names=True, dtype=None, encoding=None
    )
    assert list(rows["utterance"]) == [u.id for u in probe.fold.test]
    assert set(rows["condition"]) == {"linear_probe"}
    for dimension in ("valence", "arousal"):
        score = ccc(rows[f"{dimension}_predicted"], rows[f"{dimension}_true"])
        assert result.test_ccc[dimension] == pytest.approx(score)
        assert result.penalty[dimension] in PENALTIES
    assert (result.layers, result.features) == (3, 3 * 2 * 16)
    assert result.train_utterances == len(probe.fold.train)


def test_of_a_large_corpus_evenly_spaced_utterances_are_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = tiny_probe(tmp_path)
    monkeypatch.setattr(ridge, "MOST_TRAINING", 7)
    assert fit(probe, tmp_path)[-1].train_utterances == 7


def test_features_that_are_not_finite_are_named(tmp_path: Path) -> None:
    probe = tiny_probe(tmp_path)
    fit(probe, tmp_path, "first")
    (shard,) = (tmp_path / "cache" / "statistics").rglob("*.npy")
    stored = np.load(shard)
    stored[:, 1, 0, 3] = np.inf
    np.save(shard, stored)
    with pytest.raises(EncoderError, match=rf"\(statistics\) of utterance {probe.fold.train[0].id} are not finite"):
        fit(probe, tmp_path)


def test_told_to_stop_it_leaves_nothing(tmp_path: Path) -> None:
    probe = tiny_probe(tmp_path)
    with pytest.raises(Stopped):
        fit(probe, tmp_path, should_stop=lambda: True)
    assert not (tmp_path / "run" / probe.name).exists()


def fit_and_die(probe: LinearProbe, folder: Path, name: str, at: int) -> None:
    """In a process of its own: fit, and be killed at the `at`-th fsync."""
    count, fsync = iter(range(1, 1000)), os.fsync

    def counting(descriptor: int) -> None:
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = counting
    fit(probe, folder, name)


@pytest.mark.suites("ci", "all")
def test_killed_wherever_something_becomes_durable_it_ends_bit_identical(tmp_path: Path) -> None:
    probe = tiny_probe(tmp_path)
    fit(probe, tmp_path, "whole")
    whole, points = outcome(probe, tmp_path, "whole"), 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trials"])
    for at in range(1, 20):
        name = f"killed-{at}"
        process = context.Process(target=fit_and_die, args=(probe, tmp_path, name, at))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        points += 1
        files = TrialDirectory(tmp_path / name / probe.name)
        assert files.read_result(ProbeResult) in (None, fit(probe, tmp_path, name)[-1])
        assert outcome(probe, tmp_path, name) == whole
        assert set(files.path.iterdir()) == {files.predictions, files.result_file}
    assert points >= 4  # two files, each with the name of its folder


# --- the key ----------------------------------------------------------------------------------------------------------


def test_its_code_is_in_its_key_and_not_in_that_of_trials(tmp_path: Path) -> None:
    copy = shutil.copytree(
        PACKAGE, tmp_path / "cvrunner", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
    )
    before = code_digest(copy), code_digest(copy, PROBE_HASHED, ())
    file = copy / "training" / "linear_probe.py"
    file.write_text(file.read_text().replace("OPERATIONS_PER_S = 4e10", "OPERATIONS_PER_S = 5e10"))
    code_digest.cache_clear()
    after = code_digest(copy), code_digest(copy, PROBE_HASHED, ())
    assert before[0] == after[0]
    assert before[1] != after[1]
