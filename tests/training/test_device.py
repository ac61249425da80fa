"""What depends on the device, with a stand-in for CUDA that rejects calls before initialisation, as CUDA does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cvrunner.errors import UsageError
from cvrunner.orchestration.machine import Gpu
from cvrunner.run import commands
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


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (torch.AcceleratorError("CUDA error: out of memory", 2), True),
        (torch.AcceleratorError("CUDA error: device-side assert triggered", 710), False),
        (RuntimeError("The size of tensor a must match the size of tensor b"), False),
    ],
)
def test_every_failed_allocation_becomes_one_error_and_others_stay(error: Exception, expected: bool) -> None:
    with pytest.raises(torch.OutOfMemoryError if expected else type(error)), device.memory_errors():
        raise error
    assert device.is_out_of_memory(error) == expected


def test_an_actor_sets_allocator_and_order_of_gpus_before_torch_is_imported() -> None:
    code = (
        "import os, sys; import cvrunner.orchestration.ray_actor; "
        "print('torch' in sys.modules, os.environ.get('PYTORCH_ALLOC_CONF'), os.environ['CUDA_DEVICE_ORDER'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTORCH", "CUDA"))}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "expandable_segments:True", "PCI_BUS_ID"]
    own = environment | {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    done = subprocess.run(run, env=own, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "None", "FASTEST_FIRST"]


def test_a_gpu_is_found_by_its_uuid_whatever_order_cuda_has(monkeypatch: pytest.MonkeyPatch) -> None:
    uuids = ["1c9d-e0", "8f2c-17"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=uuids[i]))
    assert device.find_device("GPU-8f2c-17") == torch.device("cuda", 1)
    assert device.find_device("GPU-77aa-00") is None


def test_fold_takes_the_gpu_that_nvidia_smi_counts_whatever_order_cuda_has(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = tuple(Gpu("RTX 4090", 1.0, 24564.0, 0, {}, uuid) for uuid in ("GPU-1c9d-e0", "GPU-8f2c-17", "GPU-77aa-00"))
    monkeypatch.setattr(commands, "find_gpus", lambda: gpus)
    # CUDA has another order, and the third is hidden from it.
    uuids, used = ["8f2c-17", "1c9d-e0"], list[torch.device]()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=uuids[i]))
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    assert commands.chosen_gpu(0, "auto") == torch.device("cuda", 1)
    assert used == [torch.device("cuda", 1)]
    for number, why in ((2, "torch cannot use it"), (3, "this machine has 3 GPUs")):
        with pytest.raises(UsageError, match=why):
            commands.chosen_gpu(number, "auto")


def test_convolutions_do_not_run_in_tf32() -> None:
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("requested", [True, False])
def test_deterministic_algorithms_are_for_gpus(monkeypatch: pytest.MonkeyPatch, requested: bool) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        device.use_deterministic_algorithms(torch.device("cpu"), True)
        assert not torch.are_deterministic_algorithms_enabled()
        device.use_deterministic_algorithms(GPU, requested)
        assert torch.are_deterministic_algorithms_enabled() == requested
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if requested else None)
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
