"""Weights in the precision of an encoder's matrix products, cast once for all passes of an update.

autocast casts a weight once per forward pass. It can keep its casts for several passes, but those that it has made
without gradient are of no use to a pass with gradient. Here all weights of a layer are cast by one call, with gradient,
and serve both kinds of passes. Gradients are cast back and then added to each other in float32, as autocast does it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Weight:
    """A weight or bias of a linear module, and its cast."""

    def __init__(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        self.module, self.name, self.parameter = module, name, parameter
        self.cast: Tensor | None = None
        self.made_of: tuple[int, bool] | None = None

    @property
    def state(self) -> tuple[int, bool]:
        """What a cast is valid for: a version of the weight, and whether it trains."""
        return self.parameter._version, self.parameter.requires_grad


class WeightCasts:
    """Casts of the linear weights of an encoder to `dtype`; none in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._parts: dict[nn.Module, list[_Weight]] = {}
        self._kept = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Cast each weight once inside the `with` block. Casts of frozen weights last, until `clear` or a change."""
        self._kept = self.dtype != torch.float32
        try:
            yield
        finally:
            self._kept = False
            for weight in itertools.chain.from_iterable(self._parts.values()):
                if weight.parameter.requires_grad:
                    weight.cast = None

    def clear(self) -> None:
        """Free all casts."""
        self._parts.clear()

    @contextmanager
    def used_by(self, part: nn.Module) -> Iterator[None]:
        """Let a part of the encoder use its casts inside the `with` block, if casts are kept now."""
        if not self._kept:
            yield
            return
        if part not in self._parts:
            linear = [module for module in part.modules() if type(module) is nn.Linear]
            self._parts[part] = [_Weight(m, name, p) for m in linear for name, p in m.named_parameters()]
        weights = self._parts[part]
        for trains in (True, False):
            # Apart: all results of a call have a gradient if one of them does.
            of_kind = [w for w in weights if w.parameter.requires_grad == trains]
            missing = [w for w in of_kind if w.cast is None or w.made_of != w.state]
            if missing:
                # With gradient also in a pass without, since the next pass may need it.
                with torch.enable_grad():
                    casts = _Cast.apply(self.dtype, *(w.parameter for w in missing))  # type: ignore[no-untyped-call]
                for weight, cast in zip(missing, casts, strict=True):
                    weight.cast, weight.made_of = cast, weight.state
        try:
            for weight in weights:
                weight.module._parameters[weight.name] = weight.cast  # type: ignore[assignment]
            yield
        finally:
            for weight in weights:
                weight.module._parameters[weight.name] = weight.parameter


class _Cast(torch.autograd.Function):
    """Casts of tensors, by one call forward and one backward. The graph keeps nothing, so it can be used repeatedly."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        # Otherwise a weight without a gradient would get one of zeros.
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        return _cast(weights, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = iter(_cast([g for g in gradients if g is not None], ctx.dtype))
        return None, *(None if g is None else next(cast) for g in gradients)


def _cast(tensors: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    cast = [torch.empty_like(x, dtype=dtype) for x in tensors]
    torch._foreach_copy_(cast, list(tensors))
    return tuple(cast)
