"""The record of a run or a sweep in its folder, such as run.json: only the driver writes it, at every change."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import yaml
from filelock import FileLock, Timeout

import cvrunner
from cvrunner.config.schema import Config
from cvrunner.data.folds import Fold, split_table
from cvrunner.data.utterance import Corpus, natural_order
from cvrunner.errors import ResultsError
from cvrunner.files import write_atomically, write_folder_atomically
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
from cvrunner.records.run_directory import CLAIM, LOCK, RunDirectory, TrialDirectory, is_held
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

    def create_folder(self, config: Config, folds: Sequence[Fold], files: Mapping[str, str] | None = None) -> None:
        """Create the folder with config.yaml, split.json, further `files` (name: text) and the record.

        A folder that another process made meanwhile is kept. Raises ResultsError.
        """
        contents = {
            "config.yaml": config_yaml(config),
            "split.json": json.dumps(split_table(folds), indent=1) + "\n",
            **(files or {}),
            self.file.name: self.record.to_json(),
        }

        def fill(folder: Path) -> None:
            for name, text in contents.items():
                (folder / name).write_text(text, encoding="utf-8")

        try:
            write_folder_atomically(self.file.parent, fill)
        except OSError as error:
            raise ResultsError(f"results.root: {self.file.parent} cannot be written: {error.strerror}") from None

    def _end(self, complete: bool, stopped: bool, **changes: Any) -> RunStatus:
        """Set and return the final status, together with other changes."""
        status: RunStatus = "INCOMPLETE"
        if complete:
            # Also if it was stopped: the signal came too late to leave anything undone.
            status = "COMPLETE"
        elif stopped:
            status = "STOPPED"
        self._write(status=status, finished_at=datetime.now(UTC).isoformat(timespec="seconds"), **changes)
        return status

    def _write(self, **changes: Any) -> None:
        self.record = self.record.model_copy(update=changes)
        write_atomically(self.file, self.record.to_json())


def config_yaml(config: Config) -> str:
    """Return the content of config.yaml."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class RunStore(RecordStore[RunRecord]):
    """The record of a run on disk; an observer of its trials.

    Several `fold` commands may work on one run: each changes its own trials and leaves those that another one holds.
    """

    def __init__(self, directory: RunDirectory, record: RunRecord, fresh: bool = False) -> None:
        super().__init__(directory.run_file, record, fresh)
        self.directory = directory
        self.changed = False
        """Whether this invocation changed the protocol."""
        self.claims: dict[str, FileLock] | None = None
        """The trials of this command by name, if other commands may work on the run; None: the run is its own."""
        self._lock = FileLock(directory.path / ".run.json.lock")

    @classmethod
    def open(
        cls,
        experiment: Experiment,
        trials: Sequence[Trial],
        command: list[str],
        new: bool,
        preflight: Callable[[Config], None] | None = None,
    ) -> RunStore:
        """Continue the run of these trials, or begin one, after `preflight`; `new`: begin one in any case."""
        key, config = run_key(trials), experiment.config
        path, fresh = choose_folder(experiment.results_root, experiment.name, key, "run.json", new)
        directory = RunDirectory(path)
        if not fresh:
            return cls(directory, directory.read_run())
        if preflight is not None:
            preflight(config)
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
            files[directory.floor.name] = floor_csv(experiment.folds, dimensions, predictions)
        store.create_folder(config, experiment.folds, files)
        store.record = directory.read_run()
        return store

    def claim(self, trials: Sequence[Trial]) -> None:
        """Share the run with other commands, except for these trials. Raises ResultsError if one of them is in use.

        `release`, or the end of the process, gives them back.
        """
        self.claims = {}
        try:
            # One command after the other: all of them need the run's own lock for a moment.
            with self._lock, FileLock(self.directory.path / LOCK, timeout=0):
                for trial in trials:
                    folder = self.trial_directory(trial).path
                    folder.mkdir(parents=True, exist_ok=True)
                    self.claims[trial.name] = FileLock(folder / CLAIM, timeout=0)
                    self.claims[trial.name].acquire()
        except Timeout:
            self.release()
            raise in_use(self.directory.path) from None

    def release(self) -> None:
        """Give the claimed trials back."""
        for claim in (self.claims or {}).values():
            claim.release()
        self.claims = self.claims and {}

    def elsewhere(self) -> set[str]:
        """Return the names of the trials on which other commands work at this moment."""
        if self.claims is None:
            return set()
        names = self.record.trials.keys() - self.claims.keys()
        return {name for name in names if is_held(self.directory.path / name / CLAIM)}

    @contextlib.contextmanager
    def _latest(self) -> Iterator[None]:
        """Keep other commands from changing the record, and know their changes."""
        with self._lock:
            if self.claims is not None:
                self.record = self.directory.read_run()
            yield

    def declare(self, experiment: Experiment, trials: Sequence[Trial]) -> None:
        """Write the protocol before the run's first trial; if it has changed since, append what changed and when.

        Seeds and conditions are part of the run's key, so changing them begins another run: its protocol names those
        that were added after a look at test scores. Raises ResultsError if protocol.json cannot be read.
        """
        with self._latest():
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
            write_atomically(self.directory.config, config_yaml(experiment.config))
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
        self.note(looks_before=record_look(root, look))

    def trial_directory(self, trial: Trial) -> TrialDirectory:
        return self.directory.trial(trial.condition, trial.fold.number, trial.seed)

    def begin(self) -> None:
        """Mark the run as RUNNING; a trial is DONE if its result is on disk, and waits otherwise."""
        with self._latest():
            elsewhere, states = self.elsewhere(), dict(self.record.trials)
            for name, state in states.items():
                if name in elsewhere:
                    continue
                trial = self.directory.trial(state.condition, state.fold, state.seed)
                status: TrialStatus = "WAITING"
                if trial.result(state.key) is not None:
                    status = "DONE"
                    # A process killed after it wrote the result has left its checkpoint.
                    shutil.rmtree(trial.checkpoint, ignore_errors=True)
                states[name] = state.model_copy(update={"status": status, "error": None})
            self._write(trials=states, status="RUNNING", finished_at=None)

    def end(self, stopped: bool) -> RunStatus:
        """Set and return the final status: COMPLETE only if every trial has its result.

        While other commands work on the run it stays RUNNING; the last one ends it.
        """
        # Given back first, so that of two commands that end together the later one finds none at work.
        self.release()
        with self._latest():
            elsewhere, states = self.elsewhere(), dict(self.record.trials)
            for name, state in states.items():
                # Neither finished nor given up, so the driver ends while it trains: its checkpoint stays.
                if state.status == "RUNNING" and name not in elsewhere:
                    states[name] = state.model_copy(update={"status": "STOPPED"})
            complete = all(state.status == "DONE" for state in states.values())
            if elsewhere and not complete:
                self._write(trials=states)
                return "RUNNING"
            return self._end(complete, stopped, trials=states)

    def note(self, **changes: Any) -> None:
        """Change further fields of run.json, such as the links."""
        with self._latest():
            self._write(**changes)

    def attempt(self, trial: Trial, number: int) -> None:
        # `number` begins at 1 in every invocation; the record counts the attempts of all of them. Only this command
        # changes the states of its own trials, so they are known without reading the record again.
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
        with self._latest():
            self._write(trials={**self.record.trials, trial.name: state})


def in_use(folder: Path, remedy: str = "wait for it or stop it") -> ResultsError:
    """Return the error for a run or a trial that another process has locked, with what to do."""
    return ResultsError(f"{folder}: another process is working on this run; {remedy}")


@contextlib.contextmanager
def lock(folder: Path, remedy: str = "wait for it or stop it") -> Iterator[None]:
    """Keep other processes out of a run's folder. Raises ResultsError, with what to do, if it is in use."""
    try:
        # The system frees the lock if its process is killed, so it never keeps a run from continuing. No waiting: the
        # other process may need it for days.
        with FileLock(folder / LOCK, timeout=0):
            if any(map(is_held, folder.glob(f"*/*/*/{CLAIM}"))):
                raise in_use(folder, remedy)
            yield
    except Timeout:
        raise in_use(folder, remedy) from None


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
