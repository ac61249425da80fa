"""What is trained, from which epoch, at which learning rate, and whether it really moved.

A table of rules, first match wins; a parameter that no rule matches is an error that names it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cvrunner.config.sections import TrainConfig
from cvrunner.errors import WeightChangeError
from cvrunner.records.results import ParameterCount

NEVER = 1_000_000
NO_DECAY = (
    "*bias",
    "*norm*",
    "*layer_weights",
    "*ema_logit",
    "*A_log",
    "*.D",
    "*gru_rel_pos_const",
    "*masked_spec_embed",
)


@dataclass(frozen=True)
class Rule:
    """Parameters whose name matches `pattern` are `group`, trained from epoch `start` at most at `learning_rate`."""

    pattern: str
    group: str
    start: int
    learning_rate: float


def rules(train: TrainConfig, freeze_speech_encoder: bool, below: int = 0, stable: bool = False) -> tuple[Rule, ...]:
    """The freezing table of a condition. Epochs count from 1.

    With the layers `below` a boundary frozen, so is what feeds them; a pre-norm encoder (`stable`) has its last norm
    above the boundary, a post-norm one below it.
    """
    start = NEVER if freeze_speech_encoder else 1 + train.freeze_epochs
    frozen = [f"encoder.layers.{layer}.*" for layer in range(below)] if start < NEVER else []
    if frozen:
        frozen += ["feature_projection.*", "encoder.pos_conv_embed.*", "masked_spec_embed"]
        frozen += [] if stable else ["encoder.layer_norm.*"]
    return (
        Rule("encoder.wavlm.feature_extractor.*", "front_end", NEVER, 0.0),
        *(Rule(f"encoder.wavlm.{pattern}", "encoder_below", NEVER, 0.0) for pattern in frozen),
        Rule("encoder.wavlm.*", "encoder", start, train.encoder_lr),
        Rule("head.*", "head", 1, train.lr),
    )


def match(name: str, table: Iterable[Rule]) -> Rule:
    """The first rule that matches a parameter's name. Raises LookupError naming the parameter."""
    for rule in table:
        if fnmatch.fnmatchcase(name, rule.pattern):
            return rule
    raise LookupError(f"parameter {name} is in no group of the freezing table")


class Schedule:
    """The parameter groups of a model over the epochs: who trains, how fast, how far they have moved."""

    def __init__(
        self, model: nn.Module, train: TrainConfig, freeze_speech_encoder: bool, below: int = 0, stable: bool = False
    ) -> None:
        self.train = train
        self.table = rules(train, freeze_speech_encoder, below, stable)
        self.members: dict[str, dict[str, nn.Parameter]] = {rule.group: {} for rule in self.table}
        self.rule_of = {rule.group: rule for rule in self.table}
        for name, parameter in model.named_parameters():
            self.members[match(name, self.table).group][name] = parameter
        self.start = {
            group: [p.detach().to("cpu", copy=True) for p in named.values()] for group, named in self.members.items()
        }
        self.start_norm = {group: math.sqrt(sum(map(_square, tensors))) for group, tensors in self.start.items()}
        # The EMA decay may be fixed by its configuration; it stays so.
        self.fixed = {n for n, p in model.named_parameters() if n.endswith("ema_logit") and not p.requires_grad}

    def trained(self, group: str) -> bool:
        """Whether the group is trained at any time."""
        return self.rule_of[group].start < NEVER

    @property
    def groups(self) -> list[str]:
        """The groups trained at any time."""
        return [group for group in self.members if self.trained(group)]

    def begin_epoch(self, epoch: int) -> None:
        """Switch gradients on for the groups that train in this epoch, and off for all others."""
        for group, named in self.members.items():
            for name, parameter in named.items():
                parameter.requires_grad_(self.rule_of[group].start <= epoch and name not in self.fixed)

    def optimizer(self) -> torch.optim.AdamW:
        """AdamW over all groups ever trained, with and without weight decay; the learning rate is set per update."""
        groups = []
        for group in self.groups:
            for decayed in (True, False):
                parameters = [
                    p for n, p in self.members[group].items() if _decays(n) == decayed and n not in self.fixed
                ]
                decay = self.train.weight_decay if decayed else 0.0
                groups.append({"params": parameters, "weight_decay": decay, "group": group, "lr": 0.0})
        return torch.optim.AdamW(groups, fused=True)

    def learning_rate(self, group: str, update: int, updates_per_epoch: int) -> float:
        """Of a group at an update (from 0): linear warm-up from where the group starts, then cosine to 0."""
        rule = self.rule_of[group]
        begin = (rule.start - 1) * updates_per_epoch
        length = self.train.epochs * updates_per_epoch - begin
        warmup = max(1, round(self.train.warmup_ratio * length))
        position = update - begin
        if position < 0:
            return 0.0
        if position < warmup:
            return rule.learning_rate * (position + 1) / warmup
        progress = (position - warmup) / max(1, length - warmup)
        return rule.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def set_learning_rates(self, optimizer: torch.optim.Optimizer, update: int, updates_per_epoch: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(group["group"], update, updates_per_epoch)

    def gradient_norms(self) -> dict[str, Tensor]:
        """Norm of each trained group's gradient; 0 where there is none."""
        norms = {}
        for group in self.groups:
            gradients = [p.grad for p in self.members[group].values() if p.grad is not None]
            norms[group] = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        return norms

    @torch.no_grad()
    def weight_change(self) -> dict[str, float]:
        """`||w - w0|| / ||w0||` of every group since the start of training, in float64."""
        return {group: self._moved(group) for group in self.members}

    def _moved(self, group: str) -> float:
        moved = 0.0
        for parameter, start in zip(self.members[group].values(), self.start[group], strict=True):
            before = start.to(parameter.device)
            if not torch.equal(parameter, before):  # of a frozen encoder all are equal: half the time of a difference
                moved += _square(parameter - before)
        return math.sqrt(moved) / self.start_norm[group] if moved else 0.0

    def check_weight_change(self, epoch: int, change: dict[str, float], gradient_norms: dict[str, float]) -> None:
        """Raise WeightChangeError if a frozen group moved or a group that trains did not."""
        for group, rule in self.rule_of.items():
            if rule.start > epoch and change[group] != 0:
                raise WeightChangeError(
                    f"{group} is frozen in epoch {epoch}, but its weights moved by {change[group]:.3g} (relative)"
                )
            if rule.start <= epoch and (change[group] == 0 or gradient_norms[group] == 0):
                raise WeightChangeError(
                    f"{group} should train since epoch {rule.start}, but after epoch {epoch} its weights moved by "
                    f"{change[group]:.3g} (relative) with a gradient norm of {gradient_norms[group]:.3g}: the loss "
                    "does not reach it"
                )

    def count(self) -> ParameterCount:
        """Numbers of parameters: total, trained at any time, per group."""
        groups = {group: sum(p.numel() for p in named.values()) for group, named in self.members.items()}
        trainable = sum(count for group, count in groups.items() if self.trained(group))
        return ParameterCount(total=sum(groups.values()), trainable=trainable, groups=groups)


def _square(tensor: Tensor) -> float:
    """`||w||^2`, summed in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _decays(name: str) -> bool:
    return not any(fnmatch.fnmatchcase(name, pattern) for pattern in NO_DECAY)
