"""Checkpoints of a trial: whole or not there, checked when read, two generations, no pickle.

checkpoint/
    0003-000040/            epoch 3, 40 of its updates done
        weights.safetensors  optimizer.safetensors  averages.safetensors  state.json  sha256.json
    best-0002.safetensors   the trained tensors at the best epoch so far
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from cvrunner.files import patiently, write_atomically, write_folder_atomically
from cvrunner.records.run_directory import GENERATIONS


@dataclass
class Progress:
    """The state of the training loop, all that a resumed trial needs beside weights and optimizer."""

    key: str
    batch_size: int
    """Smaller than configured after an out-of-memory error."""
    epoch: int = 1
    """The epoch that training is in, from 1."""
    step: int = 0
    """Updates of this epoch already done."""
    updates: int = 0
    """Updates in all."""
    loss_sum: float = 0.0
    """Over the updates of this epoch."""
    gradient_sums: dict[str, float] = field(default_factory=dict)
    """By group: sum of gradient norms over the updates of this epoch."""
    epoch_s: float = 0.0
    """Training time in this epoch so far."""
    train_s: float = 0.0
    """Training and validation time in all earlier epochs."""
    best_epoch: int = 0
    best_ccc: float = -2.0
    """Validation CCC-Avg at the best epoch; no CCC is as low as the start value."""
    best_sha256: str = ""
    """Of the file with the weights of the best epoch."""

    def next_epoch(self) -> Progress:
        """The state at the start of the next epoch."""
        return replace(self, epoch=self.epoch + 1, step=0, loss_sum=0.0, gradient_sums={}, epoch_s=0.0)


@dataclass(frozen=True)
class Tensors:
    """The tensors of a checkpoint."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    averages: dict[str, Tensor]


class Checkpoints:
    """The checkpoint folder of one trial."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, progress: Progress, tensors: Tensors) -> None:
        """Write a generation, then drop all but the newest two."""
        path = self.folder / f"{progress.epoch:04d}-{progress.step:06d}"
        shutil.rmtree(path, ignore_errors=True)  # a damaged one that this trial has passed again
        write_folder_atomically(path, lambda folder: _write(folder, progress, tensors))
        self._drop_old()

    def load(self, key: str) -> tuple[Progress | None, Tensors | None, str | None]:
        """The newest whole checkpoint of this trial key, or nothing, and a note about damaged ones."""
        note = None
        for path in reversed(self._generations()):
            try:
                progress, tensors = _read(path)
                self._check_best(progress)
            except (OSError, ValueError, KeyError, TypeError) as error:
                note = f"checkpoint {path.name} is damaged ({error}), going back to the one before it"
                continue
            if progress.key == key:
                return progress, tensors, note
        return None, None, note

    def save_best(self, epoch: int, weights: Mapping[str, Tensor]) -> str:
        """Write the weights of a new best epoch; returns their SHA-256, for the state to be saved next."""
        write_atomically(self._best(epoch), save(_contiguous(weights)))
        return _sha256(self._best(epoch))

    def load_best(self, progress: Progress) -> dict[str, Tensor]:
        """The weights of the best epoch. Raises ValueError where they are not what was saved."""
        self._check_best(progress)
        return load_file(self._best(progress.best_epoch))

    def _check_best(self, progress: Progress) -> None:
        best = self._best(progress.best_epoch)
        if progress.best_epoch and _sha256(best) != progress.best_sha256:
            raise ValueError(f"{best.name} does not match its hash")

    def remove(self) -> None:
        """Drop everything, once the trial has its result."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _best(self, epoch: int) -> Path:
        return self.folder / f"best-{epoch:04d}.safetensors"

    def _generations(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("[0-9]*-[0-9]*") if p.is_dir())

    def _drop_old(self) -> None:
        generations = self._generations()
        for old in generations[:-GENERATIONS]:
            shutil.rmtree(old)
        wanted = {self._best(_best_epoch(path)) for path in generations[-GENERATIONS:]}
        for best in self.folder.glob("best-*.safetensors"):
            if best not in wanted:
                best.unlink()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat names, such as `12.exp_avg`."""
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The reverse of `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _write(folder: Path, progress: Progress, tensors: Tensors) -> None:
    for name, group in vars(tensors).items():
        save_file(_contiguous(group), folder / f"{name}.safetensors")
    (folder / "state.json").write_text(json.dumps(asdict(progress)))
    (folder / "sha256.json").write_text(json.dumps({p.name: _sha256(p) for p in sorted(folder.iterdir())}))


@patiently
def _read(path: Path) -> tuple[Progress, Tensors]:
    expected: dict[str, str] = json.loads((path / "sha256.json").read_text())
    for name, value in expected.items():
        if _sha256(path / name) != value:
            raise ValueError(f"{name} does not match its hash")
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    loaded = {name: load_file(path / f"{name}.safetensors") for name in ("weights", "optimizer", "averages")}
    return Progress(**state), Tensors(**loaded)


def _best_epoch(path: Path) -> int:
    try:
        return int(json.loads((path / "state.json").read_text())["best_epoch"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
