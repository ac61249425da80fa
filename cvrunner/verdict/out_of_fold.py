"""The out-of-fold predictions of a run, read from its CSV files and lined up: one utterance, one row, all conditions.

Shapes: `S` seeds, `N` utterances, `K` dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cvrunner.errors import ResultsError
from cvrunner.records.results import RunRecord, TrialResult
from cvrunner.records.run_directory import RunDirectory, trial_name
from cvrunner.verdict.ccc import ccc
from cvrunner.verdict.predictions import ABOUT

if TYPE_CHECKING:
    import pandas as pd

Floats = npt.NDArray[np.float64]

NAMES = (*ABOUT, "condition")
# A CSV rounds its numbers; more than this is another trial's file.
CCC_TOLERANCE = 1e-3


@dataclass(frozen=True)
class OutOfFold:
    """Every test utterance of the run once, in the order of the folds and, within one, of the corpus."""

    about: pd.DataFrame
    """`N` rows: utterance, speaker, gender, session, dialogue, scenario, improvised, fold."""
    truth: Floats
    """`[N, K]`, rating scale; NaN where there is no label."""
    predicted: dict[str, Floats]
    """By condition: `[S, N, K]`, rating scale."""


def read_predictions(directory: RunDirectory, condition: str, fold: int, seed: int) -> pd.DataFrame:
    """One trial's predictions.csv. Raises ResultsError where it is missing or is no such table."""
    import pandas as pd

    path = directory.trial(condition, fold, seed).predictions
    try:
        # Names stay text: a speaker 01 is not the number 1, and a dialogue may be called NA.
        text = dict.fromkeys(NAMES, str)
        table = pd.read_csv(path, dtype=text, keep_default_na=False, na_values=_blanks())
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: cannot be read as a table of predictions: {error}") from None
    if "improvised" not in table.columns:
        table["improvised"] = ""  # an older run, which did not write it down
    if missing := [name for name in NAMES if name not in table.columns]:
        raise ResultsError(f"{path}: columns are missing: {', '.join(missing)}")
    return table


def all_predictions(directory: RunDirectory, run: RunRecord) -> pd.DataFrame:
    """The predictions of all trials that have a result, as one table."""
    import pandas as pd

    done = directory.results(run).values()
    tables = [read_predictions(directory, r.condition, r.fold, r.seed) for r in done]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(NAMES))


def out_of_fold(directory: RunDirectory, run: RunRecord, results: dict[str, TrialResult]) -> OutOfFold:
    """The predictions of a complete run. Raises ResultsError where conditions or seeds were tested on different
    utterances, or where a trial's predictions do not give the CCC in its result."""
    import pandas as pd

    first: pd.DataFrame | None = None
    predicted: dict[str, Floats] = {}
    for condition in run.conditions:
        by_seed = []
        for seed in run.seeds:
            tables = [_checked(directory, run, results, condition, fold, seed) for fold in run.folds]
            table = pd.concat(tables, ignore_index=True)
            first = table if first is None else first
            _check_same_rows(first, table, f"{directory.path}: {condition}, seed {seed}")
            by_seed.append(_values(table, run, "predicted"))
        predicted[condition] = np.stack(by_seed)
    if first is None:
        raise ResultsError(f"{directory.path}: the run has no trials")
    return OutOfFold(first[[*NAMES[:-1], "fold"]], _values(first, run, "true"), predicted)


def _blanks() -> dict[str, list[str]]:
    names = ("valence", "arousal", "dominance")
    return {f"{name}_{kind}": ["", "nan", "NaN"] for name in names for kind in ("true", "predicted")}


def _values(table: pd.DataFrame, run: RunRecord, kind: str) -> Floats:
    return table[[f"{dimension}_{kind}" for dimension in run.dimensions]].to_numpy(dtype=np.float64)


def _checked(
    directory: RunDirectory,
    run: RunRecord,
    results: dict[str, TrialResult],
    condition: str,
    fold: int,
    seed: int,
) -> pd.DataFrame:
    """A trial's predictions, after its CCC was taken again from them."""
    table = read_predictions(directory, condition, fold, seed)
    name = trial_name(condition, fold, seed)
    truth, predicted = _values(table, run, "true"), _values(table, run, "predicted")
    for k, dimension in enumerate(run.dimensions):
        known = ~np.isnan(truth[:, k])
        again, written = ccc(predicted[known, k], truth[known, k]), results[name].test_ccc.get(dimension)
        if written is not None and np.isfinite(again) and abs(again - written) > CCC_TOLERANCE:
            raise ResultsError(
                f"{name}: predictions.csv gives CCC {again:.4f} for {dimension}, result.json has {written:.4f}; they "
                "are not of the same trial: delete the trial's folder and run it again"
            )
    return table


def _check_same_rows(first: pd.DataFrame, table: pd.DataFrame, where: str) -> None:
    keys = ["fold", "utterance"]
    if len(first) != len(table) or not bool((first[keys].to_numpy() == table[keys].to_numpy()).all()):
        raise ResultsError(f"{where}: other test utterances than the first condition's, so nothing can be paired")
