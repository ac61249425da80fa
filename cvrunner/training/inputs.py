"""From utterances to padded tensors: features out of the cache, and the cache filled by the trial's own encoder.

`b` utterances of a micro-batch, `F` frames, `K` dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cvrunner.data.batches import Update
from cvrunner.data.features import Features, FeatureStore, Recipe
from cvrunner.data.utterance import Utterance, read_audio
from cvrunner.model.encoder_files import EncoderFiles
from cvrunner.model.speech_encoder import ENCODER_FRAME_RATE_HZ, SpeechEncoder
from cvrunner.records.results import FeatureProgress


@dataclass(frozen=True)
class PaddedBatch:
    """A micro-batch on its device."""

    features: Tensor
    """`[b, F, ...]` in float32, right-padded with 0."""
    lengths: Tensor
    """`[b]` real frames."""
    positions: Tensor
    """`[b]` places in the effective batch."""


class Inputs:
    """The inputs of one trial: conv features for an encoder that trains, hidden states for a frozen one."""

    def __init__(
        self,
        encoder: SpeechEncoder,
        files: EncoderFiles,
        utterances: Sequence[Utterance],
        cache_dir: Path,
        device: torch.device,
        resample: bool,
    ) -> None:
        self.encoder = encoder
        self.device = device
        self.resample = resample
        self.conv = FeatureStore(cache_dir, Recipe("conv", files.digest, files.normalize), utterances, encoder.frames)
        self.hidden = FeatureStore(
            cache_dir,
            Recipe(
                "hidden",
                files.digest,
                files.normalize,
                encoder.layers,
                ENCODER_FRAME_RATE_HZ / encoder.group,
                str(encoder.precision).removeprefix("torch."),
            ),
            utterances,
            encoder.averaged_frames,
        )

    @property
    def store(self) -> FeatureStore:
        """Where training reads from. Hidden states of an encoder that trains are never cached."""
        return self.hidden if self.encoder.freeze else self.conv

    def fill_cache(self) -> Iterator[FeatureProgress]:
        """Make what is missing; several trials on one node share the work."""
        stages = [("conv features", self.conv, self._conv_features)]
        if self.encoder.freeze:
            stages = [*stages, ("hidden states", self.hidden, self._hidden_states)] if self.hidden.missing() else []
        for kind, store, compute in stages:
            for done, shards in store.fill(compute):
                yield FeatureProgress(kind=kind, done=done, shards=shards)

    def batches(self, update: Update) -> Iterator[PaddedBatch]:
        """The micro-batches of an update, one after the other."""
        for positions in update.micro_batches:
            features = [self.store.read(update.utterances[i]) for i in positions]
            padded, lengths = pad(features)
            yield PaddedBatch(
                padded.to(self.device, torch.float32, non_blocking=True),
                lengths.to(self.device),
                torch.tensor(positions, device=self.device),
            )

    def padding(self, updates: Iterable[Update]) -> float:
        """Share of frames that are padding when these updates are encoded."""
        real = padded = 0
        for update in updates:
            for positions in update.micro_batches:
                frames = [self.encoder.frames(update.utterances[i].samples) for i in positions]
                real += sum(frames)
                padded += max(frames) * len(frames)
        return 1 - real / padded if padded else 0.0

    def _conv_features(self, utterances: Sequence[Utterance]) -> Iterator[Features]:
        for u in utterances:
            waveform = torch.from_numpy(read_audio(u.path, self.resample)).to(self.device)
            yield self.encoder.conv_features(waveform).half().cpu().numpy()

    @torch.no_grad()
    def _hidden_states(self, utterances: Sequence[Utterance]) -> Iterator[Features]:
        """One utterance at a time: no padding, and what is kept does not depend on a batch size."""
        for u in utterances:
            conv, lengths = pad([self.conv.read(u)])
            states, _ = self.encoder(conv.to(self.device, torch.float32), lengths.to(self.device))
            yield states[0].half().cpu().numpy()


def pad(features: Sequence[Features]) -> tuple[Tensor, Tensor]:
    """Arrays `[f, ...]` to a tensor `[b, F, ...]` in float16, zero where there is none, and lengths `[b]`."""
    lengths = [len(array) for array in features]
    padded = np.zeros((len(features), max(lengths), *features[0].shape[1:]), dtype=np.float16)
    for row, array in zip(padded, features, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(padded), torch.tensor(lengths)


def scaled_labels(
    utterances: Sequence[Utterance], dimensions: Sequence[str], scale: tuple[float, float], device: torch.device
) -> Tensor:
    """Labels `[b, K]` with the rating scale mapped to 0..1; values outside the scale stay outside."""
    low, high = scale
    rows = [[u.label(dimension) for dimension in dimensions] for u in utterances]
    return (torch.tensor(rows, device=device, dtype=torch.float32) - low) / (high - low)
