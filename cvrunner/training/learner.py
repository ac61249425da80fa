"""The model of one trial and everything that changes or reads it: one update, prediction, and the tensors to save.

The learner knows no loop and no files but the feature cache; `fold_trainer.py` decides what happens when.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cvrunner.data.batches import MemoryFormula, Update, evaluation_update, training_updates
from cvrunner.data.utterance import Utterance
from cvrunner.encoders.loading import build_encoder
from cvrunner.encoders.lora import add_adapters
from cvrunner.errors import MemoryLimitError, NonFiniteError
from cvrunner.model.mamba_ema import MambaEMAModel
from cvrunner.training.accumulation import averaged_backward, exact_backward, in_order
from cvrunner.training.checkpoint import Position, Tensors
from cvrunner.training.device import (
    choose_precision,
    free_bytes,
    free_memory,
    memory_errors,
    memory_growth,
    precision_name,
    start_memory_count,
    use_deterministic_algorithms,
)
from cvrunner.training.freezing import Schedule
from cvrunner.training.inputs import Inputs, ratings, scaled_labels
from cvrunner.training.memory import fit_memory
from cvrunner.training.ridge import fit
from cvrunner.training.trial import Trial

Predictions = dict[str, npt.NDArray[np.float64]]
"""Values on the rating scale by dimension, one per utterance."""
MANY = 32
"""Utterances that are predicted at once by a head alone, or, if they fit, by an encoder on a GPU."""


class Learner:
    """Model, optimizer and inputs of a trial on one device."""

    def __init__(self, trial: Trial, cache_dir: Path, device: torch.device) -> None:
        model, train = trial.config.model, trial.config.train
        # The number of threads decides the order of floating-point additions on a CPU.
        torch.set_num_threads(trial.config.cluster.cpus_per_trial)
        use_deterministic_algorithms(device, train.deterministic)
        start_memory_count(device)
        self.trial = trial
        self.device = device
        self.dimensions = trial.config.corpus.dimensions
        self.batch_size = train.batch_size
        self.precision = choose_precision(train.precision, device)
        self.precision_name = precision_name(self.precision)
        encoder = build_encoder(
            trial.encoder, model, trial.config.adaptation, self.precision, train.gradient_checkpointing
        )
        # All conditions of a fold start from the same head: the seed is set after the encoder has been loaded.
        torch.manual_seed(draw_seed(trial.seed, trial.fold.number, 0, 0))
        self.model = MambaEMAModel(encoder, model, len(self.dimensions))
        # After the head, whose draws they must not move.
        add_adapters(encoder)
        self.model.to(device)
        self.schedule = Schedule(self.model, train)
        self.optimizer = self.schedule.optimizer()
        self.weights = {n: p for g in self.schedule.groups for n, p in self.schedule.members[g].items()}
        self.averages = WeightAverages(self.weights, train.ema_decay)
        self.inputs = Inputs(
            encoder, trial.encoder, trial.fold.utterances, cache_dir, device, trial.config.corpus.resample
        )
        self.memory: dict[str, MemoryFormula] = {}
        """What micro-batches are cut by on a GPU, besides `batch_size`; see `fit_memory`."""
        self.updates_per_epoch = len(self.updates(epoch=1))

    def updates(self, epoch: int, batch_size: int | None = None) -> list[Update]:
        """Updates of one epoch, cut into micro-batches of at most `batch_size` utterances (None: as configured)."""
        return updates_of(self.trial, batch_size or self.batch_size, epoch, self.memory.get("training"))

    @torch.no_grad()
    def fit_linear_path(self, should_stop: Callable[[], bool]) -> None:
        """Fit the head's linear path on the features of the pretrained encoder, before the first epoch; for a large
        corpus that takes minutes. Raises Stopped."""
        path, config = self.model.head.linear_path, self.trial.config
        if path is None:
            return
        store, layers, (low, high) = self.inputs.statistics, self.inputs.encoder.layers, config.corpus.scale
        threads = config.cluster.cpus_per_trial
        linear, _ = fit(store, self.trial.fold, layers, self.dimensions, threads, should_stop)
        weights = linear.weights.reshape(-1, len(self.dimensions))
        path.weight.copy_(torch.from_numpy(weights / (high - low)))
        path.bias.copy_(torch.from_numpy((linear.bias - low) / (high - low)))
        self.averages = WeightAverages(self.weights, config.train.ema_decay)

    def begin_epoch(self, epoch: int) -> None:
        """Enable gradients for the groups that train in this epoch, and dropout."""
        self.schedule.begin_epoch(epoch)
        self.model.train()

    # --- one update ---------------------------------------------------------------------------------------------------

    @memory_errors()
    def update(
        self, update: Update, position: Position, following: Update | None = None
    ) -> tuple[float, dict[str, float]]:
        """Take one optimizer step over an effective batch; return its loss and the gradient norm of each group.

        `following`: the next update, which is read meanwhile for a GPU.

        Raises NonFiniteError before the step if loss or gradient is not finite, and torch.OutOfMemoryError.
        """
        train = self.trial.config.train
        # Dropout depends on these and the utterance alone: a resumed epoch repeats nothing and skips nothing, and an
        # update is the same in micro-batches of any size.
        seed = draw_seed(self.trial.seed, self.trial.fold.number, position.epoch, position.step + 1)
        keys = [utterance_key(seed, u.id) for u in update.utterances]
        self.optimizer.zero_grad()
        computed = self._backward(update, keys, following)
        # Norms before clipping: the journal and the guard need what the loss asked for.
        by_group = self.schedule.gradient_norms()
        # The only place where an update waits for a GPU: loss and norms come in one copy.
        loss, *values = torch.stack([computed, *by_group.values()]).tolist()
        norms = dict(zip(by_group, values, strict=True))
        total = float(np.sqrt(sum(norm**2 for norm in norms.values())))
        if not np.isfinite(loss) or not np.isfinite(total):
            # Before the first update the weights are those of the start, whatever the learning rate.
            advice = "No update has been made yet, so the cause is not a learning rate but the labels or the encoder"
            if position.updates:
                adaptation, rate = self.trial.config.adaptation, "train.lr (5e-5)"
                if adaptation.trains_encoder:
                    rate = "train.encoder_lr (5e-6)" if adaptation.lora is None else "train.lora_lr (5e-5)"
                advice = f"Try a lower {rate} or a lower train.grad_clip (0.3)"
            raise NonFiniteError(
                f"epoch {position.epoch}, update {position.step + 1}: loss {loss}, gradient norm {total}; utterances "
                f"{', '.join(u.id for u in update.utterances[:8])}. {advice}"
            )
        norm = torch.tensor(total).to(self.device, non_blocking=True)
        torch.nn.utils.clip_grads_with_norm_(self.weights.values(), train.grad_clip, norm)
        self.schedule.set_learning_rates(self.optimizer, position.updates, self.updates_per_epoch)
        self.optimizer.step()
        self.averages.update()
        return loss, norms

    def _backward(self, update: Update, keys: Sequence[int], following: Update | None = None) -> Tensor:
        """Add the gradients of an update; return its loss."""
        backward = exact_backward if self.trial.config.train.accumulation == "exact" else averaged_backward
        labels = scaled_labels(update.utterances, self.dimensions, self.trial.config.corpus.scale, self.device)
        batches = list(self.inputs.batches(update))
        if following is not None:
            self.inputs.read_ahead(following)
        with self.model.encoder.casts.kept():
            return backward(self.model, batches, labels, list(update.turns), keys)

    def free_bytes(self) -> float | None:
        """Return the memory that is left of the trial's share of a GPU; None on a CPU."""
        # The optimizer's two moments do not exist before the first update.
        moments = 0 if self.optimizer.state else 2 * sum(p.nbytes for p in self.weights.values())
        return free_bytes(self.device, self.trial.config.cluster.gpus_per_trial, moments)

    def fit_memory(self) -> dict[str, MemoryFormula]:
        """Return what micro-batches are cut by: fitted on a GPU for a trained encoder, with exact accumulation, which
        any cut leaves as it is; otherwise nothing. Call it before the first update. No weight changes.
        """
        config, utterances = self.trial.config, self.trial.fold.train
        room = self.free_bytes()
        if room is None or not config.adaptation.trains_encoder or config.train.accumulation != "exact":
            return {}

        @memory_errors()
        def train(batch: Sequence[Utterance]) -> float:
            # In the last epoch every group trains.
            self.begin_epoch(config.train.epochs)
            update = evaluation_update(batch, len(batch), by_dialogue=False)
            grown = memory_growth(self.device, lambda: self._backward(update, range(len(batch))))
            self.optimizer.zero_grad()
            return grown

        def predict(batch: Sequence[Utterance]) -> float:
            return memory_growth(self.device, lambda: self._predict(len(batch), batch))

        fitted = {
            "training": fit_memory(train, utterances, room),
            "prediction": fit_memory(predict, utterances, room),
        }
        self.discard_update()
        start_memory_count(self.device)
        return {name: formula for name, formula in fitted.items() if formula is not None}

    @property
    def can_split(self) -> bool:
        """Whether smaller micro-batches are possible and leave an update as it is."""
        return self.batch_size > 1 and self.trial.config.train.accumulation == "exact"

    def pretend_out_of_memory(self) -> None:
        """Raise the error of a full device, for fault injection, if the next update can survive it."""
        if self.can_split:
            raise torch.OutOfMemoryError("injected by --chaos")

    def split(self, update: Update, position: Position, error: Exception) -> Update:
        """Return an update that ran out of memory in smaller micro-batches: with exact accumulation, the same step.

        Raises MemoryLimitError if that is impossible.
        """
        largest = max(map(len, update.micro_batches))
        if largest == 1 or not self.can_split:
            raise MemoryLimitError(
                f"out of memory in epoch {position.epoch}, update {position.step + 1}, at train.batch_size "
                f"{largest} with train.accumulation {self.trial.config.train.accumulation}: use a GPU with "
                "more memory, a smaller encoder, or train.accumulation exact"
            ) from error
        return self.updates(position.epoch, largest // 2)[position.step]

    def discard_update(self) -> None:
        """Free the memory of a failed update. Call it outside of the `except` block, which keeps its graph alive."""
        # Its gradients take memory and would be added to those of its repetition.
        self.optimizer.zero_grad()
        free_memory(self.device)

    # --- prediction ---------------------------------------------------------------------------------------------------

    def predict(self, utterances: Sequence[Utterance]) -> Predictions:
        """Predict utterances on the rating scale, in their order. Raises NonFiniteError."""
        # A head alone needs little memory. An encoder gets what fits; if that is not known, what fits while it trains.
        batch_size = self.batch_size
        if "prediction" in self.memory or not self.trial.config.adaptation.trains_encoder:
            batch_size = max(batch_size, MANY)
        while True:
            try:
                return self._predict(batch_size, utterances)
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
                batch_size //= 2
            # After the except block: the exception holds on to the tensors of the failed pass.
            free_memory(self.device)

    @memory_errors()
    @torch.no_grad()
    def _predict(self, batch_size: int, utterances: Sequence[Utterance]) -> Predictions:
        self.model.eval()
        by_dialogue = self.trial.config.model.protocol == "dialogue"
        limit, memory = self.trial.config.train.max_batch_s, self.memory.get("prediction")
        update = evaluation_update(utterances, batch_size, by_dialogue, limit, memory)
        # One batch in memory at a time, whatever the size of the set.
        with self.model.encoder.casts.kept():
            z = torch.cat([self.model.encode(b.features, b.lengths) for b in self.inputs.batches(update)])
        scaled = self.model.predict(z[in_order(update.micro_batches, self.device)], list(update.turns))
        rated = ratings(scaled, self.trial.config.corpus.scale)
        if not np.isfinite(rated).all():
            broken = np.flatnonzero(~np.isfinite(rated).all(1))
            first = update.utterances[broken[0]].id
            raise NonFiniteError(
                f"{len(broken)} of {len(rated)} predictions are not finite, first for utterance {first}"
            )
        # An evaluation update has its own order, which needs less memory; the caller's order is restored here.
        row = {u.id: i for i, u in enumerate(update.utterances)}
        values = rated[[row[u.id] for u in utterances]]
        return {dimension: values[:, k] for k, dimension in enumerate(self.dimensions)}

    # --- saving and loading -------------------------------------------------------------------------------------------

    def tensors(self) -> Tensors:
        """Tensors to resume from."""
        state: dict[int, dict[str, Tensor]] = self.optimizer.state_dict()["state"]
        moments = {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}
        return Tensors(dict(self.weights), moments, self.averages.averages)

    def load(self, tensors: Tensors) -> None:
        """Continue from the tensors of a checkpoint."""
        self.load_weights(tensors.weights)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.optimizer.items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        for name, average in tensors.averages.items():
            self.averages.averages[name].copy_(average)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the trained weights."""
        for name, parameter in self.weights.items():
            parameter.copy_(weights[name])

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint: weights, two moments and, if they are kept, averages."""
        copies = 4 if self.averages.averages else 3
        return copies * sum(p.nbytes for p in self.weights.values())


class WeightAverages:
    """Exponential moving averages of the trained weights, for evaluation; without a `decay`, the weights themselves."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float | None) -> None:
        self.weights = weights
        self.decay = decay
        self.averages: dict[str, Tensor] = {}
        if decay is not None:
            self.averages = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """`average = decay * average + (1 - decay) * weight`, after each optimizer step."""
        if self.decay is not None:
            weights = [self.weights[name] for name in self.averages]
            # On a GPU a few launches for all tensors; on a CPU the same as one tensor after the other.
            torch._foreach_lerp_(list(self.averages.values()), weights, 1 - self.decay)

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Replace the weights by their averages inside the `with` block."""
        kept = {name: self.weights[name].detach().clone() for name in self.averages}
        for name, average in self.averages.items():
            self.weights[name].copy_(average)
        try:
            yield
        finally:
            for name, weight in kept.items():
                self.weights[name].copy_(weight)


def updates_of(trial: Trial, batch_size: int, epoch: int, memory: MemoryFormula | None = None) -> list[Update]:
    """Return the updates of one epoch of a trial, in micro-batches of at most `batch_size` utterances that fit into
    `memory`."""
    train = trial.config.train
    return training_updates(
        trial.fold.train,
        effective_batch=train.effective_batch,
        batch_size=batch_size,
        max_batch_s=train.max_batch_s,
        memory=memory,
        length_bucket_batches=train.length_bucket_batches,
        by_dialogue=trial.config.model.protocol == "dialogue",
        seed=trial.seed,
        fold=trial.fold.number,
        epoch=epoch,
    )


def draw_seed(seed: int, fold: int, epoch: int, update: int) -> int:
    """Return the torch seed for one place of the training loop; epoch 0 is the initial head.

    The fold is part of it: if folds shared their draws, the luck of a seed would be the luck of all folds, and the
    differences of folds would not be separate draws of the randomness of training.
    """
    state = np.random.SeedSequence([seed, fold, epoch, update]).generate_state(2)
    return int(state[0]) << 31 | int(state[1]) >> 1


def utterance_key(seed: int, utterance: str) -> int:
    """Return what the dropout of one utterance is drawn from, in the update with this `draw_seed`."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {utterance}".encode(), digest_size=8).digest())
