"""Predictions as a table or as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from cvrunner.inference.ensemble import FilePrediction, Floats, Predictions

if TYPE_CHECKING:
    import pandas as pd

DIGITS = 4


def file_table(predictions: Predictions) -> pd.DataFrame:
    """A row for each file: path, duration_s, then `<dimension>` and `<dimension>_sd` (over the models, n - 1; missing
    with a single one), windows, models."""
    import pandas as pd

    rows = [
        {"path": str(f.path), "duration_s": round(f.duration_s, 3)}
        | _ratings(predictions.dimensions, f.whole())
        | {"windows": len(f.spans_s), "models": len(f.members)}
        for f in predictions.files
    ]
    return pd.DataFrame(rows)


def window_table(predictions: Predictions) -> pd.DataFrame:
    """A row for each window of each file: path, start_s, end_s, ratings, models."""
    import pandas as pd

    rows = [
        {"path": str(f.path), "start_s": round(start, 3), "end_s": round(end, 3)}
        | _ratings(predictions.dimensions, f.values[:, i])
        | {"models": len(f.members)}
        for f in predictions.files
        for i, (start, end) in enumerate(f.spans_s)
    ]
    return pd.DataFrame(rows)


def as_json(predictions: Predictions, condition: str, by_window: bool) -> str:
    """All files, with the rating of each single model; `by_window`: of each window too."""
    files = [_file(predictions.dimensions, f, by_window) for f in predictions.files]
    problems = {str(path): problem for path, problem in predictions.problems.items()}
    return json.dumps({"condition": condition, "files": files, "problems": problems}, indent=1)


def _file(dimensions: tuple[str, ...], file: FilePrediction, by_window: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"path": str(file.path), "duration_s": round(file.duration_s, 3)}
    found |= _single(dimensions, file.whole(), file.members)
    if by_window:
        found["windows"] = [
            {"start_s": round(start, 3), "end_s": round(end, 3)} | _single(dimensions, file.values[:, i], file.members)
            for i, (start, end) in enumerate(file.spans_s)
        ]
    return found


def _single(dimensions: tuple[str, ...], values: Floats, members: list[str]) -> dict[str, Any]:
    """Of `[M, K]`: by dimension mean, sd and every model's own, all digits kept."""
    return {
        dimension: {
            "mean": float(values[:, k].mean()),
            "sd": _sd(values[:, k]),
            "models": dict(zip(members, values[:, k].tolist(), strict=True)),
        }
        for k, dimension in enumerate(dimensions)
    }


def _ratings(dimensions: tuple[str, ...], values: Floats) -> dict[str, float | None]:
    row: dict[str, float | None] = {}
    for k, dimension in enumerate(dimensions):
        sd = _sd(values[:, k])
        row[dimension] = round(float(values[:, k].mean()), DIGITS)
        row[f"{dimension}_sd"] = None if sd is None else round(sd, DIGITS)
    return row


def _sd(values: Floats) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
