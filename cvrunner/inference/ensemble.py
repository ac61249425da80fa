"""The ensemble of a run's models: its members, how long files are cut into windows, its ratings, and tables of them.

`M` models, `W` windows of a file, `K` dimensions. A file is cut into windows of 15 s: nearly all turns that the models
were trained on are shorter (99 % in IEMOCAP), and an encoder's memory grows with the square of the length. A window
starts every 10 s, so whatever lasts 5 s or less, as the mean turn does, is whole in at least one window.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cvrunner.config.adaptation import adaptation_of
from cvrunner.data.utterance import SAMPLE_RATE_HZ, AudioError, check_length, read_audio
from cvrunner.errors import ResultsError, UsageError
from cvrunner.records.model_folder import ModelFolder
from cvrunner.records.results import RunRecord, TrialResult
from cvrunner.records.run_directory import RunDirectory
from cvrunner.text import format_score
from cvrunner.verdict.ccc import mean_if_all

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from cvrunner.inference.emotion_model import EmotionModel

WINDOW_S, HOP_S = 15.0, 10.0
SHORTEST_WINDOW_S, SHORTEST_HOP_S = 0.5, 0.1
LONGEST_FILE_S = 7200.0
"""A file is in memory as a whole: two hours of 48 kHz stereo take 2.8 GB."""
DIGITS = 4
"""Decimals of a rating in a table."""
Floats = npt.NDArray[np.float64]


# --- members ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Members:
    """The models of one condition, by fold and seed."""

    condition: str
    reason: str
    """Why this condition."""
    folders: tuple[ModelFolder, ...]
    missing: tuple[str, ...]
    """Trials of the condition that have no model."""


def find_members(directory: RunDirectory, condition: str | None = None) -> Members:
    """Find the models of a condition, by default the one with the best mean validation CCC-Avg; loads none of them.

    Raises UsageError for an unknown condition or if none can be chosen, and ResultsError if there is no model.
    """
    run = directory.read_run()
    results = directory.results(run)
    if condition is None:
        condition, reason = best_condition(run, results)
    elif condition not in run.conditions:
        raise UsageError(f"condition {condition}: the run has {', '.join(run.conditions)}")
    else:
        reason = "as requested"
    names = [name for name, state in run.trials.items() if state.condition == condition]
    folders = {name: ModelFolder(directory.path / name / "model") for name in names}
    found = [name for name in names if name in results and folders[name].config.is_file()]
    if not found:
        raise ResultsError(
            f"{directory.path}: condition {condition} has no trained models (model/ in its trials' folders); if they "
            "were deleted, delete the trials' folders too, and the command that made the run trains them again"
        )
    missing = tuple(name for name in names if name not in found)
    return Members(condition, reason, tuple(folders[name] for name in found), missing)


def best_condition(run: RunRecord, results: Mapping[str, TrialResult]) -> tuple[str, str]:
    """Return the condition with the best mean validation CCC-Avg and a reason to print; the test set is not used.

    Raises UsageError if no condition has all of its trials: means over different folds cannot be compared.
    """
    known: dict[str, float] = {}
    incomplete = []
    for condition in run.conditions:
        names = [name for name, state in run.trials.items() if state.condition == condition]
        # An undefined CCC, of constant predictions, counts like a missing trial: no mean can hold it.
        mean = None
        if all(name in results for name in names):
            mean = mean_if_all([results[name].validation_ccc["avg"] for name in names])
        if mean is None:
            incomplete.append(f"{condition} incomplete")
        else:
            known[condition] = mean
    if not known:
        raise UsageError(
            f"{run.run}: no condition has the results of all folds and seeds, so there is no best one; choose the "
            f"condition ({', '.join(run.conditions)})"
        )
    best = max(known, key=lambda condition: known[condition])
    others = [f"{condition} {format_score(mean)}" for condition, mean in known.items() if condition != best]
    reason = f"mean validation CCC-Avg {format_score(known[best])}"
    if others or incomplete:
        reason += f"; {', '.join(others + incomplete)}"
    return best, reason


# --- windows ----------------------------------------------------------------------------------------------------------


def windows(samples: int, window_s: float = WINDOW_S, hop_s: float = HOP_S) -> list[tuple[int, int]]:
    """Return first sample and end of each window of a recording of `samples` samples at 16 kHz.

    A recording that fits into a window stays whole. The last window is moved back to end where the recording does, so
    all windows have the same length. Raises UsageError for lengths that leave gaps or are too short.
    """
    _check_windows(window_s, hop_s)
    window, hop = round(window_s * SAMPLE_RATE_HZ), round(hop_s * SAMPLE_RATE_HZ)
    if samples <= window:
        return [(0, samples)]
    starts = [*range(0, samples - window, hop), samples - window]
    return [(start, start + window) for start in starts]


def chosen_windows(window_s: float | None, hop_s: float | None) -> tuple[float, float]:
    """Return window and hop in seconds, with defaults for None. Raises UsageError as `windows`."""
    if window_s is None:
        window_s = WINDOW_S
    if hop_s is None:
        hop_s = window_s * HOP_S / WINDOW_S
    _check_windows(window_s, hop_s)
    return window_s, hop_s


def _check_windows(window_s: float, hop_s: float) -> None:
    # Written so that NaN is refused too.
    if not window_s >= SHORTEST_WINDOW_S:
        raise UsageError(f"window_s {window_s:g}: must be {SHORTEST_WINDOW_S:g} or more")
    if not SHORTEST_HOP_S <= hop_s <= window_s:
        raise UsageError(
            f"hop_s {hop_s:g}: must be from {SHORTEST_HOP_S:g} s to the window's {window_s:g} s, else there are gaps"
        )


# --- ratings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilePrediction:
    """The ratings of one file by all models."""

    path: Path
    duration_s: float
    spans_s: list[tuple[float, float]]
    """Start and end of each window."""
    members: list[str]
    values: Floats
    """`[M, W, K]` on the rating scale."""

    def whole(self) -> Floats:
        """Return `[M, K]`: the mean over the windows, which have the same length."""
        mean: Floats = self.values.mean(axis=1)
        return mean


@dataclass(frozen=True)
class Predictions:
    """The ratings of all files that could be read, in the given order."""

    dimensions: tuple[str, ...]
    files: list[FilePrediction]
    problems: dict[Path, str]
    """Why a file could not be read."""


def load_groups(
    folders: Sequence[ModelFolder], device: torch.device, encoder: str | None = None
) -> Iterator[list[EmotionModel]]:
    """Load the models in groups that share one encoder. Raises as `load_model`."""
    # torch takes seconds to import; arguments and files are checked before.
    from cvrunner.inference.emotion_model import load_models

    # Models with a frozen encoder share one pass through it, unless folds have other layers of their own. A fine-tuned
    # encoder is loaded when its turn comes, so that one encoder is in memory at a time, and two while one replaces the
    # other.
    groups: dict[object, list[Path]] = {}
    for folder in folders:
        described = folder.read()
        needs: object = (described.model.layers, described.model.frame_rate_hz, described.precision)
        if adaptation_of(described.model).trains_encoder:
            needs = folder.path
        groups.setdefault(needs, []).append(folder.path)
    for paths in groups.values():
        yield load_models(paths, device, encoder)


def predict_files(
    paths: Sequence[Path],
    groups: Iterable[Sequence[EmotionModel]],
    window_s: float = WINDOW_S,
    hop_s: float = HOP_S,
    on_file: Callable[[], object] = lambda: None,
) -> Predictions:
    """Rate every window of every file with every model; `on_file` is called after each file of each group.

    With `protocol: dialogue` the files are the turns of one dialogue, in order, and so are the windows of a long one.
    """
    problems: dict[Path, str] = {}
    spans: dict[Path, list[tuple[int, int]]] = {}
    members: list[str] = []
    values: list[dict[Path, Floats]] = []
    dimensions: tuple[str, ...] = ()
    for group in groups:
        encoder = group[0].network.encoder
        if encoder.longest_samples is not None and window_s * SAMPLE_RATE_HZ > encoder.longest_samples:
            longest_s = encoder.longest_samples / SAMPLE_RATE_HZ
            raise UsageError(f"window_s {window_s:g}: the encoder hears at most {longest_s:g} s at once")
        vectors: list[list[torch.Tensor]] = [[] for _ in group]
        begins: dict[Path, int] = {}
        for path, waveform in _audio(paths, encoder.shortest_samples, problems, on_file):
            of_windows = windows(len(waveform), window_s, hop_s)
            try:
                rows = []
                for start, end in of_windows:
                    features = group[0].features(waveform[start:end])
                    rows.append([model.encode(features) for model in group])
            except Exception as error:  # whatever a model makes of one file, the others keep their ratings
                problems[path] = f"{type(error).__name__}: {error}"
                continue
            spans[path], begins[path] = of_windows, len(vectors[0])
            for z, encoded in zip(vectors, zip(*rows, strict=True), strict=True):
                z.extend(encoded)
        dimensions = group[0].dimensions
        members += [model.description.name for model in group]
        # The windows of all files in one row, since they may be the turns of one dialogue.
        rated = [model.rate(z) for model, z in zip(group, vectors, strict=True) if z]
        values += [{path: row[begin : begin + len(spans[path])] for path, begin in begins.items()} for row in rated]
    files = []
    for path in (path for path in paths if path in spans and path not in problems):
        of_file = np.stack([of_model[path] for of_model in values])
        if not np.isfinite(of_file).all():
            problems[path] = "a prediction is not a number"
            continue
        seconds = [(start / SAMPLE_RATE_HZ, stop / SAMPLE_RATE_HZ) for start, stop in spans[path]]
        files.append(FilePrediction(path, seconds[-1][1], seconds, members, of_file))
    return Predictions(dimensions, files, problems)


def _audio(
    paths: Iterable[Path], shortest: int, problems: dict[Path, str], on_file: Callable[[], object]
) -> Iterator[tuple[Path, npt.NDArray[np.float32]]]:
    """Yield the files that can be read, one in memory at a time; add the reason for each other one to `problems`."""
    for path in paths:
        # Every group of models reads the files again, rather than keep all in memory; what failed once is skipped.
        if path in problems:
            continue
        try:
            waveform = read_audio(path, resample=True, longest_s=LONGEST_FILE_S)
            check_length(waveform, shortest)
        except AudioError as error:
            problems[path] = str(error)
            continue
        yield path, waveform
        on_file()


# --- tables -----------------------------------------------------------------------------------------------------------


def file_table(predictions: Predictions, by_window: bool = False) -> pd.DataFrame:
    """Return a row per file: path, duration_s, then `<dimension>` and `<dimension>_sd`, windows, models.

    `by_window`: a row per window of each file: path, start_s, end_s, the ratings, models. The sd is over the models,
    divided by n - 1; missing if there is one model.
    """
    # It takes half a second to import; arguments and files are checked before.
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for file in predictions.files:
        path, models = {"path": str(file.path)}, {"models": len(file.members)}
        if by_window:
            for i, (start, end) in enumerate(file.spans_s):
                span = {"start_s": round(start, 3), "end_s": round(end, 3)}
                rows.append(path | span | _ratings(predictions.dimensions, file.values[:, i]) | models)
        else:
            duration, count = {"duration_s": round(file.duration_s, 3)}, {"windows": len(file.spans_s)}
            rows.append(path | duration | _ratings(predictions.dimensions, file.whole()) | count | models)
    return pd.DataFrame(rows)


def json_text(predictions: Predictions, condition: str, by_window: bool) -> str:
    """Return all files with the rating of each single model; `by_window`: of each window too."""
    dimensions, files = predictions.dimensions, []
    for file in predictions.files:
        found: dict[str, Any] = {"path": str(file.path), "duration_s": round(file.duration_s, 3)}
        found |= _all_digits(dimensions, file.whole(), file.members)
        if by_window:
            found["windows"] = [
                {"start_s": round(start, 3), "end_s": round(end, 3)}
                | _all_digits(dimensions, file.values[:, i], file.members)
                for i, (start, end) in enumerate(file.spans_s)
            ]
        files.append(found)
    problems = {str(path): problem for path, problem in predictions.problems.items()}
    return json.dumps({"condition": condition, "files": files, "problems": problems}, indent=1)


def _all_digits(dimensions: tuple[str, ...], values: Floats, members: list[str]) -> dict[str, Any]:
    """Return mean, sd and each model's rating of `[M, K]`, by dimension."""
    return {
        dimension: {
            "mean": float(values[:, k].mean()),
            "sd": _sd(values[:, k]),
            "models": dict(zip(members, values[:, k].tolist(), strict=True)),
        }
        for k, dimension in enumerate(dimensions)
    }


def _ratings(dimensions: tuple[str, ...], values: Floats) -> dict[str, float | None]:
    """Return mean and sd of `[M, K]` by column, rounded."""
    row: dict[str, float | None] = {}
    for k, dimension in enumerate(dimensions):
        sd = _sd(values[:, k])
        row[dimension] = round(float(values[:, k].mean()), DIGITS)
        row[f"{dimension}_sd"] = None if sd is None else round(sd, DIGITS)
    return row


def _sd(values: Floats) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
