"""A trial's events as plain lines, the same on the screen and in the log of the process that trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cvrunner.orchestration.failures import Failure
from cvrunner.records.results import (
    Ccc,
    EpochRecord,
    FeatureProgress,
    ProbeResult,
    TrainingFinished,
    TrialResult,
    TrialStarted,
    Waiting,
    ccc_label,
)
from cvrunner.text import format_bytes, format_score

if TYPE_CHECKING:
    from cvrunner.training.fold_trainer import Event


def format_event(event: Event | Failure, dimensions: Sequence[str]) -> str | None:
    """Return one line without the trial's name; None for events that are not shown. `dimensions`: CCCs to show."""
    match event:
        case Waiting():
            return f"waits for {event.what}"
        case FeatureProgress():
            return f"{event.kind}: {event.done} of {event.shards} shards in the cache"
        case TrialStarted():
            parameters = event.parameters
            groups = ", ".join(f"{name} {count:,}" for name, count in parameters.groups.items())
            text = (
                f"on {event.device} in {event.precision}: {parameters.total:,} parameters ({groups}), "
                f"{parameters.trainable:,} trained, {event.updates_per_epoch} updates an epoch, saving takes about "
                f"{event.checkpoint_s:.1f} s ({format_bytes(event.checkpoint_mib * 2**20)})"
            )
            if (event.resumed_epoch, event.resumed_update) != (1, 0):
                text += f", resumes in epoch {event.resumed_epoch} after update {event.resumed_update}"
            return text
        case EpochRecord():
            text = (
                f"epoch {event.epoch}/{event.epochs}  loss {event.train_loss:.3f}  validation "
                f"{format_ccc(event.validation_ccc, dimensions)}  {event.train_s + event.validation_s:.1f} s"
            )
            if event.best:
                text += "  best"
            return text
        case TrialResult():
            return f"done: test {format_ccc(event.test_ccc, dimensions)} at epoch {event.best_epoch}"
        case ProbeResult():
            return f"done: test {format_ccc(event.test_ccc, dimensions)}  {event.total_s:.1f} s"
        case TrainingFinished():
            return f"trained: validation {format_ccc(event.validation_ccc, dimensions)} at epoch {event.best_epoch}"
        case Failure():
            return f"{event.kind.replace('_', ' ')}: {event.message}"
    return None


def format_ccc(ccc: Ccc, dimensions: Sequence[str]) -> str:
    """Return `CCC-V 0.4123  CCC-A 0.5531`."""
    return "  ".join(f"{ccc_label(dimension)} {format_score(ccc.get(dimension))}" for dimension in dimensions)
