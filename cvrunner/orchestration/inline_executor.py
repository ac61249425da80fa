"""Trials one after the other in this process: for `fold`, for debugging, and to check that Ray changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from cvrunner.orchestration.attempt import attempt
from cvrunner.orchestration.failures import Failure
from cvrunner.records.results import TrainingFinished, TrialResult
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.training.device import default_device
from cvrunner.training.faults import NONE, Chaos
from cvrunner.training.fold_trainer import Event, TrialContext
from cvrunner.training.trial import Trial


class InlineExecutor:
    """One slot; a trial advances by one event a poll."""

    slots = 1

    def __init__(self, cache_dir: Path, device: torch.device | None = None, chaos: Chaos = NONE) -> None:
        self.cache_dir = cache_dir
        self.device = device or default_device()
        self.chaos = chaos
        self.current: tuple[Trial, Iterator[Event | Failure]] | None = None
        self.stopping = False

    def start(self, trial: Trial, directory: TrialDirectory) -> None:
        place = TrialContext(directory, self.cache_dir, self.device, lambda: self.stopping, self.chaos)
        self.current = trial, attempt(trial, place)

    def poll(self, timeout_s: float) -> list[tuple[Trial, Event | Failure]]:
        if self.current is None:
            return []
        trial, events = self.current
        event = next(events)
        if isinstance(event, (Failure, TrialResult, TrainingFinished)):
            self.current = None
        return [(trial, event)]

    def pause(self, trial: Trial) -> None:
        """Never asked for: with one slot there is nothing to gain."""

    def stop(self) -> None:
        self.stopping = True

    def close(self) -> None:
        self.current = None
