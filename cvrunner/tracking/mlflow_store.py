"""Read and write MLflow. Only this module and the exported model's `pyfunc_model.py` import mlflow.

Importing it takes seconds, so import it where it is used.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock

import cvrunner
from cvrunner.orchestration.ray_cluster import bypass_proxy


def quieten() -> None:
    """Set short waits, no telemetry and no chatter; what the user has set stays."""
    bypass_proxy(os.environ)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Otherwise the client prints two lines with the address of each run that ends.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # The reader of a run's output cannot act on what mlflow's own libraries will drop some day.
    warnings.filterwarnings("ignore", module=r"(mlflow|sqlalchemy|alembic)(\.|$)")
    for name in ("mlflow", "mlflow.store", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


# mlflow reads its settings, and warns, while it is imported.
quieten()

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Dataset, DatasetInput, LoggedModelOutput, Metric, Param, Run, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.models import ModelSignature  # noqa: E402
from mlflow.pyfunc import save_model  # noqa: E402
from mlflow.types.schema import ColSpec, Schema, TensorSpec  # noqa: E402
from sqlalchemy import make_url  # noqa: E402

METRICS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100
"""Limits of one request to MLflow."""
ARTIFACTS = "mlartifacts"
"""Folder next to a database for the files of its runs."""
ADDRESSES = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))
"""Where MLflow keeps the absolute addresses of such folders: table and column."""
BUSY_S = 20.0
"""Longest time to wait for another process that writes the database."""
QUIET_S = 5.0
"""Nobody is creating the tables of a database that did not change for this time."""


@dataclass(frozen=True)
class StoredRun:
    """A run as the server had it when it was looked up."""

    id: str
    status: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]


class MlflowStore:
    """One tracking server or database. Every method may raise what mlflow raises."""

    def __init__(self, uri: str) -> None:
        quieten()
        self.uri = uri
        self.database = database_file(uri)
        self.client = MlflowClient(tracking_uri=uri) if self.database is None else open_database(uri, self.database)
        self._last_steps: dict[tuple[str, str], int] = {}
        """Last step that the server has, by run and metric."""

    def experiment(self, name: str) -> str:
        """Return the id of an experiment; it is created if it is missing, and restored if it was deleted."""
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        artifacts = None
        if self.database is not None:
            # MLflow's default for a database is the working directory. A server has its own place.
            artifacts = (self.database.parent / ARTIFACTS / name).as_uri()
        try:
            return str(self.client.create_experiment(name, artifact_location=artifacts))
        except MlflowException:
            # Another process may have created it since.
            if (found := self.client.get_experiment_by_name(name)) is None:
                raise
            return str(found.experiment_id)

    def find(self, experiment_id: str, tags: Mapping[str, str]) -> StoredRun | None:
        """Return the newest run with these tags, or None."""
        found = next(self._search(experiment_id, tags), None)
        if found is None:
            return None
        return StoredRun(found.info.run_id, found.info.status, dict(found.data.params), dict(found.data.metrics))

    def find_or_create(
        self, experiment_id: str, name: str, tags: Mapping[str, str], more: Mapping[str, str]
    ) -> StoredRun:
        """Return the run with these tags, or a new one with them and `more`, which is RUNNING."""
        if found := self.find(experiment_id, tags):
            return found
        all_tags = {**tags, "mlflow.source.name": "cvrunner", **more}
        run = self.client.create_run(experiment_id, tags=all_tags, run_name=name)
        return StoredRun(run.info.run_id, "RUNNING", {}, {})

    def set_status(self, run_id: str, status: str) -> None:
        """Mark a run as RUNNING, or as FINISHED, FAILED or KILLED at the present time."""
        if status == "RUNNING":
            self.client.update_run(run_id, status=status)
        else:
            self.client.set_terminated(run_id, status=status)

    def close_running(self, experiment_id: str, tags: Mapping[str, str]) -> None:
        """Mark all runs with these tags that are RUNNING as KILLED."""
        # The list first: a closed run would leave the result while its pages are read.
        for run in list(self._search(experiment_id, tags, "attributes.status = 'RUNNING'")):
            self.set_status(run.info.run_id, "KILLED")

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int) -> None:
        """Write all metrics of one step in one request."""
        now_ms = int(time.time() * 1000)
        batch = [Metric(name, float(value), now_ms, step) for name, value in metrics.items()]
        for start in range(0, len(batch), METRICS_PER_BATCH):
            self.client.log_batch(run_id, metrics=batch[start : start + METRICS_PER_BATCH])

    def log_params(self, run: StoredRun, params: Mapping[str, str]) -> None:
        """Write the parameters that the run does not have yet, because the server refuses to change one."""
        batch = [Param(name, value) for name, value in params.items() if name not in run.params]
        for start in range(0, len(batch), PARAMS_PER_BATCH):
            self.client.log_batch(run.id, params=batch[start : start + PARAMS_PER_BATCH])

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Add or replace tags."""
        self.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def log_step(self, run_id: str, marker: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step of a curve unless the server has it; `marker` is a metric that every step of the curve has."""
        curve = run_id, marker
        if curve not in self._last_steps:
            history = self.client.get_metric_history(run_id, marker)
            self._last_steps[curve] = max((point.step for point in history), default=0)
        if step > self._last_steps[curve]:
            self.log_metrics(run_id, metrics, step)
            # After the write: a step that failed is not known to be there.
            self._last_steps[curve] = step

    def log_dataset(self, run_id: str, name: str, digest: str, source: str) -> None:
        """Record which data a run used; the server keeps a dataset of the same name and digest once."""
        dataset = Dataset(name=name[:500], digest=digest[:36], source_type="cvrunner", source=source)
        self.client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags=[])])

    def log_files(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Copy a file, or the content of a folder, to the run's artifacts; a missing one is skipped."""
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), folder)
        elif path.is_file():
            self.client.log_artifact(run_id, str(path), folder)

    def log_model(self, run_id: str, experiment_id: str, name: str, folder: Path) -> str:
        """Add a saved model to a run; return the model's address."""
        model = self.client.create_logged_model(experiment_id, name, source_run_id=run_id)
        self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        return str(model.model_uri)

    def _search(self, experiment_id: str, tags: Mapping[str, str], extra: str = "") -> Iterator[Run]:
        clauses = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
        if extra:
            clauses.append(extra)
        token = None
        while True:
            page = self.client.search_runs([experiment_id], " and ".join(clauses), max_results=500, page_token=token)
            yield from page
            token = page.token
            if not token:
                return


