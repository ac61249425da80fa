"""Trials one after the other in this process: for `fold`, for debugging, and to check that Ray changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from cvrunner.orchestration.scheduler import Failure, classify
from cvrunner.records.results import TrialResult
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.training.fold_trainer import Event, FoldTrainer, Workplace
from cvrunner.training.trial import Trial


class InlineExecutor:
    """One slot; a trial advances by one event a poll."""

    slots = 1

    def __init__(self, cache_dir: Path, device: torch.device | None = None) -> None:
        self.cache_dir = cache_dir
        self.device = device or torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        self.current: tuple[Trial, Iterator[Event]] | None = None
        self.stopping = False

    def start(self, trial: Trial, directory: TrialDirectory) -> None:
        place = Workplace(directory, self.cache_dir, self.device, lambda: self.stopping)
        self.current = trial, FoldTrainer(trial, place).run()

    def poll(self, timeout_s: float) -> list[tuple[Trial, Event | Failure]]:
        if self.current is None:
            return []
        trial, events = self.current
        try:
            event: Event | Failure = next(events)
        except Exception as error:
            event = classify(error)
        if isinstance(event, (Failure, TrialResult)):
            self.current = None
        return [(trial, event)]

    def stop(self) -> None:
        self.stopping = True

    def close(self) -> None:
        self.current = None
