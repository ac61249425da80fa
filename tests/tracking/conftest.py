"""What makes these tests cheap: blank figures, and a database with MLflow's tables, which take seconds to create."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cvrunner.tracking.mlflow_store import MlflowStore
from tests.blank_figures import blank_figures


@pytest.fixture(autouse=True, scope="package")
def _figures() -> Iterator[None]:
    with blank_figures():
        yield


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables and no runs."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowStore(f"sqlite:///{path}").experiment("another experiment")
    return path


@pytest.fixture(autouse=True)
def _database(empty_database: Path, tmp_path: Path) -> None:
    """Give every test of this folder a copy, where the tests expect the database."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
