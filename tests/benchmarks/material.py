"""What all rivals are given alike: cvrunner's model and optimizer settings, waveforms in memory, labels.

`B` utterances, `T` samples at 16 kHz, `F` frames of 20 ms, `S` frames of all utterances one after the other at the
model's frame rate, `L` layers, `D` width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cvrunner.data.utterance import Utterance, read_audio
from cvrunner.encoders.encoder import Encoded
from cvrunner.encoders.loading import load_backbone
from cvrunner.encoders.packing import Packing
from cvrunner.encoders.waveform import WaveformEncoder
from cvrunner.model.mamba_ema import MambaEMAModel
from cvrunner.training.freezing import Schedule
from cvrunner.training.inputs import Inputs, scaled_labels
from cvrunner.training.trial import Trial
from tests.benchmarks.workload import Workload

CPU = torch.device("cpu")


class Material:
    """Model, schedule and data of a workload, made with cvrunner's own classes."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.trial: Trial = workload.trial()
        config = self.trial.config
        self.encoder = WaveformEncoder(
            load_backbone(self.trial.encoder, config.model.encoder_dropout),
            frame_rate_hz=config.model.frame_rate_hz,
            adaptation=self.trial.config.adaptation,
            normalize=self.trial.encoder.normalize,
        )
        torch.manual_seed(0)
        self.model = MambaEMAModel(self.encoder, config.model, len(config.corpus.dimensions))
        self.schedule = Schedule(self.model, config.train)
        self.schedule.begin_epoch(1)
        self.optimizer = self.schedule.optimizer()

    @functools.cached_property
    def inputs(self) -> Inputs:
        """cvrunner's cached features, filled."""
        fold, cache_dir = self.trial.fold, self.workload.cache_dir
        inputs = Inputs(self.encoder, self.trial.encoder, fold.utterances, cache_dir, CPU, False)
        for _ in inputs.fill_cache():
            pass
        return inputs

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def updates_per_epoch(self, effective_batch: int) -> int:
        return -(-len(self.trial.fold.train) // effective_batch)

    def labels(self, utterances: Sequence[Utterance]) -> Tensor:
        """`[B, K]` scaled to 0..1."""
        corpus = self.trial.config.corpus
        return scaled_labels(utterances, corpus.dimensions, corpus.scale, CPU)

    def waveform(self, utterance: Utterance) -> Tensor:
        """`[T]`, normalised where the checkpoint asks for it."""
        samples = read_audio(utterance.path)
        if self.trial.encoder.normalize:
            samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
        return torch.from_numpy(samples)

    def raw_states(self, waveforms: Tensor, mask: Tensor | None = None) -> Encoded:
        """Waveforms and mask `[B, T]` through all of transformers' own WavLM, to what the head hears.

        Conv front-end and attention as transformers does them; frozen: in evaluation mode, without a graph.
        """
        wavlm: Any = self.encoder.backbone
        samples = mask.sum(1) if mask is not None else torch.tensor([waveforms.shape[1]])
        trains = self.encoder.adaptation.trains_encoder
        gradient: Any = contextlib.nullcontext() if trains else torch.no_grad()
        with gradient:
            hidden = wavlm(waveforms, attention_mask=mask, output_hidden_states=True).hidden_states
        lengths = wavlm._get_feat_extract_output_lengths(samples)
        packing, group = Packing(lengths.tolist(), CPU), self.encoder.group
        states = [packing.whole.pack(padded) for padded in hidden]
        averaged = packing.averaged(states, group)
        return Encoded(averaged, (lengths + group - 1) // group, packing.statistics(states))
