"""From utterances to tensors: features out of the cache, and the cache filled by the trial's own encoder.

`b` utterances of a micro-batch, `S` frames of all of them one after the other, `S'` at the model's frame rate; `F` and
`N` those of one; `C` conv channels, `L` layers, `D` width; `K` dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cvrunner.data.batches import Update, micro_batches
from cvrunner.data.features import Features, FeatureStore, Recipe
from cvrunner.data.utterance import Utterance, read_audio
from cvrunner.encoders.files import EncoderFiles
from cvrunner.encoders.packing import Packing
from cvrunner.encoders.wavlm import ENCODER_FRAME_RATE_HZ, Boundary, SpeechEncoder
from cvrunner.records.results import FeatureProgress

Waveform = npt.NDArray[np.float32]
Compute = Callable[[Sequence[Utterance]], Iterator[Features]]
CPU = torch.device("cpu")
FILL_S = 30.0
"""Seconds of audio that a frozen encoder takes at once: on a CPU 60 take no less time, and 10 more."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch."""

    features: Tensor | Boundary
    """On the device in float32: conv features `[S, C]`, the boundary of an encoder whose top layers train, or hidden
    states `[S', L, D]`."""
    lengths: Tensor
    """`[b]` real frames, on the CPU."""
    positions: Tensor
    """`[b]` places in the effective batch, on the device."""


class Inputs:
    """The inputs of one trial: conv features for an encoder that trains, hidden states for a frozen one, and both kinds
    of hidden states, at the boundary and averaged up to there, where only top layers train.

    The encoder must be the pretrained one when the cache is filled.
    """

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
        recipe = partial(Recipe, encoder_digest=files.digest, normalize=files.normalize)
        precision = str(encoder.precision).removeprefix("torch.")
        rate_hz = ENCODER_FRAME_RATE_HZ / encoder.group
        self.conv = FeatureStore(cache_dir, recipe("conv"), utterances, encoder.frames)
        # The recipe is that of the frozen condition, which shares its files: up to the boundary they are the same.
        hidden = recipe("hidden", layers=encoder.layers, frame_rate_hz=rate_hz, precision=precision)
        self.hidden = FeatureStore(cache_dir, hidden, utterances, encoder.averaged_frames)
        boundary = recipe("boundary", layers=(encoder.below,), precision=precision)
        self.boundary = FeatureStore(cache_dir, boundary, utterances, encoder.frames)

    @property
    def passes(self) -> list[tuple[str, FeatureStore, Compute]]:
        """What is made once: its name, its place, and how. What depends on layers that train is not."""
        conv = ("conv features", self.conv, self._conv_features)
        hidden = ("hidden states", self.hidden, self._hidden_states)
        if self.encoder.adaptation.cached == "hidden":
            return [conv, hidden]
        if self.encoder.starts_at_boundary:
            mixed = [hidden] if self.encoder.layers_below else []
            return [conv, *mixed, ("hidden states at the boundary", self.boundary, self._boundary_states)]
        return [conv]

    def fill_cache(self) -> Iterator[FeatureProgress]:
        """Make what is missing; several trials on one node share the work."""
        first, *later = self.passes
        missing = [one for one in later if one[1].missing()]
        self.encoder.eval()
        for kind, store, compute in [first, *missing] if missing or not later else []:
            for done, shards in store.fill(compute):
                yield FeatureProgress(kind=kind, done=done, shards=shards)

    def batches(self, update: Update) -> Iterator[Batch]:
        """The micro-batches of an update, one after the other."""
        for positions in update.micro_batches:
            features, lengths = self._read([update.utterances[i] for i in positions])
            yield Batch(features, lengths, torch.tensor(positions, device=self.device))

    def _read(self, utterances: Sequence[Utterance]) -> tuple[Tensor | Boundary, Tensor]:
        """Features of a micro-batch and `[b]` real frames of each."""
        if self.encoder.starts_at_boundary:
            hidden, below = [self.boundary.read(u) for u in utterances], self.encoder.layers_below
            mixed = self._placed(pack([self.hidden.read(u)[:, below] for u in utterances])) if below else None
            return Boundary(self._placed(pack(hidden)), mixed), _lengths(hidden)
        store = self.conv if self.encoder.adaptation.trains_encoder else self.hidden
        features = [store.read(u) for u in utterances]
        return self._placed(pack(features)), _lengths(features)

    def _placed(self, features: Tensor) -> Tensor:
        """On the device in float32; a GPU gets half the bytes, from memory that it fetches by itself."""
        if self.device.type == "cuda":
            features = features.pin_memory()
        return features.to(self.device, non_blocking=True).float()

    def padding(self, updates: Iterable[Update]) -> float:
        """Share of frames that are padding when these updates are encoded: in the attention of an encoder that trains,
        in the head's Mamba where it is frozen."""
        real = padded = 0
        for update in updates:
            for positions in update.micro_batches:
                frames = [self.encoder.frames(update.utterances[i].samples) for i in positions]
                real += sum(frames)
                if self.encoder.adaptation.trains_encoder:
                    padded += Packing(frames, CPU).padded_frames
                else:
                    padded += max(frames) * len(frames)
        return 1 - real / padded if padded else 0.0

    def _conv_features(self, utterances: Sequence[Utterance]) -> Iterator[Features]:
        for u in utterances:
            yield conv_features(self.encoder, read_audio(u.path, self.resample), self.device)

    def _hidden_states(self, utterances: Sequence[Utterance]) -> Iterator[Features]:
        """Some seconds of a shard at once: what is kept does not depend on a trial's batch size."""
        return self._some_at_once(utterances, partial(hidden_states, self.encoder, device=self.device))

    def _boundary_states(self, utterances: Sequence[Utterance]) -> Iterator[Features]:
        return self._some_at_once(utterances, self._boundary)

    def _boundary(self, conv: Sequence[Features]) -> list[Features]:
        """`[F, D]` of each utterance, from all their conv features `[F, C]` at once."""
        lengths = [len(array) for array in conv]
        states = self.encoder.to_boundary(self._placed(pack(conv)), torch.tensor(lengths))
        return np.split(states.half().cpu().numpy(), np.cumsum(lengths)[:-1])

    def _some_at_once(
        self, utterances: Sequence[Utterance], compute: Callable[[Sequence[Features]], list[Features]]
    ) -> Iterator[Features]:
        found: dict[int, Features] = {}
        for positions in micro_batches(utterances, len(utterances), FILL_S):
            states = compute([self.conv.read(utterances[i]) for i in positions])
            found |= zip(positions, states, strict=True)
        yield from (found[i] for i in range(len(utterances)))


