"""The Ray cluster with a token that the tests of submitted jobs share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.programs import TOKEN, ray_cluster


@pytest.fixture(scope="session")
def token_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A head with two logical GPUs that requires a token: a folder for everything, and the environment to use it."""
    folder = tmp_path_factory.mktemp("token-cluster")
    with ray_cluster(folder, 2, TOKEN) as env:
        yield folder, env
