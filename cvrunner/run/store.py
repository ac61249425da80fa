"""The record of a run or a sweep in its folder, such as run.json: only the driver writes it, at every change."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import yaml

import cvrunner
from cvrunner.config.schema import Config
from cvrunner.data.folds import Fold, split_table
from cvrunner.data.utterance import Corpus, natural_order
from cvrunner.errors import ResultsError
from cvrunner.files import write_atomically
from cvrunner.orchestration.failures import STATUS, Decision, Failure
from cvrunner.orchestration.trials import run_key
from cvrunner.records.results import (
    Provenance,
    RunRecord,
    RunStatus,
    TrainingFinished,
    TrialResult,
    TrialState,
    TrialStatus,
    WorkerStarted,
)
from cvrunner.records.run_directory import RunDirectory, TrialDirectory
from cvrunner.run.prepare import Experiment
from cvrunner.run.protocol import make_protocol
from cvrunner.training.trial import Trial
from cvrunner.verdict.floor import floor_csv, floor_predictions, floor_record
from cvrunner.verdict.ledger import Look, added_after_look, looks_at, new_scores, read_ledger, record_look
from cvrunner.verdict.protocol import ProtocolFile, ProtocolVersion, changes, read_protocol

if TYPE_CHECKING:
    from cvrunner.training.fold_trainer import Event

RecordT = TypeVar("RecordT", bound=Provenance)


class RecordStore(Generic[RecordT]):
    """The record of a run or a sweep, and the folder that holds it."""

    def __init__(self, file: Path, record: RecordT, fresh: bool = False) -> None:
        self.file = file
        self.record = record
        self.fresh = fresh
        """Whether nothing was trained in this folder yet."""

    def discard(self) -> None:
        """Remove the folder of a run that could not begin."""
        if self.fresh:
            shutil.rmtree(self.file.parent, ignore_errors=True)

    def create_folder(self, config: Config, folds: Sequence[Fold], files: Mapping[Path, str] | None = None) -> None:
        """Write config.yaml, split.json, further `files` (path: text) and the record. Raises ResultsError."""
        folder = self.file.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.write_config(config)
            write_atomically(folder / "split.json", json.dumps(split_table(folds), indent=1) + "\n")
            for path, text in (files or {}).items():
                write_atomically(path, text)
            # The record comes last: a folder without it is not taken for a run.
            self._write()
        except OSError as error:
            raise ResultsError(f"results.root: {folder} cannot be written: {error.strerror}") from None

    def write_config(self, config: Config) -> None:
        """Write config.yaml."""
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        write_atomically(self.file.parent / "config.yaml", text)

    def _end(self, complete: bool, stopped: bool, **changes: Any) -> RunStatus:
        """Set and return the final status, together with other changes."""
        status: RunStatus = "STOPPED" if stopped else "INCOMPLETE"
        # Also if it was stopped: the signal came too late to leave anything undone.
        if complete:
            status = "COMPLETE"
        self._write(status=status, finished_at=datetime.now(UTC).isoformat(timespec="seconds"), **changes)
        return status

    def _write(self, **changes: Any) -> None:
        self.record = self.record.model_copy(update=changes)
        write_atomically(self.file, self.record.to_json())


class RunStore(RecordStore[RunRecord]):
    """The record of a run on disk; an observer of its trials."""

    def __init__(self, directory: RunDirectory, record: RunRecord, fresh: bool = False) -> None:
        super().__init__(directory.run_file, record, fresh)
        self.directory = directory
        self.changed = False
        """Whether this invocation changed the protocol."""

    @classmethod
    def open(cls, experiment: Experiment, trials: Sequence[Trial], command: list[str], new: bool) -> RunStore:
        """Continue the run of these trials, or begin one; `new`: begin one in any case."""
        key, config = run_key(trials), experiment.config
        path, fresh = choose_folder(experiment.results_root, experiment.name, key, "run.json", new)
        directory = RunDirectory(path)
        if not fresh:
            return cls(directory, directory.read_run())
        dimensions = config.corpus.dimensions
        predictions = floor_predictions(experiment.folds, dimensions)
        record = RunRecord(
            **provenance(directory.name, key, config, experiment.corpus, trials[0], command),
            conditions=list(config.conditions),
            folds=[fold.number for fold in experiment.folds],
            seeds=list(config.train.seeds),
            floor=floor_record(experiment.folds, dimensions, predictions),
            # Sorted for the reader of the file; the trials come in the order in which they are to run.
            trials={
                t.name: TrialState(key=t.key, condition=t.condition, fold=t.fold.number, seed=t.seed)
                for t in sorted(trials, key=lambda t: (t.condition, t.fold.number, t.seed))
            },
        )
        store = cls(directory, record, fresh=True)
        files = {}
        if predictions:
            files[directory.floor] = floor_csv(experiment.folds, dimensions, predictions)
        store.create_folder(config, experiment.folds, files)
        return store

    def declare(self, experiment: Experiment, trials: Sequence[Trial]) -> None:
        """Write the protocol before the run's first trial; if it has changed since, append what changed and when.

        Seeds and conditions are part of the run's key, so changing them begins another run: its protocol names those
        that were added after a look at test scores. Raises ResultsError if protocol.json cannot be read.
        """
        protocol = make_protocol(experiment, trials, self.record.conditions)
        file = read_protocol(self.directory) or ProtocolFile(versions=[])
        if file.versions and file.versions[-1].sha256 == protocol.sha256:
            return
        looks, declared = read_ledger(self.directory.path.parent), [version.protocol for version in file.versions]
        version = ProtocolVersion(
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            sha256=protocol.sha256,
            test_scores=len(self.directory.results(self.record)),
            looks=looks_at(looks, protocol.corpus_digest),
            added_after_look=added_after_look(protocol, looks, declared),
            changes=changes(declared[-1], protocol) if declared else [],
            protocol=protocol,
        )
        file = ProtocolFile(versions=[*file.versions, version])
        write_atomically(self.directory.protocol_file, file.to_json())
        # The latest protocol is in force, so the report must find its margin and primary outcome.
        self.write_config(experiment.config)
        self._write(protocol_sha256=file.versions[0].sha256)
        self.changed = True

    def count_look(self, command: list[str], results: Mapping[str, TrialResult]) -> None:
        """Add a line to the ledger of the results folder if it does not know all test scores of these results yet."""
        root, record = self.directory.path.parent, self.record
        scores = new_scores(read_ledger(root), record.run, results)
        file = read_protocol(self.directory)
        if not scores or file is None:
            return
        look = Look(
            run=record.run,
            command=command,
            corpus_digest=record.corpus_digest,
            split_digest=record.split_digest,
            conditions={name: condition.digest for name, condition in file.current.conditions.items()},
            seeds=file.current.seeds,
            scores=scores,
        )
        self._write(looks_before=record_look(root, look))

    def trial_directory(self, trial: Trial) -> TrialDirectory:
        return self.directory.trial(trial.condition, trial.fold.number, trial.seed)

    def begin(self) -> None:
        """Mark the run as RUNNING; a trial is DONE if its result is on disk, and waits otherwise."""
        states = {}
        for name, state in self.record.trials.items():
            trial = self.directory.trial(state.condition, state.fold, state.seed)
            status: TrialStatus = "WAITING"
            if trial.result(state.key) is not None:
                status = "DONE"
                # A process killed after it wrote the result has left its checkpoint.
                shutil.rmtree(trial.checkpoint, ignore_errors=True)
            states[name] = state.model_copy(update={"status": status, "error": None})
        self._write(trials=states, status="RUNNING", finished_at=None)

    def end(self, stopped: bool) -> RunStatus:
        """Set and return the final status: COMPLETE only if every trial has its result."""
        states = dict(self.record.trials)
        for name, state in states.items():
            # Neither finished nor given up, so the driver ends while it trains: its checkpoint stays.
            if state.status == "RUNNING":
                states[name] = state.model_copy(update={"status": "STOPPED"})
        return self._end(all(state.status == "DONE" for state in states.values()), stopped, trials=states)

    def note(self, **changes: Any) -> None:
        """Change further fields of run.json, such as the links."""
        self._write(**changes)

    def attempt(self, trial: Trial, number: int) -> None:
        # `number` begins at 1 in every invocation; the record counts the attempts of all of them.
        self._set(trial, status="RUNNING", attempts=self.record.trials[trial.name].attempts + 1)

    def event(self, trial: Trial, event: Event) -> None:
        if isinstance(event, WorkerStarted):
            self._set(trial, node=event.node)
        if isinstance(event, TrialResult):
            self._set(trial, status="DONE", error=None)
        if isinstance(event, TrainingFinished):
            # Without a test part: the trial still waits for its test scores.
            self._set(trial, status="WAITING", error=None, trained=event)

    def failed(self, trial: Trial, failure: Failure, decision: Decision) -> None:
        state = self.record.trials[trial.name]
        if decision is Decision.PAUSE:
            # A paused trial resumes the same attempt, which `attempt` will count again.
            self._set(trial, status=STATUS[decision], attempts=state.attempts - 1)
            return
        failures = dict(state.failures)
        failures[failure.kind] = failures.get(failure.kind, 0) + 1
        self._set(trial, status=STATUS[decision], error=failure.message, failures=failures)
        if failure.details:
            # A traceback is too long for run.json, which is written again at every change.
            write_atomically(self.trial_directory(trial).error, failure.details)

    def _set(self, trial: Trial, **changes: Any) -> None:
        state = self.record.trials[trial.name].model_copy(update=changes)
        self._write(trials={**self.record.trials, trial.name: state})


def choose_folder(root: Path, prefix: str, key: str, record_file: str, new: bool) -> tuple[Path, bool]:
    """Return the folder to continue and False, or a free one and True.

    The one to continue is the newest `<prefix>-<key>` or `<prefix>-<key>-<n>` whose record has this key, if any; `new`:
    take a free one in any case. Raises ResultsError for a record that cannot be read.
    """
    base = root / f"{prefix}-{key[:8]}"
    files = [] if new else root.glob(f"{base.name}*/{record_file}")
    # The name has only part of the key, and two configurations may share it; the record has the whole key.
    same = [file.parent for file in files if Provenance.from_json(file.read_bytes(), str(file)).key == key]
    if same:
        # By number, not by date, because clocks can be wrong.
        return max(same, key=lambda folder: natural_order(folder.name)), False
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder, True


def provenance(name: str, key: str, config: Config, corpus: Corpus, trial: Trial, command: list[str]) -> dict[str, Any]:
    """Return the fields of `Provenance`. `trial` may be any, because all have the same corpus and split."""
    return {
        "run": name,
        "key": key,
        "status": "RUNNING",
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "host": socket.gethostname(),
        "cvrunner_version": cvrunner.__version__,
        "corpus": corpus.describe(),
        "split_digest": trial.split_digest,
        "corpus_digest": trial.corpus_digest,
        "synthetic": corpus.synthetic,
        "dimensions": list(config.corpus.dimensions),
        "protocol": config.model.protocol,
        "corpus_warnings": list(corpus.warnings),
    }
