"""What depends on the device: precision, its name, its memory."""

from __future__ import annotations

import os
import resource
import sys

import torch

# oneDNN (torch's products on a CPU) keeps a program for each of the last 1024 shapes that it met, and no two batches of
# speech have one shape: a few programs are as fast, and a long epoch does not grow.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The encoder's dtype for `train.precision`."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def start_memory_count(device: torch.device) -> None:
    """An actor trains several trials; each counts its own peak on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free_memory(device: torch.device) -> None:
    """Give back what the allocator keeps, after memory ran out."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory_mib(device: torch.device) -> float:
    """Of the GPU's allocator; on a CPU, of this process since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def default_device() -> torch.device:
    """The GPU that this process was given, which it sees as the first; else the CPU."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
