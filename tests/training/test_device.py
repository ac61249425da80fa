"""What depends on the device, with a stand-in for CUDA that rejects calls before initialisation, as CUDA does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cvrunner.training import device

GPU = torch.device("cuda:0")
INIT_FIRST = "Invalid device argument : did you call init?"


class StandInCuda:
    """CUDA of one process; `calls` are those after `init`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.initialised = False
        monkeypatch.setattr(torch.cuda, "init", self.init)
        for name in ("reset_peak_memory_stats", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, self.rejecting(name))

    def init(self) -> None:
        self.initialised = True

    def rejecting(self, name: str) -> Callable[..., Any]:
        def call(*_: Any) -> None:
            if not self.initialised:
                raise RuntimeError(INIT_FIRST)
            self.calls.append(name)

        return call


def test_the_first_cuda_call_of_a_trial_initialises_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = StandInCuda(monkeypatch)
    with pytest.raises(RuntimeError, match="did you call init"):
        device.free_memory(GPU)
    device.start_memory_count(GPU)
    assert cuda.calls == ["reset_peak_memory_stats"]


def test_a_trial_on_a_cpu_does_not_touch_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = StandInCuda(monkeypatch)
    device.start_memory_count(torch.device("cpu"))
    assert not cuda.initialised
