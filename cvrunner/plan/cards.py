"""GPUs for which `plan --card` estimates a run although they are not here. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from cvrunner.errors import UsageError

if TYPE_CHECKING:
    from cvrunner.training.probe import Counted  # imports torch

EFFICIENCY = 0.5
"""Assumed share of a card's peak arithmetic that training reaches; a guess, not a measurement."""
LAUNCH_S = 5e-6
"""Assumed time in which the host launches one kernel, in seconds."""
NOT_IN_A_NAME = ("nvidia", "geforce", "rtx", "sxm")


@dataclass(frozen=True)
class Card:
    """What the data sheet of a GPU says."""

    name: str
    memory_bytes: float
    bandwidth: float
    """Of its memory, in bytes per second."""
    bfloat16: float
    """Dense tensor-core operations per second, with sums in float32."""
    float32: float
    """Operations per second without tensor cores."""

    @property
    def assumptions(self) -> str:
        """What an estimate for this card assumes, in one sentence."""
        return (
            f"{self.memory_bytes / 2**30:g} GiB; {EFFICIENCY:.0%} of {self.bfloat16 / 1e12:g} (bfloat16) or "
            f"{self.float32 / 1e12:g} (float32) TFLOP/s plus all reads and writes at {self.bandwidth / 1e9:,.0f} GB/s, "
            f"or {1e6 * LAUNCH_S:g} us per launch if that is longer"
        )

    def seconds(self, counted: Counted) -> float:
        """Return the estimated time of what was counted."""
        computed_s = counted.bfloat16 / (EFFICIENCY * self.bfloat16) + counted.float32 / (EFFICIENCY * self.float32)
        return max(LAUNCH_S * counted.launches, computed_s + counted.moved_bytes / self.bandwidth)


CARDS = (
    Card("RTX 4090", 24 * 2**30, 1.008e12, 165.2e12, 82.6e12),
    Card("H100 SXM", 80 * 2**30, 3.35e12, 989.4e12, 66.9e12),
)
"""RTX 4090: NVIDIA Ada GPU Architecture, V2.01, appendix A. H100 SXM5: NVIDIA H100 Tensor Core GPU data sheet and
NVIDIA H100 Tensor Core GPU Architecture, V1.04, table 2; values without sparsity."""


def find_card(name: str) -> Card:
    """Return a card by its name, with or without `NVIDIA GeForce RTX`. Raises UsageError, which names the known ones,
    the most similar first."""
    for card in CARDS:
        if _key(card.name) == _key(name):
            return card
    near = sorted(CARDS, key=lambda card: SequenceMatcher(None, _key(card.name), _key(name)).ratio(), reverse=True)
    known = " and ".join(card.name for card in near)
    raise UsageError(f"--card {name}: estimates exist for {known} only; for a GPU that is here, leave out --card")


def _key(name: str) -> str:
    key = "".join(filter(str.isalnum, name.lower()))
    for word in NOT_IN_A_NAME:
        key = key.replace(word, "")
    return key
