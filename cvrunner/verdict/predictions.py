"""predictions.csv: what each trial predicted for its test set, next to the true ratings; writing, reading, lining up.

Shapes: `S` seeds, `N` utterances, `K` dimensions.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cvrunner.data.utterance import DIMENSIONS, Utterance
from cvrunner.errors import ResultsError
from cvrunner.files import write_atomically
from cvrunner.records.results import ProbeResult, RunRecord, TrialResult
from cvrunner.records.run_directory import RunDirectory, probe_name, trial_name
from cvrunner.verdict.ccc import Ccc, ccc_of_rows

if TYPE_CHECKING:
    import pandas as pd

Floats = npt.NDArray[np.float64]

ABOUT = ("utterance", "speaker", "gender", "session", "dialogue", "scenario", "improvised", "duration_s")
ADDED = ("improvised", "duration_s")
"""Columns that predictions of earlier versions do not have."""
NAMES = (*ABOUT, "condition")
IMPROVISED = {True: "true", False: "false", None: ""}
# A CSV rounds its numbers; a larger deviation means that the file is from another trial.
CCC_TOLERANCE = 1e-3


@dataclass(frozen=True)
class OutOfFold:
    """Every test utterance of a run once, in the order of the folds and, within a fold, of the corpus."""

    about: pd.DataFrame
    """`N` rows: utterance, speaker, gender, session, dialogue, scenario, improvised, duration_s, fold."""
    truth: Floats
    """`[N, K]`, rating scale; NaN if an utterance has no label."""
    predicted: dict[str, Floats]
    """Per condition: `[S, N, K]`, rating scale."""


@dataclass(frozen=True)
class ProbeScores:
    """The linear probe of a run."""

    predicted: Floats | None
    """`[N, K]`, rating scale, in the rows of OutOfFold; None if a fold is missing."""
    results: dict[int, ProbeResult]
    """By fold, with the CCC of its test set; empty if a fold is missing."""
    reason: str | None = None
    """Why the probe is missing, if it is."""


def write_predictions(
    path: Path,
    utterances: Sequence[Utterance],
    trial: tuple[str, int, int],
    true: Mapping[str, Floats],
    predicted: Mapping[str, Floats],
) -> str:
    """Write one row per utterance, with values on the rating scale and every digit; return the file's SHA-256.

    `trial`: condition, fold, seed.
    """
    columns = [f"{dimension}_{kind}" for dimension in true for kind in ("true", "predicted")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*ABOUT, "condition", "fold", "seed", *columns])
    for i, u in enumerate(utterances):
        about = [u.id, u.speaker, u.gender or "", u.session, u.dialogue, u.scenario or ""]
        about += [IMPROVISED[u.improvised], f"{u.duration_s:.3f}"]
        # repr gives the shortest text that reads back as the same float.
        values = [repr(float(values[d][i])) for d in true for values in (true, predicted)]
        writer.writerow([*about, *trial, *values])
    content = text.getvalue().encode()
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def read_predictions(path: Path) -> pd.DataFrame:
    """Read a trial's predictions.csv. Raises ResultsError if it is missing or is not such a table."""
    # pandas takes half a second to import; training, which only writes, does not need it.
    import pandas as pd

    # Names stay text: speaker 01 is not the number 1, and a dialogue may be called NA.
    text = dict.fromkeys(NAMES, str)
    blanks = {f"{name}_{kind}": ["", "nan", "NaN"] for name in DIMENSIONS for kind in ("true", "predicted")}
    try:
        table = pd.read_csv(path, dtype=text, keep_default_na=False, na_values=blanks)
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: cannot be read as a table of predictions: {error}") from None
    for name in ADDED:
        if name not in table.columns:
            table[name] = ""
    if missing := [name for name in NAMES if name not in table.columns]:
        raise ResultsError(f"{path}: columns are missing: {', '.join(missing)}")
    return table


def read_tables(directory: RunDirectory, results: Mapping[str, TrialResult]) -> dict[str, pd.DataFrame]:
    """Read the predictions of all trials that have a result, per trial name."""
    return {
        name: read_predictions(directory.trial(result.condition, result.fold, result.seed).predictions)
        for name, result in results.items()
    }


