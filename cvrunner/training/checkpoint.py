"""Checkpoints of a trial: written completely or not at all, verified when read, two generations, no pickle.

checkpoint/
    0003-000040/            epoch 3, 40 of its updates done
        weights.safetensors  optimizer.safetensors  averages.safetensors  state.json  sha256.json
    best-0002.safetensors   the trained tensors at the best epoch so far; the checkpoint at the end of that epoch shares
                            this file
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from cvrunner.data.batches import MemoryFormula
from cvrunner.files import link_or_copy, patiently, sha256_of, write_file_atomically, write_folder_atomically
from cvrunner.records.run_directory import GENERATIONS

GROUPS = ("weights", "optimizer", "averages")
"""Fields of `Tensors`; each is a file of a generation."""
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}
"""Names of types in the format of safetensors."""


class Position(NamedTuple):
    """Place of an update in the training: dropout and learning rate depend on it."""

    epoch: int
    """From 1."""
    step: int
    """Updates of this epoch already done."""
    updates: int
    """Updates of all epochs already done."""


@dataclass
class LoopState:
    """State of the training loop: with weights and optimizer, all that a resumed trial needs."""

    key: str
    batch_size: int
    """Smallest that an update has needed; smaller than configured after an out-of-memory error."""
    epoch: int = 1
    """The epoch that training is in, from 1."""
    step: int = 0
    """Updates of this epoch already done."""
    updates: int = 0
    """Updates of all epochs already done."""
    loss_sum: float = 0.0
    """Sum of the losses of this epoch's updates."""
    gradient_sums: dict[str, float] = field(default_factory=dict)
    """Sum of gradient norms over this epoch's updates, by group."""
    epoch_s: float = 0.0
    """Training time of this epoch so far, in seconds."""
    train_s: float = 0.0
    """Training and validation time of all earlier epochs, in seconds."""
    best_epoch: int = 0
    """0: no epoch has ended yet."""
    best_ccc: float | None = None
    """Validation CCC-Avg of the best epoch; None if it is undefined."""
    best_sha256: str = ""
    """Hash of the file with the weights of the best epoch."""
    memory: dict[str, MemoryFormula] = field(default_factory=dict)
    """GPU memory of a micro-batch, by `training` and `prediction`; empty if batches are cut by count."""

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.step, self.updates)

    def add(self, loss: float, gradient_norms: Mapping[str, float]) -> None:
        """Count one update."""
        self.loss_sum += loss
        for group, norm in gradient_norms.items():
            self.gradient_sums[group] = self.gradient_sums.get(group, 0.0) + norm
        self.step += 1
        self.updates += 1

    def improves(self, ccc: float | None) -> bool:
        """Whether a validation CCC-Avg makes the current epoch the best. The first epoch always is; an undefined CCC
        never replaces another epoch, and is replaced by any defined one."""
        if self.best_epoch == 0 or ccc is None:
            return self.best_epoch == 0
        return self.best_ccc is None or ccc > self.best_ccc

    def next_epoch(self) -> LoopState:
        """Return the state at the start of the next epoch."""
        return replace(self, epoch=self.epoch + 1, step=0, loss_sum=0.0, gradient_sums={}, epoch_s=0.0)