def conv_features(encoder: SpeechEncoder, waveform: Waveform, device: torch.device) -> Features:
    """Conv features `[F, C]` of one waveform `[T]`, as they are kept."""
    return encoder.conv_features(torch.from_numpy(waveform).to(device)).half().cpu().numpy()


@torch.no_grad()
def hidden_states(encoder: SpeechEncoder, conv: Sequence[Features], device: torch.device) -> list[Features]:
    """Hidden states `[N, L, D]` of each utterance, as they are kept, from all their conv features `[F, C]` at once."""
    lengths = torch.tensor([len(array) for array in conv])
    states, frames = encoder(pack(conv).to(device, torch.float32), lengths)
    return np.split(states.half().cpu().numpy(), frames.cumsum(0)[:-1].tolist())


def _lengths(features: Sequence[Features]) -> Tensor:
    return torch.tensor([len(array) for array in features])


def pack(features: Sequence[Features]) -> Tensor:
    """Arrays `[f, ...]` one after the other: `[S, ...]` in float16."""
    return torch.from_numpy(np.concatenate(features))


def scaled_labels(
    utterances: Sequence[Utterance], dimensions: Sequence[str], scale: tuple[float, float], device: torch.device
) -> Tensor:
    """Labels `[b, K]` with the rating scale mapped to 0..1; values outside the scale stay outside."""
    low, high = scale
    rows = [[u.label(dimension) for dimension in dimensions] for u in utterances]
    return (torch.tensor(rows, device=device, dtype=torch.float32) - low) / (high - low)


def ratings(scaled: Tensor, scale: tuple[float, float]) -> npt.NDArray[np.float64]:
    """The reverse of `scaled_labels`: predictions `[b, K]` on the scale 0..1 to the rating scale, in float64."""
    low, high = scale
    values: npt.NDArray[np.float64] = low + (high - low) * scaled.double().cpu().numpy()
    return values
