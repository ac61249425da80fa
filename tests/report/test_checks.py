"""The run checks: plain words, and capitals if a check found something."""

from __future__ import annotations

import json

from cvrunner.records.results import FloorRecord, Score
from cvrunner.report.evidence import checks_table
from cvrunner.report.report import read_report
from tests.runs import make_run


def found(directory):
    return dict(checks_table(read_report(directory)).rows)


def change(directory, trial, **values):
    file = directory.path / trial / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_sound_run_says_so_question_by_question(tmp_path):
    rows = found(make_run(tmp_path))
    frozen, unfrozen = rows["did frozen train the right weights?"], rows["did unfrozen train the right weights?"]
    assert (
        frozen == "yes: encoder frozen and unchanged after every epoch in 5 of 5 trials; head weights changed by 30 %"
    )
    assert (
        unfrozen
        == "yes: encoder weights changed by 1 % by the last epoch in 5 of 5 trials; head weights changed by 30 %"
    )
    assert rows["collapsed predictions"].startswith("none")
    assert rows["attempts after the first"] == "none"
    assert rows["out of memory"] == "never: every trial kept its batch_size"
    assert rows["labels"].startswith("header: the rating printed next to")
    assert rows["labels outside the scale"] == "none outside 1 to 5"
    assert rows["encoder weights"] == "made-up-wavlm, SHA-256 eeeeeeeeeeee, the same in all trials"
    assert "encoder tuned on emotion" not in rows
    assert rows["split"] == "digest 555555555555, the same in all trials"


def test_what_is_wrong_is_named(tmp_path):
    directory = make_run(tmp_path, missing=["unfrozen/fold-5/seed-0"])
    change(directory, "frozen/fold-2/seed-0", collapsed=["valence"], labels_outside_scale=7, best_epoch=1)
    change(directory, "unfrozen/fold-1/seed-0", encoder_digest="f" * 64, split_digest="6" * 64)
    change(directory, "unfrozen/fold-3/seed-0", batch_size=1, encoder_tuned="matches *emotion*")
    rows = found(directory)
    assert rows["encoder tuned on emotion"].startswith("probably: made-up-wavlm matches *emotion*; allowed by")
    assert (
        rows["out of memory"]
        == "batch_size was reduced, with the same effective batch size (unfrozen/fold-3/seed-0: 1)"
    )
    assert (
        rows["collapsed predictions"] == "CONSTANT predictions, which score a CCC of 0: frozen/fold-2/seed-0: valence"
    )
    assert rows["labels outside the scale"] == "7 outside 1 to 5; kept as they are"
    assert "in 8 of 9 trials, the last epoch was the best on validation" in rows["trained long enough?"]
    assert rows["attempts after the first"] == "unfrozen/fold-5/seed-0: 1 (worker_died 2)"
    assert rows["encoder weights"].startswith("NOT THE SAME weights")
    assert rows["split"].startswith("NOT THE SAME split")


def test_before_the_first_result_there_is_nothing_to_say(tmp_path):
    names = [f"{condition}/fold-1/seed-0" for condition in ("frozen", "unfrozen")]
    assert checks_table(read_report(make_run(tmp_path, folds=1, missing=names))).rows == []


def test_a_condition_below_the_floor_is_named(tmp_path):
    directory = make_run(tmp_path)
    low, high = Score(mean=0.1, pooled=0.1), Score(mean=0.99, pooled=0.99)
    floor = FloorRecord(
        scores={
            "scenario": {"valence": low, "arousal": low, "avg": low},
            "scenario+gender+side": {"valence": high, "arousal": low, "avg": low},
        }
    )
    directory.write_run(directory.read_run().model_copy(update={"floor": floor}))
    rows = found(directory)
    said = rows["does unfrozen beat the floor?"].split("; ")
    assert [part.split(" (")[0] for part in said] == ["CCC-V NO", "CCC-A yes", "CCC-Avg yes"]
    assert said[0].endswith("no audio 0.9900)")


def test_without_a_floor_nothing_is_claimed(tmp_path):
    assert found(make_run(tmp_path))["does frozen beat the floor?"] == "there is no floor to compare with"
