"""Run folders made of made-up numbers, for tests of what is made from a run. None of them was ever measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import yaml

from cvrunner.config.schema import Config, validate
from cvrunner.files import write_atomically
from cvrunner.records.results import EpochRecord, GroupRecord, ParameterCount, RunRecord, TrialResult, TrialState
from cvrunner.records.run_directory import RunDirectory, TrialDirectory, append_event, trial_name
from cvrunner.verdict.ccc import ccc_by_dimension

DIMENSIONS = ("valence", "arousal")
SCENARIOS = ("impro01", "impro02", "impro03", "script01_1", "script01_2", "script02_1")
TURNS = 12


def make_run(
    root: Path,
    name: str = "20260101-120000-made-up",
    *,
    conditions: Sequence[str] = ("frozen", "unfrozen"),
    folds: int = 5,
    seeds: Sequence[int] = (0,),
    epochs: int = 6,
    gain: float = 0.2,
    missing: Sequence[str] = (),
    synthetic: bool = True,
    started_at: str = "2026-01-01T12:00:00+00:00",
) -> RunDirectory:
    """A finished run; each condition errs less than the one before it by `gain`. Trials in `missing` have no result."""
    directory = RunDirectory(root / name)
    write_config(directory, made_up_config(conditions, seeds, epochs))
    names = [(c, f, s) for c in conditions for f in range(1, folds + 1) for s in seeds]
    trials = {trial_name(*n): _state(*n, failed=trial_name(*n) in missing) for n in names}
    directory.write_run(
        RunRecord(
            run=name,
            key="made-up-run-key",
            status="INCOMPLETE" if missing else "COMPLETE",
            started_at=started_at,
            command=["cvrunner", "all-folds"],
            host="nowhere",
            cvrunner_version="0.2.0",
            corpus="made up (numbers of no experiment, labels: header)",
            split_digest="5" * 64,
            corpus_digest="c" * 64,
            synthetic=synthetic,
            dimensions=list(DIMENSIONS),
            protocol="utterance",
            conditions=list(conditions),
            folds=list(range(1, folds + 1)),
            seeds=list(seeds),
            trials=trials,
        )
    )
    for condition, fold, seed in names:
        level = conditions.index(condition)
        write_trial(
            directory,
            condition,
            fold,
            seed,
            1.0 - gain * level,
            epochs,
            done=trial_name(condition, fold, seed) not in missing,
        )
    return directory


def numbers(directory: RunDirectory) -> dict[str, tuple[object, list[bytes]]]:
    """What must be bit-identical of a run: by trial, its result but for times and memory, predictions and weights."""
    found: dict[str, tuple[object, list[bytes]]] = {}
    for name, result in directory.results(directory.read_run()).items():
        values = result.model_dump(exclude={"key", "train_s", "total_s", "peak_memory_mib"})
        files = ("predictions.csv", "model/model.safetensors", "model/config.json", "model/README.md")
        found[name] = values, [(directory.path / name / file).read_bytes() for file in files]
    return found


def made_up_config(conditions: Sequence[str], seeds: Sequence[int], epochs: int) -> Config:
    return validate(
        {
            "train": {"seeds": list(seeds), "epochs": max(1, epochs)},
            "conditions": {
                name: {"model": {"freeze_speech_encoder": i == 0}, "train": {"lr": 1e-4 / (1 + i)}}
                for i, name in enumerate(conditions)
            },
            "reference": {
                "source": "made up for a test",
                "claims": [
                    {"name": "low", "condition": "frozen", "quantity": "ccc_valence", "low": 0.01},
                    {"name": "high", "condition": "frozen", "quantity": "ccc_avg", "low": 0.99},
                    {"name": "memory", "condition": "frozen", "quantity": "memory_gb", "low": 5.2},
                ],
            },
        },
        "made up",
    )


def write_config(directory: RunDirectory, config: Config) -> None:
    write_atomically(directory.config, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def write_trial(
    directory: RunDirectory,
    condition: str,
    fold: int,
    seed: int,
    error: float,
    epochs: int,
    done: bool = True,
) -> None:
    """Journal, and for a trial that is done predictions and result; larger `error`, worse predictions."""
    trial = directory.trial(condition, fold, seed)
    random = np.random.default_rng([fold, seed, round(1000 * error)])
    for epoch in range(1, epochs + 1):
        record = made_up_epoch(epoch, epochs, error, random)
        append_event(trial.journal, "epoch", **record.model_dump())
    if done:
        scores = _write_predictions(trial, condition, fold, seed, error, random)
        write_atomically(trial.result_file, _result(condition, fold, seed, epochs, scores).to_json())


def made_up_epoch(epoch: int, epochs: int, error: float, random: np.random.Generator) -> EpochRecord:
    reached = (1 - 0.8**epoch) * (1.1 - 0.5 * error)
    noise = random.normal(0, 0.02, 2)
    valence, arousal = float(0.6 * reached + noise[0]), float(0.9 * reached + noise[1])
    weights = [float(w) for w in np.linspace(1, 2, 5) / np.linspace(1, 2, 5).sum()]
    groups = {"head": GroupRecord(learning_rate=1e-4, gradient_norm=1.0, weight_change=0.05 * epoch)}
    if error < 1:
        groups["encoder"] = GroupRecord(learning_rate=1e-5, gradient_norm=0.4, weight_change=0.001 * epoch)
    return EpochRecord(
        epoch=epoch,
        epochs=epochs,
        updates=10 * epoch,
        train_loss=1 - reached / 2,
        validation_ccc={"valence": valence, "arousal": arousal, "avg": (valence + arousal) / 2},
        best=True,
        train_s=9.0 / error,
        validation_s=1.0,
        utterances_per_s=20.0 * error,
        padding_share=0.1,
        peak_memory_mib=600.0 / error,
        groups=groups,
        layer_weights={"valence": weights, "arousal": weights[::-1]},
    )


def _write_predictions(
    trial: TrialDirectory, condition: str, fold: int, seed: int, error: float, random: np.random.Generator
) -> dict[str, float | None]:
    rows = list(_rows(condition, fold, seed, error, random))
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(trial.predictions, file.getvalue())
    predicted = {d: [float(str(row[f"{d}_predicted"])) for row in rows] for d in DIMENSIONS}
    return ccc_by_dimension(predicted, {d: [float(str(row[f"{d}_true"])) for row in rows] for d in DIMENSIONS})


def _rows(
    condition: str, fold: int, seed: int, error: float, random: np.random.Generator
) -> Iterator[dict[str, object]]:
    # The truth is the fold's own, whatever the condition and the seed.
    truth = np.random.default_rng(fold)
    for scenario in SCENARIOS:
        for side in "FM":
            dialogue = f"Ses0{fold}{side}_{scenario}"
            mood, bias = truth.normal(0, 0.7, 2), random.normal(0, 0.3 * error, 2)
            for turn in range(TURNS):
                gender = "FM"[turn % 2]
                true = np.clip(3 + mood + truth.normal(0, 0.6, 2), 1, 5)
                predicted = 3 + 0.7 * (true - 3) + bias + random.normal(0, 0.6 * error, 2)
                row: dict[str, object] = {
                    "utterance": f"{dialogue}_{gender}{turn:03d}",
                    "speaker": f"0{fold}{gender}",
                    "gender": gender,
                    "session": f"Session{fold}",
                    "dialogue": dialogue,
                    "scenario": scenario,
                    "improvised": str(scenario.startswith("impro")).lower(),
                    "condition": condition,
                    "fold": fold,
                    "seed": seed,
                }
                for k, dimension in enumerate(DIMENSIONS):
                    row[f"{dimension}_true"] = f"{true[k]:.6f}"
                    row[f"{dimension}_predicted"] = f"{predicted[k]:.6f}"
                yield row


def _result(condition: str, fold: int, seed: int, epochs: int, scores: dict[str, float | None]) -> TrialResult:
    frozen = condition == "frozen"
    weights = [0.1, 0.15, 0.2, 0.25, 0.3]
    return TrialResult(
        key=f"key-{condition}-{fold}-{seed}",
        condition=condition,
        fold=fold,
        seed=seed,
        best_epoch=epochs,
        epochs_run=epochs,
        validation_ccc=scores,
        test_ccc=scores,
        collapsed=[],
        train_utterances=432,
        validation_utterances=144,
        test_utterances=144,
        parameters=ParameterCount(total=1000, trainable=400, groups={"head": 400}),
        weight_change={"head": 0.3} if frozen else {"head": 0.3, "encoder": 0.01},
        layer_weights={"valence": weights, "arousal": weights[::-1]},
        labels_outside_scale=0,
        split_digest="5" * 64,
        corpus_digest="c" * 64,
        encoder="made-up-wavlm",
        encoder_digest="e" * 64,
        device="cpu",
        precision="float32",
        peak_memory_mib=600.0 if frozen else 900.0,
        train_s=10.0 * epochs,
        total_s=11.0 * epochs,
        versions={},
    )


def _state(condition: str, fold: int, seed: int, failed: bool) -> TrialState:
    return TrialState(
        key=f"key-{condition}-{fold}-{seed}",
        condition=condition,
        fold=fold,
        seed=seed,
        status="FAILED" if failed else "DONE",
        attempts=2 if failed else 1,
        failures={"worker_died": 2} if failed else {},
        error="NonFiniteError: made up" if failed else None,
    )
