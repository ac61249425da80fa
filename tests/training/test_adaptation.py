"""LoRA, layer-wise learning rates and gradual unfreezing, as whole trials."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from cvrunner.api import load_model
from cvrunner.config.adaptation import Adaptation, adaptation_of
from cvrunner.config.sections import LoraConfig, ModelConfig, TrainConfig
from cvrunner.data.utterance import read_audio
from cvrunner.encoders.loading import load_backbone
from cvrunner.encoders.lora import add_adapters
from cvrunner.errors import ConfigError, Stopped, WeightChangeError
from cvrunner.records.results import EpochRecord, TrialResult
from cvrunner.run.prepare import prepare_config
from cvrunner.training.freezing import Schedule
from tests.tiny_encoders import save_encoder
from tests.training.test_fold_trainer import directory, outcome
from tests.training.test_freezing import model
from tests.trials import learner, pick, tiny_config, tiny_trials, train, trainer

LORA: dict[str, Any] = {"model": {"lora": {"rank": 2, "dropout": 0.2}}, "train": {"lora_lr": 1e-2}}
GRADUAL: dict[str, Any] = {"train": {"unfreeze_layers_per_epoch": 1, "layer_lr_decay": 0.5}}
METHODS = {
    "lora": LORA,
    "lora in the top layer": {**LORA, "model": {**LORA["model"], "unfreeze_top_layers": 1}},
    "lora, masked input": {**LORA, "model": {**LORA["model"], "spec_augment": True}},
    "lora by layer": {**LORA, "train": {**LORA["train"], **GRADUAL["train"]}},
    "by layer": GRADUAL,
    "by layer, top ones": {**GRADUAL, "model": {"unfreeze_top_layers": 2}},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop_at", [5, 7])
def test_stopped_at_any_update_and_continued_it_is_bit_identical(tmp_path: Path, method: str, stop_at: int) -> None:
    sections = METHODS[method]
    trial = pick(tiny_trials(tmp_path, **{**sections, "train": {**sections["train"], "ema_decay": 0.9}}), "unfrozen")
    train(trial, tmp_path, "whole")
    polled = itertools.count(1)
    with pytest.raises(Stopped):
        train(trial, tmp_path, "parts", should_stop=lambda: next(polled) == stop_at)
    train(trial, tmp_path, "parts")
    assert outcome(tmp_path, trial, "whole") == outcome(tmp_path, trial, "parts")


@pytest.mark.parametrize("method", METHODS)
def test_the_model_in_its_folder_needs_no_adapters_and_repeats_the_predictions(tmp_path: Path, method: str) -> None:
    trial = pick(tiny_trials(tmp_path, **METHODS[method]), "unfrozen")
    train(trial, tmp_path)
    folder = tmp_path / "run" / trial.name
    assert not [name for name in load_file(folder / "model" / "model.safetensors") if "lora" in name]
    rebuilt = load_model(folder / "model", device="cpu")
    for _, row in pd.read_csv(folder / "predictions.csv").iterrows():
        again = rebuilt.predict(read_audio(tmp_path / "audio" / f"{row['utterance']}.wav"))
        for dimension in ("valence", "arousal"):
            # Training reads float16 where the layers that train begin; here all layers run in float32.
            assert again[dimension] == pytest.approx(row[f"{dimension}_predicted"], abs=2e-3)


def test_only_the_adapters_and_the_head_train_and_are_saved(tmp_path: Path) -> None:
    trial = pick(tiny_trials(tmp_path, **LORA), "unfrozen")
    one = trainer(trial, tmp_path)
    events = one.run()
    while not isinstance(next(events), EpochRecord):
        pass
    saved = [
        name
        for file in directory(tmp_path, trial).checkpoint.glob("**/*.safetensors")
        if file.name == "weights.safetensors" or file.name.startswith("best-")
        for name in load_file(file)
    ]
    assert saved
    assert all(name.startswith("head.") or ".lora_" in name for name in saved)
    *_, result = events
    assert isinstance(result, TrialResult)
    assert result.weight_change.keys() == {"lora", "head"}
    # Two layers, four projections, `A` and `B` of rank 2 between 16 and 16 values.
    assert result.parameters.groups["lora"] == 2 * 4 * 2 * 2 * 16
    assert result.parameters.trainable == result.parameters.groups["lora"] + result.parameters.groups["head"]
    pretrained = load_backbone(trial.encoder).state_dict()
    trained = one.learner.model.encoder.backbone.state_dict()
    kept = {name.replace(".base_layer", ""): value for name, value in trained.items() if ".lora_" not in name}
    assert kept.keys() == pretrained.keys()
    assert all(torch.equal(value, pretrained[name]) for name, value in kept.items())


def test_the_same_head_and_other_adapters_for_another_seed(tmp_path: Path) -> None:
    trials = tiny_trials(tmp_path, train={"seeds": [0, 1]}, model=LORA["model"])
    of = {(t.condition, t.seed): learner(t, tmp_path).model for t in trials if t.fold.number == 1}
    for name, tensor in of["frozen", 0].head.state_dict().items():
        assert torch.equal(of["unfrozen", 0].head.state_dict()[name], tensor)
    first, second = (next(p for n, p in of["unfrozen", seed].named_parameters() if ".lora_A" in n) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_dropout_of_the_adapters_does_not_depend_on_the_micro_batches(tmp_path: Path) -> None:
    model = {"lora": {"rank": 2, "dropout": 0.5}}
    losses = []
    for size in (1, 2, 4):
        settings = {"batch_size": size, "accumulation_steps": 4 // size, "lora_lr": 1e-2}
        trial = pick(tiny_trials(tmp_path, model=model, train=settings), "unfrozen")
        losses.append([e.train_loss for e in train(trial, tmp_path, str(size)) if isinstance(e, EpochRecord)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0] == pytest.approx(losses[2], abs=1e-4)


class TestGuard:
    """Adapters that stand still, and a base that moves, fail the trial."""

    NORMS = {"front_end": 0.0, "encoder": 0.0, "lora": 1.0, "head": 1.0}  # noqa: RUF012

    def schedule(self) -> Schedule:
        whole = model(Adaptation("lora", start_epoch=1, lora=LoraConfig(rank=2)))
        add_adapters(whole.encoder)
        return Schedule(whole, TrainConfig())

    def moved(self, *groups: str) -> Schedule:
        schedule = self.schedule()
        with torch.no_grad():
            for group in groups:
                for parameter in schedule.members[group].values():
                    parameter.add_(0.01)
        return schedule

    def test_what_should_move_may(self) -> None:
        schedule = self.moved("lora", "head")
        schedule.check_weight_change(1, schedule.weight_change(), self.NORMS)

    def test_adapters_that_stand_still_are_an_error(self) -> None:
        schedule = self.moved("head")
        with pytest.raises(WeightChangeError, match="lora should train since epoch 1"):
            schedule.check_weight_change(1, schedule.weight_change(), self.NORMS)

    def test_adapters_that_weight_decay_alone_moves_are_an_error(self) -> None:
        schedule = self.moved("lora", "head")
        with pytest.raises(WeightChangeError, match=r"lora should train .* gradient norm of 0"):
            schedule.check_weight_change(1, schedule.weight_change(), {**self.NORMS, "lora": 0.0})

    @pytest.mark.parametrize("group", ["encoder", "front_end"])
    def test_a_base_that_moves_is_an_error(self, group: str) -> None:
        schedule = self.moved("lora", "head", group)
        with pytest.raises(WeightChangeError, match=f"{group} is frozen in epoch 1, but its weights moved"):
            schedule.check_weight_change(1, schedule.weight_change(), self.NORMS)


def schedule_of(**settings: Any) -> Schedule:
    """Of an encoder with two layers, without a head's own settings."""
    train = TrainConfig(**{"epochs": 10, "encoder_lr": 1e-3, "warmup_ratio": 0.0, **settings})
    return Schedule(model(adaptation_of(ModelConfig(freeze_speech_encoder=False), train)), train)


