"""sweep.json and the sweep's folder, kept up to date by the driver alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cvrunner.config.schema import Config
from cvrunner.data.folds import Fold
from cvrunner.data.utterance import Corpus, natural_order
from cvrunner.records.results import RunStatus
from cvrunner.run.provenance import begin_folder, free_folder, now, provenance
from cvrunner.training.trial import Trial
from cvrunner.tune.records import SettingEpoch, SettingState, SettingStatus, SweepDirectory, SweepRecord

Tell = Callable[[SweepRecord, str], object]
"""Called with the record and the setting that has changed."""


class SweepStore:
    """The record of a sweep on disk: every decision is here before it takes effect."""

    def __init__(self, directory: SweepDirectory, record: SweepRecord, fresh: bool = False) -> None:
        self.directory = directory
        self.record = record
        self.fresh = fresh
        """Nothing was trained in it yet."""
        self.listeners: list[Tell] = []

    @classmethod
    def open(
        cls,
        root: Path,
        name: str,
        key: str,
        config: Config,
        corpus: Corpus,
        folds: Sequence[Fold],
        settings: Mapping[str, Mapping[str, Any]],
        trials: Mapping[str, Sequence[Trial]],
        command: list[str],
        new: bool,
    ) -> SweepStore:
        """Continue the sweep of this key, or begin one; `new`: begin one in any case. Raises ResultsError."""
        directory = None if new else find_sweep(root, name, key)
        if directory is not None:
            return cls(directory, directory.read())
        directory, some = SweepDirectory(free_folder(root / f"{name}-tune-{key[:8]}")), next(iter(trials.values()))
        record = SweepRecord(
            **provenance(directory.name, key, config, corpus, some[0], command),
            condition=some[0].condition,
            folds=[trial.fold.number for trial in some],
            seed=some[0].seed,
            epochs=some[0].config.train.epochs,
            searched=list(next(iter(settings.values()))),
            settings={name: SettingState(values=dict(values)) for name, values in settings.items()},
        )
        begin_folder(directory, config, folds, lambda: directory.write(record))
        return cls(directory, record, fresh=True)

    def discard(self) -> None:
        """Leave nothing of a sweep that could not begin."""
        if self.fresh:
            shutil.rmtree(self.directory.path, ignore_errors=True)

    @property
    def pending(self) -> list[str]:
        """The settings that have not ended."""
        return [name for name, state in self.record.settings.items() if not state.ended]

    def begin(self) -> None:
        """The sweep is being worked on; what failed is tried again."""
        settings = {
            name: state.model_copy(update={"status": "WAITING", "error": None}) if state.status == "FAILED" else state
            for name, state in self.record.settings.items()
        }
        self._write(settings=settings, status="RUNNING", finished_at=None)

    def decided(self, setting: str, epoch: int) -> SettingEpoch | None:
        """What was decided after an epoch, if it was."""
        return next((known for known in self.record.settings[setting].epochs if known.epoch == epoch), None)

    def decide(self, setting: str, epoch: SettingEpoch) -> None:
        """Write an epoch down, and what follows from it."""
        state = self.record.settings[setting]
        status: SettingStatus = "DONE" if epoch.epoch >= self.record.epochs else "PRUNED" if epoch.stops else "WAITING"
        self._set(setting, epochs=(*state.epochs, epoch), status=status)

    def done(self, setting: str) -> None:
        """All folds have ended, perhaps before the last epoch (`train.early_stopping_patience`)."""
        self._set(setting, status="DONE")

    def failed(self, setting: str, error: str) -> None:
        self._set(setting, status="FAILED", error=error)

    def end(self, stopped: bool) -> RunStatus:
        """Set and return the final status: COMPLETE when every setting has ended, though some may have failed."""
        ended = not self.pending and self.record.best is not None
        status: RunStatus = "COMPLETE" if ended else "STOPPED" if stopped else "INCOMPLETE"
        self._write(status=status, finished_at=now())
        self.clean()
        return status

    def clean(self) -> None:
        """Drop the checkpoints of the settings that have ended."""
        for name, state in self.record.settings.items():
            if state.ended:
                for fold in self.record.folds:
                    shutil.rmtree(self.directory.fold(name, fold).checkpoint, ignore_errors=True)

    def _set(self, setting: str, **changes: Any) -> None:
        changed = self.record.settings[setting].model_copy(update=changes)
        self._write(settings={**self.record.settings, setting: changed})
        if changed.ended:
            self.clean()
        for tell in self.listeners:
            tell(self.record, setting)

    def _write(self, **changes: Any) -> None:
        self.record = self.record.model_copy(update=changes)
        self.directory.write(self.record)


def find_sweep(root: Path, name: str, key: str) -> SweepDirectory | None:
    """The newest sweep of this key, `<name>-tune-<key>` or `<name>-tune-<key>-<n>`."""
    found = [SweepDirectory(path.parent) for path in root.glob(f"{name}-tune-{key[:8]}*/sweep.json")]
    same = [sweep for sweep in found if sweep.read().key == key]
    return max(same, key=lambda sweep: natural_order(sweep.name), default=None)
