"""What a run would cost follows from the probes by plain sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cvrunner.config.sections import Claim, ClusterConfig
from cvrunner.data.utterance import Utterance
from cvrunner.orchestration.eta import longest_without_pause_s
from cvrunner.orchestration.resources import Resources, hypothetical
from cvrunner.run.estimate import RAY_AND_REPORT_S, Forecast, as_json, forecast
from cvrunner.training.trial import Trial
from tests.probes import made_up
from tests.trials import tiny_corpus, tiny_trials

CLAIMS = [
    {"name": "frozen, batch 8", "condition": "frozen", "quantity": "memory_gb", "low": 5.2},
    {"name": "baseline", "condition": "frozen", "quantity": "ccc_avg", "low": 0.6},
    {"name": "unfrozen, batch 8 x 1", "condition": "unfrozen-8x1", "quantity": "memory_gb", "low": 20.6},
]
NODE = Resources("a node", nodes=1, gpus=8, slots=8)


def made(folder: Path, *resources: Resources, **sections: Any) -> tuple[Forecast, list[Trial], tuple[Utterance, ...]]:
    """The forecast of three folds, frozen and unfrozen, from made-up probes."""
    trials = tiny_trials(folder, reference={"source": "a record", "claims": CLAIMS}, **sections)
    utterances = tiny_corpus(folder).utterances
    probes = [made_up("frozen"), made_up("unfrozen")]
    return forecast(trials, utterances, probes, resources or (NODE,)), trials, utterances


def test_every_trial_is_scheduled_in_the_order_of_the_run_with_its_own_length(tmp_path: Path) -> None:
    found, trials, _ = made(tmp_path)
    assignments = found.runs[0].schedule.assignments
    assert [one.job.name for one in assignments] == [trial.name for trial in trials]
    assert [one.job.duration_s for one in assignments] == [made_up().trial_s(trial) for trial in trials]
    assert (found.trials, found.folds, found.seeds, found.epochs) == (6, 3, 1, 3)


def test_features_are_made_once_a_node_by_all_who_work_there_and_shared_by_conditions(tmp_path: Path) -> None:
    several = Resources("several", nodes=2, gpus=16, slots=16)
    found, _, utterances = made(tmp_path, NODE, several)
    audio_s = sum(u.duration_s for u in utterances)
    statistics = 500 * 4 * len(utterances)
    assert found.disk.features == {
        "conv": int(1000 * audio_s),
        "hidden": int(2000 * audio_s),
        "statistics": statistics,
    }
    on_one, on_two = found.runs
    assert on_one.features_s == pytest.approx(0.03 * audio_s / 6)
    assert on_two.features_s == pytest.approx(0.03 * audio_s / 3)
    assert on_one.total_s == on_one.start_s + on_one.features_s + on_one.trials_s + on_one.linear_probes_s


def test_plan_and_the_eta_of_a_run_follow_one_rule_and_plan_adds_the_start(tmp_path: Path) -> None:
    two = Resources("two", nodes=1, gpus=2, slots=2)
    for preempt in (True, False):
        found, trials, _ = made(tmp_path, two, cluster={"preempt": preempt})
        durations = [made_up().trial_s(trial) for trial in trials]
        (run,) = found.runs
        whole_s = run.schedule.makespan_s
        assert run.trials_s == (min(whole_s, longest_without_pause_s(durations, 2)) if preempt else whole_s)
        assert run.schedule.lower_bound_s < run.trials_s
        assert run.start_s == RAY_AND_REPORT_S
        assert run.by_seeds[1] == run.total_s


def test_linear_probes_come_after_the_trials_and_without_a_frozen_condition_they_run_the_encoder(
    tmp_path: Path,
) -> None:
    two = Resources("two", nodes=1, gpus=2, slots=2)
    assert made(tmp_path, two)[0].runs[0].linear_probes_s == 2 * 3.0
    trials = [trial for trial in tiny_trials(tmp_path) if trial.condition == "unfrozen"]
    utterances = tiny_corpus(tmp_path).utterances
    found = forecast(trials, utterances, [made_up("unfrozen")], [two])
    assert found.runs[0].linear_probes_s == pytest.approx(2 * 3.0 + 0.01 * len(utterances) / 2)


def test_disk_counts_three_checkpoints_and_best_weights_of_what_runs_at_a_time(tmp_path: Path) -> None:
    found, _, _ = made(tmp_path, Resources("two", nodes=1, gpus=2, slots=2))
    assert found.disk.checkpoints == 2 * 3 * (3_000_000 + 1_000_000)
    assert found.disk.weights == 6 * 1_000_000


def test_a_seed_more_is_a_trial_more_of_every_condition_and_fold(tmp_path: Path) -> None:
    """Six trials on twelve GPUs: the same again fits in, whatever seeds there are already."""
    twelve = Resources("twelve", nodes=1, gpus=12, slots=12)
    assert made(tmp_path, twelve)[0].runs[0].seeds == 1
    assert made(tmp_path, twelve, train={"seeds": [3, 4]})[0].runs[0].seeds == 0
    six_more = Resources("more", nodes=1, gpus=18, slots=18)
    assert made(tmp_path, six_more, train={"seeds": [3, 4]})[0].runs[0].seeds == 1


def test_claims_of_cost_stand_by_their_condition_and_the_others_apart(tmp_path: Path) -> None:
    found, _, _ = made(tmp_path)
    assert [[claim.name for claim in c.stated] for c in found.conditions] == [["frozen, batch 8"], []]
    assert found.also_stated == (Claim.model_validate(CLAIMS[2]),)
    assert found.source == "a record"


def test_json_has_all_of_it(tmp_path: Path) -> None:
    found, trials, _ = made(tmp_path)
    data = json.loads(as_json(found))
    (run,) = data["runs"]
    assert run["makespan_s"] == found.runs[0].schedule.makespan_s
    assert len(run["schedule"]["assignments"]) == len(trials)
    assert data["conditions"][0]["stated"][0]["low"] == 5.2
    assert data["conditions"][1]["probe"]["longest"]["step_s"] == 2.0


@pytest.mark.parametrize(
    ("settings", "slots"),
    [({}, 8), ({"gpus_per_trial": 0.25}, 32), ({"max_concurrent": 3}, 3), ({"cpus_per_trial": 9}, 8)],
)
def test_hypothetical_gpus_come_with_enough_cores(settings: dict[str, Any], slots: int) -> None:
    assert hypothetical("a node", 1, 8, ClusterConfig(**settings)).slots == slots
