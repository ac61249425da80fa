"""MLflow mirrors the files: the same numbers, nothing twice, no orphans, and no failure that stops a run."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from mlflow.environment_variables import MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT

from cvrunner.orchestration.failures import Decision, Failure
from cvrunner.report.figures import draw, save_figures
from cvrunner.report.html import render_html
from cvrunner.report.report import read_epochs, read_report
from cvrunner.tracking.mirror import sync_run
from cvrunner.tracking.names import delta_metrics, page_links, score_metrics
from cvrunner.tracking.tracker import RunTracker, tracker_for, tracking_uri
from tests.runs import made_up_epoch, make_run


def client_of(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs_by_role(uri):
    client = client_of(uri)
    experiment = client.get_experiment_by_name("cvrunner-utterance")
    found: dict[str, list] = {"parent": [], "trial": [], "comparison": []}
    for run in client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]):
        found[run.data.tags["cvrunner.role"]].append(run)
    return found


def steps(uri, run, metric):
    return [point.step for point in client_of(uri).get_metric_history(run.info.run_id, metric)]


def named(runs, name):
    return next(run for run in runs if run.info.run_name == name)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = make_run(tmp_path_factory.mktemp("results"), epochs=3)
    report = read_report(directory)
    figures = draw(report)
    save_figures(directory, figures)
    directory.write_summary(report.summary)
    directory.report.write_text(render_html(report, figures))
    return directory


@pytest.fixture(scope="module")
def uri(directory):
    uri = tracking_uri(directory.read_config(), directory.path.parent)
    sync_run(directory, uri)
    return uri


@pytest.fixture(scope="module")
def runs(uri):
    return runs_by_role(uri)


def test_mlflow_has_the_numbers_of_the_summary(directory, runs):
    summary = read_report(directory).summary
    assert {role: len(of_role) for role, of_role in runs.items()} == {"parent": 2, "trial": 10, "comparison": 1}
    for parent in runs["parent"]:
        for dimension, score in summary.scores[parent.data.tags["cvrunner.condition"]].items():
            assert parent.data.metrics[f"ccc_mean/{dimension}"] == score.mean
            assert parent.data.metrics[f"ccc_pooled/{dimension}"] == score.pooled
    deltas = runs["comparison"][0].data.metrics
    for dimension, difference in summary.differences["unfrozen"].items():
        assert deltas[f"delta/unfrozen_{dimension}"] == difference.mean
        assert deltas[f"delta/unfrozen_{dimension}_speakers_low"] == difference.new_speakers.interval.low
    assert runs["comparison"][0].data.tags["mlflow.note.content"] == summary.verdict


def test_the_differences_carry_both_intervals(tmp_path):
    summary = read_report(make_run(tmp_path, seeds=(0, 1))).summary
    ((step, metrics), *_) = delta_metrics(summary)
    assert step == 0
    for dimension, difference in summary.differences["unfrozen"].items():
        for level, name in ((difference.on_corpus, ""), (difference.new_speakers, "_speakers")):
            of = f"delta/unfrozen_{dimension}{name}"
            assert (metrics[f"{of}_low"], metrics[f"{of}_high"]) == (level.interval.low, level.interval.high)
            assert (metrics[f"{of}_p"], metrics[f"{of}_detectable"]) == (level.p, level.detectable)


def test_a_condition_has_its_interval_among_its_scores_and_the_baseline_has_none(tmp_path):
    summary = read_report(make_run(tmp_path, seeds=(0, 1), epochs=1)).summary
    difference, metrics = summary.differences["unfrozen"]["avg"], score_metrics(summary, "unfrozen")
    interval = difference.on_corpus.interval
    assert metrics["delta/mean"] == difference.mean
    assert (metrics["delta/low"], metrics["delta/high"]) == (interval.low, interval.high)
    assert not any(name.startswith("delta/") for name in score_metrics(summary, "frozen"))


def test_the_pages_that_compare_runs_open_with_a_ccc(uri, runs):
    for run in runs["parent"]:
        assert next(iter(client_of(uri).get_run(run.info.run_id).data.metrics)) == "val_mean/ccc_avg"


def test_mlflows_client_prints_no_address_when_a_run_ends():
    assert MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.get()


def test_trials_are_children_with_parameters_and_their_own_curves(directory, uri, runs):
    parents = {run.info.run_id: run.data.tags["cvrunner.condition"] for run in runs["parent"]}
    for trial in runs["trial"]:
        assert parents[trial.data.tags["mlflow.parentRunId"]] == trial.data.params["condition"]
        assert trial.info.status == "FINISHED"
        assert trial.inputs.dataset_inputs[0].dataset.digest == "c" * 36
    trial = named(runs["trial"], "unfrozen/fold-2/seed-0")
    assert trial.data.params["model.freeze_speech_encoder"] == "False"
    assert trial.data.metrics["test/ccc_avg"] == directory.trial("unfrozen", 2, 0).result().test_ccc["avg"]
    assert steps(uri, trial, "val/ccc_valence") == [1, 2, 3]


def test_parents_have_curves_under_other_names_and_no_condition_parameter(directory, uri, runs):
    parent = next(run for run in runs["parent"] if run.data.tags["cvrunner.condition"] == "frozen")
    assert "condition" not in parent.data.params
    assert not set(parent.data.metrics) & set(runs["trial"][0].data.metrics)
    third = [read_epochs(directory, "frozen", fold, 0)[2].validation_ccc["valence"] for fold in range(1, 6)]
    assert parent.data.metrics["val_mean/ccc_valence"] == pytest.approx(np.mean(third))
    assert steps(uri, parent, "val_mean/ccc_avg") == [1, 2, 3]


def test_the_comparison_run_holds_the_files(uri, runs):
    client, run_id = client_of(uri), runs["comparison"][0].info.run_id
    assert {"report.html", "predictions.csv", "summary.json"} <= {f.path for f in client.list_artifacts(run_id)}
    assert len(client.list_artifacts(run_id, "figures")) == 14


def test_writing_again_adds_nothing(directory, uri, runs):
    before = {run.info.run_id: run.data.metrics for of_role in runs.values() for run in of_role}
    sync_run(directory, uri)
    after = {run.info.run_id: run.data.metrics for of_role in runs_by_role(uri).values() for run in of_role}
    assert after == before
    for parent in runs["parent"]:
        assert steps(uri, parent, "val_mean/ccc_avg") == [1, 2, 3]
        assert steps(uri, parent, "ccc_mean/avg") == [0]
    for trial in runs["trial"]:
        assert steps(uri, trial, "train/loss") == [1, 2, 3]
        assert len(steps(uri, trial, "test/ccc_avg")) == 1
    assert len(steps(uri, runs["comparison"][0], "delta/unfrozen_avg")) == 1


def test_links_need_an_address_and_lead_to_the_saved_view(directory, uri):
    assert sync_run(directory, uri) == {}
    links = sync_run(directory, uri, "http://127.0.0.1:5000/")
    key = links["scores and curves of all folds"].split("viewStateShareKey=")[1].split("&")[0]
    experiment = client_of(uri).get_experiment_by_name("cvrunner-utterance")
    assert f"mlflow.sharedViewState.{key}" in experiment.tags
    assert all(link.startswith("http://127.0.0.1:5000/#/") for link in links.values())


def test_a_server_has_its_own_page_and_a_database_the_one_that_is_started_for_it():
    def addresses(uri, base_url):
        return {link.split("/#")[0] for link in page_links(uri, base_url, "1", "view", ["a", "b"], "c").values()}

    assert addresses("https://tracking.example", "http://127.0.0.1:5000") == {"https://tracking.example"}
    assert addresses("sqlite:////tmp/mlflow.db", "http://127.0.0.1:5000") == {"http://127.0.0.1:5000"}
    assert addresses("sqlite:////tmp/mlflow.db", None) == set()


def test_parents_have_the_settings_but_not_the_name_that_groups_trials(runs):
    params = {run.data.tags["cvrunner.condition"]: run.data.params for run in runs["parent"]}
    assert params["frozen"]["model.freeze_speech_encoder"] == "True"
    assert params["unfrozen"]["model.freeze_speech_encoder"] == "False"
    assert not {"condition", "fold", "seed"} & params["frozen"].keys()


def trial_named(name):
    return SimpleNamespace(name=name)


def test_a_run_that_continues_is_found_again_and_orphans_are_closed(tmp_path):
    directory = make_run(tmp_path, folds=2, epochs=2, missing=["unfrozen/fold-2/seed-0"])
    run, config = directory.read_run(), directory.read_config()
    uri, name = tracking_uri(config, tmp_path), "unfrozen/fold-2/seed-0"
    # A trial that waits again, as the driver leaves it in run.json before it starts.
    waiting = run.trials[name].model_copy(update={"status": "WAITING"})
    directory.write_run(run.model_copy(update={"trials": run.trials | {name: waiting}}))
    killed = RunTracker(uri, pytest.fail)
    killed.start(run, config, directory)
    killed.attempt(trial_named(name), 1)
    assert killed.wait(60)
    assert named(runs_by_role(uri)["trial"], name).info.status == "RUNNING"

    resumed = RunTracker(uri, pytest.fail)
    resumed.start(run, config, directory)
    assert resumed.wait(60)
    assert named(runs_by_role(uri)["trial"], name).info.status == "KILLED"
    resumed.attempt(trial_named(name), 2)
    random = np.random.default_rng(0)
    for epoch in (1, 2, 3):  # the first two again, as after a restart from nothing
        resumed.event(trial_named(name), made_up_epoch(epoch, 3, 0.5, random))
    resumed.failed(trial_named(name), Failure("non_finite", "NonFiniteError: made up"), Decision.FAIL)
    resumed.finish(read_report(directory), "INCOMPLETE")

    found = runs_by_role(uri)
    trial = named(found["trial"], name)
    assert (len(found["parent"]), len(found["trial"])) == (2, 4)
    assert steps(uri, trial, "train/loss") == [1, 2, 3]
    assert trial.info.status == "FAILED"
    assert trial.data.tags["cvrunner.error"] == "NonFiniteError: made up"
    # The third epoch is not every trial's, and an incomplete run has no mean.
    unfrozen = next(run for run in found["parent"] if run.data.tags["cvrunner.condition"] == "unfrozen")
    assert steps(uri, unfrozen, "val_mean/ccc_avg") == [1, 2]
    assert not [metric for metric in unfrozen.data.metrics if metric.startswith("ccc_")]
    statuses = {run.info.status for of_role in found.values() for run in of_role}
    assert "RUNNING" not in statuses


def test_a_server_that_is_away_costs_one_warning(directory, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    warnings: list[str] = []
    tracker = RunTracker("http://127.0.0.1:9", warnings.append)
    run, config = directory.read_run(), directory.read_config()
    tracker.start(run, config, directory)
    for name in run.trials:
        tracker.attempt(trial_named(name), 1)
        tracker.event(trial_named(name), made_up_epoch(1, 1, 1.0, np.random.default_rng(0)))
        tracker.failed(trial_named(name), Failure("permanent", "made up"), Decision.FAIL)
    assert tracker.wait(60)
    assert len(warnings) == 1
    assert "cvrunner sync" in warnings[0]
    assert "\n" not in warnings[0]
    tracker.finish(read_report(directory), "COMPLETE")
    assert tracker.links() == {}
    assert len(warnings) == 2


def test_what_failed_on_the_way_is_written_at_the_end(directory, tmp_path, monkeypatch):
    uri, warnings = f"sqlite:///{tmp_path}/mlflow.db", []
    tracker = RunTracker(uri, warnings.append)
    tracker.start(directory.read_run(), directory.read_config(), directory)
    assert tracker.wait(60)
    with monkeypatch.context() as broken:
        broken.setattr("cvrunner.tracking.mlflow_store.MlflowStore.log_metrics", lambda *_: 1 / 0)
        tracker.event(trial_named("frozen/fold-1/seed-0"), made_up_epoch(4, 4, 1.0, np.random.default_rng(0)))
        assert tracker.wait(60)
    tracker.finish(read_report(directory), "COMPLETE")
    assert len(warnings) == 1
    assert "ZeroDivisionError" in warnings[0]
    assert len(runs_by_role(uri)["trial"]) == 10
    assert tracker.links("http://127.0.0.1:5000")


def test_the_links_are_shown_once_at_the_first_event_after_they_are_known(directory, uri):
    shown: list[dict[str, str]] = []
    tracker = RunTracker(uri, pytest.fail)
    tracker.start(directory.read_run(), directory.read_config(), directory, shown.append)
    assert tracker.wait(60)
    assert shown == []
    for epoch in (1, 2):
        record = made_up_epoch(epoch, 3, 1.0, np.random.default_rng(0))
        tracker.event(trial_named("frozen/fold-1/seed-0"), record)
    tracker.finish(read_report(directory), "COMPLETE")
    assert shown == [tracker.links("http://127.0.0.1:5000")]
    assert shown[0]


def test_tracking_that_is_off_needs_no_mlflow(tmp_path):
    directory = make_run(tmp_path, folds=1, epochs=1)
    config = directory.read_config()
    off = config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": False})})
    tracker, report = tracker_for(off, tmp_path / "off", pytest.fail), read_report(directory)
    tracker.start(report.run, off, directory)
    tracker.attempt(trial_named("frozen/fold-1/seed-0"), 1)
    tracker.finish(report, "COMPLETE")
    assert tracker.links("http://127.0.0.1:5000") == {}
    assert not (tmp_path / "off").exists()
    code = "import sys, cvrunner.tracking.tracker; sys.exit('mlflow' in sys.modules or 'matplotlib' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": "."}, check=False).returncode == 0
    )
