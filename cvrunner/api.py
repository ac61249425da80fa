"""cvrunner from Python, in a notebook or a script: runs as tables, trained models, and training (docs/api.md).

    from cvrunner.api import load_model, load_run, run_all_folds

Raises the errors of `cvrunner.errors`; nothing here ends the process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvrunner.errors import IncompleteRunError, UsageError
from cvrunner.records.results import Ccc, EpochRecord, RunRecord, Summary, TrialResult, TrialState
from cvrunner.records.run_directory import RunDirectory, TrialDirectory
from cvrunner.run import commands
from cvrunner.run import steps as run_steps

if TYPE_CHECKING:
    import pandas as pd

    from cvrunner.inference.emotion_model import EmotionModel


@dataclass(frozen=True)
class Run:
    """A run as it lies on disk; everything is read when it is asked for."""

    directory: RunDirectory

    @property
    def record(self) -> RunRecord:
        """run.json: status, folds, seeds, conditions, corpus."""
        return self.directory.read_run()

    @property
    def path(self) -> Path:
        return self.directory.path

    @property
    def status(self) -> str:
        """RUNNING, COMPLETE, INCOMPLETE or STOPPED."""
        return self.record.status

    @property
    def trials(self) -> pd.DataFrame:
        """A row for each trial: condition, fold, seed, status, then best epoch, `validation_ccc_<dimension>` and
        `test_ccc_<dimension>` (and `_avg`), seconds and memory; missing where there is no result."""
        import pandas as pd

        record = self.record
        results = self.directory.results(record)
        rows = [_trial_row(state, results.get(name), record) for name, state in record.trials.items()]
        return pd.DataFrame(rows)

    @property
    def epochs(self) -> pd.DataFrame:
        """A row for each epoch of each trial: condition, fold, seed, epoch, train_loss, `validation_ccc_<dimension>`,
        `weight_change_<group>`, seconds; of a trial that runs, as far as it is."""
        import pandas as pd

        from cvrunner.report.report import read_epochs

        rows = [
            {"condition": s.condition, "fold": s.fold, "seed": s.seed} | _epoch_row(epoch)
            for s in self.record.trials.values()
            for epoch in read_epochs(self.directory, s.condition, s.fold, s.seed)
        ]
        return pd.DataFrame(rows)

    @property
    def predictions(self) -> pd.DataFrame:
        """A row for each test utterance of each trial that has a result, out of fold: who, where, condition, fold,
        seed, `<dimension>_true` and `<dimension>_predicted`."""
        from cvrunner.verdict.out_of_fold import all_predictions

        return all_predictions(self.directory, self.record)

    @property
    def summary(self) -> Summary:
        """Scores, differences with their intervals, decisions. Raises IncompleteRunError while trials are missing."""
        from cvrunner.verdict.comparison import summarise

        written = self.directory.summary_file
        if self.status == "COMPLETE" and written.is_file():  # the intervals take a while to be computed again
            return Summary.from_json(written.read_bytes(), str(written))
        summary = summarise(self.directory)
        if summary.missing:
            raise IncompleteRunError(f"{self.path}: results are missing of {', '.join(summary.missing)}")
        return summary

    @property
    def verdict(self) -> str:
        """The comparison in one sentence. Raises IncompleteRunError while trials are missing."""
        return self.summary.verdict

    def model(self, condition: str, fold: int, seed: int = 0, device: str | None = None) -> EmotionModel:
        """One trial's model. Raises UsageError for a trial that there is not, and as `load_model`."""
        trial = self._trial(condition, fold, seed)
        return load_model(trial.model.path, device)

    def predict(
        self, files: Sequence[Path | str], condition: str | None = None, device: str | None = None
    ) -> pd.DataFrame:
        """A row for each file: mean and sd over the models of a condition, by default the best on validation.

        Raises UsageError naming the files that cannot be read.
        """
        from cvrunner.inference import command as predict_commands
        from cvrunner.inference.ensemble import load_groups, predict_files
        from cvrunner.inference.members import find_members
        from cvrunner.inference.tables import file_table

        members = find_members(self.directory, condition)
        paths = predict_commands.audio_files([Path(file) for file in files])
        found = predict_files(paths, load_groups(members.folders, predict_commands.chosen_device(device)))
        if found.problems:
            raise UsageError("; ".join(f"{path}: {problem}" for path, problem in found.problems.items()))
        return file_table(found)

    def _trial(self, condition: str, fold: int, seed: int) -> TrialDirectory:
        trial = self.directory.trial(condition, fold, seed)
        names = list(self.record.trials)
        if (name := str(trial.path.relative_to(self.path))) not in names:
            raise UsageError(f"{name}: no trial of this run; it has {', '.join(names)}")
        return trial


