"""Encoders on the waveform: wav2vec 2.0 (also XLS-R and MMS), HuBERT, data2vec-audio and WavLM.

All have a stack of convolutions on the waveform, a projection, positional convolutions and a transformer, post-norm
(base) or pre-norm (`do_stable_layer_norm`, large). WavLM alone has a gated relative position bias (Chen et al. 2022,
arXiv 2110.13900); data2vec has several positional convolutions instead of one. Shapes as in `encoder.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cvrunner.encoders.attention import relative_position_bias, self_attention
from cvrunner.encoders.encoder import SpeechEncoder
from cvrunner.encoders.packing import Packing


class WaveformEncoder(SpeechEncoder):
    """wav2vec 2.0, HuBERT, data2vec-audio or WavLM."""

    FRONT_END = ("feature_extractor",)
    INPUTS = ("feature_projection", "encoder.pos_conv_embed", "encoder.dropout")
    LAYERS = "encoder.layers"
    NORM = "encoder.layer_norm"

    @property
    def norm_is_last(self) -> bool:
        # data2vec-audio has no such setting.
        return bool(getattr(self.backbone.config, "do_stable_layer_norm", False))

    def always_in_evaluation(self) -> list[nn.Module]:
        parts = super().always_in_evaluation()
        # The statistics of this batch norm, which some HuBERTs have, are those of the pretraining.
        batch_norm = getattr(self.backbone.encoder.pos_conv_embed, "batch_norm", None)
        if batch_norm is not None:
            parts.append(batch_norm)
        return parts

    def frames(self, samples: int) -> int:
        for kernel, stride in zip(self.backbone.config.conv_kernel, self.backbone.config.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    def front_end(self, waveform: Tensor) -> Tensor:
        features: Tensor = self.backbone.feature_extractor(waveform[None])
        return features[0].T

    def first(self, conv: Tensor, packing: Packing) -> Tensor:
        encoder = self.backbone.encoder
        with self.casts.used_by(self.backbone.feature_projection):
            hidden = self.backbone.feature_projection(conv)
        # HuBERT returns the projection alone, the others also its normed input.
        if isinstance(hidden, tuple):
            hidden = hidden[0]
        if self.adaptation.masks_input and self.training:
            hidden = self._mask_spans(hidden, packing)
        hidden = hidden + self._positions(hidden, packing)
        if not self.norm_is_last:
            hidden = encoder.layer_norm(hidden)
        first: Tensor = encoder.dropout(hidden)
        return first

    def shared_by_layers(self, packing: Packing) -> Tensor | None:
        attention = self.transformer[0].attention
        if not hasattr(attention, "rel_attn_embed"):
            return None
        # All layers of a WavLM share the position bias of the first one.
        return relative_position_bias(attention, packing.whole.frames)

    def layer(self, layer: Any, hidden: Tensor, shared: Tensor | None, packing: Packing) -> Tensor:
        if self.norm_is_last:
            hidden = hidden + layer.dropout(self_attention(layer.attention, layer.layer_norm(hidden), shared, packing))
            return hidden + layer.feed_forward(layer.final_layer_norm(hidden))  # type: ignore[no-any-return]
        hidden = layer.layer_norm(hidden + layer.dropout(self_attention(layer.attention, hidden, shared, packing)))
        return layer.final_layer_norm(hidden + layer.feed_forward(hidden))  # type: ignore[no-any-return]

    def _positions(self, hidden: Tensor, packing: Packing) -> Tensor:
        """Return what the positional convolutions add to `[S, D]`.

        They see zeros as padding, as they do beyond the end of an utterance; so each one gets its own padding.
        """
        embed = self.backbone.encoder.pos_conv_embed
        steps: list[Callable[[Tensor], Tensor]] = [embed]
        if hasattr(embed, "layers"):
            steps = [lambda x, conv=conv: conv(x.mT).mT for conv in embed.layers]  # type: ignore[misc]
        elif getattr(embed, "batch_norm", None) is not None:
            # In evaluation mode it works frame by frame; padding must not pass through it, or it would not stay zero.
            hidden = embed.batch_norm(hidden)
            steps = [lambda x: embed.activation(embed.padding(embed.conv(x.mT))).mT]
        for step in steps:
            parts = zip(packing.groups, packing.parts(hidden, packing.groups), strict=True)
            hidden = torch.cat([group.pack(step(group.pad(part))) for group, part in parts])
        return hidden

    def _mask_spans(self, hidden: Tensor, packing: Packing) -> Tensor:
        """Mask spans of frames (SpecAugment, Park et al. 2019, arXiv 1904.08779); short utterances are left alone."""
        span = self.backbone.config.mask_time_length
        share = self.backbone.config.mask_time_prob
        masked = torch.zeros(len(hidden), dtype=torch.bool)
        first = 0
        for i, frames in enumerate(packing.lengths):
            if frames > span:
                random = packing.draws.generator(i, "spans")
                count = int(share * frames / span + torch.rand((), generator=random).item())
                for start in torch.randint(frames - span + 1, (count,), generator=random).tolist():
                    masked[first + start : first + start + span] = True
            first += frames
        masked = masked.to(hidden.device, non_blocking=True)
        return torch.where(masked[:, None], self.backbone.masked_spec_embed.to(hidden.dtype), hidden)
