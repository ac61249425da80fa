"""How long recordings are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvrunner.errors import UsageError
from cvrunner.inference.ensemble import HOP_S, WINDOW_S, chosen_windows, windows

RATE_HZ = 16_000
LENGTHS = st.integers(400, 3 * 60 * RATE_HZ)


def test_what_fits_into_a_window_stays_whole() -> None:
    assert windows(15 * RATE_HZ) == [(0, 15 * RATE_HZ)]
    assert windows(500) == [(0, 500)]


def test_the_last_window_ends_with_the_recording() -> None:
    seconds = [(start / RATE_HZ, end / RATE_HZ) for start, end in windows(37 * RATE_HZ)]
    assert seconds == [(0, 15), (10, 25), (20, 35), (22, 37)]


@given(LENGTHS)
def test_every_sample_is_in_a_window_and_all_are_of_one_length(samples: int) -> None:
    found = windows(samples)
    assert len({end - start for start, end in found}) == 1
    assert (found[0][0], found[-1][1]) == (0, samples)
    assert all(start < after <= end for (start, end), (after, _) in itertools.pairwise(found))


@given(LENGTHS, st.data())
def test_what_is_not_longer_than_the_overlap_is_whole_in_some_window(samples: int, data: st.DataObject) -> None:
    length = min(round((WINDOW_S - HOP_S) * RATE_HZ), samples)
    begin = data.draw(st.integers(0, samples - length))
    assert any(start <= begin and begin + length <= end for start, end in windows(samples))


def test_the_hop_follows_the_window_unless_it_is_given() -> None:
    assert chosen_windows(None, None) == (WINDOW_S, HOP_S)
    assert chosen_windows(6.0, None) == (6.0, 4.0)
    assert chosen_windows(6.0, 6.0) == (6.0, 6.0)


@pytest.mark.parametrize(("window_s", "hop_s"), [(0.1, None), (float("nan"), None), (4, 5), (4, 0), (4, float("nan"))])
def test_windows_that_leave_gaps_or_are_too_short_are_refused(window_s: float, hop_s: float | None) -> None:
    with pytest.raises(UsageError, match="must be"):
        chosen_windows(window_s, hop_s)
