"""How a condition adapts the speech encoder: the one place where "frozen" is decided.

Everything that depends on it (parameter groups, caches, checkpoints, model folders, estimates, reports) asks here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cvrunner.config.sections import LoraConfig, ModelConfig, TrainConfig

Method = Literal["frozen", "lora", "top_layers", "full"]
Cached = Literal["conv", "boundary", "hidden"]
FINE_TUNED = "fine-tuned"


@dataclass(frozen=True)
class Adaptation:
    """What happens to the encoder of one condition."""

    method: Method
    start_epoch: int | None = None
    """First epoch (from 1) in which encoder weights train; None: never."""
    top_layers: int | None = None
    """Number of transformer layers that train or have adapters, counted from the top; None: all of them, or none if
    frozen."""
    masks_input: bool = False
    """SpecAugment changes the input of the first transformer layer in every pass."""
    lora: LoraConfig | None = None
    """Adapters that train in place of the encoder's own weights."""
    layer_lr_decay: float = 1.0
    """Factor of the learning rate from each layer to the one below."""
    layers_per_epoch: int = 0
    """Number of layers, from the top, that start to train in each epoch from `start_epoch` on; 0: all at once."""

    @property
    def trains_encoder(self) -> bool:
        """Whether any encoder weight or adapter is ever updated, and so is part of checkpoints and model folders."""
        return self.start_epoch is not None

    @property
    def by_layer(self) -> bool:
        """Whether layers differ in learning rate or start, so that each is its own parameter group."""
        return self.layer_lr_decay != 1 or self.layers_per_epoch > 0

    @property
    def cached(self) -> Cached:
        """Features that never change while this condition trains, and so are computed once.

        `hidden`: conv features and the hidden states of all chosen layers; `boundary`: conv features and the hidden
        states that enter the lowest layer that trains; `conv`: the features of the convolutional front-end only.
        """
        if not self.trains_encoder:
            return "hidden"
        if self.masks_input or (self.top_layers is None and self.lora is None):
            return "conv"
        return "boundary"

    @property
    def label(self) -> str:
        """`frozen`, `fine-tuned` or `fine-tuned (LoRA)`, for people."""
        if self.lora is not None:
            return f"{FINE_TUNED} (LoRA)"
        return FINE_TUNED if self.trains_encoder else "frozen"

    def start_of(self, height: int) -> int | None:
        """Return the first epoch in which the layer that is `height` layers below the topmost one trains."""
        if self.start_epoch is None or not self.layers_per_epoch:
            return self.start_epoch
        return self.start_epoch + height // self.layers_per_epoch

    def last_start(self, depth: int, top: int) -> int:
        """Return the first epoch in which everything trains, in an encoder of `depth` layers of which `top` is the
        topmost mixed one; 0 if nothing does."""
        lowest = depth + 1 - (self.top_layers or depth)
        if lowest == 1 and self.lora is None:
            # The input of the first layer trains with the whole encoder, as its own layer.
            lowest = 0
        return self.start_of(top - lowest) or 0


FROZEN = Adaptation("frozen")


def adaptation_of(model: ModelConfig, train: TrainConfig | None = None) -> Adaptation:
    """Return the adaptation that the settings of a condition ask for."""
    if model.freeze_speech_encoder:
        return FROZEN
    train = train or TrainConfig()
    method: Method = "full"
    if model.unfreeze_top_layers is not None:
        method = "top_layers"
    if model.lora.rank:
        method = "lora"
    return Adaptation(
        method,
        start_epoch=1 + train.freeze_epochs,
        top_layers=model.unfreeze_top_layers,
        masks_input=model.spec_augment,
        lora=model.lora if model.lora.rank else None,
        layer_lr_decay=train.layer_lr_decay,
        layers_per_epoch=train.unfreeze_layers_per_epoch,
    )
