"""What all rivals are given alike: cvrunner's model and optimizer settings, waveforms in memory, labels.

`B` utterances, `T` samples at 16 kHz, `M` frames of 10 ms of a spectrogram, `F` frames of 20 ms, `S` frames of all
utterances one after the other at the model's frame rate, `L` layers, `D` width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cvrunner.data.utterance import Utterance, read_audio
from cvrunner.encoders.encoder import Encoded
from cvrunner.encoders.loading import build_encoder
from cvrunner.encoders.packing import Packing
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
        self.encoder: Any = build_encoder(self.trial.encoder, config.model, config.adaptation, torch.float32)
        torch.manual_seed(0)
        self.model = MambaEMAModel(self.encoder, config.model, len(config.corpus.dimensions))
        self.schedule = Schedule(self.model, config.train)
        self.schedule.begin_epoch(1)
        self.optimizer = self.schedule.optimizer()

    @property
    def is_whisper(self) -> bool:
        return self.workload.encoder == "whisper"

    @functools.cached_property
    def inputs(self) -> Inputs:
        """cvrunner's cached features, filled."""
        fold, cache_dir = self.trial.fold, self.workload.cache_dir
        resample = self.trial.config.corpus.resample
        inputs = Inputs(self.encoder, self.trial.encoder, fold.utterances, cache_dir, CPU, resample)
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
        samples = read_audio(utterance.path, self.trial.config.corpus.resample)
        if self.trial.encoder.settings.normalize:
            samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
        return torch.from_numpy(samples)

    def raw_input(self, utterance: Utterance) -> tuple[Tensor, Tensor]:
        """What transformers' encoder is given, time first, and a mask of what is real in it: the waveform `[T]`, or
        Whisper's spectrogram `[M, 80]`."""
        waveform = self.waveform(utterance)
        if not self.is_whisper:
            return waveform, torch.ones(len(waveform), dtype=torch.long)
        extractor = self.encoder.extractor
        padding = "max_length" if self.workload.padded else "do_not_pad"
        mel = extractor(waveform.numpy(), sampling_rate=extractor.sampling_rate, padding=padding, return_tensors="pt")
        values = mel["input_features"][0].T.contiguous()
        return values, (torch.arange(len(values)) < len(waveform) // extractor.hop_length).long()

    def raw_states(self, values: Tensor, mask: Tensor) -> Encoded:
        """Padded inputs `[B, T, ...]` and mask `[B, T]` through all of transformers' own encoder, to what the head
        hears.

        Front-end and attention as transformers does them; frozen: in evaluation mode, without a graph.
        """
        trains = self.encoder.adaptation.trains_encoder
        gradient: Any = contextlib.nullcontext() if trains else torch.no_grad()
        lengths = mask.sum(1)
        with gradient:
            if self.is_whisper:
                lengths = (lengths + 1) // 2
                hidden = self._padded_whisper(values) if self.workload.padded else self._whisper(values, mask, lengths)
            else:
                # Without padding, no mask: less work.
                wavlm, attended = self.encoder.backbone, None if mask.all() else mask
                hidden = wavlm(values, attention_mask=attended, output_hidden_states=True).hidden_states
                lengths = wavlm._get_feat_extract_output_lengths(lengths)
        packing, group = Packing(lengths.tolist(), CPU), self.encoder.group
        states = [packing.whole.pack(padded[:, : packing.whole.frames]) for padded in hidden]
        averaged = packing.averaged(states, group)
        return Encoded(averaged, (lengths + group - 1) // group, packing.statistics(states))

    def _padded_whisper(self, mel: Tensor) -> Sequence[Tensor]:
        """The hidden states `[B, 1500, D]` of windows of 30 s `[B, 3000, 80]`, as people run it."""
        hidden: Sequence[Tensor] = self.encoder.backbone(mel.transpose(1, 2), output_hidden_states=True).hidden_states
        return hidden

    def _whisper(self, mel: Tensor, mask: Tensor, lengths: Tensor) -> Sequence[Tensor]:
        """The hidden states `[B, F, D]` of spectrograms `[B, M, 80]` of `lengths` frames, each as it would be alone.

        transformers' forward pass insists on 30 s, so its modules are called one after the other. A mask in its layers,
        which they support, leaves the choice of batches to Trainer, whose groups hardly pad; batches of equal lengths
        alone would often be of one utterance.
        """
        backbone = self.encoder.backbone
        # Alone, an utterance ends in the zeros of the second convolution too, not in the first one's bias.
        first = functional.gelu(backbone.conv1(mel.transpose(1, 2))) * mask[:, None]
        x = functional.gelu(backbone.conv2(first)).transpose(1, 2)
        x = functional.dropout(x + backbone.embed_positions.weight[: x.shape[1]], backbone.dropout, backbone.training)
        attended = None
        if lengths.min() < x.shape[1]:
            padding = torch.arange(x.shape[1]) >= lengths[:, None]
            attended = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)[:, None, None]
        hidden = [x]
        for layer in backbone.layers:
            hidden.append(layer(hidden[-1], attended))
        return [*hidden[:-1], backbone.layer_norm(hidden[-1])]
