"""Count what a GPU is asked to do, without one, and estimate from it what a run would cost on a card.

On the device `meta` tensors have a shape but no data.

An aten call that is neither a view nor an allocation counts as one launch of a kernel. Autocast does not know that
device, so its rules for CUDA are applied here: products in bfloat16, norms and softmax in float32, and one cast per
weight while the outermost autocast context lives. Optimizer and clipping are not among the calls.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from cvrunner.data.batches import Update, evaluation_update
from cvrunner.data.utterance import Utterance
from cvrunner.encoders.encoder import ENCODER_FRAME_RATE_HZ, Boundary, Encoded, SpeechEncoder
from cvrunner.errors import MemoryLimitError, UsageError
from cvrunner.plan.cards import Card
from cvrunner.training.accumulation import MicroBatch, averaged_backward, exact_backward
from cvrunner.training.learner import MANY, Learner
from cvrunner.training.linear_probe import estimated_s
from cvrunner.training.memory import MARGIN
from cvrunner.training.probe import (
    ConditionProbe,
    Counted,
    Estimate,
    FeaturePass,
    TimedUpdate,
    audio_s,
    largest_batch_size,
    longest_batch,
    typical_batch,
)
from cvrunner.training.trial import Trial

META = torch.device("meta")
NO_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view", "lift_fresh"}
BFLOAT16 = {functional.linear, torch.conv1d, functional.conv1d, torch.bmm, torch.matmul, torch.baddbmm, Tensor.matmul}
OPTIMIZER_PASSES = 10
"""How often AdamW, clipping and the norms read or write as many bytes as weights train."""
FLOAT32 = {functional.layer_norm, torch.softmax, Tensor.softmax, functional.softplus, torch.cumsum, Tensor.cumsum}


class Autocast(TorchFunctionMode):
    """Autocast's rules for CUDA, and its cache of weights."""

    depth = 0
    weights: dict[int, Tensor] = {}  # noqa: RUF012 (as global as the original)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            query, key, value = (self.cast(x, torch.bfloat16) for x in args[:3])
            mask = self.cast(kwargs["attn_mask"], torch.bfloat16)
            kernel = torch.ops.aten._scaled_dot_product_efficient_attention
            return kernel(query, key, value, mask, True, kwargs["dropout_p"])[0]
        if func in BFLOAT16 or func in FLOAT32:
            dtype = torch.bfloat16 if func in BFLOAT16 else torch.float32
            args = tuple(self.cast(x, dtype) for x in args)
            kwargs = {name: self.cast(x, dtype) for name, x in kwargs.items()}
        return func(*args, **kwargs)

    def cast(self, x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == dtype:
            return x
        if dtype == torch.bfloat16 and x.is_leaf and x.requires_grad:
            if id(x) not in self.weights:
                self.weights[id(x)] = x.to(dtype)
            return self.weights[id(x)]
        return x.to(dtype)


@contextmanager
def autocast(_: str, dtype: torch.dtype | None = None, enabled: bool = True) -> Iterator[None]:
    """Stand in for torch.autocast."""
    Autocast.depth += 1
    try:
        if enabled:
            with Autocast():
                yield
        else:
            yield
    finally:
        Autocast.depth -= 1
        if Autocast.depth == 0:
            Autocast.weights.clear()


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts aten calls on `meta` by name, a change of type as `cast`, and what they compute, read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.operations: Counter[torch.dtype] = Counter()
        """Floating-point operations of matrix products, convolutions and attention, by the type of their operands."""
        self.moved_bytes = 0
        """What the launches read and write, if no cache helps."""
        self.peak_bytes = 0
        """Most memory that tensors made here take at a time."""
        self._held: dict[int, int] = {}
        self._held_bytes = 0

    @property
    def total(self) -> Counted:
        """Everything that has been counted so far."""
        half = self.operations[torch.bfloat16]
        single = self.operations.total() - half
        return Counted(self.counts.total(), half, single, self.moved_bytes, self.peak_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        # A call for many tensors returns nothing: it changes its first argument.
        results = [x for x in tree_leaves(args[0] if out is None else out) if _on_meta(x)]
        if not results:
            return out
        operands = [x for x in tree_leaves((args, kwargs)) if _on_meta(x)]
        self._hold(results, operands)
        if not func.is_view and name not in NO_LAUNCH:
            # Expanded tensors have more values than memory.
            self.moved_bytes += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*operands, *results))
            if formula := flop_registry.get(func.overloadpacket):
                self.operations[results[0].dtype] += formula(*args, **kwargs, out_val=out)
            if name == "_foreach_copy_" or (name == "_to_copy" and args[0].device == out.device):
                name = "cast"
            self.counts[name] += 1
        return out

    def _hold(self, results: list[Tensor], operands: list[Tensor]) -> None:
        """Count the memory of results that have their own, until it is free again."""
        # Tensors from before are no part of the peak, and views of them have the same storage.
        known = {x.untyped_storage()._cdata for x in operands} | self._held.keys()
        for storage in (x.untyped_storage() for x in results):
            if storage._cdata not in known:
                self._held[storage._cdata] = storage.nbytes()
                self._held_bytes += storage.nbytes()
                weakref.finalize(storage, self._release, storage._cdata).atexit = False
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)

    def _release(self, address: int) -> None:
        self._held_bytes -= self._held.pop(address)


