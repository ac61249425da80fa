"""The run checks: plain words, and capitals if a check found something."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from cvrunner.config.schema import merge, validate
from cvrunner.report.checks import checks_table
from cvrunner.report.evidence import claims_table, facts, origin_table, settings_table
from cvrunner.report.report import read_report
from cvrunner.text import DASH
from tests.runs import make_run, write_config


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
    assert rows["precision"] == "float32, as requested on every device"
    assert "encoder tuned on emotion" not in rows
    assert rows["split"] == "digest 555555555555, the same in all trials"


def test_what_is_wrong_is_named(tmp_path):
    directory = make_run(tmp_path, missing=["unfrozen/fold-5/seed-0"])
    change(directory, "frozen/fold-2/seed-0", collapsed=["valence"], labels_outside_scale=7)
    change(directory, "unfrozen/fold-1/seed-0", encoder_digest="f" * 64, split_digest="6" * 64)
    change(directory, "unfrozen/fold-3/seed-0", batch_size=1, precision="bfloat16", encoder_tuned="matches *emotion*")
    rows = found(directory)
    assert rows["encoder tuned on emotion"].startswith("probably: made-up-wavlm matches *emotion*; allowed by")
    assert (
        rows["out of memory"]
        == "batch_size was reduced, with the same effective batch size (unfrozen/fold-3/seed-0: 1)"
    )
    assert (
        rows["collapsed predictions"]
        == "COLLAPSED, the predictions vary less than 5 % as much as the labels: frozen/fold-2/seed-0: valence"
    )
    assert rows["labels outside the scale"] == "7 outside 1 to 5; kept as they are"
    assert rows["attempts after the first"] == "unfrozen/fold-5/seed-0: 1 (worker_died 2)"
    assert rows["encoder weights"].startswith("NOT THE SAME weights")
    assert rows["precision"] == "NOT THE SAME on all devices, so nothing is compared: auto became bfloat16 and float32"
    assert rows["split"].startswith("NOT THE SAME split")


def test_a_condition_that_was_not_trained_for_long_enough_is_named(tmp_path):
    directory = make_run(tmp_path, epochs=6)
    rows = found(directory)
    # The made-up curves still rise steeply after six epochs.
    assert rows["did unfrozen train for long enough?"].startswith("NO, more epochs might score higher: ")
    assert found(make_run(tmp_path / "long", epochs=40))["did unfrozen train for long enough?"].startswith("yes: ")
    short = found(make_run(tmp_path / "short", epochs=1))
    assert short["did frozen train for long enough?"].startswith("not known: no finished trial has 3 epochs")


def test_weights_that_barely_moved_are_named(tmp_path):
    directory = make_run(tmp_path)
    change(directory, "unfrozen/fold-3/seed-0", barely_moved={"encoder": 0.012}, weight_change_best={"encoder": 2e-8})
    rows = found(directory)
    assert rows["did frozen train the right weights?"].startswith("yes")
    assert rows["did unfrozen train the right weights?"].startswith(
        "BARELY: weights moved far less than their learning rate implies "
        "(unfrozen/fold-3/seed-0: encoder by 2.0e-08, implied 1.2e-02)"
    )


def test_layer_weights_that_stayed_uniform_are_said(tmp_path):
    directory = make_run(tmp_path, folds=2)
    uniform = {"valence": [0.202, 0.198, 0.2, 0.2, 0.2], "arousal": [0.1, 0.3, 0.2, 0.2, 0.2]}
    change(directory, "frozen/fold-1/seed-0", layer_weights=uniform)
    for fold in (1, 2):
        change(directory, f"unfrozen/fold-{fold}/seed-0", layer_weights={"valence": [0.5, 0.5], "arousal": [0.5, 0.5]})
    rows = found(directory)
    assert rows["did frozen learn layer weights?"].endswith("they stayed uniform in frozen/fold-1/seed-0 valence")
    assert rows["did unfrozen learn layer weights?"].startswith("NO: they stayed uniform in every trial")
    for fold in (1, 2):
        change(directory, f"unfrozen/fold-{fold}/seed-0", layer_weights={"valence": [1.0], "arousal": [1.0]})
    assert found(directory)["did unfrozen learn layer weights?"] == "one layer, nothing to learn"


def with_origin(directory, samples, **conditions):
    data = directory.read_config().model_dump(mode="json")
    data["settings_from"] = {"source": "tune", "sweep": "made-up-tune", "samples_per_condition": samples}
    data["conditions"] = merge(data["conditions"], conditions)
    write_config(directory, validate(data, "test"))


def test_the_origin_of_the_settings_and_an_unequal_budget_are_said(tmp_path):
    directory = make_run(tmp_path)
    assert found(directory)["same search for all conditions?"].startswith("no recorded search")
    with_origin(directory, {"frozen": 12, "unfrozen": 12})
    assert found(directory)["same search for all conditions?"] == "yes: 12 settings per condition"
    with_origin(directory, {"unfrozen": 12})
    assert (
        found(directory)["same search for all conditions?"]
        == "NOT THE SAME: settings tried: frozen 0, unfrozen 12; this favours unfrozen over frozen"
    )
    table = origin_table(read_report(directory))
    assert table.rows == [["frozen", "tune", "0", "no"], ["unfrozen", "tune", "12", "no"]]
    assert table.note == "Sweep: made-up-tune."


def test_settings_per_fold_are_shown(tmp_path):
    directory = make_run(tmp_path)
    with_origin(directory, {}, unfrozen={"folds": {"2": {"train": {"lr": 0.003}}}})
    rows = {row[0]: row[1:] for row in settings_table(read_report(directory)).rows}
    assert rows["train.lr"] == ["0.0001", "5e-05, 2: 0.003"]


def test_before_the_first_result_there_is_nothing_to_say(tmp_path):
    names = [f"{condition}/fold-1/seed-0" for condition in ("frozen", "unfrozen")]
    assert checks_table(read_report(make_run(tmp_path, folds=1, missing=names))).rows == []


def test_a_lead_over_the_floor_is_claimed_only_if_level_1_shows_it(tmp_path):
    directory = make_run(tmp_path, seeds=(0, 1))
    data = read_report(directory).out_of_fold
    # A floor that knows the ratings, and one that says nothing.
    table = data.about[["utterance", "fold"]].copy()
    for name, values in (("scenario", data.truth), ("scenario+gender+side", np.full_like(data.truth, 3.0))):
        for k, dimension in enumerate(("valence", "arousal")):
            table[f"{name}:{dimension}"] = table[f"{name} (stretched):{dimension}"] = values[:, k]
    table.to_csv(directory.floor, index=False)
    rows = found(directory)
    assert rows["does unfrozen beat the floor (scenario)?"].startswith("CCC-V NO, it scores lower, -")
    assert rows["does unfrozen beat the floor (scenario, gender, side)?"].startswith("CCC-V yes, +")


def test_without_a_floor_nothing_is_claimed(tmp_path):
    assert not [name for name in found(make_run(tmp_path)) if "beat" in name]


@pytest.mark.parametrize("device", ["NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3", "Quadro RTX 8000"])
def test_a_claim_about_cost_is_tested_on_a_gpu_by_any_name_and_never_on_a_cpu(tmp_path, device):
    directory = make_run(tmp_path, synthetic=False)
    claim = {"name": "memory", "condition": "frozen", "quantity": "memory_gb", "low": 10.0}
    config = yaml.safe_load(directory.config.read_text())
    config["reference"]["claims"] = [claim, claim | {"quantity": "minutes_per_epoch"}]
    directory.config.write_text(yaml.safe_dump(config))
    trials = [f"frozen/fold-{fold}/seed-0" for fold in range(1, 6)]
    for trial in trials:
        change(directory, trial, device=device, peak_memory_mib=8000.0)
    rows = claims_table(read_report(directory)).rows
    # 8000 MiB in the unit of the claim, GB; 10 s per epoch in minutes.
    assert [row[4:] for row in rows] == [["8.3886", "met"], ["0.1667", "met"]]
    change(directory, trials[-1], device="cpu")
    assert [row[4:] for row in claims_table(read_report(directory)).rows] == [[DASH, "not testable here"]] * 2


def test_warnings_about_the_corpus_are_in_the_run_checks_and_their_absence_too(tmp_path):
    directory = make_run(tmp_path)
    assert found(directory)["warnings about the corpus"] == "none"
    warnings = ["clipped audio: 3 (first: here)", "sessions that are missing: 1 (first: Session2)"]
    directory.write_run(directory.read_run().model_copy(update={"corpus_warnings": warnings}))
    assert found(directory)["warnings about the corpus"] == "; ".join(warnings)


def test_a_manifest_has_no_label_variant_of_iemocap(tmp_path):
    directory = make_run(tmp_path)
    text = directory.config.read_text()
    directory.config.write_text(text.replace("format: demo", "format: manifest"))
    assert directory.read_config().corpus.format == "manifest"
    report = read_report(directory)
    assert dict(checks_table(report).rows)["labels"] == "manifest: as listed in the manifest"
    assert dict(facts(report))["label variant"] == "manifest"
