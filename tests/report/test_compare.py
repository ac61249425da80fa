"""Two runs are paired on one split, and otherwise not subtracted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cvrunner.cli import main
from cvrunner.errors import IncompleteRunError, ResultsError, UsageError
from cvrunner.report.compare import RunComparison, compare_runs, comparison_text
from cvrunner.report.report import read_report
from tests.runs import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on one split; the second's unfrozen condition errs less."""
    root = tmp_path_factory.mktemp("results")
    made = {"seeds": (0, 1), "epochs": 40}
    return make_run(root, "one", gain=0.1, **made), make_run(root, "two", gain=0.5, **made)


def changed(directory, **values):
    """The same folder with something else in run.json."""
    directory.write_run(directory.read_run().model_copy(update=values))
    return directory


def exit_code(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return ended.value.code


def test_two_conditions_of_one_run_compare_as_its_own_summary_does(runs):
    one, _ = runs
    found = compare_runs(one, one, "frozen", "unfrozen")
    summary = read_report(one).summary
    assert found.pairs[0].differences == summary.differences["unfrozen"]
    assert found.pairs[0].decision == summary.decisions["unfrozen"]
    named = summary.verdict.replace("unfrozen is", "one/unfrozen is")
    named = named.replace("than frozen", "than one/frozen").replace("from frozen", "from one/frozen")
    assert found.verdict == named


def test_conditions_of_the_same_name_are_paired_by_fold(runs):
    one, two = runs
    found = compare_runs(one, two)
    assert [(p.baseline, p.other) for p in found.pairs] == [
        ("one/frozen", "two/frozen"), ("one/unfrozen", "two/unfrozen"),
    ]  # fmt: skip
    frozen, unfrozen = found.pairs
    # The made-up frozen conditions are the same in both.
    assert set(frozen.differences["avg"].by_trial.values()) == {0.0}
    assert frozen.decision == "practically equal"
    assert unfrozen.decision == "better"
    results = [run.results(run.read_run())["unfrozen/fold-2/seed-0"].test_ccc["avg"] for run in runs]
    assert unfrozen.differences["avg"].by_trial["fold-2/seed-0"] == pytest.approx(results[1] - results[0])
    interval = unfrozen.differences["avg"].on_corpus.interval
    assert interval.low < unfrozen.differences["avg"].mean < interval.high


def test_the_text_holds_the_numbers_and_the_settings_that_differ(runs):
    found = compare_runs(*runs, "frozen", "unfrozen")
    text = comparison_text(found, 240)
    average = found.pairs[0].differences["avg"]
    for part in (
        f"{average.mean:+.4f}",
        f"{average.on_corpus.interval.low:+.4f}",
        "two/unfrozen - one/frozen",
        "train.lr",
    ):
        assert part in text
    assert text.rstrip().endswith(found.verdict)
    assert "UNPAIRED" not in text


def test_only_the_seeds_that_both_have_are_paired(tmp_path):
    one, two = make_run(tmp_path, "one", seeds=(0, 1, 2)), make_run(tmp_path, "two", seeds=(2, 1))
    found = compare_runs(one, two)
    assert found.seeds == [1, 2]
    assert len(found.pairs[0].differences["avg"].by_trial) == 10
    assert "5 folds x 2 seeds" in found.verdict
    assert set(found.pairs[0].differences["avg"].by_trial.values()) == {0.0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"split_digest": "6" * 64}, "the split differs"),
        ({"corpus_digest": "6" * 64}, "the corpus (audio or labels) differs"),
        ({"protocol": "dialogue"}, "the protocol differs (utterance and dialogue)"),
        ({"seeds": [7]}, "no seed is in both"),
    ],
)
def test_what_cannot_be_paired_is_refused_with_the_reason(tmp_path, capsys, change, reason):
    one, two = make_run(tmp_path, "one"), changed(make_run(tmp_path, "two"), **change)
    with pytest.raises(ResultsError) as refused:
        compare_runs(one, two)
    assert reason in str(refused.value)
    assert exit_code("compare", one.path, two.path) == 2
    assert "--unpaired" in capsys.readouterr().err


