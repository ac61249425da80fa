"""Trials on GPUs in time: nothing twice, nothing at once on one GPU, and never far from the best there is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvrunner.run.estimate import TOLERANCE, Job, Schedule, assign, max_extra

DURATIONS = st.lists(st.floats(0.1, 100), min_size=1, max_size=30)


def jobs(*durations_s: float, condition: str = "unfrozen") -> list[Job]:
    return [Job(f"{condition}-{i}", condition, duration, duration) for i, duration in enumerate(durations_s)]


def trials(seeds: int = 1) -> list[Job]:
    """Five unfrozen trials of 12 hours and five frozen ones of 5 for each seed, in the order of a run."""
    return [*jobs(*[12.0] * 5 * seeds), *jobs(*[5.0] * 5 * seeds, condition="frozen")]


def shortest(durations: Sequence[float], gpus: int) -> float:
    """The makespan of the best of all assignments."""
    return min(
        max(sum(d for d, on in zip(durations, assigned, strict=True) if on == gpu) for gpu in range(gpus))
        for assigned in product(range(gpus), repeat=len(durations))
    )


@given(DURATIONS, st.integers(1, 9))
def test_every_job_runs_once_and_no_gpu_does_two_things_at_once(durations: list[float], gpus: int) -> None:
    schedule = assign(jobs(*durations), gpus)
    longest_first = sorted(jobs(*durations), key=lambda job: job.cost, reverse=True)
    assert [one.job for one in schedule.assignments] == longest_first
    for gpu in range(gpus):
        row = schedule.of_gpu(gpu)
        assert all(before.end_s <= after.start_s for before, after in pairwise(row))
    assert {one.gpu for one in schedule.assignments} <= set(range(gpus))


@given(DURATIONS, st.integers(1, 9))
def test_the_makespan_lies_between_its_bound_and_that_of_list_scheduling(durations: list[float], gpus: int) -> None:
    """Graham 1966: in any order at most the work evenly spread and what the longest adds to it."""
    schedule = assign(jobs(*durations), gpus)
    most = sum(durations) / gpus + (1 - 1 / gpus) * max(durations)
    assert schedule.lower_bound_s - 1e-9 <= schedule.makespan_s <= most + 1e-9
    idle_s = gpus * schedule.makespan_s - sum(durations)
    assert schedule.idle_share == pytest.approx(idle_s / (gpus * schedule.makespan_s), abs=1e-9)
    assert -1e-9 <= schedule.idle_share < 1


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=7), st.integers(1, 3))
def test_longest_first_is_at_most_a_third_above_the_best_there_is(durations: list[float], gpus: int) -> None:
    """Graham 1969: 4/3 - 1/(3 n)."""
    best = shortest(durations, gpus)
    made = assign(jobs(*durations), gpus)
    assert made.lower_bound_s - 1e-9 <= best <= made.makespan_s + 1e-9
    assert made.makespan_s <= (4 / 3 - 1 / (3 * gpus)) * best + 1e-9


def test_a_job_goes_where_it_can_begin_first() -> None:
    schedule = assign(jobs(5, 3, 2, 2), 2)
    assert [(s.gpu, s.start_s, s.end_s) for s in schedule.assignments] == [(0, 0, 5), (1, 0, 3), (1, 3, 5), (0, 5, 7)]
    assert (schedule.makespan_s, schedule.idle_share, schedule.lower_bound_s) == (7, 2 / 14, 6)


def test_no_jobs_take_no_time() -> None:
    schedule = Schedule(8, ())
    assert (schedule.makespan_s, schedule.lower_bound_s, schedule.idle_share) == (0, 0, 0)


def test_ten_trials_on_a_node_of_8_leave_room_for_one_more_frozen_trial_and_for_no_seed() -> None:
    schedule = assign(trials(), 8)
    assert schedule.makespan_s == 12
    assert [len(schedule.of_gpu(gpu)) for gpu in range(8)] == [1] * 5 + [2, 2, 1]
    assert schedule.idle_share == (8 * 12 - 85) / (8 * 12)
    assert max_extra(trials(), trials(), 8) == 0
    assert max_extra(jobs(5, condition="frozen"), trials(), 8) == 1
    assert max_extra(jobs(2), trials(), 8) == 5


def test_on_four_such_nodes_three_more_seeds_fit_in() -> None:
    """Twenty unfrozen trials on a GPU each; the other twelve do twenty frozen ones, two each."""
    assert assign(trials(), 32).makespan_s == 12
    assert max_extra(trials(), trials(), 32) == 3
    assert assign(trials(seeds=4), 32).makespan_s == 12
    assert assign(trials(seeds=5), 32).makespan_s > 12 * (1 + TOLERANCE)
    unfrozen = [job for job in trials() if job.condition == "unfrozen"]
    assert max_extra(unfrozen, trials(), 32) == 4


@given(st.lists(st.floats(1, 100), min_size=1, max_size=6), DURATIONS, st.integers(1, 6))
def test_what_fits_in_leaves_the_run_as_long_as_it_is(block: list[float], durations: list[float], gpus: int) -> None:
    more, there = jobs(*block), jobs(*durations)
    count = max_extra(more, there, gpus)
    limit_s = (1 + TOLERANCE) * assign(there, gpus).makespan_s
    if count:
        assert assign([*there, *more * count], gpus).makespan_s <= limit_s
    assert assign([*there, *more * (count + 1)], gpus).makespan_s > limit_s


def test_a_block_without_length_is_refused() -> None:
    with pytest.raises(ValueError, match="some time"):
        max_extra([], jobs(1), 2)