def test_each_layer_learns_more_slowly_than_the_one_above() -> None:
    schedule = schedule_of(layer_lr_decay=0.5)
    rates = {rule.group: rule.learning_rate for rule in schedule.table}
    assert [rates[f"encoder_layer_{layer:02}"] for layer in (2, 1, 0)] == [1e-3, 5e-4, 2.5e-4]
    optimizer = schedule.optimizer()
    schedule.set_learning_rates(optimizer, 0, updates_per_epoch=10)
    found = {group["group"]: group["lr"] for group in optimizer.param_groups if group["scale"] == 1}
    assert found["encoder_layer_02"] == pytest.approx(2 * found["encoder_layer_01"])
    assert found["encoder_layer_01"] == pytest.approx(2 * found["encoder_layer_00"])
    inside = [id(p) for group in optimizer.param_groups for p in group["params"]]
    members = [item for group in schedule.groups for item in schedule.members[group].items()]
    trained = [id(p) for name, p in members if name not in schedule.fixed]
    assert sorted(inside) == sorted(trained)
    assert "front_end" not in schedule.groups


def test_with_one_rate_the_table_has_one_encoder() -> None:
    assert set(schedule_of().members) == {"front_end", "encoder", "head"}


@pytest.mark.parametrize(("per_epoch", "starts"), [(1, (2, 3, 4)), (2, (2, 2, 3)), (5, (2, 2, 2))])
def test_layers_start_from_the_top(per_epoch: int, starts: tuple[int, ...]) -> None:
    schedule = schedule_of(unfreeze_layers_per_epoch=per_epoch, freeze_epochs=1)
    for epoch in range(1, 6):
        schedule.begin_epoch(epoch)
        for layer, start in zip((2, 1, 0), starts, strict=True):
            members = schedule.members[f"encoder_layer_{layer:02}"].values()
            assert {p.requires_grad for p in members} == {epoch >= start}
            # Warm-up and cosine are over the epochs in which the layer trains.
            rate = schedule.learning_rate(f"encoder_layer_{layer:02}", (start - 1) * 10, 10)
            assert rate == pytest.approx(1e-3, rel=1e-2)
            assert schedule.learning_rate(f"encoder_layer_{layer:02}", (start - 1) * 10 - 1, 10) == 0


