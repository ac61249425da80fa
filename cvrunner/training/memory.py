"""GPU memory of a micro-batch as a formula of its durations, fitted when a trial starts.

The formula is part of the checkpoint, so that a resumed trial cuts its updates as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import nnls

from cvrunner.data.batches import MemoryFormula
from cvrunner.data.utterance import Utterance

MARGIN = 0.1
"""Share of the free memory that micro-batches leave alone: fragments, and the padding within a group."""


def fit_memory(
    measure: Callable[[Sequence[Utterance]], float], utterances: Sequence[Utterance], room: float
) -> MemoryFormula | None:
    """Return the memory of a micro-batch, fitted to four measured ones; None if fewer than three fit.

    `measure`: bytes that a micro-batch takes; it may raise torch.OutOfMemoryError. `room`: bytes that are free.
    """
    by_length = sorted(utterances, key=lambda u: (u.samples, u.id))
    middle = len(by_length) // 2
    found = []
    # Two utterances at once separate the linear from the quadratic term.
    for batch in (by_length[:1], by_length[middle : middle + 1], by_length[middle : middle + 2], by_length[-1:]):
        try:
            durations = np.array([u.duration_s for u in batch])
            found.append((1.0, durations.sum(), np.square(durations).sum(), measure(batch)))
        except torch.OutOfMemoryError:
            continue
    if len(found) < 3:
        return None
    rows = np.array(found)
    terms, measured = rows[:, :3], rows[:, 3]
    # No term is negative: longer utterances never need less.
    coefficients, _ = nnls(terms, measured)
    constant, linear, quadratic = map(float, coefficients)
    # Nothing that was measured may need more than the formula says.
    missing = float(np.max(measured - terms @ coefficients))
    return MemoryFormula(constant + max(0.0, missing), linear, quadratic, room * (1 - MARGIN))
