"""What the dashboards show, from events alone; and the dashboard asks for nothing that is not there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cvrunner.orchestration import ray_metrics as g
from cvrunner.orchestration.eta import MIN_GAIN_S, Eta
from cvrunner.orchestration.events import format_event
from cvrunner.orchestration.failures import Decision, Failure
from cvrunner.orchestration.ray_metrics import METRICS, Gauges
from cvrunner.records.results import EpochRecord, FeatureProgress, TrialResult, Waiting, WorkerStarted
from jobs import grafana
from tests.trials import pick, tiny_trials

REPOSITORY = Path(__file__).parent.parent.parent
DASHBOARD = json.loads(grafana.FILE.read_text())


def epoch(number: int, epochs: int = 3, valence: float | None = 0.25, seconds: float = 10.0) -> EpochRecord:
    return EpochRecord(
        epoch=number,
        epochs=epochs,
        updates=number,
        train_loss=0.5,
        validation_ccc={"valence": valence, "arousal": 0.5, "avg": 0.375},
        best=True,
        train_s=seconds - 1,
        validation_s=1.0,
        utterances_per_s=20.0,
        padding_share=0.1,
        peak_memory_mib=100.0,
        groups={},
        layer_weights={},
    )


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two conditions, three folds, three epochs each."""
    return tiny_trials(tmp_path_factory.mktemp("trials"))


def test_before_anything_has_happened_only_counts_are_known(trials: list[Any]) -> None:
    values = Gauges("run", trials, trials[1:], slots=2).values()
    states = {labels[1]: value for labels, value in values[g.TRIALS].items()}
    assert states == {"waiting": 5, "running": 0, "done": 1, "failed": 0, "stopped": 0}
    assert set(values[g.EPOCHS].values()) == {3}
    assert values[g.RUN_ETA] == values[g.ETA] == values[g.VALIDATION_CCC] == values[g.RETRIES] == {}


def test_an_epoch_is_told_by_condition_fold_seed_and_dimension(trials: list[Any]) -> None:
    trial = pick(trials, "unfrozen", fold=2)
    gauges = Gauges("run", trials, trials, slots=2)
    gauges.attempt(trial, 1)
    gauges.event(trial, FeatureProgress(kind="conv", done=1, shards=2))
    gauges.event(trial, epoch(1, valence=None))
    values, labels = gauges.values(), ("run", "unfrozen", "2", "0")
    assert values[g.VALIDATION_CCC] == {(*labels, "arousal"): 0.5, (*labels, "avg"): 0.375}
    assert values[g.TRAIN_LOSS] == {labels: 0.5}
    assert values[g.SPEED] == {labels: 20.0}
    assert values[g.MEMORY] == {labels: 100.0}
    assert values[g.EPOCH][labels] == 1
    # Two epochs of ten seconds are left of this trial, and of the six on two slots 17 in all: with pauses 8.5 each, and
    # as much more as is not worth a pause.
    assert values[g.ETA][labels] == pytest.approx(20)
    assert values[g.RUN_ETA] == {("run",): pytest.approx(85 + MIN_GAIN_S)}
    assert values[g.TRIALS]["run", "running"] == 1


def test_the_eta_counts_what_trials_need_besides_their_epochs(tmp_path: Path) -> None:
    trials = tiny_trials(tmp_path, cluster={"preempt": False})
    eta = Eta(trials, slots=2)
    result = TrialResult.model_construct(test_ccc={}, train_s=30.0, total_s=37.0)
    eta.attempt(trials[0], 1)
    for number in (1, 2, 3):
        eta.event(trials[0], epoch(number))
    assert eta.remaining_s() == 90
    eta.event(trials[0], result)
    # Five trials on two slots, three of them one after the other.
    assert eta.remaining_s() == 3 * (30 + 7)


def test_what_a_trial_said_stays_after_it_and_retries_are_counted_by_kind(trials: list[Any]) -> None:
    first, second = trials[:2]
    gauges = Gauges("run", trials, trials, slots=1)
    for trial in (first, second):
        gauges.attempt(trial, 1)
        gauges.event(trial, epoch(1))
    gauges.failed(first, Failure("worker_died", "gone"), Decision.RETRY)
    gauges.attempt(first, 2)
    gauges.event(first, TrialResult.model_construct(test_ccc={}, best_epoch=1, train_s=1.0, total_s=1.0))
    gauges.failed(second, Failure("worker_died", "gone"), Decision.FAIL)
    values = gauges.values()
    assert values[g.RETRIES] == {("run", "worker_died"): 1}
    assert values[g.TRIALS]["run", "done"] == values[g.TRIALS]["run", "failed"] == 1
    for trial in (first, second):
        labels = ("run", trial.condition, str(trial.fold.number), "0")
        assert values[g.TRAIN_LOSS][labels] == 0.5
        assert values[g.ETA][labels] == 0


def test_names_are_ours_and_end_in_their_unit() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert all(re.fullmatch(r"cvrunner_[a-z_]+", metric.name) for metric in METRICS)
    for quantity, unit in {"eta": "seconds", "memory": "mib"}.items():
        assert all(m.name.endswith(f"_{unit}") for m in METRICS if quantity in m.name)


def test_the_dashboard_is_the_one_that_its_script_writes() -> None:
    assert grafana.dashboard() == DASHBOARD, "run: python jobs/grafana.py"


def test_each_metric_has_a_panel_and_each_panel_asks_for_a_metric_and_labels_that_are_exported() -> None:
    asked = [panel["targets"][0]["expr"] for panel in DASHBOARD["panels"]]
    labels = {f"ray_{metric.name}": set(metric.labels) for metric in METRICS}
    assert sorted(re.search(r"ray_cvrunner_\w+", query)[0] for query in asked) == sorted(labels)  # type: ignore[index]
    for panel, query in zip(DASHBOARD["panels"], asked, strict=True):
        there = labels[re.search(r"ray_cvrunner_\w+", query)[0]]  # type: ignore[index]
        by, chosen = re.search(r"by \(([^)]*)\)", query), re.findall(r"(\w+)=~?\"", query)
        shown = re.findall(r"{{(\w+)}}", panel["targets"][0]["legendFormat"])
        assert {*chosen, *shown, *(by[1].split(", ") if by else [])} <= there
    for variable in DASHBOARD["templating"]["list"][1:]:
        metric, label = re.fullmatch(r"label_values\((\w+).*, (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
        assert label in labels[metric]


def test_the_page_about_watching_lists_each_metric_with_its_labels() -> None:
    page = (REPOSITORY / "docs" / "watching.md").read_text()
    rows = re.findall(r"^\| `(ray_cvrunner_\w+)` \| (.+?) \| (.+?) \|$", page, flags=re.MULTILINE)
    assert rows == [(f"ray_{m.name}", ", ".join(m.labels), m.help) for m in METRICS]


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (epoch(2), "epoch 2/3  loss 0.500  validation CCC-V 0.2500  CCC-A 0.5000  10.0 s  best"),
        (epoch(2, valence=None), "epoch 2/3  loss 0.500  validation CCC-V –  CCC-A 0.5000  10.0 s  best"),
        (Waiting(what="a GPU"), "waits for a GPU"),
        (FeatureProgress(kind="conv", done=1, shards=2), "conv: 1 of 2 shards in the cache"),
        (Failure("gpu_memory", "full"), "gpu memory: full"),
        (WorkerStarted(host="here", node="1", pid=2), None),
    ],
)
def test_an_event_is_one_line(event: Any, text: str | None) -> None:
    assert format_event(event, ("valence", "arousal")) == text
