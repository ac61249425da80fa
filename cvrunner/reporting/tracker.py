"""A run as the tracking server sees it. The files are the truth this is a mirror, which may fail when training may not.

The driver alone writes. What was missed is written from the files at the end of the run, or by `sync_run`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cvrunner.config import Config
from cvrunner.records.results import EpochRecord, RunRecord, RunStatus, Summary, TrialResult, TrialStatus
from cvrunner.records.run_directory import RunDirectory
from cvrunner.reporting.tracking_mirror import MlflowMirror, first_line, mirror_files

Warn = Callable[[str], None]


class Tracker(Protocol):
    """What the driver tells about a run. No method raises."""

    def start(self, run: RunRecord, config: Config, directory: RunDirectory) -> None:
        """Before the first trial."""

    def trial_started(self, name: str) -> None:
        """An attempt at a trial begins; `name` as in run.json."""

    def epoch(self, name: str, record: EpochRecord) -> None:
        """A trial has finished an epoch; telling it twice changes nothing."""

    def trial_finished(
        self, name: str, result: TrialResult | None, status: TrialStatus, error: str | None = None
    ) -> None:
        """A trial is done, failed or stopped."""

    def finish(self, summary: Summary, status: RunStatus) -> None:
        """After comparison.md, figures and report.html were written, or when the run was stopped."""

    def links(self, base_url: str | None = None) -> dict[str, str]:
        """Addresses of the run's pages by name; none where there are none."""


@dataclass
class MemoryTracker:
    """Keeps what it is told: for tests, and in place of a tracker where tracking is off."""

    calls: list[tuple[str, object]] = field(default_factory=list)

    def start(self, run: RunRecord, config: Config, directory: RunDirectory) -> None:
        self.calls.append(("start", run.run))

    def trial_started(self, name: str) -> None:
        self.calls.append(("trial_started", name))

    def epoch(self, name: str, record: EpochRecord) -> None:
        self.calls.append(("epoch", (name, record.epoch)))

    def trial_finished(
        self, name: str, result: TrialResult | None, status: TrialStatus, error: str | None = None
    ) -> None:
        self.calls.append(("trial_finished", (name, status)))

    def finish(self, summary: Summary, status: RunStatus) -> None:
        self.calls.append(("finish", status))

    def links(self, base_url: str | None = None) -> dict[str, str]:
        return {}


class MlflowTracker:
    """Mirrors a run to MLflow. After a failure it keeps quiet until `finish`, which tries again from the files.

    A server that is away then costs a run seconds, not seconds for every epoch of every trial.
    """

    def __init__(self, uri: str, warn: Warn | None = None) -> None:
        self._uri = uri
        self._warn = warn or logging.getLogger("cvrunner").warning
        self._mirror = MlflowMirror(uri)
        self._directory: RunDirectory | None = None
        self._failed = False

    def start(self, run: RunRecord, config: Config, directory: RunDirectory) -> None:
        self._directory = directory
        self._try("start", lambda: self._mirror.start(run, config, directory))

    def trial_started(self, name: str) -> None:
        self._try(name, lambda: self._mirror.trial_started(name))

    def epoch(self, name: str, record: EpochRecord) -> None:
        self._try(name, lambda: self._mirror.epoch(name, record))

    def trial_finished(
        self, name: str, result: TrialResult | None, status: TrialStatus, error: str | None = None
    ) -> None:
        self._try(name, lambda: self._mirror.trial_finished(name, result, status, error))

    def finish(self, summary: Summary, status: RunStatus) -> None:
        if self._failed and self._directory:
            directory, self._failed = self._directory, False
            self._try("finish", lambda: self._mirror_again(directory, summary))
        else:
            self._try("finish", lambda: self._mirror.finish(summary, status))

    def links(self, base_url: str | None = None) -> dict[str, str]:
        found: dict[str, str] = {}
        self._try("links", lambda: found.update(self._mirror.links(base_url)))
        return found

    def _mirror_again(self, directory: RunDirectory, summary: Summary) -> None:
        self._mirror = mirror_files(directory, self._uri, summary)

    def _try(self, what: str, write: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            write()
        except Exception as error:  # whatever it is, training goes on
            self._failed = True
            self._warn(
                f"MLflow ({self._uri}): {what} could not be written: {first_line(error)}; the run "
                "goes on, and `cvrunner sync RUN` writes it from the files"
            )


def tracker_for(config: Config, results_root: Path, warn: Warn | None = None) -> Tracker:
    """The tracker that `tracking` in the configuration asks for."""
    return MlflowTracker(tracking_uri(config, results_root), warn) if config.tracking.enabled else MemoryTracker()


def tracking_uri(config: Config, results_root: Path) -> str:
    """`tracking.uri`, else a database in the results folder; absolute, since Ray runs a job in a folder of its own."""
    return config.tracking.uri or f"sqlite:///{results_root.absolute()}/mlflow.db"
