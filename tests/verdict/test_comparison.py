"""The same numbers in all formats, and no numbers while trials are missing."""

from __future__ import annotations

import json
import multiprocessing
import re
from dataclasses import replace
from statistics import fmean, stdev

import numpy as np
import pytest

from cvrunner.config.sections import VerdictConfig
from cvrunner.errors import ResultsError
from cvrunner.records.results import FloorRecord, Score
from cvrunner.records.summary import CorpusLevel, Difference, Interval, SpeakersLevel, Summary
from cvrunner.report.evidence import claims_table, trials_table
from cvrunner.report.figures import draw
from cvrunner.report.floor import floor_table
from cvrunner.report.html import render_html
from cvrunner.report.report import read_report
from cvrunner.report.tables import render_markdown, render_text
from cvrunner.report.write import update_experiment_comparison
from cvrunner.verdict.comparison import compare_conditions
from cvrunner.verdict.sentence import clause, decide
from tests.runs import make_run, write_config


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("results"), gain=0.5, seeds=(0, 1))


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
    for interval in (difference.on_corpus.interval, difference.new_speakers.interval):
        assert interval.low < difference.mean < interval.high


def test_all_formats_show_the_same_numbers(directory, report):
    directory.write_summary(report.summary)
    written = Summary.from_json(directory.summary_file.read_bytes(), "summary.json")
    assert written == report.summary
    shown = [render_markdown(report), render_text(report.run, report.summary, 200), render_html(report, draw(report))]
    numbers = [f"{score.mean:.4f}" for scores in written.scores.values() for score in scores.values()]
    numbers += [f"{d.mean:+.4f}" for d in written.differences["unfrozen"].values()]
    numbers += [f"{v:+.4f}" for v in written.differences["unfrozen"]["avg"].by_trial.values()]
    for difference in written.differences["unfrozen"].values():
        for level in (difference.on_corpus, difference.new_speakers):
            numbers += [f"{level.interval.low:+.4f} to {level.interval.high:+.4f}"]
    for text in shown:
        assert written.verdict in " ".join(text.split())
        assert [number for number in numbers if number not in text] == []


def test_the_verdict_is_one_sentence_with_both_levels_in_it(report):
    verdict = report.summary.verdict
    difference = report.summary.differences["unfrozen"]["avg"]
    levels = difference.on_corpus.interval, difference.new_speakers.interval
    for part in (
        "On this corpus, unfrozen is better",
        "CCC-Avg",
        "for new speakers",
        *(f"{i.low:+.4f}" for i in levels),
    ):
        assert part in verdict
    assert verdict.endswith("5 folds x 2 seeds, on synthetic data.")
    assert len(re.findall(r"\.(?:\s|$)", verdict)) == 1


def test_a_condition_that_errs_more_is_worse(tmp_path):
    summary = read_report(make_run(tmp_path, gain=-0.6, seeds=(0, 1))).summary
    assert summary.decisions == {"unfrozen": "worse"}
    assert "worse than frozen by 0." in summary.verdict


def test_no_gain_is_not_distinguishable_and_says_what_could_have_been_seen(tmp_path):
    summary = read_report(make_run(tmp_path, gain=0.01, seeds=(0, 1), synthetic=False)).summary
    assert summary.decisions == {"unfrozen": "not distinguishable"}
    level = summary.differences["unfrozen"]["avg"].on_corpus
    assert "not distinguishable from frozen: CCC-Avg differs by " in summary.verdict
    assert f"smallest detectable difference {level.detectable:.4f}" in summary.verdict
    assert "synthetic" not in summary.verdict


def test_one_seed_claims_nothing_about_the_conditions(tmp_path):
    summary = read_report(make_run(tmp_path, gain=0.5)).summary
    difference = summary.differences["unfrozen"]["avg"]
    assert summary.decisions == {"unfrozen": "no claim"}
    assert (difference.on_corpus, summary.for_new_speakers) == (None, {})
    assert summary.verdict.startswith(f"These trained models differ by {difference.mean:+.4f} CCC-Avg")
    assert f"for new speakers: 95 % interval {difference.new_speakers.interval.low:+.4f}" in summary.verdict
    for word in ("better", "worse", "equal", "distinguishable"):
        assert word not in summary.verdict


