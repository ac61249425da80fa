"""Whether each condition trained for long enough, judged by the validation curves of its trials.

A trial has **not** converged if both hold for its validation CCC-Avg per epoch:

1. the best epoch is among the last tenth of the epochs that were trained (at least the last epoch), and
2. the curve was still rising: over the last third of the epochs (at least three), the least-squares line has a slope
   above its own standard error and gains more than `LEAST_GAIN`.

The first rule alone would blame a flat, noisy curve, whose best epoch is anywhere; the slope against its standard error
excludes it. The second alone would blame a trial that early stopping ended long after its best epoch. `LEAST_GAIN`
excludes a curve that creeps towards its limit. It is small, because a learning rate that falls to 0 flattens the end of
every curve: what longer training would gain is more than what the last epochs gained.

A condition has converged if at least two thirds of its trials have. In simulations, the rule blames 4 to 8 % of flat,
noisy curves of 8 to 20 epochs, and finds 73 to 99 % of curves of 16 epochs that rise by 0.01 per epoch (noise of
standard deviation 0.02 to 0.005), so a single trial must not decide.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from cvrunner.records.results import EpochRecord, RunRecord
from cvrunner.records.summary import Convergence
from cvrunner.text import plural

LEAST_GAIN = 0.005
"""Gain in CCC-Avg over the last third of the epochs that counts as rising: a quarter of the default margin of 0.02."""
ENOUGH = 2 / 3
"""Share of trials that must have converged."""
FEWEST_EPOCHS = 3
"""A shorter curve has no slope with a standard error."""


def convergence(epochs: Mapping[str, Sequence[EpochRecord]], run: RunRecord) -> dict[str, Convergence]:
    """Judge every condition of a run by the epochs of its finished trials, keyed by trial name."""
    judged: dict[str, list[bool]] = defaultdict(list)
    for name, trial in run.trials.items():
        if trial.status == "DONE":
            curve = [record.validation_ccc.get("avg") for record in epochs.get(name, ())]
            if (converged := has_converged(curve)) is not None:
                judged[trial.condition].append(converged)
    return {condition: _of_condition(judged[condition]) for condition in run.conditions}


def has_converged(curve: Sequence[float | None]) -> bool | None:
    """Judge one trial by its validation CCC-Avg per epoch; None if fewer than three epochs have a defined CCC."""
    known = [(epoch, value) for epoch, value in enumerate(curve, 1) if value is not None]
    if len(known) < FEWEST_EPOCHS:
        return None
    # The first of equal values: the one that training keeps.
    best = max(known, key=lambda point: point[1])[0]
    if best <= len(curve) - max(1, math.ceil(len(curve) / 10)):
        return True
    x, y = np.array(known[-max(FEWEST_EPOCHS, math.ceil(len(curve) / 3)) :], dtype=np.float64).T
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    residual = y - y.mean() - slope * (x - x.mean())
    standard_error = math.sqrt(float((residual**2).sum()) / (len(x) - 2) / spread)
    return slope <= standard_error or slope * float(x[-1] - x[0]) <= LEAST_GAIN


def _of_condition(trials: Sequence[bool]) -> Convergence:
    count, converged = len(trials), sum(trials)
    if not count:
        reason = f"no finished trial has {FEWEST_EPOCHS} epochs with a validation CCC-Avg"
        return Convergence(converged=None, trials_converged=0, trials=0, reason=reason)
    enough = converged >= ENOUGH * count
    reason = f"{count - converged} of {plural(count, 'trial')} ended with a validation CCC-Avg that was still rising"
    return Convergence(converged=enough, trials_converged=converged, trials=count, reason=reason)


def convergence_clause(baseline: str, found: Convergence) -> str:
    """Return what a verdict must say about a baseline that did not converge, without a full stop."""
    return f"the baseline {baseline} had not converged: {found.reason}, so more epochs might change the difference"
