"""A run as the tracking server sees it. The files are the truth this is a mirror, which may fail when training may not.

The driver alone writes. What was missed is written from the files at the end of the run, or by `sync_run`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cvrunner.config.schema import Config
from cvrunner.records.results import EpochRecord, RunRecord, RunStatus, Summary, TrialResult, TrialStatus
from cvrunner.records.run_directory import RunDirectory
from cvrunner.tracking.mirror import MlflowMirror, first_line, mirror_files
from cvrunner.training.faults import NONE, Chaos

Warn = Callable[[str], None]
QUIET_S = 60.0
"""How long a server that failed is left alone."""
FINISH_S, STOP_S = 120.0, 10.0
"""How long the end of a run waits for a slow server, when it is complete and when it was stopped."""


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
    """Mirrors a run to MLflow. After a failure it keeps quiet for a while, then catches up from the files.

    A server that is away then costs a run seconds, not seconds for every epoch of every trial.
    """

    def __init__(self, uri: str, warn: Warn | None = None, breaks: Callable[[], bool] = lambda: False) -> None:
        self._uri = uri
        self._warn = warn or logging.getLogger("cvrunner").warning
        self._breaks = breaks
        self._mirror = MlflowMirror(uri)
        self._run: tuple[RunRecord, Config, RunDirectory] | None = None
        self._training: set[str] = set()
        self._failed_at: float | None = None

    def start(self, run: RunRecord, config: Config, directory: RunDirectory) -> None:
        self._run = run, config, directory
        self._try("start", lambda: self._mirror.start(run, config, directory))

    def trial_started(self, name: str) -> None:
        self._training.add(name)
        self._try(name, lambda: self._mirror.trial_started(name))

    def epoch(self, name: str, record: EpochRecord) -> None:
        self._try(name, lambda: self._mirror.epoch(name, record))

    def trial_finished(
        self, name: str, result: TrialResult | None, status: TrialStatus, error: str | None = None
    ) -> None:
        self._training.discard(name)
        self._try(name, lambda: self._mirror.trial_finished(name, result, status, error))

    def finish(self, summary: Summary, status: RunStatus) -> None:
        if self._failed_at is not None and self._run:
            directory, self._failed_at = self._run[2], None
            self._try("finish", lambda: self._mirror_again(directory, summary))
        else:
            self._try("finish", lambda: self._mirror.finish(summary, status))

    def links(self, base_url: str | None = None) -> dict[str, str]:
        found: dict[str, str] = {}
        self._try("links", lambda: found.update(self._mirror.links(base_url)))
        return found

    def _mirror_again(self, directory: RunDirectory, summary: Summary) -> None:
        self._mirror = mirror_files(directory, self._uri, summary)

    def _catch_up(self) -> None:
        """Begin anew with what the files say by now."""
        assert self._run is not None
        self._mirror = MlflowMirror(self._uri)
        self._mirror.start(*self._run)
        for name in self._training:
            self._mirror.trial_started(name)

    def _try(self, what: str, write: Callable[[], object]) -> None:
        """Write; what was missed meanwhile is in the files, and is written first."""
        if self._failed_at is not None and (self._run is None or time.monotonic() - self._failed_at < QUIET_S):
            return
        try:
            if self._breaks():
                raise ConnectionError("broken by --chaos")
            if self._failed_at is not None:
                self._catch_up()
                self._failed_at = None
            write()
        except Exception as error:  # whatever it is, training goes on
            if self._failed_at is None:
                self._warn(
                    f"MLflow ({self._uri}): {what} could not be written: {first_line(error)}; the run goes on, what is "
                    "missing is written later, and `cvrunner sync RUN` writes it from the files"
                )
            self._failed_at = time.monotonic()


class BackgroundTracker:
    """Passes everything on to another tracker, in order and on a thread of its own, so that no server holds training
    up, however slow it is."""

    def __init__(self, tracker: Tracker, warn: Warn | None = None) -> None:
        self._tracker = tracker
        self._warn = warn or logging.getLogger("cvrunner").warning
        self._calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="tracking", daemon=True).start()

    def start(self, run: RunRecord, config: Config, directory: RunDirectory) -> None:
        self._calls.put(lambda: self._tracker.start(run, config, directory))

    def trial_started(self, name: str) -> None:
        self._calls.put(lambda: self._tracker.trial_started(name))

    def epoch(self, name: str, record: EpochRecord) -> None:
        self._calls.put(lambda: self._tracker.epoch(name, record))

    def trial_finished(
        self, name: str, result: TrialResult | None, status: TrialStatus, error: str | None = None
    ) -> None:
        self._calls.put(lambda: self._tracker.trial_finished(name, result, status, error))

    def finish(self, summary: Summary, status: RunStatus) -> None:
        """Waits until all is written, but not for ever."""
        limit_s = FINISH_S if status == "COMPLETE" else STOP_S
        self._calls.put(lambda: self._tracker.finish(summary, status))
        if not self._wait(limit_s):
            self._warn(f"MLflow took longer than {limit_s:g} s; `cvrunner sync RUN` writes what is missing")

    def links(self, base_url: str | None = None) -> dict[str, str]:
        """None where the tracker is too slow to tell."""
        found: dict[str, str] = {}
        self._calls.put(lambda: found.update(self._tracker.links(base_url)))
        self._wait(STOP_S)
        return found.copy()

    def _wait(self, limit_s: float) -> bool:
        """Until everything said so far is written; False where that takes longer than `limit_s`."""
        done = threading.Event()
        self._calls.put(done.set)
        return done.wait(limit_s)

    def _work(self) -> None:
        while True:
            self._calls.get()()


def tracker_for(config: Config, results_root: Path, warn: Warn | None = None, chaos: Chaos = NONE) -> Tracker:
    """The tracker that `tracking` in the configuration asks for."""
    if not config.tracking.enabled:
        return MemoryTracker()
    uri = tracking_uri(config, results_root)
    return BackgroundTracker(MlflowTracker(uri, warn, chaos.breaks_tracker), warn)


def tracking_uri(config: Config, results_root: Path) -> str:
    """`tracking.uri`, else a database in the results folder; absolute, since Ray runs a job in a folder of its own."""
    return config.tracking.uri or f"sqlite:///{results_root.absolute()}/mlflow.db"
