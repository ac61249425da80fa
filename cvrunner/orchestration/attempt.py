"""One attempt at a trial: its events, and its failure as the last of them; and the executor without Ray."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from cvrunner.errors import (
    CvrunnerError,
    DeviceError,
    MemoryLimitError,
    NonFiniteError,
    Stopped,
    TrialError,
    TrialInUseError,
)
from cvrunner.files import FULL_DISK, PERMANENT, is_transient
from cvrunner.orchestration.failures import Failure, FailureKind
from cvrunner.orchestration.machine import find_driver, find_gpus, visible_gpus
from cvrunner.records.results import Ending
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.training.device import is_out_of_memory
from cvrunner.training.faults import NONE, Chaos
from cvrunner.training.fold_trainer import Event, FoldTrainer, TrialContext
from cvrunner.training.linear_probe import fit_fold
from cvrunner.training.trial import LinearProbe, Trial

KIND_BY_ERROR: tuple[tuple[type[BaseException], FailureKind], ...] = (
    (Stopped, "stopped"),
    (NonFiniteError, "non_finite"),
    (MemoryLimitError, "permanent"),
    (TrialInUseError, "io"),
    (TrialError, "permanent"),
    (CvrunnerError, "configuration"),
    (torch.AcceleratorError, "gpu"),
    (MemoryError, "host_memory"),
)
"""The first type that matches decides, so subclasses come before their bases."""


def training_device(trial: Trial) -> torch.device:
    """Return the CPU, or the first visible GPU, which is the one that Ray assigned.

    Raises DeviceError if torch cannot use the GPU that the trial is for, or if `train.device` is `auto` and there is a
    GPU although the trial is for a CPU: it would train on the CPU while it holds the GPU.
    """
    gpus = [gpu.name for gpu in visible_gpus(find_gpus(), os.environ)]
    if trial.device == "cuda":
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        driver, shown = find_driver(), ", ".join(gpus) or "no GPU"
        found, build = "there is no NVIDIA driver", "a CPU build"
        if torch.version.cuda:
            build = f"built for CUDA {torch.version.cuda}"
        if driver is not None:
            found = f"the driver, {driver.version} for CUDA up to {driver.cuda}, shows {shown}"
        raise DeviceError(
            f"{trial.name} is for a GPU, but torch {torch.__version__}, {build}, can use none; {found}. `cvrunner "
            "doctor` compares them; --set train.device=cpu trains on the CPU"
        )
    if gpus and trial.config.train.device == "auto":
        raise DeviceError(
            f"{trial.name} is for a CPU, since no GPU was found where the run began, but here is {', '.join(gpus)}: "
            "--set train.device=cuda, or cpu"
        )
    return torch.device("cpu")


def attempt(trial: Trial, context: TrialContext) -> Iterator[Event | Failure]:
    """Train a trial or fit a linear probe; the last event is an Ending or a Failure."""
    # The failure is built here, in the process that trains: an exception loses its traceback on the way to the driver.
    try:
        if isinstance(trial, LinearProbe):
            yield from fit_fold(trial, context)
        else:
            yield from FoldTrainer(trial, context).run()
    except Exception as error:
        yield classify(error)


def classify(error: BaseException) -> Failure:
    """Return the Failure for an exception raised by a trial, by its type."""
    kind = _kind(error)
    message = str(error) or type(error).__name__
    if kind == "disk_full":
        message += "; free some space, then the same command continues"
    if isinstance(error, CvrunnerError):
        return Failure(kind, message)
    frames = traceback.extract_tb(error.__traceback__)
    place = " > ".join(f"{frame.filename}:{frame.lineno}" for frame in frames) + f" {type(error).__name__}"
    return Failure(kind, f"{type(error).__name__}: {message}", "".join(traceback.format_exception(error)), place)


def _kind(error: BaseException) -> FailureKind:
    # Before the table: a full GPU can have the type of a broken one.
    if is_out_of_memory(error):
        return "gpu_memory"
    for error_type, kind in KIND_BY_ERROR:
        if isinstance(error, error_type):
            return kind
    if isinstance(error, OSError) and is_transient(error):
        return "io"
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return "disk_full"
    if isinstance(error, OSError) and error.errno in PERMANENT:
        return "permanent"
    return "bug"


class InlineExecutor:
    """Runs trials one after the other in this process; a trial advances by one event per poll.

    For `fold`, for debugging, and to check that Ray changes nothing.
    """

    slots = 1

    def __init__(self, cache_dir: Path, device: torch.device | None = None, chaos: Chaos = NONE) -> None:
        self.cache_dir = cache_dir
        self.device = device
        self.chaos = chaos
        self.current: tuple[Trial, Iterator[Event | Failure]] | None = None
        self.stopping = False

    def start(self, trial: Trial, directory: TrialDirectory) -> None:
        self.current = trial, self._attempt(trial, directory)

    def _attempt(self, trial: Trial, directory: TrialDirectory) -> Iterator[Event | Failure]:
        try:
            device = self.device or training_device(trial)
        except DeviceError as error:
            yield classify(error)
            return
        yield from attempt(trial, TrialContext(directory, self.cache_dir, device, lambda: self.stopping, self.chaos))

    def poll(self, timeout_s: float) -> list[tuple[Trial, Event | Failure]]:
        if self.current is None:
            return []
        trial, events = self.current
        event = next(events)
        if isinstance(event, Failure | Ending):
            self.current = None
        return [(trial, event)]

    def pause(self, trial: Trial) -> None:
        """Do nothing: with one slot a pause never ends the run earlier, so the scheduler does not ask for one."""

    def stop(self) -> None:
        self.stopping = True

    def close(self) -> None:
        self.current = None
