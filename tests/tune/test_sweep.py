"""A sweep's decisions, without a cluster: what is drawn, how a setting is scored, and what a restart obeys."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cvrunner.config.reading import load_config
from cvrunner.config.schema import Config, validate
from cvrunner.config.tuning import TuneConfig
from cvrunner.data.folds import make_folds
from cvrunner.errors import ClusterError, ConfigError
from cvrunner.orchestration.resources import capacity_by_node
from cvrunner.orchestration.trials import plan_trials
from cvrunner.records.results import EpochRecord
from cvrunner.run.prepare import Experiment
from cvrunner.tune.command import settings_table, tuned_config, tuned_yaml
from cvrunner.tune.settings import (
    Objective,
    draw_settings,
    plan_setting,
    rungs,
    searched_values,
    sweep_key,
    with_setting,
)
from cvrunner.tune.store import SettingEpoch, SettingState, SweepStore
from tests.tiny_encoders import save_encoder
from tests.trials import tiny_config, tiny_corpus

KEYS = list(TuneConfig().search_space)


def config_of(folder: Path, **tune: Any) -> Config:
    return tiny_config(save_encoder(folder / "wavlm"), tune={"num_samples": 4, **tune})


def draw(config: Config, condition: str = "unfrozen") -> dict[str, dict[str, Any]]:
    return draw_settings(config.tune, condition, searched_values(config, condition))


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_first_setting_is_the_configuration_and_the_others_lie_in_the_space() -> None:
    config = validate({"train": {"lr": 0.5}, "tune": {"num_samples": 40}}, "test")
    first, *others = draw(config).values()
    assert first == {
        "train.encoder_lr": 1e-5, "train.lr": 0.5, "train.grad_clip": 1.0, "model.unfreeze_top_layers": None,
    }  # fmt: skip
    assert len(others) == 39
    assert all(5e-6 <= values["train.encoder_lr"] <= 5e-5 for values in others)
    assert {values["train.grad_clip"] for values in others} == {0.3, 1.0}
    assert {values["model.unfreeze_top_layers"] for values in others} == {None, 2, 4}
    # Even in the logarithm: about half are below the middle, 1.6e-5, where a linear draw would put a quarter.
    assert 12 <= sum(values["train.encoder_lr"] < 1.6e-5 for values in others) <= 27


def test_with_adapters_the_rate_of_the_encoder_is_not_searched() -> None:
    space = {"train.encoder_lr": {"choices": [1e-5, 1e-4]}, "train.lora_lr": {"choices": [1e-4, 1e-3]}}
    model = {"freeze_speech_encoder": False, "lora": {"rank": 4}}
    config = validate({"conditions": {"lora": {"model": model}}, "tune": {"search_space": space}}, "test")
    assert {key for values in draw(config, "lora").values() for key in values} == {"train.lora_lr"}


def test_the_same_seed_draws_the_same_and_more_samples_begin_with_the_fewer() -> None:
    few, many, other = (
        draw(validate({"tune": tune}, "test"))
        for tune in ({"num_samples": 4}, {"num_samples": 9}, {"num_samples": 4, "seed": 1})
    )
    assert list(many.items())[:4] == list(few.items())
    assert few != other


def test_conditions_get_the_same_values_of_the_keys_that_they_share() -> None:
    config = validate({"tune": {"num_samples": 9}}, "test")
    frozen, unfrozen = (list(draw(config, condition).values()) for condition in ("frozen", "unfrozen"))
    assert len(frozen) == len(unfrozen) == 9
    assert frozen == [{key: values[key] for key in ("train.lr", "train.grad_clip")} for values in unfrozen]


def test_a_small_space_gives_each_of_its_settings_once() -> None:
    tune = {"num_samples": 30, "search_space": {"train.grad_clip": {"choices": [0.3, 1.0]}}}
    assert [*draw(validate({"tune": tune}, "test")).values()] == [{"train.grad_clip": 1.0}, {"train.grad_clip": 0.3}]


def test_a_setting_changes_its_condition_alone() -> None:
    config = validate({}, "test")
    tuned = with_setting(config, "unfrozen", {"train.lr": 0.25, "model.unfreeze_top_layers": 2})
    assert tuned.for_condition("unfrozen").train.lr == 0.25
    assert tuned.for_condition("unfrozen").model.unfreeze_top_layers == 2
    assert tuned.for_condition("frozen").numerics == config.for_condition("frozen").numerics


def test_of_a_frozen_condition_only_what_changes_something_is_searched() -> None:
    assert list(searched_values(validate({}, "test"), "frozen")) == ["train.lr", "train.grad_clip"]


def test_a_setting_breaks_no_rule_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="head_dim 32 must divide"):
        with_setting(validate({}, "test"), "unfrozen", {"model.width": 7})


def test_a_sweeps_trials_have_no_test_part_and_its_key_holds_what_decides_the_table(tmp_path: Path) -> None:
    config, corpus = config_of(tmp_path), tiny_corpus(tmp_path)
    folds = make_folds(corpus, "leave_one_session_out")

    def trials(config: Config) -> dict[str, Any]:
        return {n: plan_setting(config, "unfrozen", v, corpus, folds, [1, 3]) for n, v in draw(config).items()}

    planned = trials(config)
    assert [[t.fold.number for t in some] for some in planned.values()] == [[1, 3]] * 4
    assert all(t.fold.test == () and t.fold.validation and t.fold.train for some in planned.values() for t in some)
    keys = [sweep_key(other.tune, trials(other)) for other in (config, config_of(tmp_path, grace_period=2))]
    keys += [sweep_key(other.tune, trials(other)) for other in (config_of(tmp_path, epochs=2), config_of(tmp_path))]
    assert len(set(keys)) == 3
    assert keys[0] == keys[3]


def test_comparisons_come_at_powers_of_the_factor() -> None:
    assert rungs(TuneConfig(), 50) == [3, 9, 27]
    assert rungs(TuneConfig(grace_period=60), 50) == []
    assert rungs(TuneConfig(nested=True), 50) == []


# --- how a setting is scored --------------------------------------------------------------------------------------


def epoch(number: int, average: float | None) -> EpochRecord:
    ccc = {"valence": average, "avg": average}
    return EpochRecord.model_construct(epoch=number, validation_ccc=ccc)


def test_an_epoch_is_reported_when_all_folds_have_it_with_each_folds_best_so_far() -> None:
    objective = Objective([1, 2])
    for number, average in enumerate((0.1, 0.5, 0.4), 1):
        objective.epoch(1, epoch(number, average))
    assert list(objective.new_epochs()) == []
    objective.epoch(2, epoch(1, 0.3))
    objective.epoch(2, epoch(2, 0.1))
    reported = list(objective.new_epochs())
    assert [(one.epoch, one.score) for one in reported] == [(1, pytest.approx(0.2)), (2, pytest.approx(0.4))]
    objective.epoch(2, epoch(2, 0.9))  # repeated after a kill
    assert list(objective.new_epochs()) == []
    objective.epoch(2, epoch(3, 0.2))
    assert [one.score for one in objective.new_epochs()] == [pytest.approx(0.4)]


def test_a_fold_that_stopped_early_counts_with_its_best_epoch() -> None:
    objective = Objective([1, 2])
    objective.epoch(1, epoch(1, 0.6))
    objective.ended.add(1)
    for number in (1, 2):
        objective.epoch(2, epoch(number, 0.2 * number))
    objective.ended.add(2)
    assert [(one.epoch, one.score) for one in objective.new_epochs()] == [
        (1, pytest.approx(0.4)),
        (2, pytest.approx(0.5)),
    ]


def test_an_undefined_ccc_makes_the_score_undefined_and_is_never_the_best() -> None:
    objective = Objective([1])
    for number, average in enumerate((None, -0.9), 1):
        objective.epoch(1, epoch(number, average))
    assert [one.score for one in objective.new_epochs()] == [None, -0.9]


# --- the record, the scheduler, what is written -----------------------------------------------------------------------


def store_of(
    folder: Path,
    samples: int = 4,
    epochs: int = 9,
    conditions: Sequence[str] = ("unfrozen",),
    nested: bool = False,
) -> SweepStore:
    config, corpus = config_of(folder, num_samples=samples, epochs=epochs, nested=nested), tiny_corpus(folder)
    folds = make_folds(corpus, "leave_one_session_out")
    settings, trials = {}, {}
    for condition in conditions:
        drawn = draw(config, condition)
        settings |= drawn
        trials |= {n: plan_setting(config, condition, v, corpus, folds, [1, 2]) for n, v in drawn.items()}
    key = sweep_key(config.tune, trials)
    experiment = Experiment("tiny", config, corpus, folds, folder / "results", folder / "cache")
    return SweepStore.open(experiment, key, settings, trials, ["cvrunner", "tune"], False)


def epoch_of(folder: Path, number: int, score: float) -> SettingEpoch:
    ccc = {"valence": score, "arousal": score, "avg": score}
    return SettingEpoch(epoch=number, folds={1: ccc, 2: ccc}, score=score)


class TuneTrial:
    def __init__(self, setting: str) -> None:
        self.config = {"setting": setting}


def report(scheduler: Any, setting: str, number: int, score: float) -> str:
    from cvrunner.tune import sweep

    record = epoch_of(Path(), number, score).model_dump_json()
    result = {sweep.SETTING: setting, sweep.EPOCH: number, sweep.SCORE: score, sweep.RECORD: record}
    decision: str = scheduler.on_trial_result(None, TuneTrial(setting), result)
    return decision


@pytest.mark.filterwarnings("ignore")
def test_bad_settings_are_stopped_and_a_restart_obeys_what_was_decided(tmp_path: Path) -> None:
    from cvrunner.tune.sweep import SweepScheduler

    rule = TuneConfig(grace_period=1, reduction_factor=3.0)
    scheduler = SweepScheduler(store_of(tmp_path), rule, threading.Event())
    names = list(scheduler.store.record.settings)
    decisions = [report(scheduler, name, 1, score) for name, score in zip(names, (0.5, 0.6, 0.1, 0.7), strict=True)]
    assert decisions == ["CONTINUE", "CONTINUE", "STOP", "CONTINUE"]
    assert scheduler.store.record.settings[names[2]].status == "PRUNED"

    again = SweepScheduler(store_of(tmp_path), rule, threading.Event())
    assert again.store.directory.path == scheduler.store.directory.path
    assert again.store.pending == [names[0], names[1], names[3]]
    # With all that is known now the first would not have gone on, but that was decided.
    assert report(again, names[0], 1, 0.5) == "CONTINUE"
    assert again.asha["unfrozen"].debug_string() == scheduler.asha["unfrozen"].debug_string()
    assert report(again, names[3], 9, 0.8) == "STOP"
    assert again.store.record.settings[names[3]].status == "DONE"
    assert again.store.record.best("unfrozen") == names[3]


@pytest.mark.filterwarnings("ignore")
def test_settings_compete_within_their_condition_only(tmp_path: Path) -> None:
    from cvrunner.tune.sweep import SweepScheduler

    store = store_of(tmp_path, conditions=("frozen", "unfrozen"))
    scheduler = SweepScheduler(store, TuneConfig(grace_period=1, reduction_factor=3.0), threading.Event())
    frozen, unfrozen = (list(store.record.settings_of(c)) for c in ("frozen", "unfrozen"))
    assert [report(scheduler, name, 1, 0.9) for name in unfrozen] == ["CONTINUE"] * 4
    # Far below every unfrozen setting, but as good as the other frozen ones.
    assert [report(scheduler, name, 1, 0.1) for name in frozen] == ["CONTINUE"] * 4


@pytest.mark.filterwarnings("ignore")
def test_a_nested_sweep_stops_no_setting_early(tmp_path: Path) -> None:
    from cvrunner.tune.sweep import SweepScheduler

    store = store_of(tmp_path, nested=True)
    scheduler = SweepScheduler(store, TuneConfig(grace_period=1, nested=True), threading.Event())
    decisions = [report(scheduler, name, 1, 0.1 * k) for k, name in enumerate(reversed(store.record.settings))]
    assert decisions == ["CONTINUE"] * 4


@pytest.mark.filterwarnings("ignore")
def test_a_setting_that_cannot_be_trained_fails_alone_unless_all_would(tmp_path: Path) -> None:
    from cvrunner.tune.sweep import SweepScheduler

    scheduler = SweepScheduler(store_of(tmp_path), TuneConfig(), threading.Event())
    first, second, *_ = scheduler.store.record.settings
    result = {"setting": first, "failure": "fold 1: loss is not a number", "aborts": False}
    assert scheduler.on_trial_result(None, TuneTrial(first), result) == "STOP"
    assert not scheduler.stopping
    scheduler.on_trial_result(None, TuneTrial(second), {"setting": second, "failure": "no encoder", "aborts": True})
    assert scheduler.stopping
    assert scheduler.choose_trial_to_run(None) is None
    scheduler.store.begin()
    assert first in scheduler.store.pending  # tried again by the next command


def test_the_table_has_the_settings_trained_to_the_end_first(tmp_path: Path) -> None:
    store = store_of(tmp_path, epochs=2)
    a, b, c, d = store.record.settings
    for name, scores in {a: (0.1, 0.3), b: (0.2, 0.4), c: (0.5,)}.items():
        for number, score in enumerate(scores, 1):
            store.decide(name, epoch_of(tmp_path, number, score).model_copy(update={"stops": name == c}))
    assert store.record.sentence.startswith(
        f"unfrozen: {b} is the best of 4: mean validation CCC-Avg 0.4000, as configured 0.3000"
    )
    store.end_setting(d, "made up")
    table = settings_table(store.record, "unfrozen")
    assert [(row[0], row[-2], row[-1]) for row in table.rows] == [
        (b, "0.4000", "done"),
        (a, "0.3000", "done"),
        (c, "0.5000", "stopped early"),
        (d, "–", "failed"),
    ]
    assert store.end(stopped=False) == "COMPLETE"


def decided(store: SweepStore, scores: Mapping[str, tuple[float, float]]) -> SweepStore:
    """Give settings their CCC-Avg in folds 1 and 2, after all epochs."""
    for name, of in scores.items():
        folds = {fold: {"valence": ccc, "arousal": ccc, "avg": ccc} for fold, ccc in enumerate(of, 1)}
        for number in range(1, store.record.epochs[store.record.settings[name].condition] + 1):
            store.decide(name, SettingEpoch(epoch=number, folds=folds, score=sum(of) / 2))
    return store


def read_back(folder: Path, text: str) -> tuple[Config, str]:
    """The configuration in a tuned file, moved to another folder, and its header as one line."""
    path = folder / "elsewhere" / "tuned.yaml"
    path.parent.mkdir()
    path.write_text(text)
    return load_config(path), " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))


def test_the_tuned_configuration_is_complete_and_its_header_is_honest(tmp_path: Path) -> None:
    config, store = config_of(tmp_path, epochs=2), store_of(tmp_path, samples=2, epochs=2)
    first, best = store.record.settings
    decided(store, {first: (0.2, 0.2), best: (0.3, 0.3)})
    tuned, header = read_back(tmp_path, tuned_yaml(tuned_config(config, store.record), store.record))
    assert searched_values(tuned, "unfrozen") == store.record.settings[best].values
    assert tuned.for_condition("frozen").numerics == config.for_condition("frozen").numerics
    assert tuned.train.epochs == 3
    origin = tuned.settings_from
    assert (origin.source, origin.sweep, origin.nested) == ("tune", store.record.run, False)
    assert origin.samples_per_condition == {"unfrozen": 2}
    for text_part in (
        "Settings were chosen by the mean validation CCC-Avg of folds 1, 2 (seed 0, 2 epochs)",
        "unfrozen: 2 settings, 0 stopped early, 0 failed.   As configured 0.2000, chosen 0.3000:",
        "NOT THE SAME BUDGET for all conditions (settings tried: frozen 0, unfrozen 2)",
        "cvrunner tune --config <this file> --set tune.conditions=frozen",
        "training data of other folds",
        "search used another number of epochs than the configuration below",
    ):
        assert text_part in header, text_part


def test_all_conditions_are_tuned_with_the_same_budget(tmp_path: Path) -> None:
    store = store_of(tmp_path, samples=2, epochs=2, conditions=("frozen", "unfrozen"))
    a, b, c, d = store.record.settings
    assert not store.record.is_decided
    decided(store, {a: (0.2, 0.2), b: (0.1, 0.1), c: (0.3, 0.3), d: (0.4, 0.4)})
    tuned, header = read_back(tmp_path, tuned_yaml(tuned_config(config_of(tmp_path), store.record), store.record))
    assert searched_values(tuned, "frozen") == store.record.settings[a].values
    assert searched_values(tuned, "unfrozen") == store.record.settings[d].values
    assert tuned.settings_from.samples_per_condition == {"frozen": 2, "unfrozen": 2}
    assert "NOT THE SAME" not in header
    assert store.record.sentence.startswith(
        "frozen: of 2 settings none is better than the configuration as it is, 0.2000; unfrozen: unfrozen-02 is the "
        "best of 2: mean validation CCC-Avg 0.4000, as configured 0.3000"
    )


def test_a_nested_search_gives_each_fold_its_own_best_setting(tmp_path: Path) -> None:
    store = store_of(tmp_path, samples=3, epochs=1, nested=True)
    a, b, c = store.record.settings
    # The best on average is best in no fold.
    decided(store, {a: (0.6, 0.1), b: (0.5, 0.5), c: (0.1, 0.7)})
    assert store.record.best("unfrozen") == b
    assert store.record.chosen("unfrozen") == {1: a, 2: c}
    assert store.record.score("unfrozen") == pytest.approx(0.65)
    tuned, header = read_back(tmp_path, tuned_yaml(tuned_config(config_of(tmp_path), store.record), store.record))
    settings = store.record.settings
    for fold, name in ((1, a), (2, c)):
        assert tuned.for_condition("unfrozen", fold).train.lr == settings[name].values["train.lr"]
    assert tuned.settings_from.nested
    assert "each fold's own validation CCC-Avg" in tuned.settings_from.objective
    assert f"fold 1: {a}, " in header
    assert "No fold's test session had a part in the choice of its settings" in header
    # The trials of a run get the settings of their own fold.
    folds = make_folds(tiny_corpus(tmp_path), "leave_one_session_out")
    planned = {t.fold.number: t for t in plan_trials(tuned, tiny_corpus(tmp_path), folds) if t.condition == "unfrozen"}
    assert planned[2].config.train.lr == settings[c].values["train.lr"]
    assert planned[3].config.train.lr == config_of(tmp_path).train.lr


def test_a_second_search_keeps_the_origin_of_the_first(tmp_path: Path) -> None:
    first = decided(store_of(tmp_path, samples=2, epochs=1), {"unfrozen-01": (0.1, 0.1), "unfrozen-02": (0.2, 0.2)})
    config = tuned_config(config_of(tmp_path), first.record)
    second = decided(
        store_of(tmp_path, samples=2, epochs=1, conditions=("frozen",)),
        {"frozen-01": (0.1, 0.1), "frozen-02": (0.2, 0.2)},
    )
    origin = tuned_config(config, second.record).settings_from
    assert origin.samples_per_condition == {"unfrozen": 2, "frozen": 2}
    assert origin.sweep == f"{first.record.run}, {second.record.run}"


def test_a_state_has_ended_once_it_is_no_longer_waiting() -> None:
    states = [SettingState(condition="a", values={}, status=s) for s in ("WAITING", "DONE", "PRUNED", "FAILED")]
    assert [state.ended for state in states] == [False, True, True, True]


def test_folds_do_not_share_a_gpu_of_two_nodes() -> None:
    from cvrunner.config.sections import ClusterConfig

    half = {"GPU": 1.0, "CPU": 3.0}
    assert capacity_by_node([half, half, {"CPU": 64.0}], ClusterConfig(cpus_per_trial=2)) == 2
    with pytest.raises(ClusterError, match="needs 1 GPU and 4 CPU; the cluster has 1 GPU and 3 CPU"):
        capacity_by_node([half, half], ClusterConfig(cpus_per_trial=4))
