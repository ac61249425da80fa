"""Whisper's encoder (Radford et al. 2022, arXiv 2212.04356): log-mel spectrogram, two convolutions, a transformer.

It was trained on windows of 30 s. Here it runs on the utterance alone, with the first rows of its position table, which
is about 8 times cheaper for short turns; or, as an option, on a window padded with zeros. Spectrogram and convolutions
are the front-end: always frozen, and cached. Shapes as in `encoder.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import WhisperFeatureExtractor

from cvrunner.encoders.attention import self_attention
from cvrunner.encoders.dropout import Dropout
from cvrunner.encoders.encoder import SpeechEncoder
from cvrunner.encoders.packing import Packing


class WhisperEncoder(SpeechEncoder):
    """Whisper's encoder on the utterance alone. `extractor`: makes the log-mel spectrogram."""

    # The position table is fixed: sinusoids, which no one trains.
    FRONT_END = ("conv1", "conv2", "embed_positions")
    LAYERS = "layers"
    ATTENTION = "self_attn"
    NORM = "layer_norm"
    norm_is_last = True

    def __init__(self, backbone: Any, extractor: WhisperFeatureExtractor, **settings: Any) -> None:
        # transformers has no modules for these dropouts, only numbers.
        backbone.input_dropout = Dropout(backbone.dropout, "hidden")
        for layer in backbone.layers:
            layer.attended_dropout = Dropout(layer.dropout, "hidden")
            layer.inner_dropout = Dropout(layer.activation_dropout, "inner")
            layer.output_dropout = Dropout(layer.dropout, "hidden")
        super().__init__(backbone, **settings)
        self.extractor = extractor

    def always_in_evaluation(self) -> list[nn.Module]:
        parts = super().always_in_evaluation()
        return [*parts, self.backbone.input_dropout] if self.has_frozen_inputs else parts

    def frames(self, samples: int) -> int:
        mel_frames = samples // int(self.extractor.hop_length)
        return -(-mel_frames // 2)

    def front_end(self, waveform: Tensor) -> Tensor:
        return self.convolve(waveform, padding="do_not_pad")

    def convolve(self, waveform: Tensor, **padding: Any) -> Tensor:
        """Map a waveform `[T]`, padded as transformers' feature extractor does it, to features `[F, C]`."""
        samples, rate_hz = waveform.float().cpu().numpy(), self.extractor.sampling_rate
        mel = self.extractor(samples, sampling_rate=rate_hz, return_tensors="pt", **padding)
        features: Tensor = mel["input_features"].to(waveform)
        for conv in (self.backbone.conv1, self.backbone.conv2):
            features = functional.gelu(conv(features))
        return features[0].T

    def first(self, conv: Tensor, packing: Packing) -> Tensor:
        positions = torch.cat([torch.arange(frames) for frames in packing.lengths]).to(conv.device, non_blocking=True)
        hidden = conv + self.backbone.embed_positions(positions)
        first: Tensor = self.backbone.input_dropout(hidden)
        return first

    def layer(self, layer: Any, hidden: Tensor, shared: Tensor | None, packing: Packing) -> Tensor:
        attended = self_attention(layer.self_attn, layer.self_attn_layer_norm(hidden), shared, packing)
        hidden = hidden + layer.attended_dropout(attended)
        inner = layer.inner_dropout(layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden))))
        return hidden + layer.output_dropout(layer.fc2(inner))  # type: ignore[no-any-return]


class PaddedWhisperEncoder(WhisperEncoder):
    """Whisper's encoder on windows of 30 s, as it was trained; only the frames of the utterance are returned.

    The last column of its features, and of the states at the boundary, is 1 for the frames of the utterance and 0 for
    those of the padding. So both go through the cache together.
    """

    WINDOW = "30s"

    @property
    def window_frames(self) -> int:
        """Number of frames of a window."""
        return int(self.backbone.config.max_source_positions)

    def frames(self, samples: int) -> int:
        return self.window_frames

    def averaged_frames(self, samples: int) -> int:
        return -(-super().frames(samples) // self.group)

    def front_end(self, waveform: Tensor) -> Tensor:
        samples = 2 * self.window_frames * self.extractor.hop_length
        features = self.convolve(waveform, padding="max_length", max_length=samples)
        real = torch.arange(self.window_frames, device=waveform.device) < super().frames(len(waveform))
        return torch.cat([features, real[:, None].to(features)], dim=1)

    def states(
        self, conv: Tensor, lengths: Tensor, top: int | None = None, keys: Sequence[int] = ()
    ) -> tuple[dict[int, Tensor], Packing]:
        return _real_frames(super().states(conv[:, :-1], lengths, top, keys)[0], conv[:, -1], lengths)

    def states_from_boundary(
        self, hidden: Tensor, lengths: Tensor, keys: Sequence[int] = ()
    ) -> tuple[dict[int, Tensor], Packing]:
        return _real_frames(super().states_from_boundary(hidden[:, :-1], lengths, keys)[0], hidden[:, -1], lengths)

    @torch.no_grad()
    def to_boundary(self, conv: Tensor, lengths: Tensor) -> Tensor:
        states, _ = super().states(conv[:, :-1], lengths, self.below)
        return torch.cat([states[self.below], conv[:, -1:]], dim=1)


def _real_frames(states: dict[int, Tensor], real: Tensor, lengths: Tensor) -> tuple[dict[int, Tensor], Packing]:
    """Return the states of the frames for which `real` `[S]` is 1, and their layout."""
    windows: list[int] = lengths.tolist()
    # Counted together, since the GPU is waited for when a number is read. The real frames of a window come first.
    counts: list[int] = torch.stack([torch.count_nonzero(part) for part in torch.split(real, windows)]).tolist()
    starts = itertools.accumulate(windows[:-1], initial=0)
    first = [torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
    places = torch.cat(first).to(real.device, non_blocking=True)
    return {number: state[places] for number, state in states.items()}, Packing(counts, real.device)
