"""The no-audio floor and the scenario-controlled CCC, against examples worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cvrunner.data.folds import Fold, make_folds
from cvrunner.data.utterance import Corpus, Utterance
from cvrunner.errors import ResultsError
from cvrunner.records.run_directory import RunDirectory
from cvrunner.verdict.ccc import ccc
from cvrunner.verdict.floor import (
    FloorScore,
    floor_csv,
    floor_predictions,
    floor_record,
    label_array,
    no_audio_floor,
    read_floor,
    scenario_controlled_ccc,
    scenario_means,
    stretch_factors,
)
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


def floors(folds: Sequence[Fold], dimensions: Sequence[str] = ("valence",)) -> dict[str, FloorScore]:
    return no_audio_floor(folds, dimensions, floor_predictions(folds, dimensions))


def means(train: Sequence[Utterance], test: Sequence[Utterance], by: tuple[str, ...] = ("scenario",)) -> list[float]:
    return scenario_means(train, test, ["valence"], by)[:, 0].tolist()


def test_predicts_the_training_mean_of_the_scenario_and_of_all_where_it_is_new() -> None:
    assert means(TRAIN, TEST) == pytest.approx([2, 4, 8 / 3])


def test_an_unseen_cell_falls_back_one_name_at_a_time() -> None:
    test = [
        utterance("Ses02F_impro01_F000"),  # scenario, gender and side seen: 1
        utterance("Ses02M_impro01_F000"),  # scenario and gender: 1
        utterance("Ses02F_impro02_M000"),  # scenario: 4
        utterance("Ses02F_impro03_M000"),  # nothing: 8/3
    ]
    by = ("scenario", "gender", "side")
    assert means(TRAIN, test, by) == pytest.approx([1, 1, 4, 8 / 3])


def test_floor_of_a_worked_example() -> None:
    floor = floors([FOLD])
    assert list(floor) == [
        "scenario",
        "scenario (stretched)",
        "scenario+gender+side",
        "scenario+gender+side (stretched)",
    ]
    by_scenario = floor["scenario"]
    assert by_scenario.by_fold[1] == pytest.approx({"valence": 28 / 33, "avg": 28 / 33})
    assert by_scenario.mean == by_scenario.pooled == pytest.approx({"valence": 28 / 33, "avg": 28 / 33})


def test_mean_is_over_folds_and_pooled_is_of_all_predictions() -> None:
    folds = make_folds(corpus(5, ("F_impro01", "M_impro02", "F_script01_1"), 6), "leave_one_session_out")
    floor = floors(folds, DIMENSIONS)["scenario"]
    for k, dimension in enumerate(DIMENSIONS):
        predicted = [scenario_means(f.train, f.test, DIMENSIONS)[:, k] for f in folds]
        true = [label_array(f.test, DIMENSIONS)[:, k] for f in folds]
        by_fold = [ccc(p, t) for p, t in zip(predicted, true, strict=True)]
        assert [floor.by_fold[k][dimension] for k in range(1, 6)] == by_fold
        assert floor.mean[dimension] == pytest.approx(np.mean(by_fold))
        assert floor.pooled[dimension] == ccc(np.concatenate(predicted), np.concatenate(true))


def test_the_floor_never_sees_test_or_validation_labels() -> None:
    fold = make_folds(acted(), "leave_one_session_out")[0]
    others, test = (tuple(replace(u, valence=v) for u in of) for of, v in ((fold.validation, 1.0), (fold.test, 5.0)))
    before, blind = (floor_predictions([f], ["valence"]) for f in (fold, Fold(1, fold.train, others, test)))
    for name, values in before.items():
        assert (blind[name] == values).all()


def test_without_scenarios_there_is_a_reason_instead_of_a_score() -> None:
    plain = tuple(_without_scenario(u) for u in TRAIN), tuple(_without_scenario(u) for u in TEST)
    folds = [Fold(1, plain[0], (), plain[1])]
    assert floor_predictions(folds, ["valence"]) == {}
    record = floor_record(folds, ["valence"])
    assert (record.scores, record.reason) == ({}, "the corpus names no scenarios")


def test_one_scenario_alone_makes_a_constant_floor_of_0() -> None:
    floor = floors(make_folds(corpus(5, ("F_impro01",)), "leave_one_session_out"))
    assert floor["scenario"].mean == floor["scenario (stretched)"].mean == {"valence": 0, "avg": 0}


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no training utterance"):
        scenario_means((), TEST, ["valence"])
    with pytest.raises(ValueError, match="Ses01F_impro01_F000 has no dominance label"):
        scenario_means(TRAIN, TEST, ["valence", "dominance"])


# --- stretched --------------------------------------------------------------------------------------------------------


def acted(meaning: float = 1.0, turns: int = 30) -> Corpus:
    """Return a corpus whose valence has the scenario's own value, times `meaning`, and noise."""
    names = [f"{side}_impro0{k}" for k in range(1, 7) for side in "FM"]
    random = np.random.default_rng(0)
    some = corpus(5, names, turns)
    made = (
        replace(u, valence=3 + meaning * (int(str(u.scenario)[-1]) - 3.5) / 4 + random.normal())
        for u in some.utterances
    )
    return replace(some, utterances=tuple(made))


