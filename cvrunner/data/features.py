"""The feature cache: content-addressed, written once, and memory-mapped by all trials of a node.

The address is a hash of the recipe (encoder weights, layers, frame rate, preprocessing) and of the audio, since these
alone decide the features; names do not count. Features are float16, `[frames, ...]` per utterance, packed into shards
of a few minutes of audio. A shard is either complete or missing. Several processes can fill a store together.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from cvrunner.config.schema import digest
from cvrunner.data.utterance import Utterance
from cvrunner.files import patiently, write_file_atomically

Features = npt.NDArray[np.float16]
SHARD_S = 300.0
"""Minimum audio per shard, in seconds, except in the last one."""
FORMAT = 2
"""Version of the files, part of their address."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides features, apart from the audio."""

    kind: str
    """`conv`: output of the frozen front-end; `hidden`: hidden states of a frozen encoder."""
    encoder_digest: str
    normalize: bool
    window: str = "unpadded"
    """`unpadded`: the front-end runs on the utterance alone; `30s`: on a padded window."""
    layers: tuple[int, ...] = ()
    frame_rate_hz: float = 50.0
    precision: str = "float32"
    """Precision of the encoder; features are stored as float16 in any case."""

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
        self._maps: dict[Path, Features] = {}
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
        """Write the missing shards, sharing the work with other processes; yields (shards present, shards in total).

        `compute` yields `[frames, ...]` per utterance, in order and unpadded.
        """
        while pending := self.missing():
            yield len(self.shards) - len(pending), len(self.shards)
            filled = [self._fill_shard(shard, compute) for shard in pending]
            # Other processes hold the locks of all missing shards.
            if not any(filled):
                time.sleep(0.2)

    def _fill_shard(self, shard: Shard, compute: Callable[[Sequence[Utterance]], Iterator[Features]]) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            # Without waiting: whoever holds the lock writes this shard, and there may be others to write meanwhile.
            with FileLock(shard.path.with_suffix(".lock"), timeout=0):
                if self._is_complete(shard):
                    return True
                shard.path.unlink(missing_ok=True)
                # It may be a map of the truncated file.
                self._maps.pop(shard.path, None)
                packed = np.concatenate(list(compute(shard.utterances)))
                write_file_atomically(shard.path, lambda file: np.save(file, packed, allow_pickle=False))
                return True
        except Timeout:
            return False

    def read(self, utterance: Utterance) -> Features:
        """Return the features `[frames, ...]` of an utterance, a view of the memory map."""
        path, start, count = self._place[utterance.audio_digest]
        return self._map(path)[start : start + count]

    def _map(self, path: Path) -> Features:
        if path not in self._maps:
            self._maps[path] = patiently(np.load)(path, mmap_mode="r", allow_pickle=False)
        return self._maps[path]
