"""The interface of all speech encoders: a front-end per utterance, then transformer layers over packed frames.

The weights and most modules are transformers' own; the forward pass is written out for three reasons: it starts at the
output of the front-end, which is computed without padding and cached, so that an utterance's features do not depend on
the other utterances of its batch; it stores no attention maps; and what is frozen stays in `eval()` after `train()`.

A family (`waveform.py`, `whisper.py`) implements the front-end, the input of the first layer, and one layer.

`B` utterances, `T` samples at 16 kHz, `F` frames of 20 ms, `S` frames of all utterances, utterance after utterance,
`S'` at the model's frame rate, `C` channels of the front-end, `L` mixed layers, `D` width of the encoder.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cvrunner.config.adaptation import FROZEN, Adaptation
from cvrunner.encoders.dropout import Place, number_places, replace_dropouts
from cvrunner.encoders.packing import Packing
from cvrunner.encoders.precision import WeightCasts
from cvrunner.errors import EncoderError

ENCODER_FRAME_RATE_HZ = 50.0
"""Frame rate of all families; `encoders/files.py` rejects an encoder with another one."""


class Encoded(NamedTuple):
    """What the head hears of some utterances."""

    states: Tensor
    """`[S', L, D]`, hidden states at the model's frame rate, in float32 or better."""
    lengths: Tensor
    """`[B]`, frames of each utterance at that rate."""
    statistics: Tensor
    """`[B, L, 2, D]`, mean and standard deviation of the same states over an utterance, at the encoder's own rate."""


class Boundary(NamedTuple):
    """Output of the frozen layers below the layers that train: the same in every epoch."""

    hidden: Tensor
    """`[S, D]`, input of the lowest layer that trains."""
    mixed: Encoded | None
    """Hidden states and statistics of the `l` mixed layers up to there; None if no such layer is mixed."""


Features = Tensor | Boundary | Encoded
"""What a model hears of a micro-batch: features of the front-end, or what frozen layers have made of them."""


class ParameterGroup(NamedTuple):
    """Parameters that start to train together, at one learning rate."""

    pattern: str
    """Pattern of the parameters' names."""
    name: str
    height: int | None
    """Number of layers between the group and the topmost one that trains; None: the group never trains."""


