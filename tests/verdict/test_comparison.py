"""The same numbers in all formats, and no numbers while trials are missing."""

from __future__ import annotations

import json
import multiprocessing
import re
from dataclasses import replace
from statistics import fmean, stdev

import pytest

from cvrunner.errors import ResultsError
from cvrunner.records.results import CorrectedT, Difference, FloorRecord, Interval, Score, Summary
from cvrunner.report.evidence import claims_table, trials_table
from cvrunner.report.figures import draw
from cvrunner.report.floor import floor_table
from cvrunner.report.html import render_html
from cvrunner.report.report import read_report
from cvrunner.report.tables import render_markdown, render_text
from cvrunner.report.write import update_experiment_comparison
from cvrunner.verdict.comparison import summarise
from cvrunner.verdict.sentence import clause, decide
from tests.runs import make_run


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("results"), gain=0.5)


@pytest.fixture(scope="module")
def report(directory):
    return read_report(directory)


def with_floor(report, floor):
    return replace(report, run=report.run.model_copy(update={"floor": floor}))


def test_mean_and_sd_are_those_of_the_result_files(directory, report):
    results = report.results
    for condition, scores in report.summary.scores.items():
        values = [r.test_ccc["valence"] for r in results.values() if r.condition == condition]
        assert scores["valence"].mean == pytest.approx(fmean(values))
        assert scores["valence"].std == pytest.approx(stdev(values))


def test_differences_are_paired_by_fold(report):
    summary = report.summary
    difference = summary.differences["unfrozen"]["avg"]
    for name, value in difference.by_trial.items():
        parts = (summary.scores[c]["avg"].by_trial[name] for c in ("unfrozen", "frozen"))
        one, other = parts
        assert value == pytest.approx(one - other)
    assert difference.interval.low < difference.mean < difference.interval.high


def test_all_formats_show_the_same_numbers(directory, report):
    directory.write_summary(report.summary)
    written = Summary.from_json(directory.summary_file.read_bytes(), "summary.json")
    assert written == report.summary
    shown = [render_markdown(report), render_text(report.run, report.summary, 200), render_html(report, draw(report))]
    numbers = [f"{score.mean:.4f}" for scores in written.scores.values() for score in scores.values()]
    numbers += [f"{d.mean:+.4f}" for d in written.differences["unfrozen"].values()]
    numbers += [f"{v:+.4f}" for d in written.differences["unfrozen"].values() for v in d.by_trial.values()]
    for text in shown:
        assert written.verdict in " ".join(text.split())
        assert [number for number in numbers if number not in text] == []


def test_the_verdict_is_one_sentence_with_everything_in_it(report):
    verdict = report.summary.verdict
    interval = report.summary.differences["unfrozen"]["avg"].interval
    for part in ("unfrozen", "better", "CCC-Avg", f"{interval.low:+.4f}", f"{interval.detectable:.4f}"):
        assert part in verdict
    assert verdict.endswith("5 folds x 1 seed, on synthetic data.")
    assert len(re.findall(r"\.(?:\s|$)", verdict)) == 1


def test_a_condition_that_errs_more_is_worse(tmp_path):
    summary = summarise(make_run(tmp_path, gain=-0.6))
    assert summary.decisions == {"unfrozen": "worse"}
    assert "worse than frozen by 0." in summary.verdict


def test_no_gain_is_not_distinguishable(tmp_path):
    summary = summarise(make_run(tmp_path, gain=0.01, synthetic=False))
    assert summary.decisions == {"unfrozen": "not distinguishable"}
    assert "not distinguishable from frozen" in summary.verdict
    assert "synthetic" not in summary.verdict


def test_three_conditions_are_each_compared_with_the_first(tmp_path):
    summary = summarise(make_run(tmp_path, conditions=("frozen", "unfrozen", "top"), seeds=(0, 1), gain=0.15))
    assert list(summary.differences) == ["unfrozen", "top"]
    assert "unfrozen is" in summary.verdict
    assert "top is" in summary.verdict
    assert "5 folds x 2 seeds" in summary.verdict


def test_one_condition_is_compared_with_nothing(tmp_path):
    report = read_report(make_run(tmp_path, conditions=("frozen",)))
    assert "no other condition" in report.summary.verdict
    assert render_html(report, draw(report))


def test_an_incomplete_run_names_what_is_missing_and_prints_no_mean(tmp_path):
    report = read_report(make_run(tmp_path, missing=["unfrozen/fold-3/seed-0"]))
    summary = report.summary
    assert (summary.status, summary.missing) == ("INCOMPLETE", ["unfrozen/fold-3/seed-0"])
    assert (summary.scores, summary.differences, summary.groups) == ({}, {}, {})
    for text in (render_markdown(report), render_text(report.run, report.summary), render_html(report, draw(report))):
        assert "unfrozen/fold-3/seed-0" in text
        assert "±" not in text
        assert "pooled" not in text


def test_predictions_of_another_trial_are_refused(tmp_path):
    directory = make_run(tmp_path)
    one, other = (directory.trial("frozen", fold, 0).predictions for fold in (1, 2))
    one.write_bytes(other.read_bytes())
    with pytest.raises(ResultsError, match="not from the same trial"):
        summarise(directory)


def test_conditions_tested_on_other_utterances_are_refused(tmp_path):
    directory = make_run(tmp_path)
    file = directory.trial("unfrozen", 2, 0).predictions
    file.write_text(file.read_text().replace("Ses02F_impro01_F000", "another"))
    with pytest.raises(ResultsError, match="nothing can be paired"):
        summarise(directory)


