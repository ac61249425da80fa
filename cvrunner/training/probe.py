"""What a condition costs, measured before it is trained: real updates on its longest and on a typical batch.

It is the learner's own model, optimizer and update, on a fold of the few probed utterances; all that is written, their
features above all, lies in a folder that the caller throws away.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Literal

import psutil
import torch

from cvrunner.data.batches import Update, dialogues, evaluation_update
from cvrunner.data.utterance import Utterance
from cvrunner.errors import MemoryLimitError
from cvrunner.training.checkpoint import Position
from cvrunner.training.device import device_name, free_memory, peak_memory_mib, start_memory_count
from cvrunner.training.learner import Learner, updates_of
from cvrunner.training.trial import Trial

TIMED_UPDATES = 3
VALIDATED = 16
"""Utterances that validation is timed on."""
LOOK_EVERY_S = 0.005
"""How often the process's size is looked at, where memory is the host's."""


@dataclass(frozen=True)
class TimedUpdate:
    """An update as it was measured."""

    utterances: int
    longest_s: float
    """The longest of them, seconds of audio."""
    audio_s: float
    """Seconds of audio that are encoded."""
    step_s: float
    """Median over the timed updates."""


@dataclass(frozen=True)
class FeaturePass:
    """Filling one store of the feature cache, per second of audio; it is done once for all trials of a node."""

    kind: str
    """`conv` or `hidden`."""
    key: str
    """Of the recipe: conditions with the same one share the features."""
    cost: float
    """Seconds of computing."""
    size: float
    """Bytes."""


@dataclass(frozen=True)
class ConditionProbe:
    """One condition, measured on one device."""

    condition: str
    device: str
    precision: str
    memory: Literal["GPU", "host"]
    """host: how much this process grew; of another size than on a GPU."""
    peak_memory_mib: float
    """On the longest batch at `batch_size`."""
    larger_mib: dict[int, float]
    """Peak memory on the longest batch by larger sizes that fit as well; empty on a host."""
    configured: int
    """train.batch_size."""
    batch_size: int
    """What was measured: smaller than configured where that does not fit."""
    fits: int | None
    """The largest batch_size that the longest batch fits into, tried by doubling up to all of it; None: not limited,
    since memory is the host's."""
    typical: TimedUpdate
    longest: TimedUpdate
    validation_s: float
    """Of one utterance."""
    features: tuple[FeaturePass, ...]
    trained_bytes: int
    """Of the weights that are trained."""
    checkpoint_bytes: int

    def step_s(self, audio_s: float) -> float:
        """Seconds of an update with so many seconds of audio: on the line through the two that were measured."""
        short, long = self.typical, self.longest
        if long.audio_s <= short.audio_s or long.step_s <= short.step_s:
            return (short.step_s + long.step_s) / 2
        slope = (long.step_s - short.step_s) / (long.audio_s - short.audio_s)
        return max(0.0, short.step_s + slope * (audio_s - short.audio_s))

    def epoch_s(self, trial: Trial) -> float:
        """Seconds of the first epoch's real batches and of validation."""
        steps = sum(self.step_s(audio_s(update)) for update in updates_of(trial, self.batch_size, epoch=1))
        return steps + self.validation_s * len(trial.fold.validation)

    def trial_s(self, trial: Trial) -> float:
        """Seconds of all epochs and the test; features, saving and the process's start come on top."""
        epochs = trial.config.train.epochs
        return epochs * self.epoch_s(trial) + self.validation_s * len(trial.fold.test)


