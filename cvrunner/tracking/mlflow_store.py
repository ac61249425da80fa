"""Reading and writing MLflow: with the model file `pyfunc_model.py` all that imports mlflow, and only when used."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cvrunner

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# A batch may hold 1000 metrics and 100 parameters.
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100


@dataclass(frozen=True)
class StoredRun:
    """A run as the server has it."""

    id: str
    status: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]


class Store:
    """One tracking server. Every method may raise what mlflow raises."""

    def __init__(self, uri: str) -> None:
        _set_up()
        from mlflow import MlflowClient

        self.uri = uri
        self._client: MlflowClient = MlflowClient(tracking_uri=uri)

    def experiment(self, name: str) -> str:
        """The id of an experiment, made where there is none."""
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=self._artifacts(name)))

    def find(self, experiment_id: str, tags: Mapping[str, str]) -> StoredRun | None:
        """The newest run with these tags."""
        found = next(self._search(experiment_id, tags), None)
        if found is None:
            return None
        return StoredRun(found.info.run_id, found.info.status, dict(found.data.params), dict(found.data.metrics))

    def find_or_create(
        self, experiment_id: str, name: str, tags: Mapping[str, str], more: Mapping[str, str]
    ) -> StoredRun:
        """The run with these tags, or a new one with them and `more`; RUNNING."""
        found = self.find(experiment_id, tags)
        if found is None:
            run = self._client.create_run(experiment_id, tags={**tags, **more}, run_name=name)
            return StoredRun(run.info.run_id, "RUNNING", {}, {})
        return found

    def reopen(self, run_id: str) -> None:
        """RUNNING again."""
        self._client.update_run(run_id, status="RUNNING")

    def close(self, run_id: str, status: str) -> None:
        """FINISHED, FAILED or KILLED, now."""
        self._client.set_terminated(run_id, status=status)

    def close_running(self, experiment_id: str, tags: Mapping[str, str]) -> int:
        """KILLED for all runs with these tags that a dead process left RUNNING; how many there were."""
        orphans = list(self._search(experiment_id, tags, "attributes.status = 'RUNNING'"))
        for run in orphans:
            self.close(run.info.run_id, "KILLED")
        return len(orphans)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int) -> None:
        """All metrics of one step in one request."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        batch = [Metric(name, float(value), now_ms, step) for name, value in metrics.items()]
        for start in range(0, len(batch), METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics=batch[start : start + METRICS_PER_BATCH])

    def log_params(self, run: StoredRun, params: Mapping[str, str]) -> None:
        """The parameters that the run does not have yet: the server refuses to change one."""
        from mlflow.entities import Param

        batch = [Param(name, value) for name, value in params.items() if name not in run.params]
        for start in range(0, len(batch), PARAMS_PER_BATCH):
            self._client.log_batch(run.id, params=batch[start : start + PARAMS_PER_BATCH])

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Add or replace tags."""
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def set_experiment_tag(self, experiment_id: str, name: str, value: str) -> None:
        """Add or replace a tag of the experiment."""
        self._client.set_experiment_tag(experiment_id, name, value)

    def last_step(self, run_id: str, metric: str) -> int:
        """The last step of a metric; 0 where it has none."""
        return max((point.step for point in self._client.get_metric_history(run_id, metric)), default=0)

    def log_dataset(self, run_id: str, name: str, digest: str, source: str) -> None:
        """Which data a run used; the server knows it by name and digest and keeps it once."""
        from mlflow.entities import Dataset, DatasetInput

        dataset = Dataset(name=name[:500], digest=digest[:36], source_type="cvrunner", source=source)
        self._client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags=[])])

    def log_files(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Copy a file or a folder's content to the run's artifacts."""
        if path.is_dir():
            self._client.log_artifacts(run_id, str(path), folder)
        elif path.is_file():
            self._client.log_artifact(run_id, str(path), folder)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Write a text as an artifact."""
        self._client.log_text(run_id, text, name)

    def log_model(self, run_id: str, experiment_id: str, name: str, folder: Path) -> str:
        """A saved model as one of the run's; returns its address."""
        from mlflow.entities import LoggedModelOutput

        model = self._client.create_logged_model(experiment_id, name, source_run_id=run_id)
        self._client.log_model_artifacts(model.model_id, str(folder))
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        return str(model.model_uri)

    def _search(self, experiment_id: str, tags: Mapping[str, str], extra: str = "") -> Iterator[Run]:
        clauses = [f"tags.`{name}` = '{value}'" for name, value in tags.items()] + ([extra] if extra else [])
        token = None
        while True:
            page = self._client.search_runs([experiment_id], " and ".join(clauses), max_results=500, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _artifacts(self, experiment: str) -> str | None:
        """Beside a database file, whose own default would be the working directory; a server knows for itself."""
        if not self.uri.startswith("sqlite:///"):
            return None
        return (Path(self.uri.removeprefix("sqlite:///")).parent / "mlartifacts" / experiment).as_uri()


def save_pyfunc(folder: Path, code: Path, artifacts: Path, dimensions: Sequence[str], about: Mapping[str, str]) -> None:
    """An MLflow model in `folder`, which is empty: the code as text, no pickle, and a copy of the folder `artifacts`,
    which the code finds under its name.

    Its signature: a column `path` in, `<dimension>` and `<dimension>_sd` out.
    """
    _set_up()
    from mlflow.models import ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types.schema import ColSpec, Schema, TensorSpec

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


def _set_up() -> None:
    """Short waits, no chatter, nothing sent elsewhere; what the user has set stays."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # What mlflow's own libraries will drop some day is nothing that a reader of a run's output can act on.
    warnings.filterwarnings("ignore", module=r"(mlflow|sqlalchemy|alembic)(\.|$)")
    for name in ("mlflow", "mlflow.store", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
