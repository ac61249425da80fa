"""Convergence, judged from made-up validation curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from cvrunner.records.results import EpochRecord, RunRecord, TrialState
from cvrunner.records.summary import Convergence
from cvrunner.verdict.convergence import convergence, convergence_clause, has_converged

RISING = [0.05 * epoch for epoch in range(1, 9)]
SATURATED = [0.6 * (1 - 0.5**epoch) for epoch in range(1, 17)]


def test_a_curve_that_still_rises_at_its_end_has_not_converged() -> None:
    assert has_converged(RISING) is False
    assert has_converged([None, *RISING]) is False


def test_a_curve_that_rises_to_its_limit_has_converged_although_its_last_epoch_is_the_best() -> None:
    assert SATURATED.index(max(SATURATED)) == len(SATURATED) - 1
    assert has_converged(SATURATED) is True


def test_a_trial_that_stopped_early_has_converged_by_its_epochs_after_the_best_one() -> None:
    assert has_converged([*RISING, 0.39, 0.38]) is True
    assert has_converged([*RISING, 0.39]) is True


def test_the_best_epoch_counts_as_late_in_the_last_tenth_rounded_up() -> None:
    rising = list(np.linspace(0, 0.6, 20))
    assert has_converged([*rising[:-1], 0.5]) is False  # the 19th of 20
    assert has_converged([*rising[:-2], 0.5, 0.5]) is True  # the 18th of 20
    # One tenth of 5 epochs is the last epoch.
    assert has_converged([0.1, 0.2, 0.3, 0.4, 0.39]) is True


def test_a_drop_after_a_late_best_epoch_is_no_rise() -> None:
    assert has_converged([0.4] * 16 + [0.41, 0.30, 0.42, 0.31]) is True


@pytest.mark.parametrize("curve", [[], [0.3], [0.3, 0.4], [None, None, None, 0.2], [None] * 8])
def test_a_curve_with_less_than_three_values_is_not_judged(curve: list[float | None]) -> None:
    assert has_converged(curve) is None


@pytest.mark.parametrize("epochs", [8, 12, 16, 30])
def test_flat_noise_is_rarely_blamed_and_a_clear_rise_rarely_missed(epochs: int) -> None:
    random = np.random.default_rng(epochs)
    flat = [has_converged(list(0.5 + random.normal(0, 0.02, epochs))) for _ in range(1000)]
    steady = np.linspace(0, 0.01 * epochs, epochs)
    rising = [has_converged(list(steady + random.normal(0, 0.01, epochs))) for _ in range(1000)]
    assert np.mean(flat) > 0.85
    assert np.mean(rising) < 0.5


def test_a_constant_curve_has_converged() -> None:
    assert has_converged([0.0] * 8) is True


# --- conditions -------------------------------------------------------------------------------------------------------


def judge(**curves: Sequence[Sequence[float]]) -> dict[str, Convergence]:
    """Judge conditions with a curve per fold."""
    names = {f"{c}/fold-{k}/seed-0": (c, k, curve) for c, some in curves.items() for k, curve in enumerate(some, 1)}
    states = {
        name: TrialState(key=name, condition=c, fold=k, seed=0, status="DONE") for name, (c, k, _) in names.items()
    }
    epochs = {
        name: [EpochRecord.model_construct(epoch=e, validation_ccc={"avg": value}) for e, value in enumerate(curve, 1)]
        for name, (_, _, curve) in names.items()
    }
    return convergence(epochs, RunRecord.model_construct(conditions=list(curves), trials=states))


def test_a_condition_has_converged_if_two_thirds_of_its_trials_have() -> None:
    found = judge(frozen=[RISING, RISING, SATURATED], unfrozen=[RISING, SATURATED, SATURATED])
    assert (found["frozen"].converged, found["unfrozen"].converged) == (False, True)
    assert (found["frozen"].trials_converged, found["frozen"].trials) == (1, 3)
    assert found["unfrozen"].reason == "1 of 3 trials ended with a validation CCC-Avg that was still rising"


def test_trials_that_cannot_be_judged_do_not_count() -> None:
    found = judge(frozen=[[0.1], [0.1]], unfrozen=[[0.1], SATURATED])
    assert found["frozen"].converged is None
    assert (found["unfrozen"].converged, found["unfrozen"].trials) == (True, 1)


def test_a_trial_that_has_not_finished_does_not_count() -> None:
    state = TrialState(key="k", condition="frozen", fold=1, seed=0, status="RUNNING")
    run = RunRecord.model_construct(conditions=["frozen"], trials={"frozen/fold-1/seed-0": state})
    epochs = [EpochRecord.model_construct(epoch=e, validation_ccc={"avg": v}) for e, v in enumerate(RISING, 1)]
    assert convergence({"frozen/fold-1/seed-0": epochs}, run)["frozen"].converged is None


def test_the_clause_names_the_baseline_and_what_its_curves_show() -> None:
    assert convergence_clause("frozen", judge(frozen=[RISING])["frozen"]) == (
        "the baseline frozen had not converged: 1 of 1 trial ended with a validation CCC-Avg that was still rising, "
        "so more epochs might change the difference"
    )
