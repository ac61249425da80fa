"""The tests of this folder write many reports and look at none of their figures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.blank_figures import blank_figures


@pytest.fixture(autouse=True, scope="package")
def _figures() -> Iterator[None]:
    with blank_figures():
        yield