def _on_meta(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "meta"


@contextmanager
def counted(encoder: SpeechEncoder) -> Iterator[Calls]:
    """Count the calls inside the `with` block, on a model on `meta` with this encoder, as in one update."""

    def checkpointed(run: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        # The original enters autocast again before it runs a layer again.
        def in_autocast(*args: Any) -> Tensor:
            with autocast("meta", enabled=encoder.precision != torch.float32):
                return run(*args)

        return checkpoint(in_autocast, *args, **kwargs)

    again = mock.patch("cvrunner.encoders.encoder.checkpoint", checkpointed)
    with mock.patch("torch.autocast", autocast), again, encoder.casts.kept(), Calls() as calls:
        yield calls


# --- estimates --------------------------------------------------------------------------------------------------------


def estimate(trial: Trial, card: Card, folder: Path) -> ConditionProbe:
    """Return what a condition would cost on a card, from counted calls: the counterpart of `probe`.

    Reads the encoder's files, to the CPU, and no audio; leaves `folder` empty. Raises UsageError for an encoder whose
    calls cannot be counted, MemoryLimitError if a single utterance would not fit.
    """
    train = trial.config.train
    if train.precision == "auto":
        # Known cards have bfloat16; here, on a CPU, `auto` would be float32.
        config = trial.config.model_copy(update={"train": train.model_copy(update={"precision": "bfloat16"})})
        trial = replace(trial, config=config)
    began = time.monotonic()
    learner = Learner(trial, folder, torch.device("cpu"))
    load_s, encoder = time.monotonic() - began, learner.inputs.encoder
    if encoder.WINDOW != "unpadded":
        raise UsageError(f"--card {card.name}: no estimate for model.whisper_window {encoder.WINDOW}: use unpadded")
    # In the last epoch every group trains, whatever train.freeze_epochs says.
    learner.begin_epoch(train.epochs)
    learner.model.to(META)
    trained_bytes = sum(p.nbytes for p in learner.weights.values())
    weights_bytes = sum(x.nbytes for x in (*learner.model.parameters(), *learner.model.buffers()))
    # A checkpoint has the trained weights, the optimizer's moments and averages. Gradients are among what is counted.
    fixed_bytes = weights_bytes + learner.checkpoint_bytes - trained_bytes
    longest, typical = longest_batch(trial).utterances, typical_batch(trial)
    sizes: dict[int, Counted] = {}

    def fits(size: int) -> bool:
        sizes[size] = sizes.get(size) or _count_update(learner, longest, size)
        room = (1 - MARGIN) * card.memory_bytes * trial.config.cluster.gpus_per_trial
        return fixed_bytes + sizes[size].peak_bytes <= room

    batch_size = most = largest_batch_size(fits, train.batch_size, train.batch_size)
    if batch_size == 0:
        raise MemoryLimitError(
            f"{trial.condition}: by this estimate a {card.name} has too little memory for the longest batch with "
            "train.batch_size 1: use another card, a smaller encoder or train.gradient_checkpointing"
        )
    if batch_size == train.batch_size:
        most = largest_batch_size(fits, batch_size, len(longest))
    counted = [_count_update(learner, typical, batch_size), sizes[batch_size]]
    timed = [
        TimedUpdate(len(batch), max(u.duration_s for u in batch), audio_s(batch), card.seconds(found))
        for batch, found in zip((typical, longest), counted, strict=True)
    ]
    statistics = 2 * (encoder.depth + 1) * encoder.width
    return ConditionProbe(
        condition=trial.condition,
        device=f"{card.name} (estimate)",
        precision=learner.precision_name,
        memory="GPU",
        peak_memory_mib=(fixed_bytes + sizes[batch_size].peak_bytes) / 2**20,
        larger_mib={n: (fixed_bytes + sizes[n].peak_bytes) / 2**20 for n in sizes if batch_size < n <= most},
        configured=train.batch_size,
        batch_size=batch_size,
        fits=most,
        typical=timed[0],
        longest=timed[1],
        plain_mamba_s=None,
        load_s=load_s,
        validation_s=card.seconds(_count_prediction(learner, typical, batch_size)) / len(typical),
        features=tuple(_feature_passes(learner, card, typical)),
        statistics=statistics,
        linear_probe_s=estimated_s(len(trial.fold.train), statistics, trial.config.cluster.cpus_per_trial),
        trained_bytes=trained_bytes,
        checkpoint_bytes=learner.checkpoint_bytes,
        estimate=Estimate(card.name, card.assumptions, fixed_bytes, *counted),
    )


def _count_update(learner: Learner, utterances: Sequence[Utterance], batch_size: int) -> Counted:
    """Count an update of these utterances in micro-batches of `batch_size`, including what the optimizer moves."""
    train = learner.trial.config.train
    backward = exact_backward if train.accumulation == "exact" else averaged_backward
    learner.model.train()
    with counted(learner.model.encoder) as calls:
        update, batches = _batches(learner, utterances, batch_size)
        labels = torch.empty(len(utterances), len(learner.dimensions), device=META)
        backward(learner.model, batches, labels, list(update.turns), range(len(utterances)))
    learner.model.zero_grad()
    moved_bytes = OPTIMIZER_PASSES * sum(p.nbytes for p in learner.weights.values())
    return replace(calls.total, moved_bytes=calls.moved_bytes + moved_bytes)


@torch.no_grad()
def _count_prediction(learner: Learner, utterances: Sequence[Utterance], batch_size: int) -> Counted:
    """Count a prediction as in validation."""
    learner.model.eval()
    if not learner.trial.config.adaptation.trains_encoder:
        batch_size = max(batch_size, MANY)
    with counted(learner.model.encoder) as calls:
        update, batches = _batches(learner, utterances, batch_size)
        z = torch.cat([learner.model.encode(batch.features, batch.lengths) for batch in batches])
        learner.model.predict(z, list(update.turns))
    return calls.total


def _batches(learner: Learner, utterances: Sequence[Utterance], batch_size: int) -> tuple[Update, list[MicroBatch]]:
    """Return these utterances as one update, and its micro-batches on `meta`, as `Inputs.batches` reads them."""
    config, encoder = learner.trial.config, learner.inputs.encoder
    update = evaluation_update(utterances, batch_size, config.model.protocol == "dialogue", config.train.max_batch_s)
    batches = []
    for positions in update.micro_batches:
        samples = [update.utterances[i].samples for i in positions]
        lengths = torch.tensor([encoder.frames(n) for n in samples])
        averaged = torch.tensor([encoder.averaged_frames(n) for n in samples])

        def encoded(layers: int, lengths: Tensor = averaged) -> Encoded:
            states = torch.empty(int(lengths.sum()), layers, encoder.width, device=META)
            return Encoded(states, lengths, torch.empty(len(lengths), layers, 2, encoder.width, device=META))

        frames = int(lengths.sum())
        if encoder.adaptation.cached == "hidden":
            batches.append(MicroBatch(encoded(len(encoder.layers)), averaged, positions))
        elif encoder.starts_at_boundary:
            mixed = encoded(len(encoder.layers_below)) if encoder.layers_below else None
            features = Boundary(torch.empty(frames, encoder.width, device=META), mixed)
            batches.append(MicroBatch(features, lengths, positions))
        else:
            conv = torch.empty(frames, learner.trial.encoder.settings.front_end_width, device=META)
            batches.append(MicroBatch(conv, lengths, positions))
    return update, batches


@torch.no_grad()
def _feature_passes(learner: Learner, card: Card, utterances: Sequence[Utterance]) -> Iterator[FeaturePass]:
    """Yield what filling each store costs: a pass of the encoder, except for the front-end, which is not counted."""
    encoder, names = learner.inputs.encoder, {store.kind for _, store, _ in learner.inputs.passes}
    encoder.eval()
    lengths = torch.tensor([encoder.frames(u.samples) for u in utterances])
    with counted(encoder) as calls:
        conv = torch.empty(int(lengths.sum()), learner.trial.encoder.settings.front_end_width, device=META)
        states, packing = encoder.states(conv, lengths)
        packing.averaged(list(states.values()), encoder.group)
        packing.statistics(list(states.values()))
    cost = card.seconds(calls.total) / audio_s(utterances)
    # Values per second of audio, which are float16.
    values = {
        "conv": learner.trial.encoder.settings.front_end_width * ENCODER_FRAME_RATE_HZ,
        "hidden": len(encoder.layers) * encoder.width * ENCODER_FRAME_RATE_HZ / encoder.group,
        "boundary": encoder.width * ENCODER_FRAME_RATE_HZ,
        "statistics": 0.0,
    }
    for _, store, _ in learner.inputs.passes:
        # Statistics that are written along with hidden states are no separate pass.
        if store.kind != "statistics" or "hidden" not in names:
            pass_s = 0.0 if store.kind == "conv" else cost
            yield FeaturePass(store.kind, store.folder.name, pass_s, 2 * values[store.kind])