def probe(
    trial: Trial,
    device: torch.device,
    folder: Path,
    base_mib: float | None = None,
    enlarge: bool | None = None,
) -> ConditionProbe:
    """Run a warm-up and a few timed updates of the trial's condition; trains nothing.

    `base_mib`: the size of the process before the first probe; None: now. `enlarge`: look for the largest batch_size;
    None: where memory is a GPU's. Raises MemoryLimitError where one utterance at a time is too much.
    """
    longest, typical = longest_batch(trial), typical_batch(trial)
    validated = _spread(trial.fold.validation, VALIDATED)
    train = tuple({u.id: u for u in (*longest, *typical)}.values())
    few = replace(trial, fold=replace(trial.fold, train=train, validation=validated, test=()))
    with _host_growth(resident_mib() if base_mib is None else base_mib) as growth_mib:
        learner, seconds = _prepared(few, folder / "cache" / trial.condition, device)
        configured = learner.batch_size
        batch_size = largest_batch_size(lambda size: _fits(learner, longest, size), configured, configured)
        if batch_size == 0:
            raise MemoryLimitError(
                f"{trial.condition}: out of memory on the longest batch with train.batch_size 1: use a GPU with more "
                "memory or a smaller encoder"
            )
        timed = [_timed_update(learner, batch, batch_size) for batch in (typical, longest)]
        learner.predict(validated)
        validation_s = _time(lambda: learner.predict(validated), device) / len(validated)
    on_gpu = device.type == "cuda"
    peak_mib = peak_memory_mib(device) if on_gpu else growth_mib()
    fits, larger_mib = _larger(learner, longest, batch_size) if enlarge or on_gpu else (None, {})
    return ConditionProbe(
        condition=trial.condition,
        device=device_name(device),
        precision=str(learner.precision).removeprefix("torch."),
        memory="GPU" if on_gpu else "host",
        peak_memory_mib=peak_mib,
        larger_mib=larger_mib,
        configured=configured,
        batch_size=batch_size,
        fits=batch_size if fits is None and batch_size < configured else fits,
        typical=timed[0],
        longest=timed[1],
        validation_s=validation_s,
        features=tuple(_feature_passes(learner, seconds)),
        trained_bytes=sum(p.nbytes for p in learner.weights.values()),
        checkpoint_bytes=learner.checkpoint_bytes,
    )


def hardest(trials: Iterable[Trial]) -> Trial:
    """The one with the longest batch."""
    return max(trials, key=lambda trial: sum(u.samples for u in longest_batch(trial)))


def longest_batch(trial: Trial) -> tuple[Utterance, ...]:
    """The effective batch that takes the most memory: the longest utterances, or the dialogues that hold them."""
    return _take(_by_length(trial), trial.config.train.effective_batch)


