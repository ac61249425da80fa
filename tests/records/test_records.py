"""What is on disk is whole or not there, and reads back as it was written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import tenacity

from cvrunner import paths
from cvrunner.errors import ConfigError, ResultsError
from cvrunner.files import remove_leftovers, write_atomically, write_file_atomically, write_folder_atomically
from cvrunner.records.results import FeatureProgress
from cvrunner.records.run_directory import RunDirectory, append_event, read_events
from cvrunner.records.summary import Summary
from tests.runs import make_run


def test_a_journal_reads_back_in_order_and_by_event(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    append_event(path, "epoch", epoch=1)
    append_event(path, "stopped")
    append_event(path, "epoch", epoch=2)
    assert [line["epoch"] for line in read_events(path, "epoch")] == [1, 2]
    assert [line["event"] for line in read_events(path)] == ["epoch", "stopped", "epoch"]


@pytest.mark.parametrize("torn", [b'{"event": "epo', b"\xff\xfe garbage\n", b"[1, 2]\n", b"null\n"])
def test_a_torn_line_is_passed_over_and_does_not_swallow_the_next(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    append_event(path, "epoch", epoch=1)
    with path.open("ab") as file:
        file.write(torn)
    append_event(path, "epoch", epoch=2)
    assert [line["epoch"] for line in read_events(path, "epoch")] == [1, 2]


def test_no_journal_has_no_lines(tmp_path: Path) -> None:
    assert list(read_events(tmp_path / "none.jsonl")) == []


def test_a_journal_refuses_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        append_event(tmp_path / "journal.jsonl", "epoch", loss=float("nan"))


def test_a_write_that_fails_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("1")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_folder_atomically(tmp_path / "folder", fill)
    assert os.listdir(tmp_path) == []
    write_folder_atomically(tmp_path / "folder", lambda folder: (folder / "a").write_text("1"))
    assert (tmp_path / "folder" / "a").read_text() == "1"


def test_records_come_back_the_same_and_unknown_fields_of_newer_versions_are_passed_over() -> None:
    record = FeatureProgress(kind="conv", done=1, shards=2)
    data = {**json.loads(record.to_json()), "added_later": 1}
    assert FeatureProgress.from_json(json.dumps(data), "here") == record


def test_what_is_no_record_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"here: not a Summary: run: Field required"):
        Summary.from_json("{}", "here")
    with pytest.raises(ResultsError, match=r"run\.json is missing"):
        RunDirectory(tmp_path).read_run()


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_spoilt_result_counts_as_none(tmp_path: Path, content: str) -> None:
    trial = RunDirectory(tmp_path).trial("frozen", 1, 0)
    trial.path.mkdir(parents=True)
    trial.predictions.write_text("utterance\n")
    trial.result_file.write_text(content)
    assert trial.result() is None


@pytest.mark.parametrize("damage", [lambda text: text[:-20], lambda text: text.replace("1", "2"), lambda text: ""])
def test_a_result_whose_predictions_were_altered_counts_as_none(tmp_path: Path, damage: Callable[[str], str]) -> None:
    trial = make_run(tmp_path).trial("frozen", 1, 0)
    result, predictions = trial.result(), trial.predictions.read_text()
    assert result is not None
    digest = hashlib.sha256(predictions.encode()).hexdigest()
    trial.result_file.write_text(result.model_copy(update={"predictions_sha256": digest}).to_json())
    assert trial.result() is not None
    trial.predictions.write_text(damage(predictions))
    assert trial.result() is None


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".model.safetensors.0a1b2c3d.tmp").write_text("half")
    (tmp_path / ".0002-000000.0a1b2c3d.tmp").mkdir()
    (tmp_path / "result.json").write_text("{}")
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["result.json"]


def test_an_error_that_may_pass_is_waited_for_and_one_that_will_not_is_raised_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]
    waited: list[float] = []
    fsync = os.fsync
    monkeypatch.setattr(tenacity.nap.time, "sleep", waited.append)
    monkeypatch.setattr(os, "fsync", lambda d: fsync(d) if not errors else (_ for _ in ()).throw(errors.pop()))
    write_atomically(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"
    assert len(waited) == 2
    errors = [OSError(errno.EIO, "Input/output error") for _ in range(99)]
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(tmp_path / "file", "other")
    assert sum(waited[2:]) == 0.5 + 1 + 2 + 4 + 8
    assert (tmp_path / "file").read_text() == "content"


class TestPlaces:
    JOB = "/tmp/ray/session_2026-11-24_21-00-00_123456_789/runtime_resources/working_dir_files/_ray_pkg_ab"

    def test_a_ray_session_is_recognised(self) -> None:
        assert paths.in_ray_session(Path(self.JOB))
        assert paths.in_ray_session(Path("/tmp/ray/session_latest"))
        assert not paths.in_ray_session(Path("/data/session_notes/results"))

    def test_a_relative_path_means_the_working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert paths.lasting("results", "results.root") == tmp_path / "results"

    def test_in_a_job_it_means_a_place_that_lasts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        inside = tmp_path / "session_2026-11-24_21-00-00_123456_789" / "copy"
        inside.mkdir(parents=True)
        monkeypatch.chdir(inside)
        monkeypatch.setenv("CVRUNNER_HOME", str(tmp_path / "home"))
        assert paths.lasting("results", "results.root") == tmp_path / "home" / "results"
        (inside / "corpus").mkdir()
        assert paths.corpus_root("corpus") == inside / "corpus"
        assert paths.corpus_root("other") == tmp_path / "home" / "other"

    def test_a_place_inside_a_session_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"results\.root: .*would be lost"):
            paths.lasting(f"{self.JOB}/results", "results.root")


@pytest.mark.parametrize(
    ("version", "own"), [("0.1.0", False), ("0.2.0", True), ("0.10.1", True), ("1.0", True), ("", False)]
)
def test_folds_have_seeds_of_their_own_since_version_0_2(tmp_path: Path, version: str, own: bool) -> None:
    record = make_run(tmp_path, folds=1, epochs=0).read_run()
    assert record.model_copy(update={"cvrunner_version": version}).folds_have_own_seeds is own


def test_a_result_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path) -> None:
    trial = make_run(tmp_path, folds=1, epochs=1).trial("frozen", 1, 0)
    key = "key-frozen-1-0"
    assert trial.damage(key) is None
    assert "is the result of other settings" in str(trial.damage("another"))
    whole = trial.result_file.read_text()
    trial.result_file.write_text(whole[: len(whole) // 2])
    assert str(trial.result_file) in str(trial.damage(key))
    trial.result_file.write_text(whole.replace('"predictions_sha256": ""', f'"predictions_sha256": "{"0" * 64}"'))
    assert "predictions.csv: was altered" in str(trial.damage(key))
    trial.result_file.unlink()
    assert trial.damage(key) is None


def test_a_write_that_fails_on_a_full_disk_without_saying_so_is_an_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(file: BinaryIO) -> None:
        raise OSError("1000 requested and 0 written")  # numpy's words, without a number

    with pytest.raises(OSError, match="1000 requested"):
        write_file_atomically(tmp_path / "file", write)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="No space left on device") as full:
        write_file_atomically(tmp_path / "file", write)
    assert full.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())
