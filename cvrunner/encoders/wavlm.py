"""WavLM: from conv features, computed without padding, to hidden states at the model's frame rate.

The forward pass is that of WavLM (Chen et al. 2022, arXiv 2110.13900), written out for three reasons: it starts at conv
features, so that an utterance's features do not depend on the other utterances of its batch; it stores no attention
maps; and a frozen encoder stays in `eval()` under `no_grad` after `train()`.

`B` utterances, `T` samples at 16 kHz, `F` frames of 20 ms, `S` frames of all utterances, utterance after utterance,
`S'` at the model's frame rate, `C` conv channels, `L` mixed layers, `D` width of the encoder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import WavLMModel
from transformers.utils import logging

from cvrunner.config.adaptation import FROZEN, Adaptation
from cvrunner.config.sections import ModelConfig
from cvrunner.encoders.attention import relative_position_bias, self_attention
from cvrunner.encoders.files import EncoderFiles, check_masking
from cvrunner.encoders.packing import Packing
from cvrunner.errors import EncoderError

ENCODER_FRAME_RATE_HZ = 50.0


class Boundary(NamedTuple):
    """Output of the frozen layers below the layers that train: the same in every epoch."""

    hidden: Tensor
    """`[S, D]`, input of the lowest layer that trains."""
    mixed: Tensor | None
    """`[S', l, D]`, the hidden states of the `l` mixed layers up to there; None if no such layer is mixed."""


class SpeechEncoder(nn.Module):
    """A WavLM that is adapted as requested; its convolutional front-end is always frozen.

    `layers`: hidden states to return; 0 is the input of the first transformer layer.
    """

    def __init__(
        self,
        wavlm: Any,
        *,
        layers: tuple[int, ...] | None = None,
        frame_rate_hz: float = 12.5,
        adaptation: Adaptation = FROZEN,
        normalize: bool = False,
        gradient_checkpointing: bool = False,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.wavlm = wavlm
        self.layers = layers if layers is not None else tuple(range(wavlm.config.num_hidden_layers + 1))
        self.group = round(ENCODER_FRAME_RATE_HZ / frame_rate_hz)
        self.adaptation = adaptation
        self.width = int(wavlm.config.hidden_size)
        self.stable = bool(wavlm.config.do_stable_layer_norm)
        """Whether the layers are pre-norm (large) rather than post-norm (base)."""
        self.normalize = normalize
        self.gradient_checkpointing = gradient_checkpointing
        self.precision = precision
        depth = wavlm.config.num_hidden_layers
        self.below = 0 if adaptation.top_layers is None else depth - adaptation.top_layers
        """Number of transformer layers that stay frozen below those that train, and with them all below the first."""
        self.starts_at_boundary = self.below > 0 and adaptation.cached == "boundary"
        """Whether training runs only the layers above `below`, from cached states."""
        self.layers_below = [place for place, number in enumerate(self.layers) if number <= self.below]
        """Indices in `layers` of the hidden states that never change."""
        if not 0 <= self.below <= depth:
            raise EncoderError(
                f"model.unfreeze_top_layers {adaptation.top_layers}: the encoder has {depth} transformer layers"
            )
        if max(self.layers) > wavlm.config.num_hidden_layers:
            raise EncoderError(
                f"model.layers {max(self.layers)}: the encoder has hidden states 0..{wavlm.config.num_hidden_layers}"
            )
        if adaptation.trains_encoder and max(self.layers) <= self.below:
            raise EncoderError(
                f"model.layers {max(self.layers)}: none up to there trains with "
                f"model.unfreeze_top_layers {adaptation.top_layers}"
            )
        # The front-end never trains, in no condition: its output is cached.
        wavlm.freeze_feature_encoder()
        if not adaptation.trains_encoder:
            self.requires_grad_(False)
        self.train(self.training)

    def parameter_groups(self) -> tuple[tuple[str, str], ...]:
        """Return (name pattern, group) rows; the first match counts. Groups: front_end, encoder_below, encoder.

        With frozen layers below those that train, everything that feeds them is frozen too. A post-norm encoder has its
        layer norm before the first layer, a pre-norm one after the last.
        """
        frozen = []
        if self.below and self.adaptation.trains_encoder:
            frozen = [f"encoder.layers.{layer}.*" for layer in range(self.below)]
            frozen += ["feature_projection.*", "encoder.pos_conv_embed.*", "masked_spec_embed"]
            if not self.stable:
                frozen.append("encoder.layer_norm.*")
        below = ((f"wavlm.{pattern}", "encoder_below") for pattern in frozen)
        return ("wavlm.feature_extractor.*", "front_end"), *below, ("wavlm.*", "encoder")

    def train(self, mode: bool = True) -> SpeechEncoder:
        """Set the mode of the parts that train; frozen parts always stay in evaluation mode."""
        super().train(mode and self.adaptation.trains_encoder)
        self.wavlm.feature_extractor.eval()
        if self.below:
            for part in (self.wavlm.feature_projection, self.wavlm.encoder.pos_conv_embed, self.wavlm.encoder.dropout):
                part.eval()
            for layer in self.wavlm.encoder.layers[: self.below]:
                layer.eval()
        return self

    def frames(self, samples: int) -> int:
        """Return F for an utterance of `samples` at 16 kHz, by the length formula of WavLM."""
        for kernel, stride in zip(self.wavlm.config.conv_kernel, self.wavlm.config.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    def averaged_frames(self, samples: int) -> int:
        """Return N for an utterance of `samples` at 16 kHz."""
        return -(-self.frames(samples) // self.group)

    @torch.no_grad()
    def conv_features(self, waveform: Tensor) -> Tensor:
        """Apply the front-end to one utterance, without padding: `[T]` to `[F, C]`."""
        if self.normalize:
            waveform = (waveform - waveform.mean()) / torch.sqrt(waveform.var(correction=0) + 1e-7)
        features: Tensor = self.wavlm.feature_extractor(waveform[None])
        return features[0].T

    def forward(self, conv: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map conv features `[S, C]` and lengths `[B]` to hidden states `[S', L, D]`, in float32 or better, and lengths
        `[B]`.
        """
        packing = Packing(lengths.tolist(), conv.device)
        with self._computing(conv.device):
            states = self._above(0, self._first(conv, packing), packing, max(self.layers))
        return packing.averaged([states[number] for number in self.layers], self.group), (
            lengths + self.group - 1
        ) // self.group

    def from_boundary(self, boundary: Boundary, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map the states at the boundary to the same hidden states and lengths as `forward`."""
        packing = Packing(lengths.tolist(), boundary.hidden.device)
        with self._computing(boundary.hidden.device):
            states = self._above(self.below, boundary.hidden, packing, max(self.layers))
        above = [number for number in self.layers if number > self.below]
        averaged = packing.averaged([states[number] for number in above], self.group)
        if boundary.mixed is not None:
            averaged = torch.cat([boundary.mixed, averaged], dim=1)
            order = [*(number for number in self.layers if number <= self.below), *above]
            if order != list(self.layers):
                averaged = averaged[:, [order.index(number) for number in self.layers]]
        return averaged, (lengths + self.group - 1) // self.group

    @torch.no_grad()
    def to_boundary(self, conv: Tensor, lengths: Tensor) -> Tensor:
        """Map conv features `[S, C]` and lengths `[B]` to the input `[S, D]` of the lowest layer that trains."""
        packing = Packing(lengths.tolist(), conv.device)
        with self._computing(conv.device):
            return self._above(0, self._first(conv, packing), packing, self.below)[self.below]

    @contextlib.contextmanager
    def _computing(self, device: torch.device) -> Iterator[None]:
        gradient: Any = contextlib.nullcontext() if self.adaptation.trains_encoder else torch.no_grad()
        with gradient, torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
            yield

    def _first(self, conv: Tensor, packing: Packing) -> Tensor:
        """Return the input of the first transformer layer, `[S, D]`."""
        encoder = self.wavlm.encoder
        hidden, _ = self.wavlm.feature_projection(conv)
        if self.adaptation.masks_input and self.training:
            hidden = self._mask_spans(hidden, packing.lengths)
        # The positional convolution sees zeros as padding, as it does beyond the end of an utterance.
        hidden = hidden + torch.cat([group.pack(encoder.pos_conv_embed(group.pad(hidden))) for group in packing.groups])
        if not self.stable:
            hidden = encoder.layer_norm(hidden)
        first: Tensor = encoder.dropout(hidden)
        return first

    def _above(self, below: int, hidden: Tensor, packing: Packing, top: int) -> dict[int, Tensor]:
        """Return hidden states `[S, D]` by layer, from those of layer `below` up to `top`."""
        # All layers share the position bias of the first one.
        encoder, stable = self.wavlm.encoder, self.stable
        bias = relative_position_bias(encoder.layers[0].attention, packing.whole.frames)
        states = {below: hidden}
        for number, layer in enumerate(encoder.layers[below:top], start=below + 1):
            if self.gradient_checkpointing and hidden.requires_grad:
                hidden = checkpoint(_transformer_layer, layer, hidden, bias, packing, stable, use_reentrant=False)
            else:
                hidden = _transformer_layer(layer, hidden, bias, packing, stable)
            states[number] = hidden
        if stable and len(encoder.layers) in states:
            states[len(encoder.layers)] = encoder.layer_norm(hidden)
        return states

    def _mask_spans(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """Mask spans of frames (SpecAugment, Park et al. 2019, arXiv 1904.08779); short utterances are left alone."""
        span = self.wavlm.config.mask_time_length
        share = self.wavlm.config.mask_time_prob
        masked = torch.zeros(len(hidden), dtype=torch.bool)
        first = 0
        for frames in lengths:
            if frames > span:
                count = int(share * frames / span + torch.rand(()).item())
                for start in torch.randint(frames - span + 1, (count,)).tolist():
                    masked[first + start : first + start + span] = True
            first += frames
        masked = masked.to(hidden.device, non_blocking=True)
        return torch.where(masked[:, None], self.wavlm.masked_spec_embed.to(hidden.dtype), hidden)


def _transformer_layer(layer: Any, hidden: Tensor, bias: Tensor, packing: Packing, stable: bool) -> Tensor:
    """Apply one WavLM layer, post-norm (base) or pre-norm (`stable`, large): `[S, D]` to `[S, D]`."""
    if stable:
        hidden = hidden + layer.dropout(self_attention(layer.attention, layer.layer_norm(hidden), bias, packing))
        return hidden + layer.feed_forward(layer.final_layer_norm(hidden))  # type: ignore[no-any-return]
    hidden = layer.layer_norm(hidden + layer.dropout(self_attention(layer.attention, hidden, bias, packing)))
    return layer.final_layer_norm(hidden + layer.feed_forward(hidden))  # type: ignore[no-any-return]


def build_encoder(
    files: EncoderFiles,
    config: ModelConfig,
    adaptation: Adaptation,
    precision: torch.dtype,
    gradient_checkpointing: bool = False,
) -> SpeechEncoder:
    """Return the pretrained encoder as configured. Raises EncoderError if its files do not allow that."""
    wavlm = load_wavlm(files, config.encoder_dropout)
    if adaptation.masks_input:
        check_masking(files.name, wavlm.config.mask_time_prob)
    return SpeechEncoder(
        wavlm,
        layers=None if config.layers == "all" else config.layers,
        frame_rate_hz=config.frame_rate_hz,
        adaptation=adaptation,
        normalize=files.normalize,
        gradient_checkpointing=gradient_checkpointing,
        precision=precision,
    )


def load_wavlm(files: EncoderFiles, dropout: float | None = None) -> Any:
    """Return the pretrained WavLMModel in float32, without layer drop. Raises EncoderError if weights are missing."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    changes: dict[str, Any] = {"layerdrop": 0.0}
    if dropout is not None:
        names = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout")
        changes |= dict.fromkeys(names, dropout)
    try:
        loaded: Any = WavLMModel.from_pretrained(
            files.folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **changes
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise EncoderError(f"model.encoder {files.name}: {str(error).strip().partition(chr(10))[0]}") from None
    wavlm, info = loaded
    missing = sorted(name for name in info["missing_keys"] if name != "masked_spec_embed")
    if missing:
        raise EncoderError(
            f"model.encoder {files.name}: {len(missing)} weights are missing in its files, first {missing[0]}"
        )
    return wavlm
