"""From utterances to tensors: features are read from the cache, which the trial's encoder fills.

Shapes: `b` utterances of a micro-batch; `S` frames of all of them, utterance after utterance, `S'` at the model's frame
rate; `F` and `N` frames of one utterance at these rates; `C` conv channels, `L` layers, `D` width, `K` dimensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cvrunner.data.batches import Update, micro_batches
from cvrunner.data.features import Features, FeatureStore, Recipe
from cvrunner.data.utterance import Utterance, read_audio
from cvrunner.encoders.encoder import ENCODER_FRAME_RATE_HZ, Boundary, Encoded, SpeechEncoder
from cvrunner.encoders.encoder import Features as ModelFeatures
from cvrunner.encoders.files import EncoderFiles
from cvrunner.encoders.packing import Packing
from cvrunner.records.results import FeatureProgress
from cvrunner.training.accumulation import MicroBatch
from cvrunner.training.device import precision_name

Waveform = npt.NDArray[np.float32]
Compute = Callable[[Sequence[Utterance]], Iterator[Features]]
T = TypeVar("T")
CPU = torch.device("cpu")
FILL_S = 30.0
"""Seconds of audio that a frozen encoder processes at once: on a CPU, 60 s are not faster, and 10 s are slower."""


def _tensors(features: ModelFeatures) -> Iterator[Tensor]:
    """Yield the tensors of a micro-batch that are on its device."""
    for part in [features] if isinstance(features, Tensor) else features:
        if isinstance(part, Encoded):
            yield from (part.states, part.statistics)
        elif part is not None:
            yield part


class Reader:
    """Reads micro-batches for a GPU in a thread, and copies them on a separate stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def submit(self, read: Callable[[], MicroBatch]) -> Callable[[], MicroBatch]:
        """Start to read; return a function that waits for the batch, on the GPU without blocking the host."""

        def copied() -> tuple[MicroBatch, torch.cuda.Event]:
            with torch.cuda.stream(self._stream):
                return read(), self._stream.record_event()

        future = self._thread.submit(copied)

        def arrive() -> MicroBatch:
            batch, event = future.result()
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            for tensor in _tensors(batch.features):
                # Otherwise the allocator could hand its memory to the next copy while it is still in use.
                tensor.record_stream(current)
            return batch

        return arrive


