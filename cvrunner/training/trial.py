"""A trial: one condition, one fold, one seed, with all that decides its numbers."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

from cvrunner.config.schema import Config, digest
from cvrunner.data.folds import Fold
from cvrunner.encoders.files import EncoderFiles
from cvrunner.records.run_directory import trial_name

CODE_THAT_MATTERS = ("data/**/*.py", "model/**/*.py", "training/**/*.py", "verdict/ccc.py")
CODE_THAT_DOES_NOT = ("training/probe.py",)


@dataclass(frozen=True)
class Trial:
    """One training. Same key, same numbers."""

    condition: str
    fold: Fold
    seed: int
    config: Config
    """The configuration with the condition laid over it."""
    encoder: EncoderFiles
    split_digest: str
    corpus_digest: str

    @property
    def name(self) -> str:
        """`frozen/fold-1/seed-0`."""
        return trial_name(self.condition, self.fold.number, self.seed)

    @functools.cached_property
    def key(self) -> str:
        """Hash of what the numbers depend on: settings, data, split, encoder weights, code."""
        parts = {
            "numerics": self.config.numerics,
            "fold": self.fold.number,
            "seed": self.seed,
            "split": self.split_digest,
            "corpus": self.corpus_digest,
            "encoder": self.encoder.digest,
            "code": code_digest(),
        }
        return digest(parts)[:32]

    @property
    def frozen(self) -> bool:
        return self.config.model.freeze_speech_encoder


@functools.cache
def code_digest() -> str:
    """Hash of the syntax trees of the code that decides numbers; comments and layout do not count."""
    package = Path(__file__).parent.parent
    files = {str(f.relative_to(package)): f for pattern in CODE_THAT_MATTERS for f in package.glob(pattern)}
    return digest({n: ast.dump(ast.parse(f.read_bytes())) for n, f in files.items() if n not in CODE_THAT_DOES_NOT})
