"""A sweep in MLflow: a parent run, a child for each setting with its values and the curve of its epochs.

Everything is found again by its tags and only what is not there is written, so telling it the whole record again and
again is all that is needed, also after an outage.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from cvrunner.config.schema import Config
from cvrunner.tracking import names as names
from cvrunner.tracking.mirror import Curve, first_line
from cvrunner.tracking.mlflow_store import Store, StoredRun
from cvrunner.tracking.tracker import FINISH_S, QUIET_S, Warn
from cvrunner.tune.records import SettingEpoch, SweepDirectory, SweepRecord
from cvrunner.tune.text import sentence

MARKER = "mean/validation_ccc_avg"
"""The metric that every step of a setting has."""
UNDEFINED = -1.0
ENDED = {"DONE": "FINISHED", "PRUNED": "KILLED", "FAILED": "FAILED"}
SWEEP_ENDED = {"COMPLETE": "FINISHED", "INCOMPLETE": "FAILED", "STOPPED": "KILLED"}


class SweepMirror:
    """One sweep on one server. `update` may raise whatever mlflow raises."""

    def __init__(self, uri: str, config: Config, directory: SweepDirectory) -> None:
        self.uri = uri
        self.config = config
        self.directory = directory
        self.parent: StoredRun | None = None
        self.children: dict[str, StoredRun] = {}
        self.curves: dict[str, Curve] = {}
        self.closed: set[str] = set()

    def update(self, record: SweepRecord) -> None:
        """Write what the server has not."""
        if self.parent is None:
            self._open(record)
        assert self.parent is not None
        for name, state in record.settings.items():
            if state.epochs or state.ended:
                self._setting(record, name)
        if record.status in SWEEP_ENDED:
            self._finish(record, self.parent)

    def _open(self, record: SweepRecord) -> None:
        self.store = Store(self.uri)
        self.experiment = self.store.experiment(f"{self.config.tracking.experiment}-{record.protocol}")
        self.store.close_running(self.experiment, {names.RUN_KEY: record.key})
        parent = self._named(record, "sweep", record.key, record.run)
        self.store.reopen(parent.id)
        about = {"folds": record.folds, "seed": record.seed, "epochs": record.epochs, "settings": len(record.settings)}
        self.store.log_params(parent, {f"sweep.{key}": str(value) for key, value in about.items()})
        self.parent = parent

    def _setting(self, record: SweepRecord, name: str) -> None:
        state = record.settings[name]
        if name not in self.children:
            assert self.parent is not None
            child = self._named(record, "setting", f"{record.key}/{name}", name, **{names.PARENT: self.parent.id})
            self.store.reopen(child.id)
            self.store.log_params(child, {key: str(value) for key, value in state.values.items()})
            self.children[name], self.curves[name] = child, Curve(self.store, child.id, MARKER)
        child = self.children[name]
        for epoch in state.epochs:
            self.curves[name].log(epoch.epoch, _metrics(epoch))
        if state.ended and name not in self.closed:
            self.store.set_tags(child.id, {"cvrunner.outcome": state.status.lower()})
            if state.error:
                self.store.set_tags(child.id, {"cvrunner.error": state.error[:4000]})
            self.store.close(child.id, ENDED[state.status])
            self.closed.add(name)

    def _finish(self, record: SweepRecord, parent: StoredRun) -> None:
        self.store.set_tags(parent.id, {"mlflow.note.content": sentence(record), "cvrunner.status": record.status})
        if record.best is not None:
            best = record.settings[record.best]
            self.store.log_metrics(parent.id, {"best/validation_ccc_avg": best.score or 0.0}, len(best.epochs))
            self.store.set_tags(parent.id, {"cvrunner.best": record.best})
        for file in (self.directory.sweep_file, self.directory.config, self.directory.tuned):
            self.store.log_files(parent.id, file)
        self.store.close(parent.id, SWEEP_ENDED[record.status])
        self.store.close_running(self.experiment, {names.RUN_KEY: record.key})

    def _named(self, record: SweepRecord, role: str, key: str, name: str, **tags: str) -> StoredRun:
        found_by = {names.ROLE: role, names.RUN: record.run, names.RUN_KEY: record.key, names.KEY: key}
        more = {names.CONDITION: record.condition, "mlflow.source.name": "cvrunner"} | tags
        return self.store.find_or_create(self.experiment, name, found_by, more)


class SweepTracker:
    """Tells a mirror on a thread of its own. A server that is away is left alone for a while and costs no training."""

    def __init__(self, mirror: Callable[[], SweepMirror], warn: Warn) -> None:
        self._make = mirror
        self._mirror: SweepMirror | None = None
        self._warn = warn
        self._failed_at: float | None = None
        self._records: queue.SimpleQueue[tuple[SweepRecord, threading.Event | None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="tracking", daemon=True).start()

    def update(self, record: SweepRecord) -> None:
        """At once; written when it is its turn."""
        self._records.put((record, None))

    def finish(self, record: SweepRecord) -> None:
        """Waits until all is written, but not for ever."""
        written = threading.Event()
        self._records.put((record, written))
        if not written.wait(FINISH_S):
            self._warn(f"MLflow took longer than {FINISH_S:g} s; the same command writes what is missing")

    def _work(self) -> None:
        while True:
            record, written = self._records.get()
            if written is not None or self._failed_at is None or time.monotonic() - self._failed_at > QUIET_S:
                self._write(record)
            if written is not None:
                written.set()

    def _write(self, record: SweepRecord) -> None:
        try:
            self._mirror = self._mirror or self._make()
            self._mirror.update(record)
            self._failed_at = None
        except Exception as error:  # whatever it is, the sweep goes on
            if self._failed_at is None:
                self._warn(f"MLflow: {first_line(error)}; the sweep goes on, the same command writes what is missing")
            self._mirror, self._failed_at = None, time.monotonic()


def _metrics(epoch: SettingEpoch) -> names.Metrics:
    """A setting's epoch: the mean, and each fold's best so far."""
    metrics: names.Metrics = {MARKER: UNDEFINED if epoch.score is None else epoch.score}
    for fold, ccc in epoch.folds.items():
        metrics |= {f"fold_{fold}/validation_ccc_{name}": value for name, value in ccc.items() if value is not None}
    return metrics
