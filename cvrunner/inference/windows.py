"""How a long recording is cut. Pure.

15 s: nearly all turns that the models were trained on are shorter (99 % of IEMOCAP's), and an encoder's memory grows
with the square of the length. Every 10 s: whatever lasts 5 s or less, as the mean turn does, is whole in some window.
"""

from __future__ import annotations

from cvrunner.data.utterance import SAMPLE_RATE_HZ
from cvrunner.errors import UsageError

WINDOW_S, HOP_S = 15.0, 10.0
SHORTEST_WINDOW_S, SHORTEST_HOP_S = 0.5, 0.1


def windows(samples: int, window_s: float = WINDOW_S, hop_s: float = HOP_S) -> list[tuple[int, int]]:
    """First sample and end of each window of a recording of so many samples at 16 kHz.

    One that fits into a window stays whole. The last window is moved back to end where the recording does, so all are
    of one length. Raises UsageError for lengths that leave gaps or are too short.
    """
    _check_windows(window_s, hop_s)
    window, hop = round(window_s * SAMPLE_RATE_HZ), round(hop_s * SAMPLE_RATE_HZ)
    if samples <= window:
        return [(0, samples)]
    starts = [*range(0, samples - window, hop), samples - window]
    return [(start, start + window) for start in starts]


def chosen_windows(window_s: float | None, hop_s: float | None) -> tuple[float, float]:
    """Window and hop, where one or both may be left open. Raises UsageError for windows that cannot be."""
    window_s = WINDOW_S if window_s is None else window_s
    hop_s = window_s * HOP_S / WINDOW_S if hop_s is None else hop_s
    _check_windows(window_s, hop_s)
    return window_s, hop_s


def _check_windows(window_s: float, hop_s: float) -> None:
    if not window_s >= SHORTEST_WINDOW_S:
        raise UsageError(f"--window-s {window_s:g}: must be {SHORTEST_WINDOW_S:g} or more")
    if not SHORTEST_HOP_S <= hop_s <= window_s:
        raise UsageError(
            f"--hop-s {hop_s:g}: must be from {SHORTEST_HOP_S:g} s to the window's {window_s:g} s, else parts are not "
            "heard"
        )
