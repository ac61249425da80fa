"""The limit: what the arithmetic alone takes, over ready, length-sorted batches held in memory.

cvrunner's own model and optimizer and nothing else: no reading, no shuffling, no clipping, no validation, no records.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cvrunner.data.batches import evaluation_update
from cvrunner.data.utterance import Utterance
from cvrunner.training.accumulation import ccc_loss
from cvrunner.training.inputs import pack
from tests.benchmarks.material import Material
from tests.benchmarks.workload import Workload

Answer = dict[str, Any]
Ready = tuple[Tensor, Tensor, Tensor]
"""Features as the model takes them, lengths `[B]`, labels `[B, K]`."""


def epochs(workload: Workload) -> Answer:
    """Seconds of forward and backward over the training utterances, epoch by epoch."""
    material = Material(workload)
    batches = _ready(material, material.trial.fold.train, workload.batch_size * workload.accumulation_steps)
    material.model.train()
    train_s = []
    for epoch in range(workload.epochs):
        start = time.perf_counter()
        for number, (features, lengths, labels) in enumerate(batches):
            material.optimizer.zero_grad()
            z = material.model.encode(features, lengths)
            ccc_loss(material.model.predict(z, [1] * len(labels)), labels).backward()
            update = epoch * len(batches) + number
            material.schedule.set_learning_rates(material.optimizer, update, len(batches))
            material.optimizer.step()
        train_s.append(time.perf_counter() - start)
    return {"train_s": train_s}


@torch.no_grad()
def encoder_pass(workload: Workload) -> Answer:
    """Seconds of one pass over the corpus (or a part): front-end utterance by utterance, then length-sorted batches."""
    material = Material(workload.but(condition="frozen"))
    encoder = material.encoder.eval()
    utterances = _by_length(material.trial.fold.utterances)[workload.part :: workload.parts]
    waveforms = [material.waveform(u) for u in utterances]
    material.encoder.conv_features(waveforms[-1])
    start = time.perf_counter()
    conv = [encoder.conv_features(waveform).half().numpy() for waveform in waveforms]
    middle = time.perf_counter()
    for first in range(0, len(conv), workload.batch_size):
        members = conv[first : first + workload.batch_size]
        encoder(pack(members).float(), torch.tensor([len(array) for array in members]))
    end = time.perf_counter()
    return {"front_end_s": middle - start, "transformer_s": end - middle, "pass_s": end - start}


def _ready(material: Material, utterances: Sequence[Utterance], size: int) -> list[Ready]:
    ordered = _by_length(utterances)
    batches = []
    for first in range(0, len(ordered), size):
        members = ordered[first : first + size]
        update = evaluation_update(members, size, by_dialogue=False)
        batch = next(material.inputs.batches(update))
        batches.append(
            (batch.features, batch.lengths, material.labels([update.utterances[i] for i in update.micro_batches[0]]))
        )
    return batches


def _by_length(utterances: Sequence[Utterance]) -> list[Utterance]:
    return sorted(utterances, key=lambda u: (u.samples, u.id))
