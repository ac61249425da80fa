"""How a condition adapts the speech encoder: the one place where "frozen" is decided.

Everything that depends on it (parameter groups, caches, checkpoints, model folders, estimates, reports) asks here.
A further method, such as LoRA, is a further value of `method` with its groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cvrunner.config.sections import ModelConfig, TrainConfig

Method = Literal["frozen", "top_layers", "full"]
Cached = Literal["conv", "boundary", "hidden"]
FINE_TUNED = "fine-tuned"


@dataclass(frozen=True)
class Adaptation:
    """What happens to the encoder of one condition."""

    method: Method
    start_epoch: int | None = None
    """First epoch (from 1) in which encoder weights train; None: never."""
    top_layers: int | None = None
    """Number of transformer layers that train, counted from the top; None: all of them, or none if frozen."""
    masks_input: bool = False
    """SpecAugment changes the input of the first transformer layer in every pass."""

    @property
    def trains_encoder(self) -> bool:
        """Whether any encoder weight is ever updated, and so is part of checkpoints and model folders."""
        return self.start_epoch is not None

    @property
    def cached(self) -> Cached:
        """Features that never change while this condition trains, and so are computed once.

        `hidden`: conv features and the hidden states of all chosen layers; `boundary`: conv features and the hidden
        states that enter the lowest layer that trains; `conv`: the features of the convolutional front-end only.
        """
        if not self.trains_encoder:
            return "hidden"
        return "boundary" if self.top_layers is not None and not self.masks_input else "conv"

    @property
    def label(self) -> str:
        """`frozen` or `fine-tuned`, for people."""
        return FINE_TUNED if self.trains_encoder else "frozen"

    def start_of(self, group: str) -> int | None:
        """Return the first epoch in which a parameter group trains; None: never."""
        if group == "head":
            return 1
        return self.start_epoch if group == "encoder" else None


FROZEN = Adaptation("frozen")


def adaptation_of(model: ModelConfig, train: TrainConfig | None = None) -> Adaptation:
    """Return the adaptation that the settings of a condition ask for."""
    if model.freeze_speech_encoder:
        return FROZEN
    method: Method = "full" if model.unfreeze_top_layers is None else "top_layers"
    freeze_epochs = 0 if train is None else train.freeze_epochs
    return Adaptation(method, 1 + freeze_epochs, model.unfreeze_top_layers, model.spec_augment)
