"""A trial: one condition, one fold, one seed, and everything that decides its numbers."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cvrunner.config.schema import LINEAR_PROBE, Config, digest
from cvrunner.data.folds import Fold
from cvrunner.encoders.files import EncoderFiles
from cvrunner.records.run_directory import probe_name, trial_name

HASHED = (
    "config/adaptation.py",
    "data/**/*.py",
    "encoders/**/*.py",
    "model/**/*.py",
    "training/**/*.py",
    "verdict/ccc.py",
)
"""Code that decides numbers: a change of it changes every trial's key."""
PACKAGE = Path(__file__).parent.parent
DeviceType = Literal["cuda", "cpu"]
NOT_HASHED = ("training/faults.py", "training/linear_probe.py", "training/probe.py")
PROBE_HASHED = (
    "data/batches.py",
    "data/features.py",
    "data/folds.py",
    "encoders/**/*.py",
    "training/inputs.py",
    "training/linear_probe.py",
    "training/ridge.py",
    "verdict/ccc.py",
)
"""Code that decides the numbers of the linear probe."""


@dataclass(frozen=True)
class Trial:
    """One training. Same key, same numbers."""

    condition: str
    fold: Fold
    seed: int
    config: Config
    """The configuration with the overrides of the condition."""
    encoder: EncoderFiles
    split_digest: str
    corpus_digest: str
    device: DeviceType
    """Type of the device that the scheduler gives the trial. The precision that `auto` becomes there is in its result:
    the driver, which makes the trial, does not import torch."""

    @property
    def name(self) -> str:
        """`frozen/fold-1/seed-0`."""
        return trial_name(self.condition, self.fold.number, self.seed)

    @functools.cached_property
    def key(self) -> str:
        """Hash of everything the numbers depend on: settings, data, split, encoder weights, type of device, code."""
        parts = {
            "numerics": self.config.numerics,
            "fold": self.fold.number,
            "seed": self.seed,
            "split": self.split_digest,
            "corpus": self.corpus_digest,
            "encoder": self.encoder.digest,
            "device": self.device,
            "code": code_digest(),
        }
        return digest(parts)[:32]


@dataclass(frozen=True, kw_only=True)
class LinearProbe(Trial):
    """The linear probe of one fold, on the encoder of the baseline, whose configuration it has. No trial: it is
    deterministic, trains no weights of a network, and is not part of the comparison of conditions.
    """

    condition: str = LINEAR_PROBE
    seed: int = 0

    @property
    def name(self) -> str:
        """`linear_probe/fold-1`."""
        return probe_name(self.fold.number)

    @functools.cached_property
    def key(self) -> str:
        """Hash of everything the numbers depend on; of the settings, only the few that the probe reads."""
        numerics = self.config.numerics
        parts = {
            "dimensions": numerics["corpus"]["dimensions"],
            "precision": numerics["train"]["precision"],
            "threads": numerics["threads"],
            "fold": self.fold.number,
            "split": self.split_digest,
            "corpus": self.corpus_digest,
            "encoder": self.encoder.digest,
            "code": code_digest(patterns=PROBE_HASHED, without=()),
        }
        return digest(parts)[:32]


@functools.cache
def code_digest(
    package: Path = PACKAGE, patterns: tuple[str, ...] = HASHED, without: tuple[str, ...] = NOT_HASHED
) -> str:
    """Hash the syntax trees of the modules of a package that decide numbers.

    Comments, layout, docstrings, and the texts of exceptions do not count.
    """
    files = {str(f.relative_to(package)): f for pattern in patterns for f in package.glob(pattern)}
    return digest({name: numeric_code(f.read_text()) for name, f in files.items() if name not in without})


@functools.cache
def numeric_code(source: str) -> str:
    """Return the syntax tree of a module as text, without docstrings and without the strings of `raise` statements."""
    parts: list[str] = []
    # By hand: `ast.dump` takes twice as long, and every command that trains or continues a run waits for it.
    _write_tree(ast.parse(source), parts, in_raise=False)
    return "".join(parts)


def _write_tree(part: object, parts: list[str], in_raise: bool) -> None:
    if isinstance(part, list):
        parts.append("[")
        for one in part:
            # A string that is a statement documents a module, a class, a function, or the field before it.
            if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)):
                _write_tree(one, parts, in_raise)
        parts.append("]")
    elif not isinstance(part, ast.AST):
        parts.append(f"{part!r},")
    elif not (in_raise and isinstance(part, ast.Constant) and isinstance(part.value, str)):
        parts.append(f"{type(part).__name__}(")
        in_raise = in_raise or isinstance(part, ast.Raise)
        for name in part._fields:
            # Whether a name is read or written follows from its place in the tree.
            if name != "ctx":
                _write_tree(getattr(part, name), parts, in_raise)
        parts.append(")")
