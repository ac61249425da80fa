"""What NVIDIA's driver says of this machine's GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """One GPU at one moment."""

    name: str
    used_mib: float
    total_mib: float
    utilisation: int | None
    """Percent of the last moments that it was busy; None: the driver does not tell."""
    others_mib: dict[int, float | None]
    """By process other than this one: its memory, None where the driver does not tell."""


def gpu_names() -> tuple[str, ...]:
    """Empty without a driver."""
    return tuple(gpu.name for gpu in find_gpus())


def find_gpus() -> tuple[Gpu, ...]:
    """Empty without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library, no driver, no permission: all the same here
        return ()
    try:
        return tuple(_gpus(pynvml))
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def gpu_lines(gpus: Sequence[Gpu]) -> list[str]:
    """A line for each, or one that says that there is none."""
    if not gpus:
        return ["no GPU on this machine"]
    return [_line(index, gpu) for index, gpu in enumerate(gpus)]


def _line(index: int, gpu: Gpu) -> str:
    busy = "" if gpu.utilisation is None else f", {gpu.utilisation} % busy"
    others = ", ".join(
        f"process {pid}: {'unknown' if mib is None else f'{mib:,.0f} MiB'}" for pid, mib in gpu.others_mib.items()
    )
    shared = f", used by others ({others})" if others else ""
    return f"GPU {index}: {gpu.name}, {gpu.used_mib:,.0f} of {gpu.total_mib:,.0f} MiB used{busy}{shared}"


def _gpus(nvml: Any) -> Iterator[Gpu]:
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        try:
            busy = int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        except nvml.NVMLError:  # not told for a slice of a GPU
            busy = None
        try:
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except nvml.NVMLError:
            processes = []
        others = {
            process.pid: None if process.usedGpuMemory is None else process.usedGpuMemory / MIB
            for process in processes
            if process.pid != os.getpid()
        }
        yield Gpu(str(nvml.nvmlDeviceGetName(handle)), memory.used / MIB, memory.total / MIB, busy, others)
