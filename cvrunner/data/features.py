"""The feature cache: content-addressed, written once, read by memory map by all trials of a node.

A recipe (encoder weights, layers, frame rate, preprocessing) and the audio of an utterance decide its features, so
their hashes are the address; names do not count. Features are float16, `[frames, ...]` for an utterance, packed into
shards of a few minutes of audio. A shard is either whole or not there. Several processes fill a store together.
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
FORMAT = 2


@dataclass(frozen=True)
class Recipe:
    """What features are made of, apart from the audio."""

    kind: str
    """`conv`: output of the frozen front-end; `hidden`: hidden states of a frozen encoder."""
    encoder_digest: str
    normalize: bool
    layers: tuple[int, ...] = ()
    frame_rate_hz: float = 50.0
    precision: str = "float32"
    """What the encoder computed in; features are kept as float16 anyway."""

    @property
    def key(self) -> str:
        """Hash of all fields and the file format."""
        return digest({"format": FORMAT, **self.__dict__, "layers": list(self.layers)})[:32]


@dataclass(frozen=True)
class Shard:
    """Some utterances whose features lie in one file, one after the other."""

    path: Path
    utterances: tuple[Utterance, ...]


class FeatureStore:
    """The features of some utterances by one recipe. `frames`: how many frames an utterance of so many samples has."""

    def __init__(
        self, cache_dir: Path, recipe: Recipe, utterances: Sequence[Utterance], frames: Callable[[int], int]
    ) -> None:
        self.folder = cache_dir / recipe.kind / recipe.key
        self.shards = tuple(self._cut(utterances))
        self._maps: dict[Path, Features] = {}
        self._place: dict[str, tuple[Path, int, int]] = {}
        for shard in self.shards:
            start = 0
            for u in shard.utterances:
                count = frames(u.samples)
                self._place[u.audio_digest] = (shard.path, start, count)
                start += count

    def _cut(self, utterances: Sequence[Utterance]) -> Iterator[Shard]:
        """Shards in the order of the audio's hashes, so that they do not depend on the order of the corpus."""
        unique = {u.audio_digest: u for u in utterances}
        members: list[Utterance] = []
        for key in sorted(unique):
            members.append(unique[key])
            if sum(u.duration_s for u in members) >= SHARD_S:
                yield self._shard(members)
                members = []
        if members:
            yield self._shard(members)

    def _shard(self, members: list[Utterance]) -> Shard:
        name = hashlib.sha256("".join(u.audio_digest for u in members).encode()).hexdigest()[:32]
        return Shard(self.folder / f"{name}.npy", tuple(members))

    def missing(self) -> list[Shard]:
        """The shards that nobody has written yet."""
        return [shard for shard in self.shards if not self._is_whole(shard)]

    def _is_whole(self, shard: Shard) -> bool:
        """Whether the file is there with all its frames: a truncated one is made again."""
        try:
            last = self._place[shard.utterances[-1].audio_digest]
            return len(self._map(shard.path)) == last[1] + last[2]
        except (OSError, ValueError, EOFError):
            return False

    def fill(self, compute: Callable[[Sequence[Utterance]], Iterator[Features]]) -> Iterator[tuple[int, int]]:
        """Write what is missing, sharing the work with other processes; yields (shards there, shards in all).

        `compute` gives `[frames, ...]` for each utterance in turn, unpadded.
        """
        while pending := self.missing():
            yield len(self.shards) - len(pending), len(self.shards)
            filled = [self._fill_shard(shard, compute) for shard in pending]
            if not any(filled):
                time.sleep(0.2)  # all that is missing is in other hands

    def _fill_shard(self, shard: Shard, compute: Callable[[Sequence[Utterance]], Iterator[Features]]) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(shard.path.with_suffix(".lock"), timeout=0):
                if self._is_whole(shard):
                    return True
                shard.path.unlink(missing_ok=True)
                self._maps.pop(shard.path, None)
                packed = np.concatenate(list(compute(shard.utterances)))
                write_file_atomically(shard.path, lambda file: np.save(file, packed, allow_pickle=False))
                return True
        except Timeout:
            return False

    def read(self, utterance: Utterance) -> Features:
        """`[frames, ...]`, a view of the memory map."""
        path, start, count = self._place[utterance.audio_digest]
        return self._map(path)[start : start + count]

    def _map(self, path: Path) -> Features:
        if path not in self._maps:
            self._maps[path] = patiently(np.load)(path, mmap_mode="r", allow_pickle=False)
        return self._maps[path]
