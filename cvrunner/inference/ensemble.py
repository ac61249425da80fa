"""Predictions of several models for audio files: their mean, and how far they are apart.

`M` models, `W` windows of a file, `K` dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cvrunner.data.utterance import SAMPLE_RATE_HZ, AudioError, check_length, read_audio
from cvrunner.errors import NonFiniteError
from cvrunner.inference.emotion_model import EmotionModel, load_models
from cvrunner.inference.windows import HOP_S, WINDOW_S, windows
from cvrunner.records.model_folder import ModelFolder
from cvrunner.training.inputs import Waveform

LONGEST_FILE_S = 7200.0
"""A file is in memory as a whole: two hours of 48 kHz stereo take 2.8 GB."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FilePrediction:
    """What the models say about one file."""

    path: Path
    duration_s: float
    spans_s: list[tuple[float, float]]
    """Start and end of each window."""
    members: list[str]
    values: Floats
    """`[M, W, K]` on the rating scale."""

    def whole(self) -> Floats:
        """`[M, K]`: the mean over the windows, which are of one length."""
        mean: Floats = self.values.mean(axis=1)
        return mean


@dataclass(frozen=True)
class Predictions:
    """Of all files that could be read, in their order."""

    dimensions: tuple[str, ...]
    files: list[FilePrediction]
    problems: dict[Path, str]
    """By file that could not be read: why."""


def load_groups(
    folders: Sequence[ModelFolder], device: torch.device, encoder: str | None = None
) -> Iterator[list[EmotionModel]]:
    """Models that share an encoder pass: all with a frozen encoder together, else each by itself, loaded when its turn
    comes, so that one encoder is in memory at a time, and two while one follows the other. Raises as `load_model`."""
    frozen = folders[0].read().frozen
    for group in [folders] if frozen else [[folder] for folder in folders]:
        yield load_models([folder.path for folder in group], device, encoder)


def predict_files(
    paths: Sequence[Path],
    groups: Iterable[Sequence[EmotionModel]],
    window_s: float = WINDOW_S,
    hop_s: float = HOP_S,
    heard: Callable[[], object] = lambda: None,
) -> Predictions:
    """Every model's ratings of every window of every file; `heard` is called after each file of each group.

    With `protocol: dialogue` the files are the turns of one dialogue, in order, and so are the windows of a long one.
    """
    problems: dict[Path, str] = {}
    spans: dict[Path, list[tuple[int, int]]] = {}
    members: list[str] = []
    values: list[Floats] = []
    dimensions: tuple[str, ...] = ()
    for group in groups:
        vectors: list[list[torch.Tensor]] = [[] for _ in group]
        for path, waveform in _audio(paths, problems, heard):
            spans[path] = windows(len(waveform), window_s, hop_s)
            for start, end in spans[path]:
                features = group[0].features(waveform[start:end])
                for model, z in zip(group, vectors, strict=True):
                    z.append(model.encode(features))
        dimensions = group[0].dimensions
        members += [model.description.name for model in group]
        values += [model.rate(torch.cat(z), [len(z)]) for model, z in zip(group, vectors, strict=True) if z]
    return Predictions(dimensions, _by_file(paths, spans, members, values), problems)


def _audio(
    paths: Iterable[Path], problems: dict[Path, str], heard: Callable[[], object]
) -> Iterator[tuple[Path, Waveform]]:
    """The files that can be read, one in memory at a time; of the others, `problems` gets why."""
    for path in paths:
        if path in problems:
            continue
        try:
            waveform = read_audio(path, resample=True, longest_s=LONGEST_FILE_S)
            check_length(waveform)
        except AudioError as error:
            problems[path] = str(error)
            continue
        yield path, waveform
        heard()


def _by_file(
    paths: Iterable[Path], spans: dict[Path, list[tuple[int, int]]], members: list[str], values: list[Floats]
) -> list[FilePrediction]:
    if not spans:
        return []
    stacked, files, begin = np.stack(values), [], 0
    for path in (path for path in paths if path in spans):
        count = len(spans[path])
        of_file = stacked[:, begin : begin + count]
        if not np.isfinite(of_file).all():
            raise NonFiniteError(f"{path}: a prediction is not a number")
        seconds = [(start / SAMPLE_RATE_HZ, end / SAMPLE_RATE_HZ) for start, end in spans[path]]
        files.append(FilePrediction(path, seconds[-1][1], seconds, members, of_file))
        begin += count
    return files