def test_the_stretch_is_the_best_of_a_grid_for_the_lookup_of_the_training_sessions() -> None:
    train = make_folds(acted(), "leave_one_session_out")[0].train
    (factor,) = stretch_factors(train, ["valence"], ("scenario",))
    labels = label_array(train, ["valence"])[:, 0]
    lookup = np.array(means(train, train))
    grid = np.arange(0.01, 8, 0.01)
    best = grid[np.argmax([ccc(labels.mean() + s * (lookup - labels.mean()), labels) for s in grid])]
    assert factor > 1.5
    assert factor == pytest.approx(best, abs=0.006)


def test_the_stretched_floor_scores_nearly_what_the_best_stretch_for_the_test_set_would() -> None:
    folds = make_folds(acted(), "leave_one_session_out")
    floor = floors(folds)
    predictions = floor_predictions(folds, ["valence"])["scenario"][:, 0]
    start, best = 0, []
    for fold in folds:
        p, t = predictions[start : start + len(fold.test)], label_array(fold.test, ["valence"])[:, 0]
        start += len(fold.test)
        best.append(max(ccc(3 + s * (p - 3), t) for s in np.arange(0.1, 6, 0.05)))
    stretched = floor["scenario (stretched)"].mean["valence"]
    assert stretched > floor["scenario"].mean["valence"] + 0.05
    assert stretched == pytest.approx(np.mean(best), abs=0.02)


def test_scenarios_without_meaning_are_not_stretched_although_the_lookup_fits_its_own_labels() -> None:
    # Each session orders its scenarios the other way round than the one before it, so a lookup across sessions errs.
    some = corpus(2, ("F_impro01", "F_impro02"), 4)
    train = tuple(
        replace(u, valence=4.0 if (u.session == "Ses01") == (u.scenario == "impro01") else 2.0) for u in some.utterances
    )
    assert stretch_factors(train, ["valence"], ("scenario",)).tolist() == [0]


def test_a_single_training_session_is_cross_fitted_by_dialogue() -> None:
    some = acted(3.0).utterances
    assert stretch_factors([u for u in some if u.session == "Ses01"], ["valence"], ("scenario",))[0] > 1


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_gives_back_every_prediction_and_its_score(tmp_path: Path) -> None:
    folds = make_folds(acted(turns=4), "leave_one_session_out")
    predictions = floor_predictions(folds, DIMENSIONS)
    directory = RunDirectory(tmp_path)
    assert read_floor(directory) is None
    directory.floor.write_text(floor_csv(folds, DIMENSIONS, predictions))
    table = read_floor(directory)
    assert table is not None
    assert table["utterance"].tolist() == [u.id for fold in folds for u in fold.test]
    assert table["fold"].tolist() == [fold.number for fold in folds for _ in fold.test]
    for name, values in predictions.items():
        for k, dimension in enumerate(DIMENSIONS):
            assert (table[f"{name}:{dimension}"].to_numpy() == values[:, k]).all()


@pytest.mark.parametrize("text", ["", "utterance,scenario:valence\na,1\n", "utterance,fold,scenario:valence\na,1,x\n"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "floor.csv").write_text(text)
    with pytest.raises(ResultsError, match=r"floor\.csv: cannot be read as a table of predictions"):
        read_floor(RunDirectory(tmp_path))


# --- controlled for the scenario --------------------------------------------------------------------------------------

SCENARIO = np.array(["a", "a", "b", "b"], dtype=object)


def test_controlled_ccc_of_a_worked_example() -> None:
    # Centred: prediction -1, 1, -2, 2 and truth -1, 1, 1, -1: 2 (1 + 1 - 2 - 2) / (10 + 4).
    assert scenario_controlled_ccc([1, 3, 0, 4], [2, 4, 5, 3], SCENARIO) == pytest.approx(-4 / 14)


def test_a_constant_the_scenario_mean_and_the_truth_score_0_0_and_1() -> None:
    truth = [0.1, 0.3, 2.0, 4.1]
    assert scenario_controlled_ccc([3.3] * 4, truth, SCENARIO) == 0
    assert scenario_controlled_ccc([0.7, 0.7, 3.1, 3.1], truth, SCENARIO) == 0
    assert scenario_controlled_ccc(truth, truth, SCENARIO) == pytest.approx(1)


def test_nothing_that_varies_within_a_scenario_leaves_it_undefined() -> None:
    assert scenario_controlled_ccc([0.1, 0.1, 0.2, 0.2], [0.7, 0.7, 3.1, 3.1], SCENARIO) is None


def _without_scenario(u: Utterance) -> Utterance:
    return replace(u, scenario=None)
