"""The two ways that people train now, with cvrunner's head, optimizer settings, loss and effective batch.

`old_script`: as the script that cvrunner replaces: each utterance alone through all of transformers' encoder, again
in every epoch and in both conditions; the CCC of four utterances, averaged over the effective batch.
`trainer`: Hugging Face's Trainer over padded waveforms with attention mask, batches grouped by length.

Both are helped where it costs nothing of their nature: waveforms, or Whisper's spectrograms, are in memory, a frozen
encoder runs in evaluation mode without a graph, layer drop and SpecAugment are off as in cvrunner, nothing is saved to
disk. Both validate after every epoch and test once, as cvrunner does. Encoder and Mamba-2 are computed as transformers
does it. Whisper's encoder has windows of 30 s, or, as transformers does not do it, no padding beyond that of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments, Wav2Vec2FeatureExtractor
from transformers.utils import logging

from cvrunner.data.batches import evaluation_update
from cvrunner.data.utterance import Utterance
from cvrunner.encoders.encoder import Encoded
from cvrunner.model import mamba
from cvrunner.training.accumulation import ccc_loss
from cvrunner.verdict.ccc import ccc_by_dimension
from tests.benchmarks.material import Material
from tests.benchmarks.workload import Workload, of_all_lengths

Answer = dict[str, Any]
RawInputs = Mapping[str, tuple[Tensor, Tensor]]
"""What the encoder is given, and its mask, by utterance."""
OLD_MICRO_BATCH = 4
SAME_LOSS = 2e-3
"""Largest difference between losses that are the same but for rounding."""


@torch.no_grad()
def first_losses(workload: Workload) -> Answer:
    """The loss of the same utterances from the same weights, in evaluation mode: cvrunner's, and both rivals'.

    Raises ValueError if a rival's is another: it would be compared while it computes something else. Trainer's is
    compared unless padding changes it: the group norm in WavLM-base's front-end is over the padded length.
    """
    material = Material(workload)
    material.model.eval()
    chosen = of_all_lengths(material.trial.fold.train, workload.batch_size)
    update = evaluation_update(chosen, workload.batch_size, by_dialogue=False)
    batch = next(material.inputs.batches(update))
    members = [update.utterances[i] for i in batch.positions]
    labels = material.labels(members)
    z = material.model.encode(batch.features, batch.lengths)
    ours = ccc_loss(material.model.predict(z, [1] * len(members)), labels)
    old = ccc_loss(_old_forward(material, {u.id: material.raw_input(u) for u in members}, members), labels)
    padded = _ForTrainer(material)(**_collate(_Inputs(material, members).rows))["loss"]
    losses = {"cvrunner": ours.item(), "old_script": old.item(), "trainer": padded.item()}
    norm = getattr(material.encoder.backbone.config, "feat_extract_norm", None)
    compared = [loss for name, loss in losses.items() if name != "trainer" or norm != "group"]
    # cvrunner's features are stored in float16.
    if max(compared) - min(compared) > SAME_LOSS:
        raise ValueError(f"the losses of the same utterances differ by more than {SAME_LOSS}: {losses}")
    return losses


def _material(workload: Workload) -> Material:
    """With transformers' own Mamba-2, unless the workload says otherwise: this process is the rival's alone."""
    if not workload.fast_head:
        mamba.LONGEST = 0
    return Material(workload)


def _answer(material: Material, train_s: list[float], validation_s: list[float], began: float) -> Answer:
    """Seconds of each epoch's training and validation, the utterances of both, and seconds of everything."""
    fold = material.trial.fold
    counts = {"trained": len(fold.train), "validated": len(fold.validation)}
    return {"train_s": train_s, "validation_s": validation_s, **counts, "total_s": time.perf_counter() - began}


# --- the old script ---------------------------------------------------------------------------------------------------


def old_script(workload: Workload) -> Answer:
    """Seconds of each epoch's training and validation."""
    began = time.perf_counter()
    material = _material(workload)
    fold = material.trial.fold
    inputs = {u.id: material.raw_input(u) for u in fold.utterances}
    effective = workload.batch_size * workload.accumulation_steps
    train_s, validation_s = [], []
    for epoch in range(workload.epochs):
        start = time.perf_counter()
        order = np.random.default_rng(epoch).permutation(len(fold.train))
        material.model.train()
        for number, first in enumerate(range(0, len(order), effective)):
            members = [fold.train[i] for i in order[first : first + effective]]
            _old_update(material, inputs, members, epoch * material.updates_per_epoch(effective) + number)
        middle = time.perf_counter()
        _score(material, fold.validation, _old_predictions(material, inputs, fold.validation))
        train_s.append(middle - start)
        validation_s.append(time.perf_counter() - middle)
    _score(material, fold.test, _old_predictions(material, inputs, fold.test))
    return _answer(material, train_s, validation_s, began)


def _old_update(material: Material, inputs: RawInputs, members: Sequence[Utterance], number: int) -> None:
    material.optimizer.zero_grad()
    micro_batches = [members[i : i + OLD_MICRO_BATCH] for i in range(0, len(members), OLD_MICRO_BATCH)]
    for micro in micro_batches:
        loss = ccc_loss(_old_forward(material, inputs, micro), material.labels(micro))
        (loss / len(micro_batches)).backward()
    config = material.trial.config.train
    nn.utils.clip_grad_norm_(material.trained, config.grad_clip)
    material.schedule.set_learning_rates(material.optimizer, number, material.updates_per_epoch(config.effective_batch))
    material.optimizer.step()


