"""The folder of a run: the path of each file, and reading and writing them.

<root>/<run>/
    config.yaml  split.json  floor.csv  protocol.json  run.json
    summary.json  comparison.md  report.html  figures/  paper/
    <condition>/fold-<k>/seed-<s>/
        journal.jsonl  result.json  predictions.csv  model/  checkpoint/
    linear_probe/fold-<k>/
        result.json  predictions.csv, or error.txt
    evaluations/
        corpus.json
        <name>/                         the run's models on another corpus
            evaluation.json  floor.csv  summary.json
            <condition>/fold-<k>/seed-<s>/
                predictions.csv  result.json
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cvrunner.config.schema import LINEAR_PROBE, Config, validate
from cvrunner.errors import ConfigError, ResultsError
from cvrunner.files import sha256_of, write_atomically
from cvrunner.records import legacy
from cvrunner.records.model_folder import ModelFolder
from cvrunner.records.results import Result, RunRecord, TrialResult
from cvrunner.records.summary import Summary

ResultT = TypeVar("ResultT", bound=Result)
GENERATIONS = 2
"""Number of checkpoints that a running trial keeps."""
LOCK, CLAIM = ".lock", ".claim"
"""Files that a process holds locked: in the folder of its run, or in those of its trials if it shares the run."""


def trial_name(condition: str, fold: int, seed: int) -> str:
    """Return a trial's name, such as `frozen/fold-1/seed-0`, which is also its folder in the run."""
    return f"{condition}/fold-{fold}/seed-{seed}"


def probe_name(fold: int) -> str:
    """Return the name of a fold's linear probe, such as `linear_probe/fold-1`, which is also its folder in the run."""
    return f"{LINEAR_PROBE}/fold-{fold}"


