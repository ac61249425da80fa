"""Cost of a condition, measured before training: real updates on its hardest and on a typical batch.

The learner trains as in a trial, on a fold of the few probed utterances. Everything it writes, mainly cached features,
is in a folder that the caller deletes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from cvrunner.model import mamba
from cvrunner.training.checkpoint import Position
from cvrunner.training.device import device_name, free_memory, peak_memory_mib, start_memory_count
from cvrunner.training.learner import Learner, updates_of
from cvrunner.training.linear_probe import estimated_s
from cvrunner.training.trial import Trial

TIMED_UPDATES = 3
VALIDATED = 16
"""Number of utterances on which validation is timed."""
SQUARE_S = 32.0
"""Counted with `tests/benchmarks/launches.py`: WavLM-large keeps 66 MB a second for its backward pass, and 2.0 MB
a square second."""
SAMPLE_EVERY_S = 0.005
"""Interval at which the size of the process is sampled if it trains in host memory."""


@dataclass(frozen=True)
class TimedUpdate:
    """A measured update."""

    utterances: int
    longest_s: float
    """Duration of the longest utterance, in seconds."""
    audio_s: float
    """Seconds of audio in the update."""
    step_s: float
    """Median over the timed updates."""


@dataclass(frozen=True)
class FeaturePass:
    """Cost of filling one store of the feature cache, per second of audio; paid once for all trials on a node."""

    kind: str
    """`conv` or `hidden`."""
    key: str
    """Key of the recipe: conditions with the same recipe share the features."""
    cost: float
    """Seconds per second of audio."""
    size: float
    """Bytes per second of audio."""


@dataclass(frozen=True)
class Counted:
    """What an update, or a prediction, asks of a GPU, counted without one."""

    launches: int
    bfloat16: float
    """Floating-point operations in bfloat16."""
    float32: float
    """The same in float32."""
    moved_bytes: int
    """Read and written by all kernels together."""
    peak_bytes: int
    """Most memory that activations, gradients and casts take at a time."""


@dataclass(frozen=True)
class Estimate:
    """What the costs of a condition follow from if they were counted for a card that is not here."""

    card: str
    assumptions: str
    fixed_bytes: int
    """Weights, moments of the optimizer, and averages."""
    typical: Counted
    longest: Counted


@dataclass(frozen=True)
class ConditionProbe:
    """One condition, measured on one device, or estimated for one."""

    condition: str
    device: str
    precision: str
    memory: Literal["GPU", "host"]
    """host: growth of this process, which differs from the memory that a GPU would need."""
    peak_memory_mib: float
    """Peak memory on the longest batch at `batch_size`."""
    larger_mib: dict[int, float]
    """Peak memory on the longest batch, by each larger batch size that also fits; empty in host memory."""
    configured: int
    """train.batch_size."""
    batch_size: int
    """Measured batch size: smaller than configured if that does not fit."""
    fits: int | None
    """Largest batch_size that fits for the longest batch, found by doubling; None: no limit was looked for, because
    memory is the host's."""
    typical: TimedUpdate
    longest: TimedUpdate
    plain_mamba_s: float | None
    """The typical update without the kernels of mamba-ssm; None if they are not installed or there is no GPU."""
    load_s: float
    """Seconds to build the model and load the encoder."""
    validation_s: float
    """Seconds per utterance."""
    features: tuple[FeaturePass, ...]
    statistics: int
    """Values per utterance that the linear probe is fitted on."""
    linear_probe_s: float
    """Estimated time to fit the linear probe of one fold."""
    trained_bytes: int
    """Size of the weights that train."""
    checkpoint_bytes: int
    estimate: Estimate | None = None
    """None: measured."""

    def step_s(self, audio_s: float) -> float:
        """Return the seconds of an update with `audio_s` seconds of audio: linear between the two measured updates."""
        short, long = self.typical, self.longest
        if long.audio_s <= short.audio_s or long.step_s <= short.step_s:
            return (short.step_s + long.step_s) / 2
        slope = (long.step_s - short.step_s) / (long.audio_s - short.audio_s)
        return max(0.0, short.step_s + slope * (audio_s - short.audio_s))

    def epoch_s(self, trial: Trial) -> float:
        """Return the seconds of one epoch: the real batches of the first epoch, and validation."""
        steps = sum(self.step_s(audio_s(update.utterances)) for update in updates_of(trial, self.batch_size, epoch=1))
        return steps + self.validation_s * len(trial.fold.validation)

    def trial_s(self, trial: Trial) -> float:
        """Return the seconds of loading, linear path, all epochs and test, without features, checkpoints and the start
        of the process."""
        epochs = trial.config.train.epochs
        path_s = self.linear_probe_s if trial.config.model.linear_path else 0.0
        return self.load_s + path_s + epochs * self.epoch_s(trial) + self.validation_s * len(trial.fold.test)


