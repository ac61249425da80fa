"""The database in a results folder: half made, damaged, moved, or in a folder with an odd name."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from cvrunner.records.run_directory import RunDirectory
from cvrunner.tracking.mlflow_store import MlflowStore
from cvrunner.tracking.tracker import tracking_uri
from tests.runs import made_up_config, make_run

ODD = ["a b", "q?x=1", "h#sh", "p%41", "quo'te\"", "ü;&:"]


def uri_in(folder: Path) -> str:
    return tracking_uri(made_up_config(("frozen", "unfrozen"), (0,), 1), folder)


def statements(file: Path, *lines: str) -> None:
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        for line in lines:
            database.execute(line)


def test_a_database_that_was_left_half_made_is_emptied_and_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cvrunner.tracking.mlflow_store.QUIET_S", 0.0)
    (tmp_path / "results").mkdir()
    file = tmp_path / "results" / "mlflow.db"
    shutil.copy(tmp_path / "mlflow.db", file)
    # As a kill leaves it: the tables are there, the version of an early step of the migration too.
    statements(file, "UPDATE alembic_version SET version_num = '451aebb31d03'", "DROP TABLE scorers")
    assert MlflowStore(uri_in(file.parent)).experiment("mine") == "1"
    assert "was half made" in caplog.text


def test_a_database_with_runs_that_mlflow_cannot_open_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cvrunner.tracking.mlflow_store.QUIET_S", 0.0)
    file = tmp_path / "mlflow.db"
    statements(
        file,
        "UPDATE alembic_version SET version_num = '451aebb31d03'",
        "INSERT INTO runs (run_uuid, experiment_id) VALUES ('a', 0)",
    )
    before = file.read_bytes()
    with pytest.raises(Exception, match="out-of-date database schema"):
        MlflowStore(uri_in(tmp_path))
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "no database"])
def test_a_damaged_database_is_set_aside_and_filled_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    # A folder of its own: the connections of other tests go on with their file.
    (tmp_path / "results").mkdir()
    file = tmp_path / "results" / "mlflow.db"
    content = (tmp_path / "mlflow.db").read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"not a database, but long enough" * 100)
    before = file.read_bytes()
    assert MlflowStore(uri_in(file.parent)).experiment("mine") == "1"
    assert file.with_name("mlflow.db.damaged").read_bytes() == before
    assert "was damaged" in caplog.text


@pytest.mark.parametrize("name", ODD)
def test_characters_that_addresses_reserve_may_be_in_the_name_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in" / name
    folder.mkdir(parents=True)
    shutil.copy(tmp_path / "mlflow.db", folder)
    store = MlflowStore(uri_in(folder))
    run = store.find_or_create(store.experiment("mine"), "a run", {"a": "b"}, {})
    (folder / "file.txt").write_text("content")
    store.log_files(run.id, folder / "file.txt")
    assert [path.read_text() for path in folder.glob("mlartifacts/mine/*/artifacts/*")] == ["content"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == [name]


def test_artifacts_follow_a_results_folder_that_was_moved(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from cvrunner.records.run_directory import RunDirectory; "
        "from cvrunner.tracking.mirror import sync_run; from tests.tracking.test_database import uri_in; "
        "run = RunDirectory(Path(sys.argv[1])); sync_run(run, uri_in(run.path.parent))"
    )

    def sync(run: RunDirectory) -> None:
        # A process each, because MLflow remembers where the files of a run are.
        subprocess.run([sys.executable, "-c", script, str(run.path)], check=True, timeout=120)

    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    shutil.copy(tmp_path / "mlflow.db", before)
    sync(make_run(before, "first", folds=1, epochs=1))
    before.rename(after)
    sync(RunDirectory(after / "first"))
    sync(make_run(after, "second", folds=1, epochs=1))
    assert not before.exists()
    with contextlib.closing(sqlite3.connect(after / "mlflow.db")) as database:
        addresses = [uri for (uri,) in database.execute("SELECT artifact_uri FROM runs")]
    assert len(addresses) == 10
    assert {uri.partition("/mlartifacts/")[0] for uri in addresses} == {after.as_uri()}
    written = [
        path
        for uri in addresses
        for path in Path(uri.removeprefix("file://").replace("%20", " ")).glob("predictions.csv")
    ]
    assert len(written) == 2


def test_a_database_in_a_folder_that_is_gone_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        MlflowStore(uri_in(tmp_path / "gone"))
    assert not (tmp_path / "gone").exists()
