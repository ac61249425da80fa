"""Report a run to MLflow from one background thread, so that a slow or unreachable server never delays training.

The files of a run are the source of truth. What a server missed is written from them: when it answers again, at the
end of the run, or by `cvrunner sync RUN`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from cvrunner.config.schema import Config
from cvrunner.orchestration.failures import STATUS, Decision, Failure
from cvrunner.orchestration.ray_cluster import answers
from cvrunner.records.results import EpochRecord, RunRecord, RunStatus, TrialResult
from cvrunner.records.run_directory import RunDirectory
from cvrunner.report.report import Report
from cvrunner.tracking.mirror import Mirror, MlflowMirror, mlflow_problem
from cvrunner.tracking.names import UI_ADDRESS
from cvrunner.training.faults import NONE, Chaos
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from cvrunner.training.fold_trainer import Event

MirrorT = TypeVar("MirrorT", bound=Mirror)
Warn = Callable[[str], None]

QUIET_S = 60.0
"""Time for which a server that failed is left alone, in seconds."""
FINISH_S, STOP_S = 120.0, 10.0
"""Time limits for the last entries, in seconds: of a complete run, and of one that was stopped or failed."""


class Tracker(Generic[MirrorT]):
    """Pass writes to a mirror in MLflow, in order, on one background thread. No method raises.

    After a failure the server is left alone for `QUIET_S`; then a new mirror catches up from the files. An unreachable
    server costs one warning, rather than seconds for every epoch of every trial.
    """

    remedy: ClassVar[str]
    """The command that writes what is missing, for warnings."""

    def __init__(self, uri: str | None, warn: Warn, breaks: Callable[[], bool] = lambda: False) -> None:
        """Set up a tracker that writes nothing before `start`, and nothing at all if `uri` is None.

        `breaks` injects failures (`--chaos tracker=`).
        """
        self.uri = uri
        self._warn = warn
        self._breaks = breaks
        self._open_mirror: Callable[[str], MirrorT] | None = None
        self._mirror: MirrorT | None = None
        self._failed_at: float | None = None
        self._entries: queue.SimpleQueue[threading.Event | tuple[str, Callable[[MirrorT], object], bool]]
        self._entries = queue.SimpleQueue()
        """Events of `wait`, and writes: a name for the warning, the write itself, and whether it is the last."""

    def is_away(self) -> bool:
        """Return whether nobody listens at the address of the server; a database is always there."""
        return self.uri is not None and self.uri.startswith("http") and not answers(self.uri)

    def wait(self, limit_s: float) -> bool:
        """Wait until everything so far is written; return False if that takes longer than `limit_s` seconds."""
        if self._open_mirror is None:
            return True
        done = threading.Event()
        self._entries.put(done)
        return done.wait(limit_s)

    def _open(self, open_mirror: Callable[[str], MirrorT]) -> None:
        """Begin, unless tracking is off or has begun. `open_mirror` gets the URI and catches up from the files."""
        if self.uri is None or self._open_mirror is not None:
            return
        self._open_mirror = open_mirror
        # A daemon: the process may end while a server still keeps the thread waiting.
        threading.Thread(target=self._work, name="tracking", daemon=True).start()
        self._write("the run", lambda mirror: None)

    def _write(self, what: str, write: Callable[[MirrorT], object], last: bool = False) -> None:
        """Queue a write. `last`: attempt it even if the server failed less than `QUIET_S` ago."""
        if self._open_mirror is not None:
            self._entries.put((what, write, last))

    def _finish(self, write: Callable[[MirrorT], object], status: RunStatus) -> None:
        """Write the last entries and wait for them, within the time limit for `status`."""
        limit_s = FINISH_S if status == "COMPLETE" else STOP_S
        self._write("the outcome", write, last=True)
        if not self.wait(limit_s):
            self._warn(f"MLflow took longer than {limit_s:g} s; {self.remedy} writes what is missing")

    def _work(self) -> None:
        """Carry out the writes, one after the other, until the process ends."""
        assert self.uri is not None
        assert self._open_mirror is not None
        while True:
            entry = self._entries.get()
            if isinstance(entry, threading.Event):
                entry.set()
                continue
            what, write, last = entry
            if last:
                self._failed_at = None
            if self._failed_at is not None and time.monotonic() - self._failed_at < QUIET_S:
                continue  # The next mirror finds this in the files.
            try:
                if self._breaks():
                    raise ConnectionError("injected by --chaos")
                self._mirror = self._mirror or self._open_mirror(self.uri)
                write(self._mirror)
                self._failed_at = None
            except Exception as error:  # mlflow raises whatever its database and its HTTP client do
                if self._failed_at is None:
                    self._warn(
                        f"MLflow ({self.uri}): {what} could not be written: {mlflow_problem(error)}; training is not "
                        f"affected, what is missing is written later, or by {self.remedy}"
                    )
                # What the server has is unknown now, so the next attempt looks it up again.
                self._mirror, self._failed_at = None, time.monotonic()


class RunTracker(Tracker[MlflowMirror]):
    """The tracker of a run: an observer of its trials."""

    remedy = "`cvrunner sync RUN`"
    only: frozenset[str] | None = None
    """Names of the trials to report if other commands work on the others; None: all."""
    _show_links: Callable[[dict[str, str]], None] | None = None
    _links: dict[str, str] | None = None

    def start(
        self,
        run: RunRecord,
        config: Config,
        directory: RunDirectory,
        show_links: Callable[[dict[str, str]], None] | None = None,
    ) -> None:
        """Open the run in MLflow, before its first trial.

        `show_links` is called with the run's links at the first event after they are known. On the caller's thread,
        because run.json has one writer; and not at once, because mlflow takes seconds to open.
        """
        self._show_links = show_links
        self._open(lambda uri: MlflowMirror(uri, run, config, directory, self.only))

        def find_links(mirror: MlflowMirror) -> None:
            self._links = mirror.links(UI_ADDRESS)

        self._write("the links", find_links)

    def attempt(self, trial: Trial, number: int) -> None:
        self._write(trial.name, lambda mirror: mirror.trial_started(trial.name))

    def event(self, trial: Trial, event: Event) -> None:
        if self._show_links and self._links is not None:
            self._show_links(self._links)
            self._show_links = None
        if isinstance(event, EpochRecord):
            self._write(trial.name, lambda mirror: mirror.epoch(trial.name, event))
        elif isinstance(event, TrialResult):
            self._write(trial.name, lambda mirror: mirror.trial_finished(trial.name, event, "DONE"))

    def failed(self, trial: Trial, failure: Failure, decision: Decision) -> None:
        # After a retry or a pause the trial is started again in this run, and its MLflow run stays open.
        if decision not in (Decision.RETRY, Decision.PAUSE):
            status, error = STATUS[decision], failure.message
            self._write(trial.name, lambda mirror: mirror.trial_finished(trial.name, None, status, error))

    def links(self, base_url: str | None = None) -> dict[str, str]:
        """Return the addresses of the run's pages by name; none if MLflow is off, fails or does not answer in time."""
        found: dict[str, str] = {}
        self._write("the links", lambda mirror: found.update(mirror.links(base_url)))
        self.wait(STOP_S)
        return found.copy()

    def finish(self, report: Report, status: RunStatus) -> None:
        """Write the comparison and its files, after the report was written or when the run was stopped.

        While other commands work on the run, only wait for what was written: the last one writes the outcome.
        """
        # Not started yet if there was nothing left to train.
        self.start(report.run, report.config, report.directory)
        if status == "RUNNING":
            self.wait(FINISH_S)
        elif self.only is None:
            self._finish(lambda mirror: mirror.finish(report, status), status)
        else:
            # What the other commands have written is not known to the mirror of this one.
            self._finish(
                lambda mirror: MlflowMirror(mirror.uri, report.run, report.config, report.directory).finish(
                    report, status
                ),
                status,
            )


def tracker_for(config: Config, results_root: Path, warn: Warn, chaos: Chaos = NONE) -> RunTracker:
    """Return the tracker that `tracking` in the configuration asks for; it writes nothing if tracking is off."""
    uri = tracking_uri(config, results_root) if config.tracking.enabled else None
    return RunTracker(uri, warn, chaos.breaks_tracker)


def tracking_uri(config: Config, results_root: Path) -> str:
    """Return `tracking.uri`, or else the address of a database in the results folder."""
    # Absolute, because Ray runs a job in a working directory that it removes. In an address `%` and `?` have a meaning.
    folder = str(results_root.absolute()).replace("%", "%25").replace("?", "%3F").replace("#", "%23")
    return config.tracking.uri or f"sqlite:///{folder}/mlflow.db"
