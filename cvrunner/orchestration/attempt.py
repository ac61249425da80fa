"""One try at a trial, whatever it runs on: its events, and its failure as the last of them."""

from __future__ import annotations

from collections.abc import Iterator

from cvrunner.orchestration.failures import Failure, classify
from cvrunner.training.fold_trainer import Event, FoldTrainer, Workplace
from cvrunner.training.trial import Trial


def attempt(trial: Trial, place: Workplace) -> Iterator[Event | Failure]:
    """Ends with a TrialResult or a Failure, which is made here, where the exception still has its traceback."""
    try:
        yield from FoldTrainer(trial, place).run()
    except Exception as error:
        yield classify(error)
