"""The MLflow model works on its own: without the run, the encoder's folder, or a pickle."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from rich.console import Console

from cvrunner import __version__
from cvrunner.api import Run
from cvrunner.errors import ResultsError, UsageError
from cvrunner.inference import command as predict_commands
from cvrunner.inference import export as predict_export
from cvrunner.inference.export import log_model, upload
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


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as an upload needs: it accepts the token `good`, and keeps what it gets."""

    private, created, files, public_already = True, [], {}, False  # type: ignore[var-annotated]

    def do_GET(self) -> None:
        self.answer({"id": "me/model", "private": not self.public_already, "siblings": [], "sha": "0" * 40})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        endpoint = f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]
        if self.headers.get("Authorization") != "Bearer good":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self.answer({"url": f"{endpoint}/me/model"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{endpoint}/me/model/commit/{'0' * 40}"})
        else:
            self.answer({"errors": [], "warnings": []})

    def answer(self, content: object, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A stand-in for the hub on this machine, in place of the real one for `huggingface_hub`."""
    handler = type("OneHub", (Hub,), {"created": [], "files": {}, "public_already": False})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("cvrunner.inference.export.HfApi", lambda: HfApi(endpoint, token="good"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield handler
        server.shutdown()


def test_the_folder_and_its_card_are_uploaded_privately(exported: Path, hub: type[Hub]) -> None:
    assert upload(exported, "me/model", private=True).endswith("/me/model")
    assert [repository["visibility"] for repository in hub.created] == ["private"]
    files = {str(path.relative_to(exported)): path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    assert hub.files == files
    card = hub.files["README.md"].decode()
    assert "Not for decisions about people" in card
    assert "CCC-Avg" in card
    assert ModelCard(card).data.tags[-1] == "synthetic"


def test_a_public_repository_of_that_name_gets_nothing_unless_that_is_asked_for(exported: Path, hub: type[Hub]) -> None:
    hub.public_already = True
    with pytest.raises(ResultsError, match="is public"):
        upload(exported, "me/model", private=True)
    assert hub.files == {}
    upload(exported, "me/model", private=False)
    assert "README.md" in hub.files


def test_a_hub_that_refuses_is_answered_with_how_to_log_in(
    exported: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = predict_export.HfApi()
    monkeypatch.setattr("cvrunner.inference.export.HfApi", lambda: HfApi(good.endpoint, token="wrong"))
    with pytest.raises(ResultsError, match="hf auth login") as refused:
        upload(exported, "me/model", private=True)
    assert "wrong" not in str(refused.value)
    assert str(exported) in str(refused.value)


@pytest.mark.parametrize("name", ["model", "me/my model", "a/b/c"])
def test_what_is_no_name_on_the_hub_is_refused_before_anything_is_written(run: Run, tmp_path: Path, name: str) -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(UsageError, match="--hub"):
        predict_commands.export(run.path, tmp_path / "new", "frozen", None, False, console, name)
    assert not (tmp_path / "new").exists()
