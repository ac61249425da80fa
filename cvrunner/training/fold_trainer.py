"""One trial, start to end. `FoldTrainer.run` is the algorithm; everything else in this file is one of its steps.

The same code runs on a GPU of a Ray cluster and on a laptop's CPU, for the frozen and for the unfrozen condition.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from cvrunner.config.sections import TrainConfig
from cvrunner.data.batches import Update, evaluation_update, training_updates
from cvrunner.data.utterance import Utterance
from cvrunner.encoders.wavlm import build_encoder
from cvrunner.errors import MemoryLimitError, NonFiniteError, Stopped, TrialInUseError
from cvrunner.files import remove_leftovers
from cvrunner.model.mamba_ema import MambaEMAModel
from cvrunner.records.results import (
    Ccc,
    EpochRecord,
    FeatureProgress,
    GroupRecord,
    TrainingFinished,
    TrialResult,
    TrialStarted,
    Waiting,
    WorkerStarted,
)
from cvrunner.records.run_directory import TrialDirectory, append_event
from cvrunner.training import faults as chaos
from cvrunner.training.accumulation import averaged_backward, exact_backward
from cvrunner.training.checkpoint import (
    Checkpoints,
    Progress,
    Tensors,
    load_optimizer_tensors,
    optimizer_tensors,
)
from cvrunner.training.device import (
    choose_precision,
    device_name,
    free_memory,
    peak_memory_mib,
    start_memory_count,
)
from cvrunner.training.freezing import Schedule
from cvrunner.training.inputs import Inputs, ratings, scaled_labels
from cvrunner.training.outcome import write_outcome
from cvrunner.training.trial import Trial
from cvrunner.training.weights_ema import WeightsEma
from cvrunner.verdict.ccc import ccc_by_dimension

Event = WorkerStarted | Waiting | FeatureProgress | TrialStarted | EpochRecord | TrainingFinished | TrialResult
Predictions = dict[str, npt.NDArray[np.float64]]
HEAD_BATCH = 32
"""Utterances that a frozen condition predicts at once."""
LOCK_S = 120.0
"""How long a process that trained this trial before, perhaps on a node that died, has to let go of it."""


@dataclass(frozen=True)
class TrialContext:
    """Where a trial runs: none of it changes its numbers on the same kind of machine."""

    directory: TrialDirectory
    cache_dir: Path
    device: torch.device
    should_stop: Callable[[], bool] = lambda: False
    chaos: chaos.Chaos = chaos.NONE


class FoldTrainer:
    """Trains, validates and tests one trial. Iterate over `run()` for its events; the last one is the result."""

    def __init__(self, trial: Trial, place: TrialContext) -> None:
        self.trial = trial
        self.place = place
        self.model_config = trial.config.model
        self.train_config: TrainConfig = trial.config.train
        self.dimensions = trial.config.corpus.dimensions
        self.fold = trial.fold
        self.batch_size = trial.config.train.batch_size
        self.journal = place.directory.journal
        self.checkpoints = Checkpoints(place.directory.checkpoint)

    def run(self) -> Iterator[Event]:
        """Yield what happens, as it happens.

        Raises Stopped when told to stop, after saving; MovementError and NonFiniteError when training goes wrong.
        """
        if (result := self.place.directory.result(self.trial.key)) is not None:
            self.checkpoints.remove()
            yield result
            return
        lock = FileLock(self.place.directory.path / ".lock")
        yield from self._take(lock)
        try:
            yield from self._run()
        finally:
            lock.release()

    def _run(self) -> Iterator[Event]:
        began = time.monotonic()

        # Build: the same weights whatever came before, then what a checkpoint knows.
        self._build()
        yield from self.inputs.fill_cache()
        progress, started = self._resume()
        yield started

        # Train: one epoch after the other, each validated, judged, recorded and saved.
        while progress.epoch <= self.train_config.epochs and not self._stops_early(progress):
            self.schedule.begin_epoch(progress.epoch)
            self._train_epoch(progress)
            validation_began = time.monotonic()
            validation_ccc = self._validate()
            record = self._judge_epoch(progress, validation_ccc, time.monotonic() - validation_began)
            progress = self._keep(progress, record)
            yield record

        if not self.fold.test:
            yield TrainingFinished(key=self.trial.key, best_epoch=progress.best_epoch, epochs_run=progress.epoch - 1)
            return

        # Test: once, with the weights that validation has chosen.
        self._load_weights(self.checkpoints.load_best(progress))
        predictions = self._predict(self.fold.test)
        yield self._finish(progress, predictions, time.monotonic() - began)

    def _take(self, lock: FileLock) -> Iterator[Event]:
        """Raises TrialInUseError while another process trains this trial; a process that dies lets go."""
        self.place.directory.path.mkdir(parents=True, exist_ok=True)
        for patience_s in (0.0, LOCK_S):
            try:
                lock.acquire(timeout=patience_s)
                remove_leftovers(self.place.directory.path)
                return
            except Timeout:
                if patience_s == 0:
                    yield Waiting(what=f"another process, which trains this trial, for {LOCK_S:g} s at most")
        raise TrialInUseError(f"{self.place.directory.path} is being trained by another process")

    # --- rehearsing: what `probe.py` measures, part of no training ----------------------------------------------------

    def prepare(self) -> Iterator[FeatureProgress]:
        """Build, fill the cache, and switch on all that trains at any time."""
        self._build()
        yield from self.inputs.fill_cache()
        self.schedule.begin_epoch(self.train_config.epochs)

    def dry_run(self, utterances: Sequence[Utterance], batch_size: int) -> Update:
        """One real update of these utterances in micro-batches of `batch_size`. Raises torch.OutOfMemoryError."""
        self.model.train()
        by_dialogue = self.model_config.protocol == "dialogue"
        update = evaluation_update(utterances, batch_size, by_dialogue, self.train_config.max_batch_s)
        self._step(update, Progress(key=self.trial.key, batch_size=batch_size, epoch=self.train_config.epochs))
        return update

    def dry_run_validation(self, utterances: Sequence[Utterance]) -> None:
        """Predict these utterances as validation does."""
        self._predict(utterances)

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint: weights, two moments and, where there are some, averages."""
        copies = 4 if self.averages.averages else 3
        return copies * sum(p.nbytes for p in self.weights.values())

    # --- building and resuming ----------------------------------------------------------------------------------------

    def _build(self) -> None:
        config, device = self.model_config, self.place.device
        torch.set_num_threads(self.trial.config.cluster.cpus_per_trial)
        start_memory_count(device)
        self.precision = choose_precision(self.train_config.precision, device)
        encoder = build_encoder(self.trial.encoder, config, self.precision, self.train_config.gradient_checkpointing)
        # Both conditions of a fold start from the same head.
        torch.manual_seed(_seed(self.trial.seed, 0, 0))
        self.model = MambaEMAModel(encoder, config, len(self.dimensions)).to(device)
        self.schedule = Schedule(
            self.model, self.train_config, config.freeze_speech_encoder, encoder.below, encoder.stable
        )
        self.optimizer = self.schedule.optimizer()
        self.weights = {n: p for g in self.schedule.groups for n, p in self.schedule.members[g].items()}
        self.averages = WeightsEma(self.weights, self.train_config.ema_decay)
        self.inputs = Inputs(
            encoder,
            self.trial.encoder,
            self.fold.utterances,
            self.place.cache_dir,
            device,
            self.trial.config.corpus.resample,
        )
        self.updates_per_epoch = len(self._updates(epoch=1))

    def _resume(self) -> tuple[Progress, TrialStarted]:
        """Where to go on; a fresh trial saves at once, which shows that the disk takes what hours of training need."""
        began = time.monotonic()
        progress, tensors, note = self.checkpoints.load(self.trial.key)
        if progress is None or tensors is None:
            self.checkpoints.remove()
            progress = Progress(key=self.trial.key, batch_size=self.batch_size)
            self._save(progress)
            grows_by = 3.0 if not self.averages.averages else 2.0  # the optimizer's moments are still to come
        else:
            self._load_weights(tensors.weights)
            load_optimizer_tensors(self.optimizer, tensors.optimizer)
            for name, average in tensors.averages.items():
                self.averages.averages[name].copy_(average)
            self.batch_size = min(self.batch_size, progress.batch_size)
            grows_by = 1.0
        return progress, self._started(progress, note, (time.monotonic() - began) * grows_by)

    def _started(self, progress: Progress, note: str | None, checkpoint_s: float) -> TrialStarted:
        record = TrialStarted(
            parameters=self.schedule.count(),
            device=device_name(self.place.device),
            precision=str(self.precision).removeprefix("torch."),
            updates_per_epoch=self.updates_per_epoch,
            resumed_epoch=progress.epoch,
            resumed_update=progress.step,
            checkpoint_s=checkpoint_s,
            checkpoint_mib=self.checkpoint_bytes / 2**20,
            note=note,
        )
        append_event(self.journal, "started", key=self.trial.key, **record.model_dump())
        return record

    # --- training -----------------------------------------------------------------------------------------------------

    def _train_epoch(self, progress: Progress) -> None:
        """The rest of the epoch that `progress` is in; changes `progress`."""
        self.model.train()
        began, before = time.monotonic(), progress.epoch_s
        saved, updates = began, self._updates(progress.epoch)
        harms = self.place.chaos.harms(len(updates))
        self.padding_share = self.inputs.padding(updates)
        while progress.step < len(updates):
            self._stop_if_told(progress)
            if time.monotonic() - saved > self.trial.config.cluster.checkpoint_every_s:
                self._save(progress)
                saved = time.monotonic()
            try:
                self._inject_fault(harms.pop(progress.step, None))
                loss, norms = self._step(updates[progress.step], progress)
            except torch.OutOfMemoryError as error:
                self._halve_batch_size(progress, error)
                updates = self._updates(progress.epoch)
                continue
            progress.loss_sum += loss
            for group, norm in norms.items():
                progress.gradient_sums[group] = progress.gradient_sums.get(group, 0.0) + norm
            progress.step += 1
            progress.updates += 1
            progress.epoch_s = before + time.monotonic() - began

    def _step(self, update: Update, progress: Progress) -> tuple[float, dict[str, float]]:
        """One optimizer update; returns loss and gradient norms by group."""
        # Dropout comes from (seed, epoch, update) alone, so a resumed epoch repeats nothing and skips nothing.
        torch.manual_seed(_seed(self.trial.seed, progress.epoch, progress.step + 1))
        backward = exact_backward if self.train_config.accumulation == "exact" else averaged_backward
        self.optimizer.zero_grad()
        loss = float(backward(self.model, list(self.inputs.batches(update)), self._labels(update), list(update.turns)))
        norms = {group: float(norm) for group, norm in self.schedule.gradient_norms().items()}
        total = float(np.sqrt(sum(norm**2 for norm in norms.values())))
        if not np.isfinite(loss) or not np.isfinite(total):
            append_event(self.journal, "not_finite", epoch=progress.epoch, update=progress.step, loss=str(loss))
            raise NonFiniteError(
                f"epoch {progress.epoch}, update {progress.step + 1}: loss {loss}, gradient norm {total}; utterances "
                f"{', '.join(u.id for u in update.utterances[:8])}. Try a lower train.encoder_lr (5e-6) or a lower "
                "train.grad_clip (0.3)"
            )
        norm = torch.tensor(total, device=self.place.device)
        torch.nn.utils.clip_grads_with_norm_(self.weights.values(), self.train_config.grad_clip, norm)
        self.schedule.set_learning_rates(self.optimizer, progress.updates, self.updates_per_epoch)
        self.optimizer.step()
        self.averages.update()
        return loss, norms

    def _halve_batch_size(self, progress: Progress, error: Exception) -> None:
        """Out of memory: the same update again in smaller micro-batches, which exact accumulation makes the same step.

        Raises MemoryLimitError where that is not possible.
        """
        if not self._can_halve:
            raise MemoryLimitError(
                f"out of memory in epoch {progress.epoch}, update {progress.step + 1}, at train.batch_size "
                f"{self.batch_size} with train.accumulation {self.train_config.accumulation}: use a GPU with more "
                "memory, a smaller encoder, or train.accumulation exact"
            ) from error
        self.batch_size //= 2
        progress.batch_size = self.batch_size
        self.optimizer.zero_grad()
        free_memory(self.place.device)
        append_event(self.journal, "memory", epoch=progress.epoch, update=progress.step, batch_size=self.batch_size)

    @property
    def _can_halve(self) -> bool:
        return self.batch_size > 1 and self.train_config.accumulation == "exact"

    def _inject_fault(self, harm: chaos.Fault | None) -> None:
        """What --chaos has in store for an update."""
        if harm == "kill":
            chaos.die()
        if harm == "oom" and self._can_halve:
            raise torch.OutOfMemoryError("injected by --chaos")

    def _updates(self, epoch: int) -> list[Update]:
        return updates_of(self.trial, self.batch_size, epoch)

    def _labels(self, update: Update) -> Tensor:
        return scaled_labels(update.utterances, self.dimensions, self.trial.config.corpus.scale, self.place.device)

    def _stop_if_told(self, progress: Progress) -> None:
        if self.place.should_stop():
            self._save(progress)
            append_event(self.journal, "stopped", epoch=progress.epoch, update=progress.step)
            raise Stopped(f"{self.trial.name}: stopped in epoch {progress.epoch}, saved")

    # --- validating, judging, keeping ---------------------------------------------------------------------------------

    def _validate(self) -> Ccc:
        with self.averages.applied():
            predicted = self._predict(self.fold.validation)
        return ccc_by_dimension(predicted, self._truth(self.fold.validation))

    def _predict(self, utterances: Sequence[Utterance]) -> Predictions:
        """Predictions on the rating scale, by dimension, in the order of `utterances`."""
        # A head alone holds little; an encoder gets what fits while it trains.
        batch_size = max(self.batch_size, HEAD_BATCH) if self.trial.frozen else self.batch_size
        while True:
            try:
                return self._predict_by(batch_size, utterances)
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
                batch_size //= 2
            free_memory(self.place.device)

    @torch.no_grad()
    def _predict_by(self, batch_size: int, utterances: Sequence[Utterance]) -> Predictions:
        self.model.eval()
        by_dialogue = self.model_config.protocol == "dialogue"
        update = evaluation_update(utterances, batch_size, by_dialogue, self.train_config.max_batch_s)
        # One batch in memory at a time, whatever the size of the set.
        encoded = [(self.model.encode(b.features, b.lengths), b.positions) for b in self.inputs.batches(update)]
        z, positions = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        scaled = self.model.predict(z[positions.argsort()], list(update.turns))
        rated = ratings(scaled, self.trial.config.corpus.scale)
        if not np.isfinite(rated).all():
            raise NonFiniteError(
                f"{int((~np.isfinite(rated)).any(1).sum())} of {len(rated)} predictions are not numbers"
            )
        row = {u.id: i for i, u in enumerate(update.utterances)}
        values = rated[[row[u.id] for u in utterances]]
        return {dimension: values[:, k] for k, dimension in enumerate(self.dimensions)}

    def _truth(self, utterances: Sequence[Utterance]) -> Predictions:
        return {d: np.array([u.label(d) for u in utterances], dtype=np.float64) for d in self.dimensions}

    def _judge_epoch(self, progress: Progress, validation_ccc: Ccc, validation_s: float) -> EpochRecord:
        """The epoch's record. Raises MovementError where the encoder did not do what its condition says."""
        weight_change = self.schedule.weight_change()
        norms = {group: progress.gradient_sums.get(group, 0.0) / progress.step for group in self.schedule.members}
        self.schedule.check_weight_change(progress.epoch, weight_change, norms)
        last = progress.updates - 1
        groups = {
            group: GroupRecord(
                learning_rate=self.schedule.learning_rate(group, last, self.updates_per_epoch),
                gradient_norm=norms[group],
                weight_change=weight_change[group],
            )
            for group in self.schedule.groups
        }
        average = validation_ccc["avg"]
        return EpochRecord(
            epoch=progress.epoch,
            epochs=self.train_config.epochs,
            updates=progress.updates,
            train_loss=progress.loss_sum / progress.step,
            validation_ccc=validation_ccc,
            best=progress.best_epoch == 0 or (average is not None and average > progress.best_ccc),
            train_s=progress.epoch_s,
            validation_s=validation_s,
            utterances_per_s=len(self.fold.train) / max(progress.epoch_s, 1e-9),
            padding_share=self.padding_share,
            peak_memory_mib=peak_memory_mib(self.place.device),
            groups=groups,
            layer_weights=dict(zip(self.dimensions, self.model.layer_weights(), strict=True)),
            ema_decay=dict(zip(self.dimensions, self.model.ema_decay(), strict=False)),
        )

    def _keep(self, progress: Progress, record: EpochRecord) -> Progress:
        """Journal line, best weights, checkpoint; returns the state at the start of the next epoch."""
        following = progress.next_epoch()
        following.train_s += record.train_s + record.validation_s
        if record.best:
            average = record.validation_ccc["avg"]
            following.best_epoch = record.epoch
            following.best_ccc = -1.5 if average is None else average
            with self.averages.applied():
                following.best_sha256 = self.checkpoints.save_best(record.epoch, self.weights)
        # The line first: an epoch that a checkpoint calls done has its line. A kill in between repeats the epoch, and
        # of two lines of one epoch, which are the same, the last one counts.
        append_event(self.journal, "epoch", **record.model_dump())
        self._save(following)
        return following

    def _save(self, progress: Progress) -> None:
        tensors = Tensors(dict(self.weights), optimizer_tensors(self.optimizer), self.averages.averages)
        self.checkpoints.save(progress, tensors)

    def _stops_early(self, progress: Progress) -> bool:
        patience = self.train_config.early_stopping_patience
        return patience is not None and progress.best_epoch > 0 and progress.epoch - 1 - progress.best_epoch >= patience

    # --- testing and finishing ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.weights.items():
            parameter.copy_(weights[name])

    def _finish(self, progress: Progress, predictions: Predictions, total_s: float) -> TrialResult:
        result = write_outcome(
            self.place.directory,
            self.trial,
            progress,
            self._truth(self.fold.test),
            predictions,
            self.weights,
            parameters=self.schedule.count(),
            device=device_name(self.place.device),
            precision=str(self.precision).removeprefix("torch."),
            peak_memory_mib=peak_memory_mib(self.place.device),
            total_s=total_s,
        )
        self.checkpoints.remove()
        return result


def updates_of(trial: Trial, batch_size: int, epoch: int) -> list[Update]:
    """Those of one epoch of a trial, in micro-batches of `batch_size`."""
    return training_updates(
        trial.fold.train,
        effective_batch=trial.config.train.effective_batch,
        batch_size=batch_size,
        max_batch_s=trial.config.train.max_batch_s,
        length_bucket_batches=trial.config.train.length_bucket_batches,
        by_dialogue=trial.config.model.protocol == "dialogue",
        seed=trial.seed,
        epoch=epoch,
    )


def _seed(seed: int, epoch: int, update: int) -> int:
    """One of torch's seeds for each place of the training loop; epoch 0 is the initial head."""
    state = np.random.SeedSequence([seed, epoch, update]).generate_state(2)
    return int(state[0]) << 31 | int(state[1]) >> 1