def probe(
    trial: Trial,
    device: torch.device,
    folder: Path,
    base_mib: float | None = None,
    enlarge: bool = False,
) -> ConditionProbe:
    """Measure a condition with a warm-up and a few timed updates.

    `base_mib`: size of the process before the first probe; None: now. `enlarge`: look for the largest
    batch_size on a CPU too. Raises MemoryLimitError if a single utterance does not fit.
    """
    longest, typical = longest_batch(trial).utterances, typical_batch(trial)
    by_length = sorted(trial.fold.validation, key=lambda u: u.samples)
    step = max(1.0, len(by_length) / VALIDATED)
    validated = tuple(by_length[int(i * step)] for i in range(min(VALIDATED, len(by_length))))
    train = tuple({u.id: u for u in (*longest, *typical)}.values())
    # A fold of only these utterances: features of the whole corpus would take minutes.
    few = replace(trial, fold=replace(trial.fold, train=train, validation=validated, test=()))
    with _host_growth(base_mib or resident_mib()) as growth_mib:
        learner, load_s, seconds = _prepared(few, folder / "cache" / trial.condition, device)
        configured = learner.batch_size
        batch_size = largest_batch_size(lambda size: _fits(learner, longest, size), configured, configured)
        if batch_size == 0:
            raise MemoryLimitError(
                f"{trial.condition}: out of memory on the longest batch with train.batch_size 1: use a GPU with more "
                "memory or a smaller encoder"
            )
        # The first update after a change of shape compiles kernels, so each timed batch has a warm-up of its shape.
        timed = [_timed_update(learner, batch, batch_size) for batch in (typical, longest)]
        plain_mamba_s = None
        if compares_kernels(device):
            with mamba.without_kernels():
                plain_mamba_s = _timed_update(learner, typical, batch_size).step_s
        learner.predict(validated)
        validation_s = _time(lambda: learner.predict(validated), device) / len(validated)
    encoder = learner.inputs.encoder
    statistics = 2 * (encoder.depth + 1) * encoder.width
    memory: Literal["GPU", "host"] = "host"
    fits: int | None = None
    peak_mib, larger_mib = growth_mib(), dict[int, float]()
    if device.type == "cuda":
        memory, peak_mib = "GPU", peak_memory_mib(device)
    if enlarge or memory == "GPU":
        fits, larger_mib = _larger(learner, longest, batch_size)
    elif batch_size < configured:
        fits = batch_size
    return ConditionProbe(
        condition=trial.condition,
        device=device_name(device),
        precision=learner.precision_name,
        memory=memory,
        peak_memory_mib=peak_mib,
        larger_mib=larger_mib,
        configured=configured,
        batch_size=batch_size,
        fits=fits,
        typical=timed[0],
        longest=timed[1],
        plain_mamba_s=plain_mamba_s,
        load_s=load_s,
        validation_s=validation_s,
        features=tuple(_feature_passes(learner, seconds)),
        statistics=statistics,
        linear_probe_s=estimated_s(len(trial.fold.train), statistics, trial.config.cluster.cpus_per_trial),
        trained_bytes=sum(p.nbytes for p in learner.weights.values()),
        checkpoint_bytes=learner.checkpoint_bytes,
    )


def compares_kernels(device: torch.device) -> bool:
    """Whether the kernels of mamba-ssm would be used."""
    return mamba.KERNELS and device.type == "cuda"


def hardest(trials: Iterable[Trial]) -> Trial:
    """Return the trial with the hardest batch."""
    return max(trials, key=lambda trial: memory_weight(longest_batch(trial)))


def longest_batch(trial: Trial) -> Update:
    """Return the update that needs the most memory of all that the trial will draw in its epochs."""
    train = trial.config.train
    epochs = range(1, train.epochs + 1)
    return max((u for epoch in epochs for u in updates_of(trial, train.batch_size, epoch)), key=memory_weight)


def memory_weight(update: Update) -> float:
    """Return what the memory of an update grows with: seconds of its hardest micro-batch, and their squares, for
    attention. In WavLM-large an utterance of SQUARE_S takes as much for one as for the other."""
    durations = [[update.utterances[i].duration_s for i in micro] for micro in update.micro_batches]
    return max(sum(d + d * d / SQUARE_S for d in of) for of in durations)