@pytest.mark.parametrize(("seeds", "level"), [((0, 1), None), ((0, 1, 2), "level")])
def test_a_single_fold_needs_three_seeds_and_has_no_second_level(tmp_path, seeds, level):
    summary = read_report(make_run(tmp_path, folds=1, seeds=seeds, gain=0.5)).summary
    difference = summary.differences["unfrozen"]["avg"]
    assert (difference.on_corpus is None) == (level is None)
    assert difference.new_speakers is None
    assert "for new speakers: unknown" in summary.verdict


def test_folds_that_shared_their_seeds_have_no_first_level(tmp_path):
    directory = make_run(tmp_path, gain=0.5, seeds=(0, 1, 2))
    directory.write_run(directory.read_run().model_copy(update={"cvrunner_version": "0.1.0"}))
    summary = read_report(directory).summary
    assert summary.decisions == {"unfrozen": "no claim"}
    assert "an earlier version" in summary.differences["unfrozen"]["avg"].no_corpus_level


def test_a_baseline_that_had_not_converged_is_named_in_the_sentence(tmp_path):
    rising, flat = (read_report(make_run(tmp_path / str(n), seeds=(0, 1), epochs=n)).summary for n in (6, 40))
    assert "the baseline frozen had not converged: 10 of 10 trials" in rising.verdict
    assert "converged" not in flat.verdict
    assert (rising.convergence["frozen"].converged, flat.convergence["frozen"].converged) == (False, True)


def test_three_conditions_are_each_compared_with_the_first(tmp_path):
    summary = read_report(make_run(tmp_path, conditions=("frozen", "unfrozen", "top"), seeds=(0, 1), gain=0.15)).summary
    assert list(summary.differences) == ["unfrozen", "top"]
    assert "unfrozen is" in summary.verdict
    assert "top is" in summary.verdict
    assert "5 folds x 2 seeds" in summary.verdict


def test_several_conditions_have_wider_intervals_than_the_same_one_alone(tmp_path):
    several = read_report(make_run(tmp_path, "two", conditions=("frozen", "unfrozen", "top"), seeds=(0, 1))).summary
    alone = read_report(make_run(tmp_path, "one", conditions=("frozen", "unfrozen"), seeds=(0, 1))).summary
    one, two = (s.differences["unfrozen"]["avg"].on_corpus for s in (alone, several))
    assert one.standard_error == pytest.approx(two.standard_error)
    assert two.interval.high - two.interval.low > one.interval.high - one.interval.low
    assert two.p >= one.p


def test_the_primary_outcome_decides_and_the_others_are_adjusted(tmp_path):
    directory = make_run(tmp_path, gain=0.5, seeds=(0, 1), epochs=40)
    config = directory.read_config()
    chosen = config.model_copy(update={"verdict": VerdictConfig(primary="arousal", margin=0.5, cluster="speaker")})
    write_config(directory, chosen)
    summary = read_report(directory).summary
    assert (summary.primary, summary.margin, summary.cluster) == ("arousal", 0.5, "speaker")
    assert "CCC-A" in summary.verdict
    assert "CCC-Avg" not in summary.verdict
    by_outcome = summary.differences["unfrozen"]
    assert by_outcome["arousal"].on_corpus.holm_p is None
    assert by_outcome["valence"].on_corpus.holm_p >= by_outcome["valence"].on_corpus.p


def test_speakers_are_resampled_if_sessions_hold_more_than_two(tmp_path):
    directory = make_run(tmp_path, seeds=(0, 1))
    assert read_report(directory).summary.cluster == "dialogue"
    for file in directory.path.glob("*/*/*/predictions.csv"):
        lines = file.read_text().splitlines()
        # Every utterance of a dialogue gets the dialogue's name as a part of its speaker's.
        rows = [line.split(",") for line in lines]
        column, dialogue = rows[0].index("speaker"), rows[0].index("dialogue")
        for row in rows[1:]:
            row[column] = f"{row[column]}-{row[dialogue]}"
        file.write_text("\n".join(",".join(row) for row in rows) + "\n")
    assert read_report(directory).summary.cluster == "speaker"


