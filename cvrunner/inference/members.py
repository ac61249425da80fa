"""Which trained models of a run make up its ensemble: from its records alone, without loading any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cvrunner.errors import ResultsError, UsageError
from cvrunner.records.model_folder import ModelFolder
from cvrunner.records.results import RunRecord, TrialResult
from cvrunner.records.run_directory import RunDirectory
from cvrunner.verdict.ccc import mean_if_all


@dataclass(frozen=True)
class Members:
    """The models of one condition, by fold and seed."""

    condition: str
    reason: str
    """Why this condition."""
    folders: tuple[ModelFolder, ...]
    missing: tuple[str, ...]
    """Trials of the condition that left no model."""


def find_members(directory: RunDirectory, condition: str | None = None) -> Members:
    """The models of a condition; without one, of that with the best mean validation CCC-Avg.

    Raises UsageError for a condition that there is not, or cannot be chosen, and ResultsError where there is no model.
    """
    run = directory.read_run()
    results = directory.results(run)
    if condition is None:
        condition, reason = best_condition(run, results)
    elif condition not in run.conditions:
        raise UsageError(f"--condition {condition}: the run has {', '.join(run.conditions)}")
    else:
        reason = "as told"
    names = [name for name, state in run.trials.items() if state.condition == condition]
    folders = {name: ModelFolder(directory.path / name / "model") for name in names}
    there = [name for name in names if name in results and folders[name].config.is_file()]
    if not there:
        raise ResultsError(
            f"{directory.path}: condition {condition} has no trained models (model/ in its trials' folders); where "
            "they were deleted, delete the trials' folders too, and the command that made the run trains them again"
        )
    missing = tuple(name for name in names if name not in there)
    return Members(condition, reason, tuple(folders[name] for name in there), missing)


def best_condition(run: RunRecord, results: Mapping[str, TrialResult]) -> tuple[str, str]:
    """The condition with the best mean validation CCC-Avg, and a sentence that says so; the test set has no say.

    Raises UsageError where no condition has all of its trials: means over different folds cannot be compared.
    """
    means = {condition: _validation(run, results, condition) for condition in run.conditions}
    known = {condition: mean for condition, mean in means.items() if mean is not None}
    if not known:
        raise UsageError(
            f"{run.run}: no condition has the results of all folds and seeds, so there is no best one; choose with "
            f"--condition ({', '.join(run.conditions)})"
        )
    best = max(known, key=lambda condition: known[condition])
    others = [f"{condition} {known[condition]:.4f}" for condition in known if condition != best]
    others += [f"{condition} incomplete" for condition in means if condition not in known]
    against = f"; {', '.join(others)}" if others else ""
    return best, f"mean validation CCC-Avg {known[best]:.4f}{against}"


def _validation(run: RunRecord, results: Mapping[str, TrialResult], condition: str) -> float | None:
    names = [name for name, state in run.trials.items() if state.condition == condition]
    if any(name not in results for name in names):
        return None
    return mean_if_all([results[name].validation_ccc["avg"] for name in names])
