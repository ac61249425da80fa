"""The freezing table: which parameters train, from which epoch, at which learning rate, and whether they changed.

The encoder sorts its parameters into groups, the condition's adaptation says when each group trains. A parameter that
no rule matches is an error that names it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cvrunner.config.sections import TrainConfig
from cvrunner.encoders.encoder import SpeechEncoder
from cvrunner.errors import WeightChangeError
from cvrunner.model.mamba_ema import MambaEMAModel
from cvrunner.records.results import ParameterCount

NEVER = 1_000_000
"""Start epoch of a group that never trains."""
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

LEAST_SHARE = 0.01
"""Share of the implied weight change below which a group has barely moved."""
LEAST_CHANGE = 1e-6
"""Relative weight change below which a group has barely moved, however small its learning rate is."""


@dataclass(frozen=True)
class Rule:
    """Parameters whose name matches `pattern` belong to `group`, which trains from epoch `start` (from 1) at most at
    `learning_rate`."""

    pattern: str
    group: str
    start: int
    learning_rate: float


def rules(encoder: SpeechEncoder, train: TrainConfig) -> tuple[Rule, ...]:
    """Return the freezing table of an encoder and its head; the first rule that matches a name counts."""
    adaptation, table = encoder.adaptation, []
    peak = train.encoder_lr if adaptation.lora is None else train.lora_lr
    for pattern, group, height in encoder.parameter_groups():
        if height is None or (start := adaptation.start_of(height)) is None:
            table.append(Rule(f"encoder.{pattern}", group, NEVER, 0.0))
        else:
            rate = peak * adaptation.layer_lr_decay**height
            table.append(Rule(f"encoder.{pattern}", group, start, rate))
    return *table, Rule("head.*", "head", 1, train.lr)


def match(name: str, table: Iterable[Rule]) -> Rule:
    """The first rule that matches a parameter's name. Raises LookupError naming the parameter."""
    for rule in table:
        if fnmatch.fnmatchcase(name, rule.pattern):
            return rule
    raise LookupError(f"parameter {name} is in no group of the freezing table")


class Schedule:
    """The parameter groups of a model over the epochs: who trains, how fast, how much the weights have changed."""

    def __init__(self, model: MambaEMAModel, train: TrainConfig) -> None:
        self.train = train
        self.table = rules(model.encoder, train)
        members: dict[str, dict[str, nn.Parameter]] = {rule.group: {} for rule in self.table}
        for name, parameter in model.named_parameters():
            members[match(name, self.table).group][name] = parameter
        # Whisper has no parameters between its front-end and the first layer.
        self.members = {group: named for group, named in members.items() if named}
        self.rule_of = {rule.group: rule for rule in self.table if rule.group in self.members}
        # What the head itself holds fixed: an EMA decay that the configuration gives, and the linear path.
        self.fixed = {n for n, p in model.head.named_parameters("head") if not p.requires_grad}
        # The copy is in host memory: on a GPU it would take as much as the weights.
        self.start = {
            group: [p.detach().to("cpu", copy=True) for n, p in named.items() if n not in self.fixed]
            for group, named in self.members.items()
        }
        self.start_norm = {group: math.sqrt(sum(map(_square, tensors))) for group, tensors in self.start.items()}

    @property
    def groups(self) -> list[str]:
        """Groups that train in any epoch."""
        return [group for group in self.members if self.rule_of[group].start < NEVER]

    def begin_epoch(self, epoch: int) -> None:
        """Enable gradients of the groups that train in this epoch, and disable all others."""
        for group, named in self.members.items():
            for name, parameter in named.items():
                parameter.requires_grad_(self.rule_of[group].start <= epoch and name not in self.fixed)

    def optimizer(self) -> torch.optim.AdamW:
        """Return AdamW over all groups that ever train, with and without weight decay. Learning rates are set later."""
        groups = []
        for group in self.groups:
            trained = {name: p for name, p in self.members[group].items() if name not in self.fixed}
            undecayed = {name for name in trained for pattern in NO_DECAY if fnmatch.fnmatchcase(name, pattern)}
            layer_weights = {name for name in trained if name.endswith("layer_weights")}
            for names, decay, scale in (
                (trained.keys() - undecayed, self.train.weight_decay, 1.0),
                (undecayed - layer_weights, 0.0, 1.0),
                # Softmax logits that move as slowly as other weights leave the mix a plain mean of the layers.
                (layer_weights, 0.0, self.train.layer_weights_lr / self.train.lr),
            ):
                parameters = [p for name, p in trained.items() if name in names]
                if parameters:
                    groups.append(
                        {"params": parameters, "weight_decay": decay, "group": group, "scale": scale, "lr": 0.0}
                    )
        return torch.optim.AdamW(groups, fused=True)

    def learning_rate(self, group: str, update: int, updates_per_epoch: int) -> float:
        """Return a group's learning rate at an update (from 0): linear warm-up from its first epoch, then cosine."""
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
            group["lr"] = group["scale"] * self.learning_rate(group["group"], update, updates_per_epoch)

    def gradient_norms(self) -> dict[str, Tensor]:
        """Return the gradient norm of each group that trains; 0 without a gradient."""
        norms = {}
        for group in self.groups:
            parameters = list(self.members[group].values())
            gradients = [p.grad for p in parameters if p.grad is not None]
            norms[group] = torch.zeros((), device=parameters[0].device)
            if gradients:
                norms[group] = torch.nn.utils.get_total_norm(gradients)
        return norms

    @torch.no_grad()
    def weight_change(self) -> dict[str, float]:
        """Return `||w - w0|| / ||w0||` of every group since the start of training, in float64."""
        change = dict.fromkeys(self.members, 0.0)
        for group, named in self.members.items():
            moved = 0.0
            moving = [p for name, p in named.items() if name not in self.fixed]
            for parameter, start in zip(moving, self.start[group], strict=True):
                before = start.to(parameter.device)
                # A frozen encoder has only equal weights: comparing takes a tenth of the time of a float64 difference.
                if not torch.equal(parameter, before):
                    moved += _square(parameter - before)
            if moved:
                change[group] = math.sqrt(moved) / self.start_norm[group]
        return change

    def implied_change(self, group: str, updates: int, updates_per_epoch: int) -> float:
        """Return the relative weight change that the learning rates of the first `updates` imply.

        AdamW scales every parameter's step to about its learning rate. If the gradients were noise without a direction,
        each of n parameters would walk `sqrt(sum lr_t^2)` at random, and the group `sqrt(n sum lr_t^2) / ||w0||`; any
        direction in the gradients moves it further.
        """
        walked = sum(self.learning_rate(group, update, updates_per_epoch) ** 2 for update in range(updates))
        count = sum(p.numel() for name, p in self.members[group].items() if name not in self.fixed)
        return math.sqrt(count * walked) / self.start_norm[group]

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
        """Count parameters: all, those that ever train, and per group."""
        groups = {group: sum(p.numel() for p in named.values()) for group, named in self.members.items()}
        trainable = sum(groups[group] for group in self.groups)
        return ParameterCount(total=sum(groups.values()), trainable=trainable, groups=groups)


def barely_moved(change: float, implied: float) -> bool:
    """Whether a group moved far less than its learning rates imply, or not at all to speak of.

    Gradients that are zero, or so small that AdamW's epsilon outweighs them, do that; weight decay alone then moves the
    weights. A learning rate that is far too small falls below `LEAST_CHANGE`.
    """
    return change < max(LEAST_CHANGE, LEAST_SHARE * implied)


def _square(tensor: Tensor) -> float:
    """Return `||w||^2`, summed in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
