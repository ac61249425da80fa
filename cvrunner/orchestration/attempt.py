"""One try at a trial, whatever it runs on: its events, and its failure as the last of them."""

from __future__ import annotations

import traceback
from collections.abc import Iterator

import torch

from cvrunner.errors import CvrunnerError, MemoryLimitError, NonFiniteError, Stopped, TrialError, TrialInUseError
from cvrunner.files import PERMANENT, is_transient
from cvrunner.orchestration.failures import Failure, FailureKind
from cvrunner.training.fold_trainer import Event, FoldTrainer, TrialContext
from cvrunner.training.trial import Trial

KINDS: tuple[tuple[type[BaseException], FailureKind], ...] = (
    (Stopped, "stopped"),
    (NonFiniteError, "non_finite"),
    (MemoryLimitError, "permanent"),
    (TrialInUseError, "io"),
    (TrialError, "permanent"),
    (CvrunnerError, "configuration"),
    (torch.OutOfMemoryError, "gpu_memory"),
    (torch.AcceleratorError, "gpu"),
    (MemoryError, "host_memory"),
)
"""The first type that an exception is of says its kind."""


def attempt(trial: Trial, place: TrialContext) -> Iterator[Event | Failure]:
    """Ends with TrialResult, Trained or Failure, which is made here, where the exception still has its traceback."""
    try:
        yield from FoldTrainer(trial, place).run()
    except Exception as error:
        yield classify(error)


def classify(error: BaseException) -> Failure:
    """A Failure from an exception raised by a trial, by its type."""
    kind = _kind(error)
    message = str(error) or type(error).__name__
    if isinstance(error, CvrunnerError):
        return Failure(kind, message)
    frames = traceback.extract_tb(error.__traceback__)
    place = " > ".join(f"{frame.filename}:{frame.lineno}" for frame in frames) + f" {type(error).__name__}"
    return Failure(kind, f"{type(error).__name__}: {message}", "".join(traceback.format_exception(error)), place)


def _kind(error: BaseException) -> FailureKind:
    for type_, kind in KINDS:
        if isinstance(error, type_):
            return kind
    if isinstance(error, OSError):
        return "io" if is_transient(error) else "permanent" if error.errno in PERMANENT else "bug"
    return "bug"