def one_table(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the predictions of several trials below each other."""
    import pandas as pd

    if not tables:
        return pd.DataFrame(columns=list(NAMES))
    return pd.concat(tables, ignore_index=True)


def out_of_fold(
    directory: RunDirectory, run: RunRecord, results: Mapping[str, TrialResult], tables: Mapping[str, pd.DataFrame]
) -> OutOfFold:
    """Line up the predictions of a complete run: one utterance, one row, all conditions.

    Raises ResultsError if conditions or seeds were tested on different utterances, or if a trial's predictions do not
    give the CCC in its result.
    """
    for name, table in tables.items():
        _check_scores(name, recomputed_ccc(table, run.dimensions), results[name].test_ccc)
    first: pd.DataFrame | None = None
    predicted: dict[str, Floats] = {}
    for condition in run.conditions:
        by_seed = []
        for seed in run.seeds:
            table = one_table([tables[trial_name(condition, fold, seed)] for fold in run.folds])
            if first is None:
                first = table
            # Rows are compared by position from here on, so their order must be the same too.
            keys = ["fold", "utterance"]
            if len(first) != len(table) or not bool((first[keys].to_numpy() == table[keys].to_numpy()).all()):
                raise ResultsError(
                    f"{directory.path}: {condition}, seed {seed}: the test utterances differ from the first "
                    "condition's, so nothing can be paired"
                )
            by_seed.append(_values(table, run.dimensions, "predicted"))
        predicted[condition] = np.stack(by_seed)
    if first is None:
        raise ResultsError(f"{directory.path}: the run has no trials")
    return OutOfFold(first[[*ABOUT, "fold"]], _values(first, run.dimensions, "true"), predicted)


def read_probe(directory: RunDirectory, run: RunRecord, data: OutOfFold) -> ProbeScores:
    """Read the linear probe of a run, or why there is none; never raises, as a report does not depend on it."""
    results: dict[int, ProbeResult] = {}
    tables = []
    for fold in run.folds:
        files, name = directory.linear_probe(fold), probe_name(fold)
        result = files.read_result(ProbeResult)
        if result is None or (result.split_digest, result.corpus_digest) != (run.split_digest, run.corpus_digest):
            reason = "no result; the command of the run fits what is missing"
            if files.error.is_file():
                reason = files.error.read_text(encoding="utf-8", errors="replace").strip()
            return ProbeScores(None, {}, f"{name}: {reason}")
        try:
            tables.append(read_predictions(files.predictions))
            _check_scores(name, recomputed_ccc(tables[-1], run.dimensions), result.test_ccc)
        except (ResultsError, KeyError) as error:
            return ProbeScores(None, {}, str(error))
        results[fold] = result
    table = one_table(tables)
    if table[["fold", "utterance"]].to_numpy().tolist() != data.about[["fold", "utterance"]].to_numpy().tolist():
        return ProbeScores(None, {}, "the linear probe was tested on other utterances than the conditions")
    return ProbeScores(_values(table, run.dimensions, "predicted"), results)


def recomputed_ccc(table: pd.DataFrame, dimensions: Sequence[str]) -> Ccc:
    """Return the CCC of a trial's predictions per dimension, over the utterances with a label, and `avg`."""
    return ccc_of_rows(_values(table, dimensions, "predicted"), _values(table, dimensions, "true"), dimensions)


def _values(table: pd.DataFrame, dimensions: Sequence[str], kind: str) -> Floats:
    return table[[f"{dimension}_{kind}" for dimension in dimensions]].to_numpy(dtype=np.float64)


def _check_scores(name: str, recomputed: Ccc, written: Ccc) -> None:
    """Raise ResultsError if a trial's predictions do not give the CCC in its result."""
    for dimension, value in recomputed.items():
        # A run may be read in fewer dimensions than it has, and then `avg` is another one.
        stored = written.get(dimension) if dimension != "avg" else None
        if stored is not None and value is not None and abs(value - stored) > CCC_TOLERANCE:
            raise ResultsError(
                f"{name}: predictions.csv gives CCC {value:.4f} for {dimension}, but result.json has "
                f"{stored:.4f}; they are not from the same trial: delete the trial's folder and run it again"
            )