class Inputs:
    """Inputs of one trial: conv features if all layers train, hidden states of a frozen encoder, or the states at the
    boundary to the layers that train.

    Fill the cache before any update: it must come from the pretrained encoder.
    """

    def __init__(
        self,
        encoder: SpeechEncoder,
        files: EncoderFiles,
        utterances: Sequence[Utterance],
        cache_dir: Path,
        device: torch.device,
        resample: bool,
    ) -> None:
        self.encoder = encoder
        self.device = device
        self._reader = Reader(device) if device.type == "cuda" else None
        self._ahead: tuple[Update, Iterable[Callable[[], MicroBatch]]] | None = None
        self._resident: dict[str, Tensor] | None = None
        self.utterances = utterances
        self.resample = resample
        # Hidden states in bfloat16 differ from those in float32, so the precision is part of their recipe.
        precision = precision_name(encoder.precision)
        recipe = partial(Recipe, encoder_digest=files.digest, normalize=files.settings.normalize, window=encoder.WINDOW)
        rate_hz = ENCODER_FRAME_RATE_HZ / encoder.group
        self.conv = FeatureStore(cache_dir, recipe("conv"), utterances, encoder.frames)
        # The same recipe as in the frozen condition: up to the boundary the states are equal, so the files are shared.
        hidden = recipe("hidden", layers=encoder.layers, frame_rate_hz=rate_hz, precision=precision)
        self.hidden = FeatureStore(cache_dir, hidden, utterances, encoder.averaged_frames)
        boundary = recipe("boundary", layers=(encoder.below,), precision=precision)
        self.boundary = FeatureStore(cache_dir, boundary, utterances, encoder.frames)
        self.statistics = statistics_store(files, encoder.WINDOW, precision, utterances, cache_dir)

    @property
    def passes(self) -> list[tuple[str, FeatureStore, Compute]]:
        """Name, store and computation of everything that is computed once; nothing of it depends on trained weights."""
        conv = ("conv features", self.conv, self._conv_features)
        hidden = ("hidden states", self.hidden, self._hidden_states)
        # Statistics are written with the hidden states, where these are needed.
        statistics = ("statistics", self.statistics, self._statistics)
        if self.encoder.adaptation.cached == "hidden":
            return [conv, hidden, statistics]
        if not self.encoder.starts_at_boundary:
            return [conv, statistics]
        boundary = ("hidden states at the boundary", self.boundary, self._boundary_states)
        if not self.encoder.layers_below:
            return [conv, statistics, boundary]
        return [conv, hidden, statistics, boundary]

    def fill_cache(self, only_statistics: bool = False) -> Iterator[FeatureProgress]:
        """Compute the features that are missing; several trials on one node share the work.

        `only_statistics`: of the hidden states; all are missing if no condition is frozen.
        """
        conv, *later = self.passes
        missing = [one for one in later if one[1].missing() and (one[0] == "statistics" or not only_statistics)]
        self.encoder.eval()
        # Conv features alone are of no use if all later features are cached.
        if missing:
            missing.insert(0, conv)
        for kind, store, compute in missing:
            for done, shards in store.fill(compute):
                yield FeatureProgress(kind=kind, done=done, shards=shards)
        # Training may use other layers, or none.
        self.encoder.casts.clear()

    def batches(self, update: Update) -> Iterator[MicroBatch]:
        """Yield the micro-batches of an update; for a GPU, the one after it is being read meanwhile."""
        if self._reader is None:
            yield from (self._batch(update, positions) for positions in update.micro_batches)
            return
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] is not update:
            ahead = update, self._submitted(update)
        for arrive in one_ahead(ahead[1]):
            yield arrive()

    def read_ahead(self, update: Update) -> None:
        """Start to read the update that comes next, for a GPU. On a CPU the work would only move."""
        if self._reader is not None:
            self._ahead = update, list(self._submitted(update))

    def keep_on_gpu(self, room: float | None) -> bool:
        """Let the hidden states of a frozen encoder stay on the GPU once they are there, if they take at most half of
        `room` bytes; return whether they do. None, as on a CPU: no."""
        frames = {u.audio_digest: self.encoder.averaged_frames(u.samples) for u in self.utterances}
        size = sum(frames.values()) * len(self.encoder.layers) * self.encoder.width * np.dtype(np.float16).itemsize
        if room is not None and self.encoder.adaptation.cached == "hidden" and size <= room / 2:
            self._resident = {}
        return self._resident is not None

    def _submitted(self, update: Update) -> Iterator[Callable[[], MicroBatch]]:
        assert self._reader is not None
        for positions in update.micro_batches:
            yield self._reader.submit(partial(self._batch, update, positions))

    def _batch(self, update: Update, positions: tuple[int, ...]) -> MicroBatch:
        """Read a micro-batch."""
        encoder, utterances = self.encoder, [update.utterances[i] for i in positions]
        if encoder.adaptation.cached == "hidden":
            encoded = self._encoded(utterances, range(len(encoder.layers)))
            return MicroBatch(encoded, encoded.lengths, positions)
        store = self.boundary if encoder.starts_at_boundary else self.conv
        arrays = [store.read(u) for u in utterances]
        packed, lengths = self._to_device(arrays), torch.tensor([len(array) for array in arrays])
        if not encoder.starts_at_boundary:
            return MicroBatch(packed, lengths, positions)
        mixed = self._encoded(utterances, encoder.layers_below) if encoder.layers_below else None
        return MicroBatch(Boundary(packed, mixed), lengths, positions)

    def _encoded(self, utterances: Sequence[Utterance], places: Sequence[int]) -> Encoded:
        """Read what the frozen encoder returned, of the mixed layers at these places."""
        lengths = torch.tensor([self.encoder.averaged_frames(u.samples) for u in utterances])
        layers = [self.encoder.layers[place] for place in places]
        statistics = self._to_device([self.statistics.read(u)[:, layers] for u in utterances])
        if self._resident is not None:
            for u in utterances:
                if u.audio_digest not in self._resident:
                    self._resident[u.audio_digest] = self._to_device([self.hidden.read(u)], torch.float16)
            states = torch.cat([self._resident[u.audio_digest] for u in utterances]).float()
        else:
            hidden = [self.hidden.read(u) for u in utterances]
            # Whole arrays need no copy.
            if len(places) < len(self.encoder.layers):
                hidden = [array[:, places] for array in hidden]
            states = self._to_device(hidden)
        return Encoded(states, lengths, statistics)

    def _to_device(self, features: Sequence[Features], dtype: torch.dtype = torch.float32) -> Tensor:
        """Concatenate arrays `[f, ...]` to `[S, ...]` on the device."""
        if self.device.type != "cuda":
            return pack(features).to(dtype)
        # Half the bytes cross the bus, and from pinned memory the copy does not block.
        shape = (sum(map(len, features)), *features[0].shape[1:])
        pinned = torch.empty(shape, dtype=torch.from_numpy(features[0]).dtype, pin_memory=True)
        np.concatenate(features, out=pinned.numpy())
        return pinned.to(self.device, non_blocking=True).to(dtype)

    def padding(self, updates: Iterable[Update]) -> float:
        """Return the share of padded frames in these updates: in the attention of an encoder that trains, or in the
        Mamba of the head if the encoder is frozen."""
        real = padded = 0
        for update in updates:
            for positions in update.micro_batches:
                frames = [self.encoder.frames(update.utterances[i].samples) for i in positions]
                real += sum(frames)
                if self.encoder.adaptation.trains_encoder:
                    padded += sum(len(group.lengths) * group.frames for group in Packing(frames, CPU).groups)
                else:
                    padded += max(frames) * len(frames)
        return 1 - real / padded if padded else 0.0

    def _conv_features(self, utterances: Sequence[Utterance]) -> Iterator[Features]:
        for u in utterances:
            yield conv_features(self.encoder, read_audio(u.path, self.resample), self.device)

    def _hidden_states(self, utterances: Sequence[Utterance]) -> Iterator[Features]:
        """Yield `[N, L, D]` of each utterance of a shard, and store its statistics, for which all layers are run."""
        found = self._in_chunks(partial(hidden_states_and_statistics, self.encoder, device=self.device), utterances)
        self.statistics.add(utterances, [statistics for _, statistics in found])
        yield from (hidden for hidden, _ in found)

    def _statistics(self, utterances: Sequence[Utterance]) -> Iterator[Features]:
        found = self._in_chunks(partial(hidden_states_and_statistics, self.encoder, device=self.device), utterances)
        yield from (statistics for _, statistics in found)

    def _boundary_states(self, utterances: Sequence[Utterance]) -> Iterator[Features]:
        """Yield `[F, D]` of each utterance of a shard."""

        def compute(conv: Sequence[Features]) -> list[Features]:
            lengths = [len(array) for array in conv]
            states = self.encoder.to_boundary(self._to_device(conv), torch.tensor(lengths))
            return np.split(states.half().cpu().numpy(), np.cumsum(lengths)[:-1])

        yield from self._in_chunks(compute, utterances)

    def _in_chunks(self, compute: Callable[[Sequence[Features]], list[T]], utterances: Sequence[Utterance]) -> list[T]:
        """Apply `compute` to the conv features of a shard, half a minute of audio at a time."""
        found: dict[int, T] = {}
        # Cut by duration, not by train.batch_size: what is cached must not depend on a trial's batches.
        with self.encoder.casts.kept():
            for positions in micro_batches(utterances, len(utterances), FILL_S):
                computed = compute([self.conv.read(utterances[i]) for i in positions])
                found |= zip(positions, computed, strict=True)
        return [found[i] for i in range(len(utterances))]


