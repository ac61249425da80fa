"""The feature cache: content-addressed, written once, and memory-mapped by all trials of a node.

The address is a hash of the recipe (encoder weights, layers, frame rate, preprocessing) and of the audio, since these
alone decide the features; names do not count. Features are float16 (statistics: float32), `[frames, ...]` per
utterance, packed into shards of a few minutes of audio. A shard is either complete or missing. Several processes can
fill a store together.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from cvrunner.config.schema import digest
from cvrunner.data.utterance import Utterance
from cvrunner.errors import EncoderError
from cvrunner.files import patiently, write_file_atomically

Features = npt.NDArray[np.float16 | np.float32]
SHARD_S = 300.0
"""Minimum audio per shard, in seconds, except in the last one."""
PROGRESS_S = 10.0
"""Minimum time between two reports of progress, in seconds."""
FORMAT = 2
"""Version of the files, part of their address."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides features, apart from the audio."""

    kind: str
    """`conv`: output of the frozen front-end; `hidden`: hidden states of a frozen encoder; `boundary`: its states below
    the layers that train; `statistics`: mean and standard deviation of all its hidden states over an utterance."""
    encoder_digest: str
    normalize: bool
    window: str = "unpadded"
    """`unpadded`: the front-end runs on the utterance alone; `30s`: on a padded window."""
    layers: tuple[int, ...] = ()
    frame_rate_hz: float = 50.0
    precision: str = "float32"
    """Precision of the encoder; that of the stored features does not depend on it."""

    @property
    def key(self) -> str:
        """Hash of all fields and the version of the files."""
        return digest({"format": FORMAT, **self.__dict__, "layers": list(self.layers)})[:32]


@dataclass(frozen=True)
class Shard:
    """Utterances whose features are in one file, one after the other."""

    path: Path
    utterances: tuple[Utterance, ...]


class FeatureStore:
    """The features of some utterances by one recipe. `frames` maps a number of samples to a number of frames."""

    def __init__(
        self, cache_dir: Path, recipe: Recipe, utterances: Sequence[Utterance], frames: Callable[[int], int]
    ) -> None:
        self.folder = cache_dir / recipe.kind / recipe.key
        self.shards = tuple(self._make_shards(utterances))
        self.kind = recipe.kind
        self._maps: dict[Path, Features] = {}
        self._checked: set[str] = set()
        # File, first frame and number of frames by digest of the audio.
        self._place: dict[str, tuple[Path, int, int]] = {}
        for shard in self.shards:
            start = 0
            for u in shard.utterances:
                count = frames(u.samples)
                self._place[u.audio_digest] = (shard.path, start, count)
                start += count

    def _make_shards(self, utterances: Sequence[Utterance]) -> Iterator[Shard]:
        unique = {u.audio_digest: u for u in utterances}
        groups: list[list[Utterance]] = [[]]
        # Sorted by hash, so that the same set of recordings gives the same shards whatever the order of the corpus.
        for key in sorted(unique):
            groups[-1].append(unique[key])
            if sum(u.duration_s for u in groups[-1]) >= SHARD_S:
                groups.append([])
        for members in filter(None, groups):
            name = hashlib.sha256("".join(u.audio_digest for u in members).encode()).hexdigest()[:32]
            yield Shard(self.folder / f"{name}.npy", tuple(members))

    def missing(self) -> list[Shard]:
        """Return the shards that no process has written yet."""
        return [shard for shard in self.shards if not self._is_complete(shard)]

    def _is_complete(self, shard: Shard) -> bool:
        """Return whether the file exists with all its frames; a truncated one is made again."""
        try:
            _, start, count = self._place[shard.utterances[-1].audio_digest]
            return len(self._map(shard.path)) == start + count
        except (OSError, ValueError, EOFError):
            return False

    def fill(self, compute: Callable[[Sequence[Utterance]], Iterator[Features]]) -> Iterator[tuple[int, int]]:
        """Write the missing shards, sharing the work with other processes; yields (shards present, shards in total) at
        the start, and again whenever the number has changed after `PROGRESS_S`.

        `compute` yields `[frames, ...]` per utterance, in order and unpadded.
        """
        shown, shown_at = -1, -math.inf
        while pending := self.missing():
            present, filled = len(self.shards) - len(pending), False
            for shard in pending:
                if present > shown and time.monotonic() - shown_at >= PROGRESS_S:
                    yield present, len(self.shards)
                    shown, shown_at = present, time.monotonic()
                if self._fill_shard(shard, compute):
                    present, filled = present + 1, True
            # Other processes hold the locks of all missing shards.
            if not filled:
                time.sleep(0.2)

    def _fill_shard(self, shard: Shard, compute: Callable[[Sequence[Utterance]], Iterator[Features]]) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            # Without waiting: whoever holds the lock writes this shard, and there may be others to write meanwhile.
            with FileLock(shard.path.with_suffix(".lock"), timeout=0):
                if self._is_complete(shard):
                    return True
                shard.path.unlink(missing_ok=True)
                self._write(shard, list(compute(shard.utterances)))
                return True
        except Timeout:
            return False

    def add(self, utterances: Sequence[Utterance], features: Sequence[Features]) -> None:
        """Write a shard, unless it is complete, with features that were made along with those of another store.

        `utterances`: those of one shard, in order; stores of the same utterances have the same shards.
        """
        # Without a lock: another process would write the same bytes, and each write is atomic.
        shard = next(one for one in self.shards if one.utterances == tuple(utterances))
        if not self._is_complete(shard):
            self._write(shard, features)

    def _write(self, shard: Shard, features: Sequence[Features]) -> None:
        for u, of in zip(shard.utterances, features, strict=True):
            if not all_finite(of):
                raise EncoderError(
                    f"features ({self.kind}) of utterance {u.id} ({u.path}) are not finite, or above the 65504 of "
                    "float16: check the recording, and whether the encoder's files are damaged"
                )
        packed = np.concatenate(features)
        # It may be a map of a truncated file.
        self._maps.pop(shard.path, None)
        write_file_atomically(shard.path, lambda file: np.save(file, packed, allow_pickle=False))

    def read(self, utterance: Utterance) -> Features:
        """Return the features `[frames, ...]` of an utterance, a view of the memory map.

        Raises EncoderError if they are not finite.
        """
        path, start, count = self._place[utterance.audio_digest]
        features = self._map(path)[start : start + count]
        # Once per process: the file never changes.
        if utterance.audio_digest not in self._checked:
            if not all_finite(features):
                raise EncoderError(
                    f"cached features ({self.kind}) of utterance {utterance.id} are not finite: {path} is damaged, "
                    "delete it to have it written again"
                )
            self._checked.add(utterance.audio_digest)
        return features

    def unmap(self) -> None:
        """Give the memory of all mapped files back; views must not be used any more. Reading maps a file again."""
        self._maps.clear()

    def _map(self, path: Path) -> Features:
        if path not in self._maps:
            self._maps[path] = patiently(np.load)(path, mmap_mode="r", allow_pickle=False)
        return self._maps[path]


def all_finite(features: Features) -> bool:
    """Whether no value is NaN or infinite."""
    if features.dtype != np.float16:
        return bool(np.isfinite(features).all())
    # All bits of the exponent are 1 only then; the sign is the bit above them. Six times faster than `np.isfinite`,
    # which counts for gigabytes of hidden states.
    return not features.size or int((features.view(np.uint16) & 0x7FFF).max()) < 0x7C00
