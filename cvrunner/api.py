"""cvrunner from Python, in a notebook or a script: runs as tables, trained models, and training (docs/api.md).

    from cvrunner.api import load_model, load_run, run_all_folds

Raises the errors of `cvrunner.errors`; nothing here ends the process.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cvrunner.errors import CvrunnerError, IncompleteRunError, UsageError
from cvrunner.inference.command import audio_files, chosen_device
from cvrunner.inference.ensemble import file_table, find_members, load_groups, predict_files
from cvrunner.records.results import RunRecord
from cvrunner.records.run_directory import RunDirectory
from cvrunner.records.summary import Summary
from cvrunner.report.report import read_epochs, read_report
from cvrunner.report.tables import comparison_tables
from cvrunner.run import commands
from cvrunner.run.prepare import find_run_directory, prepare
from cvrunner.text import plural
from cvrunner.verdict.predictions import one_table, read_tables

if TYPE_CHECKING:
    import pandas as pd

    from cvrunner.inference.emotion_model import EmotionModel


@dataclass(frozen=True, repr=False)
class Run:
    """A run on disk; everything is read when it is asked for."""

    directory: RunDirectory

    def __repr__(self) -> str:
        return f"<Run {self.path.name}: {self._progress()}>"

    def _repr_html_(self) -> str:
        """The verdict, the scores and the picture of the differences; of an incomplete run, how far it is."""
        try:
            record, summary = self.record, self.summary
        except CvrunnerError:
            # A cell that ends with the run must not fail because the run has.
            return f"<p><b>{escape(self.path.name)}</b>: {escape(self._progress())}</p>"
        html = f"<p><b>{escape(summary.verdict)}</b></p>{comparison_tables(record, summary)[0].as_html()}"
        picture = self.directory.figures / "differences.png"
        if picture.is_file():
            data = base64.b64encode(picture.read_bytes()).decode()
            html += f'<img alt="Differences with their intervals" width="700" src="data:image/png;base64,{data}">'
        return html

    def _progress(self) -> str:
        try:
            record = self.record
        except CvrunnerError as error:
            return str(error)
        done = sum(state.status == "DONE" for state in record.trials.values())
        synthetic = ", synthetic data" if record.synthetic else ""
        return f"{record.status}, {done} of {plural(len(record.trials), 'trial')} done{synthetic}"

    @property
    def record(self) -> RunRecord:
        """run.json: status, folds, seeds, conditions, corpus."""
        return self.directory.current_run()

    @property
    def path(self) -> Path:
        return self.directory.path

    @property
    def status(self) -> str:
        """RUNNING, COMPLETE, INCOMPLETE, STOPPED, or INTERRUPTED if its process was killed."""
        return self.record.status

    @property
    def trials(self) -> pd.DataFrame:
        """A row per trial: condition, fold, seed, status, then best epoch, `validation_ccc_<dimension>` and
        `test_ccc_<dimension>` (and `_avg`), seconds and memory; missing if there is no result."""
        record = self.record
        results, rows = self.directory.results(record), []
        for name, state in record.trials.items():
            row = state.model_dump(include={"condition", "fold", "seed", "status"})
            stored = results[name].model_dump() if name in results else {}
            row["best_epoch"] = stored.get("best_epoch")
            # Columns are the same with and without results, so that tables of several runs can be joined.
            for part in ("validation_ccc", "test_ccc"):
                scores = stored.get(part, {})
                row |= {f"{part}_{dimension}": scores.get(dimension) for dimension in (*record.dimensions, "avg")}
            rows.append(row | {key: stored.get(key) for key in ("train_s", "peak_memory_mib", "device", "precision")})
        return _table(rows)

    @property
    def epochs(self) -> pd.DataFrame:
        """A row per finished epoch of each trial: condition, fold, seed, epoch, train_loss,
        `validation_ccc_<dimension>`, `weight_change_<group>`, seconds."""
        rows = []
        for s in self.record.trials.values():
            for epoch in read_epochs(self.directory, s.condition, s.fold, s.seed):
                row: dict[str, Any] = {"condition": s.condition, "fold": s.fold, "seed": s.seed}
                row |= epoch.model_dump(include={"epoch", "train_loss", "best"})
                row |= {f"validation_ccc_{name}": value for name, value in epoch.validation_ccc.items()}
                row |= {f"weight_change_{group}": values.weight_change for group, values in epoch.groups.items()}
                rows.append(row | {"train_s": epoch.train_s, "validation_s": epoch.validation_s})
        return _table(rows)

    @property
    def predictions(self) -> pd.DataFrame:
        """A row per test utterance of each trial that has a result, out of fold: utterance, speaker, session and
        dialogue, condition, fold, seed, `<dimension>_true` and `<dimension>_predicted`."""
        return one_table(list(read_tables(self.directory, self.directory.results(self.record)).values()))

    @property
    def summary(self) -> Summary:
        """Scores, differences with their intervals, decisions. Raises IncompleteRunError while trials are missing."""
        written = self.directory.summary_file
        # Read if possible: computing the intervals again takes a while.
        if self.status == "COMPLETE" and written.is_file():
            return Summary.from_json(written.read_bytes(), str(written))
        summary = read_report(self.directory).summary
        if summary.missing:
            raise IncompleteRunError(f"{self.path}: there are no results of {', '.join(summary.missing)}")
        return summary

    @property
    def verdict(self) -> str:
        """The comparison in one sentence. Raises IncompleteRunError while trials are missing."""
        return self.summary.verdict

    def model(self, condition: str, fold: int, seed: int = 0, device: str | None = None) -> EmotionModel:
        """Load the model of one trial. Raises UsageError for an unknown trial, and as `load_model`."""
        trial = self.directory.trial(condition, fold, seed)
        names = list(self.record.trials)
        if (name := str(trial.path.relative_to(self.path))) not in names:
            raise UsageError(f"{name}: no trial of this run; it has {', '.join(names)}")
        return load_model(trial.model.path, device)

    def predict(
        self, files: Sequence[Path | str], condition: str | None = None, device: str | None = None
    ) -> pd.DataFrame:
        """Rate files: a row per file, mean and sd over the models of a condition, by default the best on validation.

        Raises UsageError naming the files that cannot be read.
        """
        members = find_members(self.directory, condition)
        paths = audio_files([Path(file) for file in files])
        found = predict_files(paths, load_groups(members.folders, chosen_device(device)))
        if found.problems:
            raise UsageError("; ".join(f"{path}: {problem}" for path, problem in found.problems.items()))
        return file_table(found)


def load_run(run: Path | str) -> Run:
    """Find a run by its folder, or by its name in the results folder. Raises ResultsError if there is none."""
    return Run(find_run_directory(Path(run)))


def load_model(folder: Path | str, device: str | None = None, encoder: Path | str | None = None) -> EmotionModel:
    """Load the trained model in a trial's `model/` folder or a copy of it, ready to `predict`.

    `device`: by default the first GPU, else the CPU; `encoder`: path of its encoder, if that was moved.
    Raises ResultsError for a folder without a complete model, EncoderError if the encoder is not the one that the model
    was trained on, and UsageError for a device that is not available.
    """
    # It imports torch, which takes seconds; tables of runs do not need it.
    from cvrunner.inference import emotion_model

    moved = str(encoder) if encoder is not None else None
    return emotion_model.load_model(Path(folder), chosen_device(device), moved)


def run_all_folds(
    config: Path | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    new: bool = False,
    quiet: bool = True,
) -> Run:
    """Train every condition, fold and seed on Ray, as `cvrunner all-folds`; finished trials are not repeated.

    `config`: by default the demo; `overrides`: such as `{"train.epochs": 5}`; `quiet`: print nothing.
    Raises IncompleteRunError if trials failed, Stopped after Ctrl-C (running trials are saved), and every other
    CvrunnerError that the command would end with.
    """
    path = Path(config) if config is not None else None
    experiment = prepare(path, as_settings(overrides or {}))
    run = Run(commands.run_all_folds(experiment, new, quiet, Console(quiet=quiet)))
    if run.status != "COMPLETE":
        failed = [f"{name} ({s.error or s.status})" for name, s in run.record.trials.items() if s.status != "DONE"]
        raise IncompleteRunError(f"{run.path}: {len(failed)} of {len(run.record.trials)} trials: {'; '.join(failed)}")
    return run


def as_settings(overrides: Mapping[str, Any]) -> list[str]:
    """Return overrides such as `{"train.epochs": 5}` in the form `train.epochs=5`; a value may be a whole section."""
    # `--set` reads YAML, and JSON is a part of it.
    return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    # It takes half a second to import; training and models do not need it.
    import pandas as pd

    return pd.DataFrame(rows)
