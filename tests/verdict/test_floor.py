"""The no-audio floor and the scenario-controlled CCC, against examples worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cvrunner.data.folds import Fold, make_folds
from cvrunner.data.utterance import Utterance
from cvrunner.verdict.ccc import ccc
from cvrunner.verdict.floor import label_array, no_audio_floor, scenario_controlled_ccc, scenario_means
from tests.corpora import DIMENSIONS, corpus, utterance

# Means: impro01 2, impro02 4, all 8/3.
TRAIN = (
    utterance("Ses01F_impro01_F000", valence=1.0),
    utterance("Ses01F_impro01_M000", valence=3.0),
    utterance("Ses01M_impro02_F000", valence=4.0),
)
TEST = (
    utterance("Ses02F_impro01_F000", valence=2.0),
    utterance("Ses02F_impro02_M000", valence=5.0),
    utterance("Ses02F_impro03_M000", valence=3.0),
)
FOLD = Fold(1, TRAIN, (), TEST)


def test_predicts_the_training_mean_of_the_scenario_and_of_all_where_it_is_new() -> None:
    assert scenario_means(TRAIN, TEST, "valence") == pytest.approx([2, 4, 8 / 3])


def test_an_unseen_cell_falls_back_one_name_at_a_time() -> None:
    test = [
        utterance("Ses02F_impro01_F000"),  # scenario, gender and side seen: 1
        utterance("Ses02M_impro01_F000"),  # scenario and gender: 1
        utterance("Ses02F_impro02_M000"),  # scenario: 4
        utterance("Ses02F_impro03_M000"),  # nothing: 8/3
    ]
    by = ("scenario", "gender", "side")
    assert scenario_means(TRAIN, test, "valence", by) == pytest.approx([1, 1, 4, 8 / 3])


def test_floor_of_a_worked_example() -> None:
    floor = no_audio_floor([FOLD], ["valence"])
    assert list(floor) == ["scenario", "scenario+gender+side"]
    by_scenario = floor["scenario"]
    assert by_scenario.by_fold[1] == pytest.approx({"valence": 28 / 33, "avg": 28 / 33})
    assert by_scenario.mean == by_scenario.pooled == pytest.approx({"valence": 28 / 33, "avg": 28 / 33})
    assert by_scenario.reason is None


def test_controlled_ccc_of_a_worked_example() -> None:
    assert scenario_controlled_ccc(TRAIN, TEST, [3, 4, 3], "valence") == pytest.approx(-13 / 14)


def test_controlled_ccc_of_the_floor_itself_is_0() -> None:
    assert scenario_controlled_ccc(TRAIN, TEST, scenario_means(TRAIN, TEST, "valence"), "valence") == 0


def test_controlled_ccc_of_the_truth_is_1() -> None:
    assert scenario_controlled_ccc(TRAIN, TEST, label_array(TEST, "valence"), "valence") == pytest.approx(1)


def test_mean_is_over_folds_and_pooled_is_of_all_predictions() -> None:
    folds = make_folds(corpus(5, ("F_impro01", "M_impro02", "F_script01_1"), 6), "leave_one_session_out")
    floor = no_audio_floor(folds, DIMENSIONS)["scenario"]
    for dimension in DIMENSIONS:
        predicted = [scenario_means(f.train, f.test, dimension) for f in folds]
        true = [label_array(f.test, dimension) for f in folds]
        by_fold = [ccc(p, t) for p, t in zip(predicted, true, strict=True)]
        assert [floor.by_fold[k][dimension] for k in range(1, 6)] == by_fold
        assert floor.mean[dimension] == pytest.approx(np.mean(by_fold))
        assert floor.pooled[dimension] == ccc(np.concatenate(predicted), np.concatenate(true))


def test_the_floor_never_sees_test_or_validation_labels() -> None:
    folds = make_folds(corpus(), "leave_one_session_out")
    fold = folds[0]
    others = tuple(replace(u, valence=1.0) for u in fold.validation)
    blind = Fold(1, fold.train, others, tuple(replace(u, valence=5.0) for u in fold.test))
    before = scenario_means(fold.train, fold.test, "valence")
    assert (scenario_means(blind.train, blind.test, "valence") == before).all()
    assert no_audio_floor([Fold(1, fold.train, others, fold.test)], ["valence"]) == no_audio_floor([fold], ["valence"])


def test_without_scenarios_there_is_a_reason_instead_of_a_score() -> None:
    plain = tuple(_without_scenario(u) for u in TRAIN), tuple(_without_scenario(u) for u in TEST)
    floor = no_audio_floor([Fold(1, plain[0], (), plain[1])], ["valence"])["scenario"]
    assert floor.reason == "the corpus names no scenarios"
    assert floor.by_fold == {1: {"valence": None, "avg": None}}
    assert floor.mean == floor.pooled == {"valence": None, "avg": None}
    assert scenario_controlled_ccc(*plain, [3, 4, 3], "valence") is None


def test_one_scenario_alone_makes_a_constant_floor_of_0() -> None:
    floor = no_audio_floor(make_folds(corpus(5, ("F_impro01",)), "leave_one_session_out"), ["valence"])
    assert floor["scenario"].mean == {"valence": 0, "avg": 0}


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no training utterance"):
        scenario_means((), TEST, "valence")
    with pytest.raises(ValueError, match="Ses01F_impro01_F000 has no dominance label"):
        scenario_means(TRAIN, TEST, "dominance")
    with pytest.raises(ValueError, match=r"prediction has shape \(2,\), must have \(3,\)"):
        scenario_controlled_ccc(TRAIN, TEST, [3, 4], "valence")


def _without_scenario(u: Utterance) -> Utterance:
    return replace(u, scenario=None)