class SpeechEncoder(nn.Module, abc.ABC):
    """A pretrained encoder that is adapted as requested; its front-end is always frozen.

    `backbone`: transformers' model. `layers`: hidden states to return; 0 is the input of the first transformer layer.
    `normalize`: scale waveforms to mean 0 and variance 1. `limits`: samples of the shortest and the longest utterance.
    """

    FRONT_END: ClassVar[tuple[str, ...]]
    """Names of the backbone's modules before the cached features. They never train."""
    INPUTS: ClassVar[tuple[str, ...]] = ()
    """Names of its modules between the cached features and the first transformer layer."""
    LAYERS: ClassVar[str]
    """Name of its list of transformer layers."""
    ATTENTION: ClassVar[str] = "attention"
    """Name of the attention in a layer."""
    NORM: ClassVar[str]
    """Name of its layer norm: before the first transformer layer, or after the last one."""
    WINDOW: ClassVar[str] = "unpadded"
    """What the front-end runs on: part of the address of cached features."""

    def __init__(
        self,
        backbone: Any,
        *,
        layers: tuple[int, ...] | None = None,
        frame_rate_hz: float = 12.5,
        adaptation: Adaptation = FROZEN,
        normalize: bool = False,
        limits: tuple[int, int | None] = (1, None),
        gradient_checkpointing: bool = False,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.depth = len(self.transformer)
        self.layers = layers or tuple(range(self.depth + 1))
        self.group = round(ENCODER_FRAME_RATE_HZ / frame_rate_hz)
        self.adaptation = adaptation
        self.width = int(backbone.config.hidden_size)
        self.normalize = normalize
        self.shortest_samples, self.longest_samples = limits
        self.gradient_checkpointing = gradient_checkpointing
        self.precision = precision
        self.casts = WeightCasts(precision)
        self.below = self.depth - (adaptation.top_layers or self.depth)
        """Number of transformer layers that stay frozen below those that train, and with them all below the first."""
        self.has_frozen_inputs = adaptation.trains_encoder and (self.below > 0 or adaptation.lora is not None)
        """Whether the input of the first transformer layer is frozen although layers above it train."""
        self.starts_at_boundary = self.has_frozen_inputs and adaptation.cached == "boundary"
        """Whether training runs only the layers above `below`, from cached states."""
        self.layers_below = [place for place, number in enumerate(self.layers) if number <= self.below]
        """Indices in `layers` of the hidden states that never change."""
        if not 0 <= self.below <= self.depth:
            raise EncoderError(
                f"model.unfreeze_top_layers {adaptation.top_layers}: the encoder has {self.depth} transformer layers"
            )
        if max(self.layers) > self.depth:
            raise EncoderError(f"model.layers {max(self.layers)}: the encoder has hidden states 0..{self.depth}")
        if adaptation.trains_encoder and max(self.layers) <= self.below:
            raise EncoderError(
                f"model.layers {max(self.layers)}: none up to there trains with "
                f"model.unfreeze_top_layers {adaptation.top_layers}"
            )
        for name in self.FRONT_END:
            backbone.get_submodule(name).requires_grad_(False)
        if not adaptation.trains_encoder:
            self.requires_grad_(False)
        replace_dropouts(backbone, lambda name: "inner" if name.endswith("intermediate_dropout") else "hidden")
        for layer in self.transformer:
            attention: Any = layer.get_submodule(self.ATTENTION)
            attention.place = Place(attention.dropout, "attention")
        self.train(self.training)

    # --- what a family implements -------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def norm_is_last(self) -> bool:
        """Whether the layer norm `NORM` is after the last transformer layer, as with pre-norm layers."""

    @abc.abstractmethod
    def frames(self, samples: int) -> int:
        """Return F for an utterance of `samples` at 16 kHz, by the family's own length formula."""

    @abc.abstractmethod
    def front_end(self, waveform: Tensor) -> Tensor:
        """Map one waveform `[T]`, normalised if the checkpoint requires it, to features `[F, C]`, without padding."""

    @abc.abstractmethod
    def first(self, conv: Tensor, packing: Packing) -> Tensor:
        """Map features `[S, C]` to the input of the first transformer layer, `[S, D]`."""

    @abc.abstractmethod
    def layer(self, layer: Any, hidden: Tensor, shared: Tensor | None, packing: Packing) -> Tensor:
        """Apply one transformer layer: `[S, D]` to `[S, D]`. `shared`: what `shared_by_layers` returned."""

    def shared_by_layers(self, packing: Packing) -> Tensor | None:
        """Return what all layers use and is computed once per pass, such as a position bias."""
        return None

    def always_in_evaluation(self) -> list[nn.Module]:
        """Return the modules that stay in evaluation mode in every condition."""
        return [self.backbone.get_submodule(name) for name in self.FRONT_END]

    # --- the same for all families ------------------------------------------------------------------------------------

    @property
    def transformer(self) -> nn.ModuleList:
        """The transformer layers."""
        layers: nn.ModuleList = self.backbone.get_submodule(self.LAYERS)
        return layers

    def parameter_layers(self) -> tuple[tuple[str, int | None], ...]:
        """Return (name pattern, layer) rows; the first match counts. Layers are numbered as hidden states are.

        Parameters of layer `n` change hidden state `n` and those above: 0 is the input of the first transformer layer.
        A norm after the last layer belongs to that layer; None is the front-end.
        """
        rows: list[tuple[str, int | None]] = [(f"backbone.{name}.*", None) for name in self.FRONT_END]
        rows += [("backbone.masked_spec_embed", 0), *((f"backbone.{name}.*", 0) for name in self.INPUTS)]
        if not self.norm_is_last:
            rows.append((f"backbone.{self.NORM}.*", 0))
        rows += [(f"backbone.{self.LAYERS}.{number}.*", number + 1) for number in range(self.depth)]
        return *rows, ("backbone.*", self.depth)

    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        """Return the parameter groups; of several with a matching pattern the first counts.

        Names: front_end, encoder_below, encoder, lora; if layers differ, encoder_layer_03 or lora_layer_03. With frozen
        layers below those that train, everything that feeds them is frozen too. With adapters, all other weights are;
        in a model whose adapters were merged, the projections that had them are the group lora.
        """
        adaptation, top = self.adaptation, max(self.layers)
        rows = []
        if adaptation.lora is not None:
            # `Linear` of peft has the projection as `base_layer`, so its name has `.weight` only without adapters.
            of_layer = ["lora_*", *(f"{target}_proj.weight" for target in adaptation.lora.targets)]
            for number in range(self.below + 1, top + 1):
                patterns = [f"backbone.{self.LAYERS}.{number - 1}.*.{pattern}" for pattern in of_layer]
                rows += [self._trained(pattern, "lora", number, top) for pattern in patterns]
        for pattern, layer in self.parameter_layers():
            if layer is None:
                rows.append(ParameterGroup(pattern, "front_end", None))
            elif self.below and layer <= self.below:
                rows.append(ParameterGroup(pattern, "encoder_below", None))
            elif adaptation.lora is not None or not adaptation.trains_encoder:
                rows.append(ParameterGroup(pattern, "encoder", None))
            else:
                # Layers above the topmost mixed one get no gradient.
                rows.append(self._trained(pattern, "encoder", min(layer, top), top))
        return tuple(rows)

    def _trained(self, pattern: str, name: str, layer: int, top: int) -> ParameterGroup:
        if not self.adaptation.by_layer:
            return ParameterGroup(pattern, name, 0)
        return ParameterGroup(pattern, f"{name}_layer_{layer:02}", top - layer)

    def train(self, mode: bool = True) -> SpeechEncoder:
        """Set the mode of the parts that train; frozen parts always stay in evaluation mode."""
        super().train(mode and self.adaptation.trains_encoder)
        frozen = self.always_in_evaluation()
        if self.has_frozen_inputs:
            frozen += [*map(self.backbone.get_submodule, self.INPUTS), *self.transformer[: self.below]]
        for part in frozen:
            part.eval()
        number_places(self)
        return self

    def averaged_frames(self, samples: int) -> int:
        """Return N for an utterance of `samples` at 16 kHz."""
        return -(-self.frames(samples) // self.group)

    @torch.no_grad()
    def conv_features(self, waveform: Tensor) -> Tensor:
        """Apply the front-end to one utterance, without padding: `[T]` to `[F, C]`."""
        if self.normalize:
            waveform = (waveform - waveform.mean()) / torch.sqrt(waveform.var(correction=0) + 1e-7)
        return self.front_end(waveform)

    def forward(self, conv: Tensor, lengths: Tensor, keys: Sequence[int] = ()) -> Encoded:
        """Encode features of the front-end `[S, C]` and lengths `[B]`. `keys`: what the dropout of each utterance is
        drawn from."""
        states, packing = self.states(conv, lengths, max(self.layers), keys)
        return self._encoded(states, self.layers, packing)

    def states(
        self, conv: Tensor, lengths: Tensor, top: int | None = None, keys: Sequence[int] = ()
    ) -> tuple[dict[int, Tensor], Packing]:
        """Map features `[S, C]` and lengths `[B]` to the hidden states `[S, D]` by layer, up to layer `top` (None:
        all), at the encoder's own frame rate, and to the layout of their frames.
        """
        packing = Packing(lengths.tolist(), conv.device, keys)
        with self._computing(packing):
            # The sums of layers stay in float32 if products do not: layer norms then need no cast and keep no copy.
            hidden = self.first(conv, packing).to(conv.dtype)
            return self._above(0, hidden, packing, top), packing

    def from_boundary(self, boundary: Boundary, lengths: Tensor, keys: Sequence[int] = ()) -> Encoded:
        """Return the same as `forward`, from the states at the boundary."""
        states, packing = self.states_from_boundary(boundary.hidden, lengths, keys)
        above = [number for number in self.layers if number > self.below]
        encoded = self._encoded(states, above, packing)
        if boundary.mixed is None:
            return encoded
        below = [number for number in self.layers if number <= self.below]
        order = [[*below, *above].index(number) for number in self.layers]
        mixed = torch.cat([boundary.mixed.states, encoded.states], dim=1)
        statistics = torch.cat([boundary.mixed.statistics, encoded.statistics], dim=1)
        if order != sorted(order):
            mixed, statistics = mixed[:, order], statistics[:, order]
        return Encoded(mixed, encoded.lengths, statistics)

    def states_from_boundary(
        self, hidden: Tensor, lengths: Tensor, keys: Sequence[int] = ()
    ) -> tuple[dict[int, Tensor], Packing]:
        """Map the states at the boundary `[S, D]` and lengths `[B]` to what `states` returns, for the layers above."""
        packing = Packing(lengths.tolist(), hidden.device, keys)
        with self._computing(packing):
            return self._above(self.below, hidden, packing, max(self.layers)), packing

    @torch.no_grad()
    def to_boundary(self, conv: Tensor, lengths: Tensor) -> Tensor:
        """Map features `[S, C]` and lengths `[B]` to the input `[S, D]` of the lowest layer that trains."""
        states, _ = self.states(conv, lengths, self.below)
        return states[self.below]

    def _encoded(self, states: dict[int, Tensor], layers: Sequence[int], packing: Packing) -> Encoded:
        """Return these layers' hidden states as the head takes them."""
        chosen = [states[number] for number in layers]
        lengths = torch.tensor([-(-frames // self.group) for frames in packing.lengths])
        return Encoded(packing.averaged(chosen, self.group), lengths, packing.statistics(chosen))

    @contextlib.contextmanager
    def _computing(self, packing: Packing) -> Iterator[None]:
        gradient = torch.set_grad_enabled(torch.is_grad_enabled() and self.adaptation.trains_encoder)
        autocast = torch.autocast(packing.device.type, self.precision, enabled=self.precision != torch.float32)
        with gradient, autocast, packing.draws.used():
            yield

    def _above(self, below: int, hidden: Tensor, packing: Packing, top: int | None) -> dict[int, Tensor]:
        """Return hidden states `[S, D]` by layer, from those of layer `below` up to `top` (None: all)."""
        shared = self.shared_by_layers(packing)
        states = {below: hidden}
        for number, layer in enumerate(self.transformer[below:top], start=below + 1):
            if self.gradient_checkpointing and hidden.requires_grad:
                hidden = checkpoint(self._layer, layer, hidden, shared, packing, use_reentrant=False)
            else:
                hidden = self._layer(layer, hidden, shared, packing)
            states[number] = hidden
        if self.norm_is_last and self.depth in states:
            states[self.depth] = self.backbone.get_submodule(self.NORM)(hidden)
        return states

    def _layer(self, layer: Any, hidden: Tensor, shared: Tensor | None, packing: Packing) -> Tensor:
        # With gradient checkpointing the backward pass runs the layer again, and needs the same draws.
        with packing.draws.used(), self.casts.used_by(layer):
            return self.layer(layer, hidden, shared, packing)
