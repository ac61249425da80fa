"""predictions.csv holds who said what, how it was rated and what was predicted, with every digit."""

from __future__ import annotations

import csv

import numpy as np

from cvrunner.verdict.predictions import write_predictions
from tests.corpora import utterance


def rows(tmp_path, *utterances):
    values = {"valence": np.full(len(utterances), 1 / 3)}
    write_predictions(tmp_path / "predictions.csv", utterances, ("frozen", 2, 0), values, values)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_names_the_utterance_and_keeps_every_digit(tmp_path):
    (row,) = rows(tmp_path, utterance("Ses01F_impro01_M003"))
    assert (row["utterance"], row["speaker"], row["scenario"]) == ("Ses01F_impro01_M003", "01M", "impro01")
    assert (row["condition"], row["fold"], row["seed"]) == ("frozen", "2", "0")
    assert float(row["valence_predicted"]) == 1 / 3


def test_improvised_is_true_false_or_empty(tmp_path):
    names = ("Ses01F_impro01_M003", "Ses01F_script01_1_M003")
    said = rows(tmp_path, *map(utterance, names), utterance(names[0], improvised=None, scenario=None, gender=None))
    assert [row["improvised"] for row in said] == ["true", "false", ""]
    assert (said[2]["scenario"], said[2]["gender"]) == ("", "")
