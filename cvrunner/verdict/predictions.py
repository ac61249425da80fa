"""predictions.csv: what a trial predicted for its test set, beside the truth."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cvrunner.data.utterance import Utterance
from cvrunner.files import write_atomically

ABOUT = ("utterance", "speaker", "gender", "session", "dialogue", "scenario", "improvised")
IMPROVISED = {True: "true", False: "false", None: ""}


def write_predictions(
    path: Path,
    utterances: Sequence[Utterance],
    trial: tuple[str, int, int],
    true: Mapping[str, npt.NDArray[np.float64]],
    predicted: Mapping[str, npt.NDArray[np.float64]],
) -> None:
    """One row an utterance; `trial` = condition, fold, seed. Values are on the rating scale, every digit kept."""
    columns = [f"{dimension}_{kind}" for dimension in true for kind in ("true", "predicted")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*ABOUT, "condition", "fold", "seed", *columns])
    for i, u in enumerate(utterances):
        about = [u.id, u.speaker, u.gender or "", u.session, u.dialogue, u.scenario or "", IMPROVISED[u.improvised]]
        values = [repr(float(values[d][i])) for d in true for values in (true, predicted)]
        writer.writerow([*about, *trial, *values])
    write_atomically(path, text.getvalue())
