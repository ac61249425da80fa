"""Everything that depends on the device: precision, name, memory."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# oneDNN (torch's matrix products on a CPU) caches a compiled program for each of the last 1024 shapes, and no two
# batches of speech have the same shape: a small cache is as fast, and memory does not grow during a long epoch.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
# In TF32, torch's default for convolutions on a GPU, they err by 1e-3. Features go into a cache that a CPU may share.
torch.backends.cudnn.allow_tf32 = False

ALLOCATION_FAILURES = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    # A full GPU while the CUDA context is created.
    "CUDA error: out of memory",
)


def choose_precision(requested: str, device: torch.device) -> torch.dtype:
    """Return the encoder's dtype for `train.precision`."""
    if requested == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported():
        requested = "bfloat16"
    return torch.bfloat16 if requested == "bfloat16" else torch.float32


def precision_name(dtype: torch.dtype) -> str:
    """Return the name that a configuration and a result have for a precision, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or `cpu`."""
    if device.type != "cuda":
        return "cpu"
    return torch.cuda.get_device_name(device)


def use_deterministic_algorithms(device: torch.device, requested: bool) -> None:
    """Make a GPU repeat itself bit for bit, or not; an operation that cannot warns. A CPU always does."""
    if device.type != "cuda":
        return
    if requested:
        # Read when cuBLAS starts: with more workspaces it chooses among algorithms.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(requested, warn_only=True)
    # It would also fill each new tensor, to find reads before writes: of no use here, and slow.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def start_memory_count(device: torch.device) -> None:
    """Reset the GPU's peak memory: an actor trains several trials, and each reports its own peak."""
    if device.type == "cuda":
        # As the first CUDA call of a process, the reset would fail: unlike most calls, it does not initialise CUDA.
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation on the GPU failed, by torch's allocator or by cuBLAS, cuDNN or the CUDA context.

    The latter arrive as a RuntimeError, or as the AcceleratorError of a broken GPU, which only their text tells apart.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ALLOCATION_FAILURES)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise torch.OutOfMemoryError for every failed allocation on the GPU."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


def free_memory(device: torch.device) -> None:
    """Release cached GPU memory after an out-of-memory error, once nothing refers to the failed graph any more."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak of the GPU's allocator; on a CPU, the peak of this process since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def free_bytes(device: torch.device, share: float, reserved: int) -> float | None:
    """Return the bytes of the GPU that are left to a trial with a `share` of it, apart from what it already holds and
    from `reserved`; None on a CPU."""
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    return total * share - torch.cuda.memory_allocated(device) - reserved


def memory_growth(device: torch.device, work: Callable[[], object]) -> int:
    """Return the bytes by which some work on the GPU exceeds what is allocated before."""
    start_memory_count(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def find_device(uuid: str) -> torch.device | None:
    """Return the GPU with a UUID as NVIDIA's driver reports it; None if torch cannot use it.

    CUDA may number GPUs in another order than the driver: the fastest first, and only those in CUDA_VISIBLE_DEVICES.
    """
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid.removeprefix("GPU-"):
            return torch.device("cuda", index)
    return None


def default_device() -> torch.device:
    """Return the first visible GPU, or the CPU: for predictions, which may run on either."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