def database_file(uri: str) -> Path | None:
    """Return the file of a SQLite database; None for a server or another database."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(make_url(uri).database or "").absolute()


def open_database(uri: str, file: Path) -> MlflowClient:
    """Open or create a database, one process at a time: MLflow cannot create its tables twice at once.

    A damaged database is set aside, and one that a full disk or a kill left half made is emptied; both are logged, and
    written again from the files of the runs. Artifacts follow a folder that was moved.
    """
    # Also before the lock, which would create the folder, perhaps where one was before it was moved.
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent} does not exist")
    # With the driver's name, for without it MLflow would make folders of the address as it is quoted.
    uri = uri.replace("sqlite:", "sqlite+pysqlite:", 1)
    with FileLock(file.with_name(f".{file.name}.lock")):
        if file.exists() and is_damaged(file):
            aside = file.with_name(f"{file.name}.damaged")
            shutil.copyfile(file, aside)
            empty(file, f"damaged; its content is kept in {aside}")
        try:
            client = MlflowClient(tracking_uri=uri)
        except Exception:
            # A program that does not know the lock, such as `mlflow ui`, may be creating the tables.
            time.sleep(max(0.0, QUIET_S - abs(time.time() - file.stat().st_mtime)))
            try:
                client = MlflowClient(tracking_uri=uri)
            except Exception:
                if holds_runs(file):
                    raise
                empty(file, "half made")
                client = MlflowClient(tracking_uri=uri)
        move_artifacts(file)
    return client


def is_damaged(file: Path) -> bool:
    """Return whether a file is no intact SQLite database."""
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=BUSY_S)) as database:
            return bool(database.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok")
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return True
        raise


def holds_runs(file: Path) -> bool:
    """Return whether a database has MLflow's table of runs, and runs in it."""
    with contextlib.closing(sqlite3.connect(file, timeout=BUSY_S)) as database:
        found = database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'runs'").fetchone()
        return bool(found[0]) and bool(database.execute("SELECT count(*) FROM runs").fetchone()[0])


def empty(file: Path, reason: str) -> None:
    """Empty a database in place: open connections would continue with a file that is removed."""
    with file.open("wb"):
        file.with_name(f"{file.name}-journal").unlink(missing_ok=True)
    logging.getLogger(__name__).warning(
        "MLflow database %s was %s; it is written again from this run's files, and by `cvrunner sync RUN` from others",
        file,
        reason,
    )


def move_artifacts(file: Path) -> None:
    """Let the artifacts of experiments in `<database's folder>/mlartifacts` follow the folder if it was moved.

    MLflow keeps absolute addresses: without this it would write to the old place.
    """
    here = (file.parent / ARTIFACTS).as_uri()
    with contextlib.closing(sqlite3.connect(file, timeout=BUSY_S)) as database, database:
        locations = [row[0] for row in database.execute("SELECT artifact_location FROM experiments")]
        for location in locations:
            before, found, _ = (location or "").partition(f"/{ARTIFACTS}/")
            before += f"/{ARTIFACTS}"
            if not found or not before.startswith("file:") or before == here or is_same(before, here):
                continue
            for table, column in ADDRESSES:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608 (names of our own)
                    f"WHERE substr({column}, 1, ?) = ?",
                    (here, len(before) + 1, len(before) + 1, f"{before}/"),
                )


def is_same(first: str, second: str) -> bool:
    """Return whether two `file:` addresses lead to the same folder, such as by a link."""
    paths = [Path(unquote(urlsplit(address).path)) for address in (first, second)]
    return all(path.exists() for path in paths) and paths[0].samefile(paths[1])


def save_pyfunc(folder: Path, code: Path, artifacts: Path, dimensions: Sequence[str], about: Mapping[str, str]) -> None:
    """Write an MLflow model into the empty `folder`: the code as text, no pickle, and a copy of the folder `artifacts`.

    The code finds the copy by the folder's name. Signature: a column `path` in; `<dimension>` and `<dimension>_sd` out.
    """
    quieten()
    out: list[ColSpec | TensorSpec] = [
        ColSpec("double", name) for dimension in dimensions for name in (dimension, f"{dimension}_sd")
    ]
    save_model(
        path=str(folder),
        python_model=str(code),
        artifacts={artifacts.name: str(artifacts)},
        signature=ModelSignature(inputs=Schema([ColSpec("string", "path")]), outputs=Schema(out)),
        pip_requirements=[f"cvrunner=={cvrunner.__version__}"],
        metadata=dict(about),
    )