def test_unpaired_shows_scores_without_any_difference(tmp_path):
    one, two = make_run(tmp_path, "one"), changed(make_run(tmp_path, "two", gain=0.5), split_digest="6" * 64)
    found = compare_runs(one, two, unpaired=True)
    assert (found.paired, found.pairs) == (False, [])
    assert found.scores["two/unfrozen"] == read_report(two).summary.scores["unfrozen"]
    text = comparison_text(found, 200)
    assert "UNPAIRED: the split differs (digests 555555555555 and 666666666666)" in text
    for absent in ("95 %", "p-value", "better", "worse", "sign test", "detectable"):
        assert absent not in text


def test_runs_in_other_dimensions_share_no_average(tmp_path):
    one, two = make_run(tmp_path, "one"), changed(make_run(tmp_path, "two"), dimensions=["arousal"])
    text = comparison_text(compare_runs(one, two, unpaired=True), 200)
    assert "CCC-A" in text
    assert "CCC-Avg" not in text


def test_conditions_are_chosen_by_name(runs):
    one, two = runs
    for condition, with_ in ((None, "unfrozen"), ("unfrozen", None)):
        assert [p.other for p in compare_runs(one, two, condition, with_).pairs] == ["two/unfrozen"]
    with pytest.raises(UsageError, match="--with melted: two has frozen, unfrozen"):
        compare_runs(one, two, "frozen", "melted")
    with pytest.raises(UsageError, match="the same run twice"):
        compare_runs(one, one)


def test_runs_without_a_shared_condition_ask_for_names(tmp_path):
    one, two = make_run(tmp_path, "one"), make_run(tmp_path, "two", conditions=("half", "whole"))
    with pytest.raises(UsageError, match="choose with --condition and --with"):
        compare_runs(one, two)


def test_a_run_with_missing_trials_is_compared_in_its_complete_conditions_only(tmp_path):
    one, two = make_run(tmp_path, "one"), make_run(tmp_path, "two", missing=["unfrozen/fold-3/seed-0"])
    for unpaired in (False, True):
        with pytest.raises(IncompleteRunError, match="unfrozen/fold-3/seed-0"):
            compare_runs(one, two, unpaired=unpaired)
    assert compare_runs(one, two, "frozen").pairs


def test_tables_that_contradict_the_digests_are_refused(tmp_path):
    one, two = make_run(tmp_path, "one"), make_run(tmp_path, "two")
    for condition in ("frozen", "unfrozen"):
        file = two.trial(condition, 2, 0).predictions
        file.write_text(file.read_text().replace("Ses02F_impro01_F000", "another"))
    with pytest.raises(ResultsError, match=r"the test utterances in predictions\.csv differ"):
        compare_runs(one, two)


def test_two_folders_of_one_name_get_a_number(tmp_path):
    one, two = make_run(tmp_path / "here", "same"), make_run(tmp_path / "there", "same")
    assert list(compare_runs(one, two, "frozen").scores) == ["same (1)/frozen", "same (2)/frozen"]


def test_json_is_the_comparison_and_nothing_else(runs, capsys):
    one, two = runs
    assert not exit_code("compare", one.path, two.path, "--json")
    printed = capsys.readouterr().out
    assert RunComparison.model_validate(json.loads(printed)) == compare_runs(one, two)


def test_the_interval_of_identical_predictions_is_a_point(runs):
    found = compare_runs(*runs, "frozen")
    level = found.pairs[0].differences["avg"].on_corpus
    assert np.allclose([level.interval.low, level.interval.high, level.standard_error], 0)
    assert level.p == 1.0


def test_a_precision_that_became_another_one_on_another_device_is_not_compared(tmp_path):
    one, two = make_run(tmp_path, "one"), make_run(tmp_path, "two")
    file = two.path / "frozen" / "fold-1" / "seed-0" / "result.json"
    changes = {"precision": "bfloat16", "device": "NVIDIA GeForce RTX 4090"}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ResultsError, match=r"train\.precision auto became bfloat16 on NVIDIA .* and float32 on cpu"):
        compare_runs(one, two)
    assert not compare_runs(one, two, unpaired=True).paired
    # Requested, the difference is the subject of the comparison.
    two.config.write_text(two.config.read_text().replace("precision: auto", "precision: bfloat16"))
    assert compare_runs(one, two).paired