def _old_forward(material: Material, inputs: RawInputs, members: Sequence[Utterance]) -> Tensor:
    """`[B, K]`: every utterance by itself through the encoder, all together through the head."""
    alone = ([part[None] for part in inputs[u.id]] for u in members)
    encoded = zip(*(material.raw_states(values, mask) for values, mask in alone), strict=True)
    z = material.model.head.encode(Encoded(*map(torch.cat, encoded)))
    return material.model.predict(z, [1] * len(members))


@torch.no_grad()
def _old_predictions(material: Material, inputs: RawInputs, members: Sequence[Utterance]) -> Tensor:
    material.model.eval()
    batches = [members[i : i + OLD_MICRO_BATCH] for i in range(0, len(members), OLD_MICRO_BATCH)]
    return torch.cat([_old_forward(material, inputs, batch) for batch in batches])


# --- Hugging Face Trainer ---------------------------------------------------------------------------------------------


def trainer(workload: Workload) -> Answer:
    """Seconds of each epoch's training and validation."""
    began = time.perf_counter()
    logging.set_verbosity_error()
    material = _material(workload)
    fold = material.trial.fold
    clock = _Clock()
    made = Trainer(
        model=_ForTrainer(material),
        args=_arguments(workload, material),
        train_dataset=_Inputs(material, fold.train),
        eval_dataset=_Inputs(material, fold.validation),
        data_collator=_collate,
        processing_class=Wav2Vec2FeatureExtractor(),
        optimizers=(_with_peak_rates(material), _schedule(material)),
        compute_metrics=lambda found: _trainer_score(material, found),
        callbacks=[clock],
    )
    made.train()
    made.predict(_Inputs(material, fold.test))
    return _answer(material, clock.train_s, clock.validation_s, began)


class _ForTrainer(nn.Module):
    """cvrunner's model behind the interface that Trainer wants, from the encoder's input on."""

    def __init__(self, material: Material) -> None:
        super().__init__()
        self.model = material.model
        self.raw_states = material.raw_states

    def forward(self, input_values: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        z = self.model.head.encode(self.raw_states(input_values, attention_mask))
        logits = self.model.predict(z, [1] * len(labels))
        return {"loss": ccc_loss(logits, labels), "logits": logits}


class _Inputs(torch.utils.data.Dataset[dict[str, Any]]):
    """Utterances with what the encoder is given of them, in memory."""

    def __init__(self, material: Material, utterances: Sequence[Utterance]) -> None:
        self.rows = []
        for utterance, label in zip(utterances, material.labels(utterances), strict=True):
            values, mask = material.raw_input(utterance)
            self.rows.append({"input_values": values, "attention_mask": mask, "labels": label})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class _Clock(TrainerCallback):
    """When each epoch's training and validation end."""

    def __init__(self) -> None:
        self.train_s: list[float] = []
        self.validation_s: list[float] = []
        self.mark = 0.0

    def _lap(self, laps: list[float]) -> None:
        now = time.perf_counter()
        laps.append(now - self.mark)
        self.mark = now

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark = time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._lap(self.train_s)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._lap(self.validation_s)


def _arguments(workload: Workload, material: Material) -> TrainingArguments:
    return TrainingArguments(
        output_dir=f"{workload.folder}/trainer",
        num_train_epochs=workload.epochs,
        per_device_train_batch_size=workload.batch_size,
        per_device_eval_batch_size=workload.batch_size,
        gradient_accumulation_steps=workload.accumulation_steps,
        max_grad_norm=material.trial.config.train.grad_clip,
        train_sampling_strategy="group_by_length",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )


def _collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Right-padded inputs `[B, T, ...]` with their mask `[B, T]`."""
    padded = {
        name: nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True)
        for name in ("input_values", "attention_mask")
    }
    return {**padded, "labels": torch.stack([row["labels"] for row in rows])}


def _with_peak_rates(material: Material) -> torch.optim.Optimizer:
    """cvrunner's optimizer with each group's highest learning rate, which a LambdaLR then scales."""
    for group in material.optimizer.param_groups:
        group["lr"] = group["scale"] * material.schedule.rule_of[group["group"]].learning_rate
    return material.optimizer


def _schedule(material: Material) -> LambdaLR:
    """cvrunner's learning rates, update by update."""
    per_epoch = material.updates_per_epoch(material.trial.config.train.effective_batch)

    def share(group: str) -> Any:
        peak = material.schedule.rule_of[group].learning_rate
        return lambda update: material.schedule.learning_rate(group, update, per_epoch) / peak

    return LambdaLR(material.optimizer, [share(g["group"]) for g in material.optimizer.param_groups])


def _trainer_score(material: Material, found: EvalPrediction) -> dict[str, float]:
    low, high = material.trial.config.corpus.scale
    dimensions = material.trial.config.corpus.dimensions
    predicted, true = (
        {d: low + (high - low) * np.asarray(values, dtype=np.float64)[:, k] for k, d in enumerate(dimensions)}
        for values in (found.predictions, found.label_ids)
    )
    return {name: value for name, value in ccc_by_dimension(predicted, true).items() if value is not None}


def _score(material: Material, utterances: Sequence[Utterance], predictions: Tensor) -> None:
    """The CCC, computed as cvrunner does, since all rivals judge each epoch by it."""
    dimensions = material.trial.config.corpus.dimensions
    truth = {d: np.array([u.label(d) for u in utterances], dtype=np.float64) for d in dimensions}
    ccc_by_dimension({d: predictions[:, k].double().numpy() for k, d in enumerate(dimensions)}, truth)
