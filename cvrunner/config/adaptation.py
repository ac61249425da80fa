"""How a condition adapts the speech encoder: the one place where "frozen" is decided.

Everything that depends on it (parameter groups, caches, checkpoints, model folders, estimates, reports) asks here.
A further method, such as LoRA, is a further value of `method`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cvrunner.config.sections import ModelConfig, TrainConfig

Method = Literal["frozen", "top_layers", "full"]
Cached = Literal["conv", "boundary", "hidden"]


@dataclass(frozen=True)
class Adaptation:
    """What happens to the encoder of one condition."""

    method: Method
    start_epoch: int | None
    """First epoch (from 1) in which encoder weights train; None: never."""
    top_layers: int | None
    """Number of transformer layers that train, counted from the top; None: all of them, or none if frozen."""
    encoder_lr: float
    """Peak learning rate of the encoder weights that train; 0 if frozen."""

    @property
    def trains_encoder(self) -> bool:
        """Whether any encoder weight is ever updated, and so has to be saved with the trial."""
        return self.start_epoch is not None

    @property
    def cached(self) -> Cached:
        """What the feature cache holds for this condition besides the conv features, which never train.

        `hidden`: the hidden states of all chosen layers; `boundary`: those that enter the lowest layer that trains;
        `conv`: nothing more, because every transformer layer trains.
        """
        if not self.trains_encoder:
            return "hidden"
        return "conv" if self.top_layers is None else "boundary"


def adaptation_of(model: ModelConfig, train: TrainConfig | None = None) -> Adaptation:
    """Return the adaptation that a condition's settings ask for."""
    train = train or TrainConfig()
    if model.freeze_speech_encoder:
        return Adaptation("frozen", None, None, 0.0)
    method: Method = "full" if model.unfreeze_top_layers is None else "top_layers"
    return Adaptation(method, 1 + train.freeze_epochs, model.unfreeze_top_layers, train.encoder_lr)
