"""Blank figures for tests that write reports and do not look at them: drawing takes most of a report's time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from matplotlib.figure import Figure


@contextlib.contextmanager
def blank_figures() -> Iterator[None]:
    """Within this context every figure is saved blank."""

    def save(_: Figure, file: Any, *, format: str, **__: Any) -> None:
        file.write('<svg xmlns="http://www.w3.org/2000/svg"></svg>' if format == "svg" else b"\x89PNG")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        patch.setattr(Figure, "draw_without_rendering", lambda _: None)
        yield
