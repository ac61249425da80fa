"""The folder of a run: where each file lies, and reading and writing them.

<root>/<run>/
    config.yaml  split.json  run.json  summary.json  comparison.md  report.html  figures/
    <condition>/fold-<k>/seed-<s>/
        journal.jsonl  result.json  predictions.csv  model/  checkpoint/
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cvrunner.errors import ResultsError
from cvrunner.files import write_atomically
from cvrunner.records.model_folder import ModelFolder
from cvrunner.records.results import RunRecord, Summary, TrialResult

GENERATIONS = 2
"""Number of checkpoints that a running trial keeps."""


def trial_name(condition: str, fold: int, seed: int) -> str:
    """`frozen/fold-1/seed-0`: the trial's name everywhere, and its folder in the run."""
    return f"{condition}/fold-{fold}/seed-{seed}"


@dataclass(frozen=True)
class TrialDirectory:
    """The files of one trial."""

    path: Path

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def predictions(self) -> Path:
        """CSV: utterance, speaker, gender, session, dialogue, scenario, improvised (true, false or empty), condition,
        fold, seed, then for each dimension `<dimension>_true` and `<dimension>_predicted` on the rating scale."""
        return self.path / "predictions.csv"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def model(self) -> ModelFolder:
        """The trained model at the best epoch."""
        return ModelFolder(self.path / "model")

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def kept(self) -> tuple[Path, ...]:
        """What a finished trial leaves, the result last: while it is missing, nothing is finished."""
        return self.journal, self.predictions, *self.model.files, self.result_file

    def result(self, key: str | None = None) -> TrialResult | None:
        """The result, or None where there is none, or none of this trial key. Spoilt files count as none."""
        try:
            result = TrialResult.from_json(self.result_file.read_bytes(), str(self.result_file))
            predictions = hashlib.sha256(self.predictions.read_bytes()).hexdigest()
        except (ResultsError, OSError):
            return None
        if result.predictions_sha256 not in ("", predictions):
            return None
        return result if key in (None, result.key) else None


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def split(self) -> Path:
        return self.path / "split.json"

    @property
    def comparison(self) -> Path:
        return self.path / "comparison.md"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def run_file(self) -> Path:
        return self.path / "run.json"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    def trial(self, condition: str, fold: int, seed: int) -> TrialDirectory:
        return TrialDirectory(self.path / trial_name(condition, fold, seed))

    def read_run(self) -> RunRecord:
        """run.json. Raises ResultsError where this is not a run's folder."""
        if not self.run_file.is_file():
            raise ResultsError(f"{self.path}: no run here (run.json is missing)")
        return RunRecord.from_json(self.run_file.read_bytes(), str(self.run_file))

    def write_run(self, record: RunRecord) -> None:
        write_atomically(self.run_file, record.to_json())

    def write_summary(self, summary: Summary) -> None:
        write_atomically(self.summary_file, summary.to_json())

    def results(self, record: RunRecord) -> dict[str, TrialResult]:
        """The results that are there, by trial name, in the run's order."""
        found = {
            name: self.trial(state.condition, state.fold, state.seed).result(state.key)
            for name, state in record.trials.items()
        }
        return {name: result for name, result in found.items() if result is not None}