def test_an_undefined_ccc_makes_the_mean_undefined(tmp_path):
    directory = make_run(tmp_path)
    file = directory.trial("frozen", 1, 0).result_file
    result = json.loads(file.read_text())
    result["test_ccc"] |= {"valence": None, "avg": None}
    file.write_text(json.dumps(result))
    summary = summarise(directory)
    assert summary.scores["frozen"]["valence"].mean is None
    assert "undefined" in summary.verdict


def test_claims_are_tested_on_real_data_only(tmp_path, report):
    assert {row[-1] for row in claims_table(report).rows} == {"not testable here"}
    real = read_report(make_run(tmp_path, synthetic=False))
    # The memory claim needs a GPU.
    assert [row[-1] for row in claims_table(real).rows] == ["met", "missed", "not testable here"]


def test_the_floor_is_shown_next_to_the_conditions(report):
    scores = {name: Score(mean=0.626, pooled=0.6) for name in ("valence", "arousal", "avg")}
    floor = FloorRecord(scores={"scenario": scores}, controlled={"frozen": scores}, ceiling=scores)
    report = with_floor(report, floor)
    rows = {row[0]: row[1:] for row in floor_table(report).rows}
    names = ["no audio: scenario", "frozen", "unfrozen", "frozen, controlled for scenario", "one human rater"]
    assert list(rows) == [*names, "frozen / one human rater", "unfrozen / one human rater"]
    unfrozen = report.summary.scores["unfrozen"]
    expected = [unfrozen[d].mean / 0.626 for d in scores] + [unfrozen[d].pooled / 0.6 for d in scores]
    assert rows["unfrozen / one human rater"] == [f"{share:.2f}" for share in expected]


def test_a_human_rater_who_reaches_nothing_has_no_ratio(report):
    none = {name: Score(mean=0.0, pooled=None) for name in ("valence", "arousal", "avg")}
    rows = floor_table(with_floor(report, FloorRecord(ceiling=none))).rows
    assert rows[-1] == ["unfrozen / one human rater", *["–"] * 6]


def test_scripted_and_improvised_are_scored_apart(report):
    parts = list(report.summary.groups["frozen"])
    assert parts[:4] == ["gender F", "gender M", "scripted", "improvised"]
    table = report.out_of_fold.about
    assert set(table["improvised"]) == {"true", "false"}


def test_a_corpus_that_does_not_say_has_no_scripted_part(tmp_path):
    directory = make_run(tmp_path)
    for file in directory.path.glob("*/*/*/predictions.csv"):
        file.write_text(file.read_text().replace(",true,", ",,").replace(",false,", ",,"))
    assert list(summarise(directory).groups["frozen"])[:3] == ["gender F", "gender M", "speaker 01F"]


def test_a_failed_trial_shows_its_attempts_and_its_error(tmp_path):
    report = read_report(make_run(tmp_path, missing=["frozen/fold-1/seed-0"]))
    first = trials_table(report).rows[0]
    assert first[:3] == ["frozen/fold-1/seed-0", "FAILED", "2"]
    assert first[-1] == "NonFiniteError: made up"


def test_the_table_of_runs_is_newest_first(tmp_path):
    old = make_run(tmp_path, "old", started_at="2026-01-01T00:00:00+00:00")
    make_run(tmp_path, "new", missing=["frozen/fold-1/seed-0"], started_at="2026-02-01T00:00:00+00:00")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    old.write_summary(summarise(old))
    lines = update_experiment_comparison(tmp_path).read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| [")]
    assert [(row[0], row[2]) for row in rows] == [
        ("| [new](new/comparison.md)", "INCOMPLETE"),
        ("| [old](old/comparison.md)", "COMPLETE"),
        ("| [broken](broken/comparison.md)", "unreadable"),
    ]
    assert f"{summarise(old).scores['frozen']['avg'].mean:.4f}" in rows[1][5]


def test_two_processes_can_update_the_table_at_once(tmp_path):
    for number in range(4):
        make_run(tmp_path, f"run-{number}", folds=2, epochs=1)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_update_often, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "experiment_comparison.md").read_text().count("| [run-") == 4
    assert not list(tmp_path.glob("*.tmp"))


def _update_often(root):
    for _ in range(20):
        update_experiment_comparison(root)


@pytest.mark.parametrize(
    ("low", "high", "p", "expected"),
    [
        (0.01, 0.05, 0.01, "better"),
        (-0.05, -0.01, 0.01, "worse"),
        (-0.01, 0.05, 0.01, "not distinguishable"),
        (0.01, 0.05, 0.30, "not distinguishable"),
        (0.01, 0.05, None, "better"),
    ],
)
def test_a_claim_needs_the_interval_and_the_folds(low, high, p, expected):
    difference = Difference(
        mean=(low + high) / 2,
        std=0.1,
        by_trial={},
        pooled=None,
        interval=Interval(low=low, high=high, standard_error=0.01, detectable=0.03, level=0.95, resamples=2000),
        corrected_t=None if p is None else CorrectedT(t=1.0, p=p, folds=5, test_train_ratio=1 / 3),
    )
    assert decide(difference) == expected
    said = clause("unfrozen", "frozen", difference, decide(difference))
    assert ("more seeds would help" in said) == (p == 0.30)