def load_run(run: Path | str) -> Run:
    """A run by its folder, or by its name in the results folder. Raises ResultsError where there is none."""
    return Run(run_steps.find_run_directory(Path(run)))


def load_model(folder: Path | str, device: str | None = None, encoder: Path | str | None = None) -> EmotionModel:
    """The trained model in a trial's `model/` folder or a copy of it, ready to `predict`.

    `device`: by default the first GPU, else the CPU; `encoder`: where its encoder is now, if not where it was.
    Raises ResultsError for a folder without a whole model, EncoderError where the encoder is not the one that the model
    was trained on, and UsageError for a device that there is not.
    """
    from cvrunner.inference import command as predict_commands
    from cvrunner.inference import emotion_model

    elsewhere = None if encoder is None else str(encoder)
    return emotion_model.load_model(Path(folder), predict_commands.chosen_device(device), elsewhere)


def run_all_folds(
    config: Path | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    new: bool = False,
    quiet: bool = True,
) -> Run:
    """What `cvrunner all-folds` does: every condition, fold and seed on Ray; done trials are not repeated.

    `config`: by default the demo; `overrides`: such as `{"train.epochs": 5}`; `quiet`: print nothing.
    Raises IncompleteRunError where trials failed, Stopped after Ctrl-C (what runs is saved), and every other
    CvrunnerError that the command would end with.
    """
    from rich.console import Console

    experiment = run_steps.prepare(None if config is None else Path(config), as_settings(overrides or {}))
    run = Run(commands.run_all_folds(experiment, new, quiet, Console(quiet=quiet)))
    if run.status != "COMPLETE":
        failed = [f"{name} ({s.error or s.status})" for name, s in run.record.trials.items() if s.status != "DONE"]
        raise IncompleteRunError(f"{run.path}: {len(failed)} of {len(run.record.trials)} trials: {'; '.join(failed)}")
    return run


def as_settings(overrides: Mapping[str, Any]) -> list[str]:
    """`{"train.epochs": 5}` as `--set` has it. A value may be a section of its own."""
    return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]


def _trial_row(state: TrialState, result: TrialResult | None, record: RunRecord) -> dict[str, Any]:
    row: dict[str, Any] = {"condition": state.condition, "fold": state.fold, "seed": state.seed, "status": state.status}
    row["best_epoch"] = None if result is None else result.best_epoch
    for part in ("validation_ccc", "test_ccc"):
        scores: Ccc = {} if result is None else getattr(result, part)
        row |= {f"{part}_{name}": scores.get(name) for name in (*record.dimensions, "avg")}
    for name in ("train_s", "peak_memory_mib", "device", "precision"):
        row[name] = None if result is None else getattr(result, name)
    return row


def _epoch_row(epoch: EpochRecord) -> dict[str, Any]:
    row: dict[str, Any] = {"epoch": epoch.epoch, "train_loss": epoch.train_loss, "best": epoch.best}
    row |= {f"validation_ccc_{name}": value for name, value in epoch.validation_ccc.items()}
    row |= {f"weight_change_{group}": values.weight_change for group, values in epoch.groups.items()}
    return row | {"train_s": epoch.train_s, "validation_s": epoch.validation_s}
