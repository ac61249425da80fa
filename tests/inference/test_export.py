"""The MLflow model works on its own: without the run, the encoder's folder, or a pickle."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from cvrunner import __version__
from cvrunner.api import Run
from cvrunner.errors import ResultsError, UsageError
from cvrunner.inference import command as predict_commands
from cvrunner.inference.export import log_model
from cvrunner.tracking.mirror import sync_run
from tests.end_to_end.programs import environment

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    assert predict_commands.export(run.path, folder, "unfrozen", None, False, Console(file=io.StringIO())) == 0
    return folder


def test_it_holds_models_encoder_code_and_signature_and_no_pickle(exported: Path) -> None:
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    models = [f"artifacts/ensemble/models/fold-{fold:02}-seed-0000/model.safetensors" for fold in (1, 2, 3, 4, 5)]
    assert {*models, "artifacts/ensemble/encoder/model.safetensors", "pyfunc_model.py", "MLmodel"} <= files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pth", ".bin"))]
    assert not any(path.is_symlink() for path in exported.rglob("*"))
    assert f"cvrunner=={__version__}" in (exported / "requirements.txt").read_text().splitlines()
    signature = yaml.safe_load((exported / "MLmodel").read_text())["signature"]
    assert [column["name"] for column in json.loads(signature["inputs"])] == ["path"]
    columns = ["valence", "valence_sd", "arousal", "arousal_sd"]
    assert [column["name"] for column in json.loads(signature["outputs"])] == columns


@pytest.mark.end_to_end
@pytest.mark.suites("ci", "all")
def test_mlflow_serves_it_where_neither_run_nor_encoder_are(
    run: Run, home: Path, audio: dict[str, Path], exported: Path, tmp_path: Path
) -> None:
    paths = [str(path) for path in audio.values()][:2]
    expected = run.predict(paths, "unfrozen")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(exported, elsewhere)
    (tmp_path / "in.json").write_text(
        json.dumps({"dataframe_split": {"columns": ["path"], "data": [[path] for path in paths]}})
    )
    hidden = home / "wavlm"
    hidden.rename(home / "hidden")
    try:
        command = ["-m", "mlflow", "models", "predict", "-m", str(elsewhere), "-i", str(tmp_path / "in.json")]
        done = subprocess.run(
            [sys.executable, *command, "-o", str(tmp_path / "out.json"), "--env-manager", "local"],
            env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
    finally:
        (home / "hidden").rename(hidden)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["predictions"]
    columns = ["valence", "valence_sd", "arousal", "arousal_sd"]
    assert [[row[name] for name in columns] for row in rows] == expected[columns].to_numpy().tolist()


def test_it_can_be_put_into_mlflow_beside_its_condition_once_the_run_is_there(
    run: Run, exported: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    part = Run(type(run.directory)(shutil.copytree(run.path, tmp_path / run.path.name)))
    with pytest.raises(ResultsError, match=r"not in MLflow .* yet; `cvrunner sync"):
        log_model(part.directory, "unfrozen", exported)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    sync_run(part.directory, uri)
    address = log_model(part.directory, "unfrozen", exported)
    client = MlflowClient(uri)
    model = client.get_logged_model(address.removeprefix("models:/"))
    assert model.status == "READY"
    assert client.get_run(model.source_run_id).data.tags["cvrunner.condition"] == "unfrozen"
    assert (Path(model.artifact_location.removeprefix("file://")) / "MLmodel").is_file()


def test_a_folder_that_is_there_is_left_alone(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        predict_commands.export(run.path, tmp_path, None, None, False, Console(file=io.StringIO()))
