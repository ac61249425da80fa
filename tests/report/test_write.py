"""One call writes all files of a run, reading each of its files once; the floor comes from the folds."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
from rich.console import Console

from cvrunner.data.folds import make_folds
from cvrunner.records.results import RunRecord
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.records.summary import Summary
from cvrunner.report.report import read_report
from cvrunner.report.write import write_report
from cvrunner.run.session import Outcome, Run, conclude
from cvrunner.run.store import RunStore
from cvrunner.verdict.floor import floor_record
from tests.blank_figures import blank_figures
from tests.corpora import corpus
from tests.runs import DIMENSIONS, SCENARIOS, TURNS, make_run

SPOKEN = [f"{side}_{scenario}" for scenario in SCENARIOS for side in "FM"]


@pytest.fixture(scope="module")
def folds():
    return make_folds(corpus(dialogues=SPOKEN, turns=TURNS), "leave_one_session_out")


@pytest.fixture
def blank():
    with blank_figures():
        yield


def test_one_call_writes_all_files_and_again_the_same(tmp_path):
    directory = make_run(tmp_path, epochs=2)
    write_report(directory, {"view": "http://127.0.0.1:5000/#/x"})
    files = [directory.summary_file, directory.comparison, directory.report, tmp_path / "experiment_comparison.md"]
    files += sorted(directory.figures.iterdir())
    before = [file.read_bytes() for file in files]
    write_report(directory, {"view": "http://127.0.0.1:5000/#/x"})
    assert [file.read_bytes() for file in files] == before


def test_the_end_of_a_run_reads_every_prediction_once(tmp_path, folds, monkeypatch):
    directory = make_run(tmp_path, epochs=1)
    record = directory.read_run().model_copy(update={"floor": floor_record(folds, DIMENSIONS)})
    directory.write_run(record)
    finished = []
    tracker = SimpleNamespace(
        uri=None, is_away=lambda: False, links=lambda _: {}, finish=lambda report, status: finished.append(status)
    )
    printed = Console(file=io.StringIO(), width=200)
    run = Run(SimpleNamespace(folds=folds), RunStore(directory, record), [], [], tracker, printed)
    parsed, hashed, real_read_csv, real_result = Counter(), Counter(), pd.read_csv, TrialDirectory.result
    monkeypatch.setattr(pd, "read_csv", lambda path, **options: parsed.update([path]) or real_read_csv(path, **options))
    monkeypatch.setattr(
        TrialDirectory, "result", lambda trial, key=None: hashed.update([trial.predictions]) or real_result(trial, key)
    )
    assert conclude(run, Outcome(stopped=False, error=None)) == 0
    assert finished == ["COMPLETE"]
    files = Counter(directory.path.glob("*/*/*/predictions.csv"))
    assert len(files) == 10
    assert parsed == hashed == files
    first = printed.file.getvalue()
    assert first.endswith(f"report   {directory.report}\n")
    # A finished run is only shown again.
    conclude(run, None)
    assert printed.file.getvalue() == 2 * first
    assert parsed == hashed == files
    assert set(read_report(directory).run.floor.controlled) == {"frozen", "unfrozen"}


@pytest.mark.usefixtures("blank")
def test_the_floor_survives_run_json_and_stands_in_the_report(tmp_path, folds):
    directory = make_run(tmp_path, epochs=1)
    directory.write_run(directory.read_run().model_copy(update={"floor": floor_record(folds, DIMENSIONS)}))
    run = read_report(directory).run
    floor = run.floor
    assert {name.removesuffix(" (stretched)") for name in floor.scores} == {"scenario", "scenario+gender+side"}
    assert set(floor.controlled["frozen"]) == {"valence", "arousal", "avg"}
    assert {score.mean for score in floor.controlled_constant.values()} == {0}
    directory.write_run(run)
    assert directory.read_run().floor == floor
    write_report(directory)
    page = directory.report.read_text()
    assert f"{floor.scores['scenario']['avg'].mean:.4f}" in page
    assert "controlled for scenario" in page
    assert (directory.figures / "floor.svg").is_file()


@pytest.mark.usefixtures("blank")
def test_the_ceiling_of_rated_utterances_stands_in_the_report(tmp_path):
    raters = {"E1": (1.0, 2.0, None), "E2": (2.0, 2.5, None)}
    base = corpus(dialogues=SPOKEN, turns=TURNS)
    rated = [
        replace(u, raters=raters if u.turn % 2 else {"E1": raters["E2"], "E2": (4.0, 3.0, None)})
        for u in base.utterances
    ]
    floor = floor_record(make_folds(replace(base, utterances=tuple(rated)), "leave_one_session_out"), DIMENSIONS)
    assert floor.ceiling_reason is None
    assert set(floor.ceiling) == {"valence", "arousal", "avg"}
    directory = make_run(tmp_path, epochs=1)
    directory.write_run(directory.read_run().model_copy(update={"floor": floor}))
    assert directory.read_run().floor == floor
    write_report(directory)
    for file in (directory.report, directory.comparison):
        assert "unfrozen / one human rater" in file.read_text()
        assert f"{floor.ceiling['avg'].mean:.4f}" in file.read_text()


def test_without_raters_there_is_a_reason_instead_of_a_ceiling(folds):
    floor = floor_record(folds, DIMENSIONS)
    assert floor.ceiling == {}
    assert floor.ceiling_reason == "the corpus has no utterance that two observers rated"


@pytest.mark.usefixtures("blank")
def test_without_scenarios_the_reason_stands_in_the_report(tmp_path):
    bare = make_folds(corpus(scenario=None), "leave_one_session_out")
    floor = floor_record(bare, DIMENSIONS)
    assert floor.scores == {}
    directory = make_run(tmp_path, epochs=1)
    directory.write_run(directory.read_run().model_copy(update={"floor": floor}))
    assert read_report(directory).run.floor == floor
    write_report(directory)
    for file in (directory.report, directory.comparison):
        assert "the corpus names no scenarios" in file.read_text()


@pytest.mark.usefixtures("blank")
def test_records_of_older_runs_can_still_be_read(tmp_path):
    directory = make_run(tmp_path, epochs=1)
    run = directory.read_run()
    old_run = run.model_dump_json(exclude={"floor", "links"})
    assert RunRecord.from_json(old_run, "run.json") == run
    for file in directory.path.glob("*/*/*/predictions.csv"):
        lines = [line.split(",") for line in file.read_text().splitlines()]
        file.write_text("\n".join(",".join(cells[:6] + cells[7:]) for cells in lines))
    summary = write_report(directory).summary
    old_summary = summary.model_dump_json(exclude={"decisions", "groups"})
    assert Summary.from_json(old_summary, "summary.json").verdict == summary.verdict


def test_trials_that_resolved_the_precision_differently_are_scored_but_not_compared(tmp_path, blank):
    directory = make_run(tmp_path)
    file = directory.path / "unfrozen" / "fold-3" / "seed-0" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"precision": "bfloat16"}))
    write_report(directory)
    summary = read_report(directory).summary
    assert summary.verdict.startswith("NOT COMPARED: train.precision auto became bfloat16 and float32, so")
    assert summary.scores["unfrozen"]["avg"].mean is not None
    assert not summary.differences
    assert not summary.decisions
    assert "NOT COMPARED" in directory.comparison.read_text()
