"""Files of a finished trial: predictions, model and, when both are complete, the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.torch import save
from torch import Tensor

from cvrunner.data.checks import labels_outside
from cvrunner.data.utterance import SAMPLE_RATE_HZ
from cvrunner.encoders.files import stated_licence
from cvrunner.files import write_atomically, write_folder_atomically
from cvrunner.records.model_folder import ModelDescription, ModelFolder, model_card
from cvrunner.records.results import EpochRecord, ParameterCount, TrialResult
from cvrunner.records.run_directory import TrialDirectory, append_event, read_events
from cvrunner.training.checkpoint import LoopState
from cvrunner.training.freezing import barely_moved
from cvrunner.training.trial import Trial
from cvrunner.verdict.ccc import ccc_by_dimension, is_collapsed
from cvrunner.verdict.predictions import write_predictions

Predictions = Mapping[str, npt.NDArray[np.float64]]


def write_outcome(
    directory: TrialDirectory,
    trial: Trial,
    state: LoopState,
    truth: Predictions,
    predictions: Predictions,
    weights: Mapping[str, Tensor],
    *,
    parameters: ParameterCount,
    device: str,
    precision: str,
    peak_memory_mib: float,
    total_s: float,
) -> TrialResult:
    """Write predictions, model and result, in this order, so that a result implies complete files.

    `truth` and `predictions` of the test set are on the rating scale, by dimension.
    """
    fold, config = trial.fold, trial.config.corpus
    epochs = {line["epoch"]: line for line in read_events(directory.journal, "epoch")}
    best, last = (
        EpochRecord.from_json(json.dumps(epochs[number]), str(directory.journal))
        for number in (state.best_epoch, state.epoch - 1)
    )
    trial_id = (trial.condition, fold.number, trial.seed)
    packages = ["torch", "transformers", "numpy"]
    if trial.config.adaptation.lora is not None:
        packages.append("peft")
    sha256 = write_predictions(directory.predictions, fold.test, trial_id, truth, predictions)
    result = TrialResult(
        key=trial.key,
        condition=trial.condition,
        fold=fold.number,
        seed=trial.seed,
        best_epoch=state.best_epoch,
        epochs_run=state.epoch - 1,
        validation_ccc=best.validation_ccc,
        test_ccc=ccc_by_dimension(predictions, truth),
        collapsed=[d for d in config.dimensions if is_collapsed(predictions[d], truth[d])],
        train_utterances=len(fold.train),
        validation_utterances=len(fold.validation),
        test_utterances=len(fold.test),
        parameters=parameters,
        weight_change={name: group.weight_change for name, group in last.groups.items()},
        weight_change_best={name: group.weight_change for name, group in best.groups.items()},
        # The tested epoch comes second, so that its value is the one that is kept.
        barely_moved={
            name: group.implied_change
            for record in (last, best)
            for name, group in record.groups.items()
            # With gradual unfreezing, the lower layers may not have begun to train by the best epoch.
            if group.implied_change is not None
            and (group.implied_change > 0 or not trial.config.adaptation.layers_per_epoch)
            and barely_moved(group.weight_change, group.implied_change)
        },
        layer_weights=best.layer_weights,
        batch_size=state.batch_size,
        memory={name: list(formula) for name, formula in state.memory.items()},
        labels_outside_scale=sum(labels_outside(fold.utterances, d, config.scale) for d in config.dimensions),
        split_digest=trial.split_digest,
        corpus_digest=trial.corpus_digest,
        encoder=trial.encoder.name,
        encoder_digest=trial.encoder.digest,
        encoder_tuned=trial.encoder.tuned,
        device=device,
        precision=precision,
        peak_memory_mib=peak_memory_mib,
        train_s=state.train_s,
        total_s=total_s,
        versions={name: version(name) for name in packages},
        predictions_sha256=sha256,
    )
    write_model(directory.model, trial, result, weights)
    write_atomically(directory.result_file, result.to_json())
    append_event(directory.journal, "result", test_ccc=result.test_ccc, best_epoch=result.best_epoch)
    return result


def write_model(folder: ModelFolder, trial: Trial, result: TrialResult, weights: Mapping[str, Tensor]) -> None:
    """Write the model's folder, completely or not at all."""
    config, licence = trial.config.corpus, stated_licence(trial.encoder)
    # Everything that is needed to rebuild the model, except for the weights.
    description = ModelDescription(
        model=trial.config.model,
        encoder_revision=trial.encoder.revision,
        encoder_digest=trial.encoder.digest,
        encoder_normalize=trial.encoder.settings.normalize,
        precision=trial.config.train.precision,
        dimensions=list(config.dimensions),
        scale=config.scale,
        sample_rate_hz=SAMPLE_RATE_HZ,
        condition=trial.condition,
        fold=trial.fold.number,
        seed=trial.seed,
        trial_key=trial.key,
        synthetic=config.format == "demo",
    )

    def fill(path: Path) -> None:
        new = ModelFolder(path)
        tensors = {n: p.detach().contiguous() for n, p in weights.items()}
        new.weights.write_bytes(save(tensors, metadata={"format": "pt"}))
        new.config.write_text(description.to_json())
        new.card.write_text(model_card(description, result, config.format, trial.config.label_variant, licence))

    # An attempt that was killed before its result was written may have left one.
    shutil.rmtree(folder.path, ignore_errors=True)
    write_folder_atomically(folder.path, fill)
