"""Checkpoints of a trial: written completely or not at all, verified when read, two generations, no pickle.

checkpoint/
    0003-000040/            epoch 3, 40 of its updates done
        weights.safetensors  optimizer.safetensors  averages.safetensors  state.json  sha256.json
    best-0002.safetensors   the trained tensors at the best epoch so far
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save, save_file
from torch import Tensor

from cvrunner.data.batches import MemoryFormula
from cvrunner.files import patiently, write_atomically, write_folder_atomically
from cvrunner.records.run_directory import GENERATIONS


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
    """Checkpoint folder of one trial."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: LoopState, tensors: Tensors) -> None:
        """Write a generation, then drop all but the newest two."""
        path = self.folder / f"{state.epoch:04d}-{state.step:06d}"
        # A damaged checkpoint of the same place in the training may be left; it was passed over when resuming.
        shutil.rmtree(path, ignore_errors=True)

        def fill(folder: Path) -> None:
            for name, group in vars(tensors).items():
                save_file(_contiguous(group), folder / f"{name}.safetensors")
            (folder / "state.json").write_text(json.dumps(asdict(state)))
            (folder / "sha256.json").write_text(json.dumps({p.name: _sha256(p) for p in sorted(folder.iterdir())}))

        write_folder_atomically(path, fill)
        generations = self._generations()
        for old in generations[:-GENERATIONS]:
            shutil.rmtree(old)
        kept = set()
        for generation in generations[-GENERATIONS:]:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                kept.add(self._best(int(json.loads((generation / "state.json").read_text())["best_epoch"])))
        for best in set(self.folder.glob("best-*.safetensors")) - kept:
            best.unlink()

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

    def save_best(self, epoch: int, weights: Mapping[str, Tensor]) -> str:
        """Write the weights of a new best epoch; return their SHA-256, which the next state refers to."""
        # One file per epoch: the checkpoint before still refers to the weights of its own best epoch.
        write_atomically(self._best(epoch), save(_contiguous(weights)))
        return _sha256(self._best(epoch))

    def load_best(self, state: LoopState) -> dict[str, Tensor]:
        """Return the weights of the best epoch. Raises ValueError if the file differs from what was saved."""
        self._check_best(state)
        return load_file(self._best(state.best_epoch))

    def _check_best(self, state: LoopState) -> None:
        best = self._best(state.best_epoch)
        if state.best_epoch and _sha256(best) != state.best_sha256:
            raise ValueError(f"{best.name} does not match its hash")

    def remove(self) -> None:
        """Delete everything, once the trial has its result."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _best(self, epoch: int) -> Path:
        return self.folder / f"best-{epoch:04d}.safetensors"

    def _generations(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("[0-9]*-[0-9]*") if p.is_dir())


@patiently
def _read(path: Path) -> tuple[LoopState, Tensors]:
    expected: dict[str, str] = json.loads((path / "sha256.json").read_text())
    for name, value in expected.items():
        if _sha256(path / name) != value:
            raise ValueError(f"{name} does not match its hash")
    fields: dict[str, Any] = json.loads((path / "state.json").read_text())
    loaded = {name: load_file(path / f"{name}.safetensors") for name in ("weights", "optimizer", "averages")}
    fields["memory"] = {name: MemoryFormula(*terms) for name, terms in fields["memory"].items()}
    return LoopState(**fields), Tensors(**loaded)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