def test_a_reference_is_scored_and_each_condition_has_a_lead_over_it(directory, report):
    run, data = report.run, report.out_of_fold
    mean = np.repeat(np.nanmean(data.truth, axis=0)[None, None], len(data.truth), axis=1)
    summary = compare_conditions(run, report.results, data, VerdictConfig(), {"no-audio floor": mean})
    reference = summary.references["no-audio floor"]
    assert reference.scores["valence"].mean == 0
    for condition, scores in summary.scores.items():
        lead = reference.leads[condition]["valence"]
        assert lead.mean == pytest.approx(scores["valence"].mean)
        assert lead.on_corpus.interval.low > 0
    # The differences between the conditions are the same with or without a reference.
    assert summary.differences == report.summary.differences


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
        read_report(directory)


def test_conditions_tested_on_other_utterances_are_refused(tmp_path):
    directory = make_run(tmp_path)
    file = directory.trial("unfrozen", 2, 0).predictions
    file.write_text(file.read_text().replace("Ses02F_impro01_F000", "another"))
    with pytest.raises(ResultsError, match="nothing can be paired"):
        read_report(directory)


def test_an_undefined_ccc_makes_the_mean_undefined(tmp_path):
    directory = make_run(tmp_path)
    file = directory.trial("frozen", 1, 0).result_file
    result = json.loads(file.read_text())
    result["test_ccc"] |= {"valence": None, "avg": None}
    file.write_text(json.dumps(result))
    summary = read_report(directory).summary
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
    assert list(read_report(directory).summary.groups["frozen"])[:3] == ["gender F", "gender M", "speaker 01F"]


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
    old.write_summary(read_report(old).summary)
    lines = update_experiment_comparison(tmp_path).read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| [")]
    assert [(row[0], row[2]) for row in rows] == [
        ("| [new](new/comparison.md)", "INCOMPLETE"),
        ("| [old](old/comparison.md)", "COMPLETE"),
        ("| [broken](broken/comparison.md)", "unreadable"),
    ]
    assert f"{read_report(old).summary.scores['frozen']['avg'].mean:.4f}" in rows[1][5]


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


def made_up_difference(mean, half_width, speakers):
    """A difference whose 90 % interval has 5/6 of the width of the 95 % one."""
    narrow = half_width * 5 / 6
    level = CorpusLevel(
        interval=Interval(low=mean - half_width, high=mean + half_width, level=0.95),
        equivalence=Interval(low=mean - narrow, high=mean + narrow, level=0.9),
        standard_error=half_width / 2,
        df=20,
        p=0.01,
        detectable=1.4 * half_width,
        equality_power=0.2,
        dialogues_sd=0.01,
        training_sd=0.01,
        sessions_sd=0.01,
        one_more_seed=half_width,
    )
    second = SpeakersLevel(
        interval=Interval(low=mean - speakers, high=mean + speakers, level=0.95),
        t=1.0,
        df=4,
        p=0.2,
        folds=5,
        test_train_ratio=1 / 3,
        detectable=0.1,
        worse=0.1,
        equal=0.5,
        better=0.4,
        one_more_session=0.1,
    )
    return Difference(mean=mean, std=0.1, by_trial={}, pooled=None, on_corpus=level, new_speakers=second)


@pytest.mark.parametrize(
    ("mean", "half_width", "speakers", "expected", "said"),
    [
        (0.05, 0.03, 0.04, "better", "also better for new speakers"),
        (0.05, 0.03, 0.06, "better", "not shown for new speakers"),
        (-0.05, 0.03, 0.04, "worse", "also worse for new speakers"),
        (0.01, 0.009, 0.05, "better, but by less than the margin", "less than the margin of 0.02"),
        (-0.01, 0.009, 0.05, "worse, but by less than the margin", "not shown for new speakers"),
        (0.001, 0.01, 0.05, "practically equal", "practically equal to frozen"),
        (0.01, 0.03, 0.05, "not distinguishable", "smallest detectable difference 0.0420"),
        # Level 2 alone claims nothing.
        (0.01, 0.03, 0.005, "not distinguishable", "for new speakers: 95 % interval +0.0050 to +0.0150"),
    ],
)
def test_the_decision_follows_the_table(mean, half_width, speakers, expected, said):
    difference = made_up_difference(mean, half_width, speakers)
    decision = decide(difference, margin=0.02)
    assert decision == expected
    assert said in clause("unfrozen", "frozen", "avg", difference, decision, margin=0.02)