def typical_batch(trial: Trial) -> tuple[Utterance, ...]:
    """Return an effective batch from the middle of the utterances, or dialogues, sorted by length."""
    train, settings = trial.fold.train, trial.config.train
    groups = dialogues(train) if trial.config.model.protocol == "dialogue" else [[u] for u in train]
    # Dialogues by their longest utterances, of which `batch_size` are encoded at once; longest first.
    groups.sort(key=lambda g: -sum(sorted((u.samples for u in g), reverse=True)[: settings.batch_size]))
    count = settings.effective_batch
    needed = -(-count * len(groups) // len(train))
    # Whole groups, until they hold enough utterances.
    taken: list[Utterance] = []
    for group in groups[max(0, (len(groups) - needed) // 2) :]:
        if len(taken) < count:
            taken += group
    return tuple(taken)


def largest_batch_size(fits: Callable[[int], bool], start: int, limit: int) -> int:
    """Return the largest size that fits: doubled from `start` up to `limit`, or halved below it; 0 if none fits."""
    size = start
    while not fits(size):
        size //= 2
        if size == 0:
            return 0
    # Doubled only if `start` itself fits; after halving, the next larger size is known not to fit.
    while start <= size < limit and fits(min(2 * size, limit)):
        size = min(2 * size, limit)
    return size


def audio_s(utterances: Iterable[Utterance]) -> float:
    """Return the seconds of audio in some utterances."""
    return sum(u.duration_s for u in utterances)


def resident_mib() -> float:
    """Return the resident memory of this process."""
    return float(psutil.Process().memory_info().rss) / 2**20


# --- measuring --------------------------------------------------------------------------------------------------------


def _prepared(trial: Trial, cache_dir: Path, device: torch.device) -> tuple[Learner, float, dict[str, float]]:
    """Return a learner with a full cache, all of whose groups train; the seconds to load it, and those of each feature
    pass by name."""
    start = time.monotonic()
    learner, began = Learner(trial, cache_dir, device), dict[str, float]()
    load_s = time.monotonic() - start
    for event in learner.inputs.fill_cache():
        began.setdefault(event.kind, time.monotonic())
    times = [*began.values(), time.monotonic()]
    learner.begin_epoch(trial.config.train.epochs)
    return learner, load_s, {name: end - start for name, (start, end) in zip(began, pairwise(times), strict=True)}


def _dry_run(learner: Learner, utterances: Sequence[Utterance], batch_size: int) -> None:
    """Take one real update of these utterances in micro-batches of `batch_size`. Raises torch.OutOfMemoryError."""
    config = learner.trial.config
    learner.model.train()
    update = evaluation_update(utterances, batch_size, config.model.protocol == "dialogue", config.train.max_batch_s)
    # In the last epoch every group trains, whatever train.freeze_epochs says.
    learner.update(update, Position(config.train.epochs, 0, 0))


def _feature_passes(learner: Learner, seconds: Mapping[str, float]) -> Iterator[FeaturePass]:
    # Statistics that are written along with hidden states are no separate pass.
    stores = [(store, seconds[name]) for name, store, _ in learner.inputs.passes if name in seconds]
    utterances = {u.audio_digest: u for u in learner.trial.fold.utterances}.values()
    heard_s = audio_s(utterances)
    for store, took_s in stores:
        size = sum(store.read(u).nbytes for u in utterances)
        yield FeaturePass(store.folder.parent.name, store.folder.name, took_s / heard_s, size / heard_s)


def _timed_update(learner: Learner, batch: Sequence[Utterance], batch_size: int) -> TimedUpdate:
    _dry_run(learner, batch, batch_size)
    times = [_time(lambda: _dry_run(learner, batch, batch_size), learner.device) for _ in range(TIMED_UPDATES)]
    return TimedUpdate(len(batch), max(u.duration_s for u in batch), audio_s(batch), median(times))


def _time(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that some work takes on the device."""
    _wait_for(device)
    began = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - began


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fits(learner: Learner, batch: Sequence[Utterance], batch_size: int) -> bool:
    """Whether an update fits into memory. The peak memory of a GPU is counted from here on."""
    start_memory_count(learner.device)
    try:
        _dry_run(learner, batch, batch_size)
        _wait_for(learner.device)
        return True
    except torch.OutOfMemoryError:
        pass
    # Only after the except block: the exception keeps the tensors of the failed update alive.
    learner.optimizer.zero_grad()
    free_memory(learner.device)
    return False


def _larger(learner: Learner, batch: Sequence[Utterance], batch_size: int) -> tuple[int, dict[int, float]]:
    """Return the largest size that fits, from `batch_size` up, and the peak memory of each size above it."""
    peaks: dict[int, float] = {}

    def fits(size: int) -> bool:
        if size > batch_size and _fits(learner, batch, size):
            peaks[size] = peak_memory_mib(learner.device)
        return size == batch_size or size in peaks

    if batch_size < learner.batch_size:
        # The configured size is known not to fit.
        return batch_size, peaks
    return largest_batch_size(fits, batch_size, len(batch)), peaks


@contextmanager
def _host_growth(base_mib: float) -> Iterator[Callable[[], float]]:
    """Sample the size of this process; yield a function that returns its largest growth over `base_mib`."""
    peak, done = [base_mib], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_EVERY_S):
            peak[0] = max(peak[0], resident_mib())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: peak[0] - base_mib
    finally:
        done.set()
        watcher.join()