def statistics_store(
    files: EncoderFiles, window: str, precision: str, utterances: Sequence[Utterance], cache_dir: Path
) -> FeatureStore:
    """Return the store of the statistics of all hidden states, one row per utterance; to read it takes no encoder.

    Neither the mixed layers nor the model's frame rate are part of its recipe: statistics are of all layers, at the
    encoder's own frame rate. `window`: as `model.whisper_window`; `precision`: of the encoder, such as `float32`.
    """
    recipe = Recipe(
        "statistics",
        files.digest,
        files.settings.normalize,
        window=window,
        frame_rate_hz=ENCODER_FRAME_RATE_HZ,
        precision=precision,
    )
    return FeatureStore(cache_dir, recipe, utterances, lambda samples: 1)


def conv_features(encoder: SpeechEncoder, waveform: Waveform, device: torch.device) -> Features:
    """Return the conv features `[F, C]` of one waveform `[T]`, as cached: float16."""
    return encoder.conv_features(torch.from_numpy(waveform).to(device)).half().cpu().numpy()


@torch.no_grad()
def hidden_states_and_statistics(
    encoder: SpeechEncoder, conv: Sequence[Features], device: torch.device
) -> list[tuple[Features, Features]]:
    """Return, for each utterance, its hidden states `[N, L, D]`, in float16, and the statistics `[1, L', 2, D]` of all
    `L'` hidden states of the encoder, in float32; from the conv features `[F, C]` of all utterances.
    """
    states, packing = encoder.states(pack(conv).to(device, torch.float32), torch.tensor([len(array) for array in conv]))
    averaged = packing.averaged([states[number] for number in encoder.layers], encoder.group)
    # Of the states: an encoder that pads to a window takes more rows than it returns.
    frames = np.cumsum([-(-length // encoder.group) for length in packing.lengths])
    hidden = np.split(averaged.half().cpu().numpy(), frames[:-1].tolist())
    statistics = packing.statistics([state for _, state in sorted(states.items())]).cpu().numpy()
    return list(zip(hidden, np.split(statistics, len(conv)), strict=True))


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield the items, each after the next one has been taken."""
    iterator = iter(items)
    waiting = list(itertools.islice(iterator, 1))
    for item in iterator:
        yield waiting.pop()
        waiting.append(item)
    yield from waiting


def pack(features: Sequence[Features]) -> Tensor:
    """Concatenate arrays `[f, ...]` to `[S, ...]`."""
    return torch.from_numpy(np.concatenate(features))


def scaled_labels(
    utterances: Sequence[Utterance], dimensions: Sequence[str], scale: tuple[float, float], device: torch.device
) -> Tensor:
    """Return labels `[b, K]` with the rating scale mapped to 0..1; values outside the scale stay outside."""
    low, high = scale
    rows = [[u.label(dimension) for dimension in dimensions] for u in utterances]
    labels = torch.tensor(rows, dtype=torch.float32).to(device, non_blocking=True)
    return (labels - low) / (high - low)


def ratings(scaled: Tensor, scale: tuple[float, float]) -> npt.NDArray[np.float64]:
    """Map predictions `[b, K]` from 0..1 to the rating scale, in float64: the reverse of `scaled_labels`."""
    low, high = scale
    values: npt.NDArray[np.float64] = low + (high - low) * scaled.double().cpu().numpy()
    return values