class TrialDirectory:
    """The files of one trial, or of a linear probe, which has only predictions, a result and perhaps an error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = path / "journal.jsonl"
        self.predictions = path / "predictions.csv"
        """Columns: utterance, speaker, gender, session, dialogue, scenario, improvised (true, false or empty),
        duration_s, condition, fold, seed, then per dimension `<dimension>_true` and `<dimension>_predicted` on the
        rating scale."""
        self.model = ModelFolder(path / "model")
        """The trained model at the best epoch."""
        self.checkpoint = path / "checkpoint"
        self.result_file = path / "result.json"
        self.error = path / "error.txt"
        """Why it failed: a traceback, or the message of a linear probe."""
        # The result is written last: while it is missing, the trial is not finished.
        self.kept = (self.journal, self.predictions, *self.model.files, self.result_file)
        """What a finished trial leaves."""

    def result(self, key: str | None = None) -> TrialResult | None:
        """Return the trial's result; None if there is none, it has another key, or its files are damaged."""
        return self.read_result(TrialResult, key)

    def read_result(self, kind: type[ResultT], key: str | None = None) -> ResultT | None:
        """Return a result of this kind; None if there is none, it has another key, or its files are damaged."""
        try:
            return self._read_result(kind, key)
        except (ResultsError, OSError):
            return None

    def damage(self, key: str) -> str | None:
        """Return why the trial's result cannot be used; None if it can, or if there is none."""
        try:
            self._read_result(TrialResult, key)
        except ResultsError as error:
            return str(error)
        except OSError as error:
            return f"{error.filename}: {error.strerror}" if self.result_file.exists() else None
        return None

    def _read_result(self, kind: type[ResultT], key: str | None) -> ResultT:
        result = kind.from_json(self.result_file.read_bytes(), str(self.result_file))
        # A copy of the folder that was cut short would else be compared with part of its predictions.
        if result.predictions_sha256 not in ("", sha256_of(self.predictions)):
            raise ResultsError(f"{self.predictions}: was altered: its SHA-256 is not the one in result.json")
        if key not in (None, result.key):
            raise ResultsError(f"{self.result_file}: is the result of other settings (key {result.key[:8]})")
        return result


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.config = path / "config.yaml"
        self.split = path / "split.json"
        self.floor = path / "floor.csv"
        """Predictions without audio of all test utterances; missing if the corpus names no scenarios."""
        self.protocol_file = path / "protocol.json"
        self.run_file = path / "run.json"
        self.summary_file = path / "summary.json"
        self.comparison = path / "comparison.md"
        self.report = path / "report.html"
        self.figures = path / "figures"
        self.evaluations = path / "evaluations"
        self.evaluation_file = path / "evaluation.json"
        """Only in the folder of an evaluation, which is otherwise like that of a run."""

    def evaluation(self, name: str) -> RunDirectory:
        return RunDirectory(self.evaluations / name)

    def trial(self, condition: str, fold: int, seed: int) -> TrialDirectory:
        return TrialDirectory(self.path / trial_name(condition, fold, seed))

    def linear_probe(self, fold: int) -> TrialDirectory:
        return TrialDirectory(self.path / probe_name(fold))

    def read_run(self) -> RunRecord:
        """Read run.json. Raises ResultsError if this is not the folder of a run."""
        if not self.run_file.is_file():
            raise ResultsError(f"{self.path}: no run here (run.json is missing)")
        return RunRecord.from_json(self.run_file.read_bytes(), str(self.run_file))

    def current_run(self) -> RunRecord:
        """Read run.json; a run, and its trials, that a killed process has left RUNNING are INTERRUPTED."""
        run = self.read_run()
        if run.status != "RUNNING" or any(map(is_held, (self.path / LOCK, *self.path.glob(f"*/*/*/{CLAIM}")))):
            return run
        trials = dict(run.trials)
        for name, state in trials.items():
            if state.status == "RUNNING":
                trials[name] = state.model_copy(update={"status": "INTERRUPTED"})
        return run.model_copy(update={"status": "INTERRUPTED", "trials": trials})

    def read_config(self) -> Config:
        """Read config.yaml, also one that an earlier version wrote. Raises ConfigError."""
        try:
            data = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"{self.config}: cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{self.config}: must hold sections with keys, not {type(data).__name__}")
        # Only here: in a configuration that a user writes, an old name is an error that gives the new one.
        return validate(legacy.with_current_names(data, legacy.CONFIG), str(self.config))

    def write_run(self, record: RunRecord) -> None:
        write_atomically(self.run_file, record.to_json())

    def write_summary(self, summary: Summary) -> None:
        write_atomically(self.summary_file, summary.to_json())

    def results(self, record: RunRecord) -> dict[str, TrialResult]:
        """Read the results of all finished trials, by trial name, in the run's order."""
        # The key: a folder of this name may hold the result of other settings, copied from another run.
        found = {name: TrialDirectory(self.path / name).result(state.key) for name, state in record.trials.items()}
        return {name: result for name, result in found.items() if result is not None}


def is_held(file: Path) -> bool:
    """Return whether a living process holds this lock; also true if this cannot be found out."""
    try:
        # A shared lock needs no right to write, and does not disturb who looks at the same time.
        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


# --- the journal: one JSON object per line, only ever appended --------------------------------------------------------


def append_event(path: Path, event: str, **fields: Any) -> None:
    """Append a line with the event's name and the time in UTC; it is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"event": event, "time": datetime.now(UTC).isoformat(), **fields}, allow_nan=False)
    with path.open("a+b") as file:
        if file.tell():
            # A process killed while writing leaves half a line, which must not swallow this one.
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def read_events(path: Path, event: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the lines of one event, or of all, oldest first. Damaged lines are skipped; a missing file has no lines."""
    if not path.exists():
        return
    # A kill can cut a line in the middle of a character. Whole lines are ASCII, so nothing within them ends a line.
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and (event is None or record.get("event") == event):
            yield legacy.with_current_names(record, legacy.EVENT)
