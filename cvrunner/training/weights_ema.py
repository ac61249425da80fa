"""An exponential moving average of the trained weights, for evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class WeightsEma:
    """Averages of some parameters; without a `decay` (None), the parameters themselves."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float | None) -> None:
        self.parameters = parameters
        self.decay = decay
        self.averages = {n: p.detach().clone() for n, p in parameters.items()} if decay is not None else {}

    @torch.no_grad()
    def update(self) -> None:
        """`average = decay * average + (1 - decay) * weight`, after each update."""
        if self.decay is not None:
            for name, average in self.averages.items():
                average.lerp_(self.parameters[name], 1 - self.decay)

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """The averages stand in for the weights inside the `with`."""
        weights = {name: self.parameters[name].detach().clone() for name in self.averages}
        for name, average in self.averages.items():
            self.parameters[name].copy_(average)
        try:
            yield
        finally:
            for name, weight in weights.items():
                self.parameters[name].copy_(weight)
