"""One trial, from start to end. `FoldTrainer.run` is the algorithm; the methods below it are its steps.

    features into the cache -> resume from the newest checkpoint, or start
    for each epoch:
        updates of the epoch, each one step of the learner      (a checkpoint every few minutes)
        validation CCC -> judge: did the encoder do what its condition says?
        journal line -> best weights -> checkpoint
    best validation epoch -> test set, once -> predictions, model, result

The same code runs on a GPU of a Ray cluster and on a laptop's CPU, for every condition.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from cvrunner.data.utterance import Utterance
from cvrunner.encoders.lora import merged
from cvrunner.errors import NonFiniteError, Stopped, TrialInUseError
from cvrunner.files import remove_leftovers
from cvrunner.records.results import (
    Ccc,
    Ending,
    EpochRecord,
    FeatureProgress,
    GroupRecord,
    TrainingFinished,
    TrialResult,
    TrialStarted,
    Waiting,
    WorkerStarted,
)
from cvrunner.records.run_directory import TrialDirectory, append_event, read_events
from cvrunner.training import faults
from cvrunner.training.checkpoint import Checkpoints, LoopState
from cvrunner.training.device import device_name, peak_memory_mib
from cvrunner.training.learner import Learner, Predictions
from cvrunner.training.outcome import write_outcome
from cvrunner.training.trial import Trial
from cvrunner.verdict.ccc import ccc_by_dimension

Event = WorkerStarted | Waiting | FeatureProgress | TrialStarted | EpochRecord | Ending
"""The last one is an Ending."""
LOCK_S = 120.0
"""How long to wait for a process that trained this trial before, perhaps on a dying node, to release it."""


@dataclass(frozen=True)
class TrialContext:
    """Where a trial runs. None of it changes the trial's numbers on the same kind of machine."""

    directory: TrialDirectory
    cache_dir: Path
    device: torch.device
    should_stop: Callable[[], bool] = lambda: False
    chaos: faults.Chaos = faults.NONE


