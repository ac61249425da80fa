"""What a trial's events say, as one plain line: the same on the screen and in the log of the process that trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cvrunner.orchestration.failures import Failure
from cvrunner.records.results import (
    Ccc,
    EpochRecord,
    FeatureProgress,
    TrialResult,
    TrialStarted,
    Waiting,
    ccc_label,
)

if TYPE_CHECKING:
    from cvrunner.training.fold_trainer import Event


def format_event(event: Event | Failure, dimensions: Sequence[str]) -> str | None:
    """One line without the trial's name; None for what is not worth one. `dimensions`: whose CCC is told."""
    match event:
        case Waiting():
            return f"waits for {event.what}"
        case FeatureProgress():
            return f"{event.kind}: {event.done} of {event.shards} shards in the cache"
        case TrialStarted():
            return started_text(event)
        case EpochRecord():
            seconds, best = event.train_s + event.validation_s, "  best" if event.best else ""
            return (
                f"epoch {event.epoch}/{event.epochs}  loss {event.train_loss:.3f}  validation "
                f"{scores_text(event.validation_ccc, dimensions)}  {seconds:.1f} s{best}"
            )
        case TrialResult():
            return f"done: test {scores_text(event.test_ccc, dimensions)} at epoch {event.best_epoch}"
        case Failure():
            return f"{event.kind.replace('_', ' ')}: {event.message}"
    return None


def started_text(event: TrialStarted) -> str:
    """What is trained, where, and from where on."""
    groups = ", ".join(f"{name} {count:,}" for name, count in event.parameters.groups.items())
    resumed = (
        f", goes on in epoch {event.resumed_epoch} after update {event.resumed_update}"
        if (event.resumed_epoch, event.resumed_update) != (1, 0)
        else ""
    )
    return (
        f"on {event.device} in {event.precision}: {event.parameters.total:,} parameters ({groups}), "
        f"{event.parameters.trainable:,} trained, {event.updates_per_epoch} updates an epoch, saving takes about "
        f"{event.checkpoint_s:.1f} s ({event.checkpoint_mib:,.0f} MiB){resumed}"
    )


def scores_text(ccc: Ccc, dimensions: Sequence[str]) -> str:
    """`CCC-V 0.412  CCC-A 0.553`."""
    return "  ".join(f"{ccc_label(dimension)} {score_text(ccc.get(dimension))}" for dimension in dimensions)


def score_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