@dataclass(frozen=True)
class Tensors:
    """Tensors of a checkpoint, by parameter or by optimizer slot (`12.exp_avg`)."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    averages: dict[str, Tensor]


class Checkpoints:
    """Checkpoint folder of one trial. One thread writes; training waits for the copy to host memory alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: LoopState, tensors: Tensors, best: bool = False) -> None:
        """Copy a generation and start to write it; all but the newest two are then dropped. First wait for the
        generation before, and raise what went wrong with it.

        `best`: the averages, or without them the weights, are those of a new best epoch. They are stored under both
        names, but once, and `state.best_sha256` is set before the next `wait` returns.
        """
        self.wait()
        copied = {name: {n: t.detach().to("cpu", copy=True) for n, t in vars(tensors)[name].items()} for name in GROUPS}
        evaluated = None
        if best:
            evaluated = "averages" if tensors.averages else "weights"
        self._pending = self._writer.submit(self._write, state, asdict(state), copied, evaluated)

    def wait(self) -> None:
        """Wait until the last generation is durable. Raises what went wrong with it, such as OSError."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let the writer finish; what went wrong with it does not matter any more."""
        self._writer.shutdown()

    def _write(
        self, state: LoopState, fields: dict[str, Any], tensors: dict[str, dict[str, Tensor]], best: str | None
    ) -> None:
        path = self.folder / f"{fields['epoch']:04d}-{fields['step']:06d}"
        # A damaged checkpoint of the same place in the training may be left; it was passed over when resuming.
        shutil.rmtree(path, ignore_errors=True)
        hashes: dict[str, str] = {}

        def write(name: str, file: BinaryIO) -> None:
            hashes[f"{name}.safetensors"] = write_tensors(file, tensors[name])

        if best is not None:
            # One file per epoch: the previous checkpoint still refers to the weights of another best epoch.
            write_file_atomically(self._best(fields["best_epoch"]), lambda file: write(best, file))
            fields["best_sha256"] = state.best_sha256 = hashes[f"{best}.safetensors"]

        def fill(folder: Path) -> None:
            for name in GROUPS:
                target = folder / f"{name}.safetensors"
                if name == best:
                    link_or_copy(self._best(fields["best_epoch"]), target)
                    continue
                with target.open("wb") as file:
                    write(name, file)
            text = json.dumps(fields)
            (folder / "state.json").write_text(text)
            hashes["state.json"] = hashlib.sha256(text.encode()).hexdigest()
            (folder / "sha256.json").write_text(json.dumps(hashes))

        write_folder_atomically(path, fill)
        generations = self._generations()
        for old in generations[:-GENERATIONS]:
            shutil.rmtree(old)
        kept = set()
        for generation in generations[-GENERATIONS:]:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                kept.add(self._best(int(json.loads((generation / "state.json").read_text())["best_epoch"])))
        for unused in set(self.folder.glob("best-*.safetensors")) - kept:
            unused.unlink()

    def load(self, key: str) -> tuple[LoopState | None, Tensors | None, str | None]:
        """Return the newest intact checkpoint with this trial key, if there is one, and a note about damaged ones."""
        note = None
        for path in reversed(self._generations()):
            try:
                state, tensors = _read(path)
                self._check_best(state)
            except (OSError, ValueError, KeyError, TypeError) as error:
                note = f"checkpoint {path.name} is damaged ({error}), going back to the one before it"
                continue
            if state.key == key:
                return state, tensors, note
        return None, None, note

    def load_best(self, state: LoopState) -> dict[str, Tensor]:
        """Return the weights of the best epoch. Raises ValueError if the file differs from what was saved."""
        self.wait()
        self._check_best(state)
        return load_file(self._best(state.best_epoch))

    def _check_best(self, state: LoopState) -> None:
        best = self._best(state.best_epoch)
        if state.best_epoch and sha256_of(best) != state.best_sha256:
            raise ValueError(f"{best.name} does not match its hash")

    def remove(self) -> None:
        """Delete everything, once the trial has its result."""
        self.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _best(self, epoch: int) -> Path:
        return self.folder / f"best-{epoch:04d}.safetensors"

    def _generations(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("[0-9]*-[0-9]*") if p.is_dir())


@patiently
def _read(path: Path) -> tuple[LoopState, Tensors]:
    expected: dict[str, str] = json.loads((path / "sha256.json").read_text())
    for name, value in expected.items():
        if sha256_of(path / name) != value:
            raise ValueError(f"{name} does not match its hash")
    fields: dict[str, Any] = json.loads((path / "state.json").read_text())
    loaded = {name: load_file(path / f"{name}.safetensors") for name in GROUPS}
    fields["memory"] = {name: MemoryFormula(*terms) for name, terms in fields["memory"].items()}
    return LoopState(**fields), Tensors(**loaded)


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors of the CPU in the format of safetensors; return the SHA-256 of all that is written.

    safetensors itself would have to be read again for the hash, or would hold a second copy in memory.
    """
    flat = [tensor.reshape(-1).view(torch.uint8).numpy() for tensor in tensors.values()]
    parts = [memoryview(array) for array in flat]  # type: ignore[arg-type]
    ends = list(itertools.accumulate((part.nbytes for part in parts), initial=0))
    header = {
        name: {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        for (name, tensor), offsets in zip(tensors.items(), itertools.pairwise(ends), strict=True)
    }
    text = json.dumps(header).encode()
    # The data start at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    blocks: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text, *parts]
    for part in blocks:
        file.write(part)
        digest.update(part)
    return digest.hexdigest()