def test_layers_that_have_not_started_are_as_pretrained_also_after_a_restart(tmp_path: Path) -> None:
    trial = pick(tiny_trials(tmp_path, **GRADUAL), "unfrozen")
    pretrained = load_backbone(trial.encoder).state_dict()
    frozen: dict[int, set[int]] = {}
    for epoch in (1, 2, 3):
        # Another process for each epoch.
        one = trainer(trial, tmp_path)
        events = one.run()
        while not (isinstance(event := next(events), EpochRecord) and event.epoch == epoch):
            pass
        trained = one.learner.model.encoder.backbone.state_dict()
        moved = {name for name, value in trained.items() if not torch.equal(value, pretrained[name])}
        members = one.learner.schedule.members
        frozen[epoch] = {
            layer
            for layer in range(3)
            if not any(f"encoder.backbone.{name}" in members[f"encoder_layer_{layer:02}"] for name in moved)
        }
        assert event.groups["encoder_layer_00"].weight_change == 0 or epoch == 3
        events.close()
    assert frozen == {1: {0, 1}, 2: {0}, 3: set()}


def test_layers_without_an_epoch_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    config = tiny_config(save_encoder(tmp_path / "wavlm"), train={"unfreeze_layers_per_epoch": 1, "epochs": 2})
    with pytest.raises(
        ConfigError, match=r"unfreeze_layers_per_epoch 1: the lowest layer of unfrozen .* in epoch 3 of 2"
    ):
        prepare_config(config, "test")


def test_where_adapters_change_nothing_a_frozen_condition_is_frozen() -> None:
    lora = LoraConfig(rank=8)
    assert adaptation_of(ModelConfig(lora=lora)).method == "frozen"
    assert adaptation_of(ModelConfig(lora=lora)).cached == "hidden"
    adapted = adaptation_of(ModelConfig(lora=lora, freeze_speech_encoder=False))
    assert (adapted.method, adapted.cached, adapted.lora) == ("lora", "boundary", lora)
    assert adaptation_of(ModelConfig(freeze_speech_encoder=False)).lora is None
