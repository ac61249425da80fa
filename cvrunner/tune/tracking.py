"""The layout of a sweep in MLflow: a parent, and a child per setting with its values and the curve of its epochs."""

from __future__ import annotations

from cvrunner.config.schema import Config
from cvrunner.tracking import names
from cvrunner.tracking.mirror import MAX_TAG, Mirror
from cvrunner.tracking.tracker import Tracker
from cvrunner.tune.store import SweepDirectory, SweepRecord, comparable

MARKER = "mean/validation_ccc_avg"
"""The metric that every step of a setting has."""


class SweepMirror(Mirror):
    """A sweep in MLflow."""

    def __init__(self, uri: str, config: Config, record: SweepRecord, directory: SweepDirectory) -> None:
        super().__init__(uri, config, record)
        self.directory = directory
        self.children: dict[str, str] = {}
        """Entry by setting."""
        self.closed: set[str] = set()
        found_by = names.run_tags(record, "sweep", record.key)
        searched = {names.CONDITION: ", ".join(record.conditions)}
        parent = self.store.find_or_create(self.experiment, record.run, found_by, searched)
        self.store.set_status(parent.id, "RUNNING")
        about = {"folds": record.folds, "seed": record.seed, "nested": record.nested}
        for condition, epochs in record.epochs.items():
            about |= {f"{condition}.epochs": epochs, f"{condition}.settings": len(record.settings_of(condition))}
        self.store.log_params(parent, {f"sweep.{key}": str(value) for key, value in about.items()})
        self.parent = parent
        self.update(record)

    def update(self, record: SweepRecord) -> None:
        """Write what the record has and the server has not. The record is complete, so an outage needs no more."""
        for name, state in record.settings.items():
            if name in self.closed or not (state.epochs or state.ended):
                continue
            if name not in self.children:
                found_by = names.run_tags(record, "setting", f"{record.key}/{name}")
                tags = {names.CONDITION: state.condition, names.PARENT: self.parent.id}
                child = self.store.find_or_create(self.experiment, name, found_by, tags)
                self.store.set_status(child.id, "RUNNING")
                self.store.log_params(child, {key: str(value) for key, value in state.values.items()})
                self.children[name] = child.id
            run_id = self.children[name]
            for epoch in state.epochs:
                metrics: names.Metrics = {MARKER: comparable(epoch.score)}
                for fold, ccc in epoch.folds.items():
                    # Per fold the best CCC so far, which is what the score is the mean of.
                    metrics |= names.ccc_metrics(f"fold_{fold}/validation_ccc", ccc)
                self.store.log_step(run_id, MARKER, epoch.epoch, metrics)
            if state.ended:
                outcome = {"cvrunner.outcome": state.status.lower()}
                if state.error:
                    outcome["cvrunner.error"] = state.error[:MAX_TAG]
                self.store.set_tags(run_id, outcome)
                self.store.set_status(run_id, names.ENDED[state.status])
                # Closing an entry again would move the time at which it ended.
                self.closed.add(name)

    def finish(self, record: SweepRecord) -> None:
        """Write the outcome and the files, and close every entry that is still open."""
        self.update(record)
        parent = self.parent.id
        self.store.set_tags(parent, {"mlflow.note.content": record.sentence, "cvrunner.status": record.status})
        for condition in record.conditions:
            if chosen := record.chosen(condition):
                best, score = f"best/{condition}/validation_ccc_avg", comparable(record.score(condition))
                # A repeated command finishes the sweep again.
                if self.parent.metrics.get(best) != score:
                    self.store.log_metrics(parent, {best: score}, record.epochs[condition])
                self.store.set_tags(parent, {f"cvrunner.best.{condition}": ", ".join(dict.fromkeys(chosen.values()))})
        for file in (self.directory.sweep_file, self.directory.config, self.directory.tuned):
            self.store.log_files(parent, file)
        self.store.set_status(parent, names.ENDED[record.status])
        self.store.close_running(self.experiment, self.own)


class SweepTracker(Tracker[SweepMirror]):
    """The tracker of a sweep."""

    remedy = "the same command"

    def start(self, config: Config, record: SweepRecord, directory: SweepDirectory) -> None:
        """Open the sweep in MLflow, unless it was opened before."""
        self._open(lambda uri: SweepMirror(uri, config, record, directory))

    def update(self, record: SweepRecord, setting: str) -> None:
        """Write the change of a setting; a listener of the store."""
        self._write(setting, lambda mirror: mirror.update(record))

    def finish(self, record: SweepRecord) -> None:
        """Write the outcome, within the time limit."""
        self._finish(lambda mirror: mirror.finish(record), record.status)
