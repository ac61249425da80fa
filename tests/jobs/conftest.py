"""For all tests of jobs."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def everywhere(without_cluster: None) -> None: ...