class FoldTrainer:
    """Trains, validates and tests one trial. Iterate over `run()` for its events; the last one is the result."""

    def __init__(self, trial: Trial, context: TrialContext) -> None:
        self.trial = trial
        self.context = context
        self.fold = trial.fold
        self.train = trial.config.train
        self.journal = context.directory.journal
        self.checkpoints = Checkpoints(context.directory.checkpoint)

    def run(self) -> Iterator[Event]:
        """Yield what happens, as it happens.

        Raises Stopped after saving if asked to stop; WeightChangeError, NonFiniteError and MemoryLimitError if
        training goes wrong; TrialInUseError if another process trains the same trial.
        """
        # A task may be reported as failed although it finished, so a trial must be safe to start again.
        if (result := self.context.directory.result(self.trial.key)) is not None:
            self.checkpoints.remove()
            yield result
            return
        lock = FileLock(self.context.directory.path / ".lock")
        yield from self._acquire(lock)
        try:
            yield from self._run()
        finally:
            # Whoever takes the lock next must find the checkpoints complete.
            self.checkpoints.close()
            lock.release()

    def _run(self) -> Iterator[Event]:
        began = time.monotonic()

        # Start: the same weights in every attempt, then what a checkpoint knows.
        self.learner = Learner(self.trial, self.context.cache_dir, self.context.device)
        yield from self.learner.inputs.fill_cache()
        state, started = self._resume()
        yield started

        # Train: each epoch is validated, judged, recorded and saved.
        while state.epoch <= self.train.epochs and not self._stops_early(state):
            self.learner.begin_epoch(state.epoch)
            padding_share = self._train_epoch(state)
            validation_began = time.monotonic()
            with self.learner.averages.applied():
                predicted = self.learner.predict(self.fold.validation)
            validation_ccc = ccc_by_dimension(predicted, self._truth(self.fold.validation))
            record = self._judge_epoch(state, validation_ccc, time.monotonic() - validation_began, padding_share)
            state = self._keep(state, record)
            yield record

        if not self.fold.test:
            best = {line["epoch"]: line for line in read_events(self.journal, "epoch")}[state.best_epoch]
            yield TrainingFinished(
                key=self.trial.key,
                best_epoch=state.best_epoch,
                epochs_run=state.epoch - 1,
                validation_ccc=best["validation_ccc"],
            )
            return

        # Test: once, with the weights that validation has chosen.
        self.learner.load_weights(self.checkpoints.load_best(state))
        predictions = self.learner.predict(self.fold.test)
        yield self._finish(state, predictions, time.monotonic() - began)

    # --- starting -----------------------------------------------------------------------------------------------------

    def _acquire(self, lock: FileLock) -> Iterator[Event]:
        """Lock the trial. Raises TrialInUseError while another process trains it; a dying process releases its lock."""
        self.context.directory.path.mkdir(parents=True, exist_ok=True)
        # Try at once, then wait: the wait is announced only if there is one.
        for patience_s in (0.0, LOCK_S):
            try:
                lock.acquire(timeout=patience_s)
                remove_leftovers(self.context.directory.path)
                return
            except Timeout:
                if patience_s == 0:
                    yield Waiting(what=f"another process, which trains this trial, for {LOCK_S:g} s at most")
        raise TrialInUseError(f"{self.context.directory.path} is being trained by another process")

    def _resume(self) -> tuple[LoopState, TrialStarted]:
        """Return the loop's state, from the newest checkpoint if there is one, and the record of the start."""
        began = time.monotonic()
        state, tensors, note = self.checkpoints.load(self.trial.key)
        if state is None or tensors is None:
            self.checkpoints.remove()
            self.learner.fit_linear_path(self.context.should_stop)
            memory = self.learner.fit_memory()
            state = LoopState(key=self.trial.key, batch_size=self.learner.batch_size, memory=memory)
            # Saved before any training: a disk that is too small shows now, not after an hour.
            began = time.monotonic()
            self._save(state)
            self.checkpoints.wait()
            # The first checkpoint lacks the optimizer's moments, which later ones hold.
            growth = 2.0 if self.learner.averages.averages else 3.0
        else:
            self.learner.load(tensors)
            growth = 1.0
        self.learner.memory = state.memory
        self.learner.inputs.keep_on_gpu(self.learner.free_bytes())
        record = TrialStarted(
            parameters=self.learner.schedule.count(),
            device=device_name(self.context.device),
            precision=self.learner.precision_name,
            updates_per_epoch=self.learner.updates_per_epoch,
            resumed_epoch=state.epoch,
            resumed_update=state.step,
            checkpoint_s=(time.monotonic() - began) * growth,
            checkpoint_mib=self.learner.checkpoint_bytes / 2**20,
            note=note,
        )
        append_event(self.journal, "started", key=self.trial.key, **record.model_dump())
        return state, record

    # --- one epoch ----------------------------------------------------------------------------------------------------

    def _train_epoch(self, state: LoopState) -> float:
        """Train the rest of the epoch that `state` is in, and advance `state`. Return the share of padded frames."""
        began, before = time.monotonic(), state.epoch_s
        saved, updates = began, self.learner.updates(state.epoch)
        padding_share = self.learner.inputs.padding(updates)
        drawn = self.context.chaos.draw_faults(len(updates))
        take_update = faults.with_faults(self.learner.update, drawn, self.learner.pretend_out_of_memory)
        while state.step < len(updates):
            if self.context.should_stop():
                self._save(state)
                self.checkpoints.wait()
                append_event(self.journal, "stopped", epoch=state.epoch, update=state.step)
                raise Stopped(f"{self.trial.name}: stopped in epoch {state.epoch}, saved")
            if time.monotonic() - saved > self.trial.config.cluster.checkpoint_every_s:
                self._save(state)
                saved = time.monotonic()
            update = updates[state.step]
            try:
                loss, norms = take_update(update, state.position, *updates[state.step + 1 : state.step + 2])
            except torch.OutOfMemoryError as error:
                # Only this update: the next ones may be shorter, and run as configured.
                updates[state.step] = self.learner.split(update, state.position, error)
            except NonFiniteError as error:
                append_event(self.journal, "not_finite", epoch=state.epoch, update=state.step, error=str(error))
                raise
            if updates[state.step] is not update:
                self.learner.discard_update()
                size = max(map(len, updates[state.step].micro_batches))
                state.batch_size = min(state.batch_size, size)
                append_event(self.journal, "memory", epoch=state.epoch, update=state.step, batch_size=size)
                continue
            state.add(loss, norms)
            # Counted after each update, so that a checkpoint within the epoch holds the time so far.
            state.epoch_s = before + time.monotonic() - began
        return padding_share

    def _judge_epoch(
        self, state: LoopState, validation_ccc: Ccc, validation_s: float, padding_share: float
    ) -> EpochRecord:
        """Return the epoch's record. Raises WeightChangeError if the encoder did not do what its condition says."""
        schedule, model = self.learner.schedule, self.learner.model
        change = schedule.weight_change()
        # Frozen groups have no sums; their mean of 0 is what the guard expects.
        norms = {group: state.gradient_sums.get(group, 0.0) / state.step for group in schedule.members}
        schedule.check_weight_change(state.epoch, change, norms)
        last = state.updates - 1
        groups = {
            group: GroupRecord(
                learning_rate=schedule.learning_rate(group, last, self.learner.updates_per_epoch),
                gradient_norm=norms[group],
                weight_change=change[group],
                implied_change=schedule.implied_change(group, state.updates, self.learner.updates_per_epoch),
            )
            for group in schedule.groups
        }
        return EpochRecord(
            epoch=state.epoch,
            epochs=self.train.epochs,
            updates=state.updates,
            train_loss=state.loss_sum / state.step,
            validation_ccc=validation_ccc,
            best=state.improves(validation_ccc["avg"]),
            train_s=state.epoch_s,
            validation_s=validation_s,
            utterances_per_s=len(self.fold.train) / max(state.epoch_s, 1e-9),
            padding_share=padding_share,
            peak_memory_mib=peak_memory_mib(self.context.device),
            groups=groups,
            layer_weights=dict(zip(self.learner.dimensions, model.layer_weights(), strict=True)),
            ema_decay=dict(zip(self.learner.dimensions, model.ema_decay(), strict=False)),
        )

    def _keep(self, state: LoopState, record: EpochRecord) -> LoopState:
        """Write journal line and checkpoint, with the best weights; return the state at the start of the next epoch."""
        # Writing the previous checkpoint sets the hash of the best weights in this state.
        self.checkpoints.wait()
        following = state.next_epoch()
        following.train_s += record.train_s + record.validation_s
        if record.best:
            following.best_epoch, following.best_ccc = record.epoch, record.validation_ccc["avg"]
        # The line before the checkpoint: an epoch that a checkpoint calls done has its line. A kill in between repeats
        # the epoch; of its two lines, which are the same, the last one counts.
        append_event(self.journal, "epoch", **record.model_dump())
        self._save(following, record.best)
        return following

    def _save(self, state: LoopState, best: bool = False) -> None:
        self.checkpoints.save(state, self.learner.tensors(), best)

    def _stops_early(self, state: LoopState) -> bool:
        patience = self.train.early_stopping_patience
        return patience is not None and state.best_epoch > 0 and state.epoch - 1 - state.best_epoch >= patience

    # --- testing ------------------------------------------------------------------------------------------------------

    def _truth(self, utterances: Sequence[Utterance]) -> Predictions:
        return {d: np.array([u.label(d) for u in utterances], dtype=np.float64) for d in self.learner.dimensions}

    def _finish(self, state: LoopState, predictions: Predictions, total_s: float) -> TrialResult:
        """Write predictions, model and result, then drop the checkpoints."""
        result = write_outcome(
            self.context.directory,
            self.trial,
            state,
            self._truth(self.fold.test),
            predictions,
            merged(self.learner.model, self.learner.weights),
            parameters=self.learner.schedule.count(),
            device=device_name(self.context.device),
            precision=self.learner.precision_name,
            peak_memory_mib=peak_memory_mib(self.context.device),
            total_s=total_s,
        )
        self.checkpoints.remove()
        return result