def typical_batch(trial: Trial) -> tuple[Utterance, ...]:
    """An effective batch from the middle of the utterances, or dialogues, sorted by length."""
    groups, wanted = _by_length(trial), trial.config.train.effective_batch
    needed = -(-wanted * len(groups) // len(trial.fold.train))
    return _take(groups[max(0, (len(groups) - needed) // 2) :], wanted)


def largest_batch_size(fits: Callable[[int], bool], start: int, limit: int) -> int:
    """Doubled from `start` while it fits, `limit` at most; halved where not even `start` does. 0: not even one fits."""
    size = start
    while not fits(size):
        size //= 2
        if size == 0:
            return 0
    while start <= size < limit and fits(min(2 * size, limit)):
        size = min(2 * size, limit)
    return size


def audio_s(update: Update) -> float:
    """Seconds of audio in an update."""
    return sum(u.duration_s for u in update.utterances)


def resident_mib() -> float:
    """Main memory that this process has."""
    return float(psutil.Process().memory_info().rss) / 2**20


# --- which utterances -------------------------------------------------------------------------------------------------


def _by_length(trial: Trial) -> list[list[Utterance]]:
    """Training utterances one by one, or whole dialogues by what they hold of `batch_size`; longest first."""
    train, batch_size = trial.fold.train, trial.config.train.batch_size
    groups = dialogues(train) if trial.config.model.protocol == "dialogue" else [[u] for u in train]
    return sorted(groups, key=lambda g: sum(sorted((u.samples for u in g), reverse=True)[:batch_size]), reverse=True)


def _take(groups: Sequence[Sequence[Utterance]], wanted: int) -> tuple[Utterance, ...]:
    """Whole groups from the front, until there are so many utterances."""
    taken: list[Utterance] = []
    for group in groups:
        if len(taken) < wanted:
            taken += group
    return tuple(taken)


def _spread(utterances: Sequence[Utterance], count: int) -> tuple[Utterance, ...]:
    """So many at most, of all lengths alike."""
    ordered = sorted(utterances, key=lambda u: u.samples)
    step = max(1.0, len(ordered) / count)
    return tuple(ordered[int(i * step)] for i in range(min(count, len(ordered))))


# --- measuring --------------------------------------------------------------------------------------------------------


def _prepared(trial: Trial, cache_dir: Path, device: torch.device) -> tuple[Learner, list[float]]:
    """Return a learner with a full cache, all of whose groups train, and the seconds of each feature pass, in order."""
    learner, began = Learner(trial, cache_dir, device), dict[str, float]()
    for event in learner.fill_cache():
        began.setdefault(event.kind, time.monotonic())
    times = [*began.values(), time.monotonic()]
    learner.begin_epoch(trial.config.train.epochs)
    return learner, [end - start for start, end in pairwise(times)]


def _dry_run(learner: Learner, utterances: Sequence[Utterance], batch_size: int) -> Update:
    """Take one real update of these utterances in micro-batches of `batch_size`. Raises torch.OutOfMemoryError."""
    config = learner.trial.config
    learner.model.train()
    update = evaluation_update(utterances, batch_size, config.model.protocol == "dialogue", config.train.max_batch_s)
    # In the last epoch every group trains, whatever train.freeze_epochs says.
    learner.update(update, Position(config.train.epochs, 0, 0))
    return update


def _feature_passes(learner: Learner, seconds: Sequence[float]) -> Iterator[FeaturePass]:
    stores = [store for _, store, _ in learner.inputs.passes]
    utterances = {u.audio_digest: u for u in learner.trial.fold.utterances}.values()
    audio_s = sum(u.duration_s for u in utterances)
    for store, took_s in zip(stores, seconds, strict=True):
        size = sum(store.read(u).nbytes for u in utterances)
        yield FeaturePass(store.folder.parent.name, store.folder.name, took_s / audio_s, size / audio_s)


def _timed_update(learner: Learner, batch: Sequence[Utterance], batch_size: int) -> TimedUpdate:
    update = _dry_run(learner, batch, batch_size)
    times = [_time(lambda: _dry_run(learner, batch, batch_size), learner.device) for _ in range(TIMED_UPDATES)]
    return TimedUpdate(len(batch), max(u.duration_s for u in batch), audio_s(update), median(times))


def _time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done it."""
    _wait_for(device)
    began = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - began


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fits(learner: Learner, batch: Sequence[Utterance], batch_size: int) -> bool:
    """Whether an update fits into memory; if so, the count of a GPU's peak has begun with it."""
    start_memory_count(learner.device)
    try:
        _dry_run(learner, batch, batch_size)
        _wait_for(learner.device)
        return True
    except torch.OutOfMemoryError:
        pass
    # Not before the exception is gone, which holds on to what the update had.
    learner.optimizer.zero_grad()
    free_memory(learner.device)
    return False


def _larger(learner: Learner, batch: Sequence[Utterance], batch_size: int) -> tuple[int, dict[int, float]]:
    """The largest size that fits from `batch_size` on, and the peak memory by each size above it."""
    peaks: dict[int, float] = {}

    def fits(size: int) -> bool:
        if size > batch_size and _fits(learner, batch, size):
            peaks[size] = peak_memory_mib(learner.device)
        return size == batch_size or size in peaks

    limit = len(batch) if batch_size == learner.batch_size else batch_size
    return largest_batch_size(fits, batch_size, limit), peaks


@contextmanager
def _host_growth(base_mib: float) -> Iterator[Callable[[], float]]:
    """Watches this process; what it gives tells by how much at most it has been larger than `base_mib`."""
    peak, done = [base_mib], threading.Event()

    def watch() -> None:
        while not done.wait(LOOK_EVERY_S):
            peak[0] = max(peak[0], resident_mib())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: peak[0] - base_mib
    finally:
        done.set()
        watcher.join()
