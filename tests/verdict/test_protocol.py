"""The protocol: what it declares, what counts as a change, and what was added after test scores were seen."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from cvrunner.config.sections import Dimension, VerdictConfig
from cvrunner.verdict.ledger import LEDGER, Look, added_after_look, looks_at, new_scores, read_ledger, record_look
from cvrunner.verdict.protocol import (
    DECISION,
    ConditionProtocol,
    Protocol,
    changes,
    cluster_unit,
    protocol_text,
    question,
)
from tests.runs import make_run


def protocol(
    conditions: dict[str, str], seeds: list[int], margin: float = 0.02, corpus: str = "c" * 64, split: str = "5" * 64
) -> Protocol:
    """A protocol of made-up conditions, given as name and digest; the first is the baseline."""
    return Protocol(
        question=question(next(iter(conditions)), list(conditions)[1:], "avg"),
        primary="avg",
        secondary=["valence", "arousal"],
        margin=margin,
        cluster="dialogue",
        baseline=next(iter(conditions)),
        conditions={
            name: ConditionProtocol(
                overrides={"train": {"lr": 0.1}}, seeds=seeds, encoder="wavlm", encoder_digest="e" * 64, digest=digest
            )
            for name, digest in conditions.items()
        },
        seeds=seeds,
        folds=[1, 2, 3],
        scheme="leave_one_session_out",
        selection="the best epoch",
        decision=list(DECISION),
        settings={"train": {"epochs": 3}},
        corpus="made up, with a description " + "that is long " * 20,
        corpus_digest=corpus,
        split_digest=split,
        code_digest="d" * 64,
        cvrunner_version="0.2.0",
    )


def look(of: Protocol, run: str = "first", **changed: object) -> Look:
    values = {
        "run": run,
        "command": ["all-folds"],
        "corpus_digest": of.corpus_digest,
        "split_digest": of.split_digest,
        "conditions": {name: condition.digest for name, condition in of.conditions.items()},
        "seeds": of.seeds,
        "scores": {"frozen/fold-1/seed-0": "1234"},
    }
    return Look.model_validate(values | changed)


BASE = protocol({"frozen": "f", "unfrozen": "u"}, [0])


def test_the_hash_depends_on_every_value_and_not_on_the_order_of_keys() -> None:
    assert protocol({"frozen": "f", "unfrozen": "u"}, [0]).sha256 == BASE.sha256
    assert protocol({"frozen": "f", "unfrozen": "u"}, [0], margin=0.05).sha256 != BASE.sha256
    again = Protocol.from_json(json.dumps(dict(reversed(BASE.model_dump().items()))), "test")
    assert again.sha256 == BASE.sha256


def test_changes_name_the_key_with_both_values() -> None:
    new = protocol({"frozen": "f", "unfrozen": "u", "lora": "l"}, [0, 1], margin=0.05)
    found = changes(BASE, new)
    assert "margin: 0.02 -> 0.05" in found
    assert "seeds: [0] -> [0, 1]" in found
    assert "conditions.lora.digest: none -> l" in found
    assert changes(BASE, BASE) == []


@pytest.mark.parametrize(
    ("speakers", "unit"),
    [
        ([("s1", "a"), ("s1", "b"), ("s2", "c"), ("s2", "d")], "dialogue"),
        ([("s1", "a"), ("s1", "b"), ("s2", "c"), ("s2", "d"), ("s2", "e")], "speaker"),
    ],
)
def test_the_resampled_unit_is_the_speaker_where_a_session_has_more_than_two(
    speakers: list[tuple[str, str]], unit: str
) -> None:
    assert cluster_unit(VerdictConfig(), speakers) == unit
    assert cluster_unit(VerdictConfig(cluster="dialogue"), speakers) == "dialogue"
    assert cluster_unit(VerdictConfig(cluster="speaker"), speakers) == "speaker"


@pytest.mark.parametrize("primary", ["avg", "valence"])
def test_the_question_names_the_primary_outcome(primary: Dimension) -> None:
    label = {"avg": "CCC-Avg", "valence": "CCC-V"}[primary]
    assert question("a", ["b"], primary).startswith(f"Does b differ from a in test {label},")
    assert question("a", ["b", "c"], primary).startswith(f"Do b, c differ from a in test {label},")
    assert question("a", [], primary) == f"Which test {label} does a reach?"


def test_the_text_says_everything_in_lines_of_less_than_100_columns() -> None:
    text = protocol_text(BASE)
    assert max(map(len, text.splitlines())) < 100
    words = " ".join(text.split())
    for value in (BASE.question, BASE.sha256, BASE.corpus_digest, BASE.split_digest, BASE.code_digest, *DECISION):
        assert value in words
    assert "train.lr = 0.1 (baseline)" in words


# --- looks ------------------------------------------------------------------------------------------------------------


def test_seeds_and_conditions_that_an_earlier_look_did_not_have_are_named() -> None:
    new = protocol({"frozen": "f", "unfrozen": "u", "lora": "l"}, [0, 1, 2])
    assert added_after_look(new, [look(BASE)]) == ["seed 1", "seed 2", "condition lora"]
    assert added_after_look(new, []) == []
    assert added_after_look(BASE, [look(BASE)]) == []


def test_what_was_declared_before_the_look_is_not_named_even_if_it_was_trained_later() -> None:
    new = protocol({"frozen": "f", "unfrozen": "u"}, [0, 1], margin=0.05)
    assert added_after_look(new, [look(BASE)], [protocol({"frozen": "f", "unfrozen": "u"}, [0, 1])]) == []


def test_a_look_at_other_settings_another_corpus_or_another_split_is_another_comparison() -> None:
    new = protocol({"frozen": "f", "unfrozen": "u"}, [0, 1])
    assert added_after_look(new, [look(BASE, conditions={"frozen": "x", "unfrozen": "y"})]) == []
    assert added_after_look(new, [look(BASE, corpus_digest="other")]) == []
    assert added_after_look(new, [look(BASE, split_digest="other")]) == []


def test_a_condition_under_another_name_is_known_by_its_settings() -> None:
    assert added_after_look(protocol({"frozen": "f", "full": "u"}, [0]), [look(BASE)]) == []


def test_looks_are_counted_per_corpus_and_a_damaged_line_is_skipped(tmp_path: Path) -> None:
    assert record_look(tmp_path, look(BASE)) == 0
    assert record_look(tmp_path, look(BASE, corpus_digest="other")) == 0
    with (tmp_path / LEDGER).open("a") as file:
        file.write('{"event": "look", "run": "cut')
    assert record_look(tmp_path, look(BASE, "second")) == 1
    looks = read_ledger(tmp_path)
    assert [of.run for of in looks] == ["first", "first", "second"]
    assert looks_at(looks, BASE.corpus_digest) == 2
    assert all(of.time for of in looks)


def _append(folder: Path, name: str) -> None:
    for number in range(20):
        record_look(folder, look(BASE, f"{name}-{number}"))


def test_two_processes_may_append_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append, args=(tmp_path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    looks = read_ledger(tmp_path)
    assert {of.run for of in looks} == {f"{name}-{number}" for name in "ab" for number in range(20)}
    assert len(looks) == 40


def test_scores_are_new_until_a_look_has_recorded_them_with_the_same_predictions(tmp_path: Path) -> None:
    directory = make_run(tmp_path, "made-up", folds=2, epochs=1)
    results = {
        name: result.model_copy(update={"predictions_sha256": f"{number}" * 64})
        for number, (name, result) in enumerate(directory.results(directory.read_run()).items())
    }
    new = new_scores([], "made-up", results)
    assert set(new) == set(results)
    name, *others = new
    seen = look(BASE, "made-up", scores={name: new[name]})
    assert set(new_scores([seen], "made-up", results)) == set(others)
    assert set(new_scores([seen], "another run", results)) == set(results)
    again = {name: results[name].model_copy(update={"predictions_sha256": "a" * 64})}
    assert set(new_scores([seen], "made-up", again)) == {name}
