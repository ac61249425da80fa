"""The freezing table, the learning rates, and the guard that says whether it really fine-tuned."""

from __future__ import annotations

import pytest
import torch

from cvrunner.config.adaptation import FROZEN, Adaptation, adaptation_of
from cvrunner.config.sections import MambaConfig, ModelConfig, TrainConfig
from cvrunner.errors import WeightChangeError
from cvrunner.model.mamba_ema import MambaEMAModel
from cvrunner.training.freezing import NEVER, Schedule, barely_moved, match, rules
from tests.tiny_encoders import FULL, TOP_LAYER, tiny_encoder

TRAIN = TrainConfig(epochs=10, lr=1e-3, encoder_lr=1e-5, warmup_ratio=0.1)


def model(adaptation: Adaptation = FULL, protocol: str = "utterance", stable: bool = False) -> MambaEMAModel:
    config = ModelConfig(width=16, protocol=protocol, mamba=MambaConfig(state_size=4, head_dim=8, layers=1))
    return MambaEMAModel(tiny_encoder(stable, adaptation=adaptation), config, 2)


def test_a_parameter_that_no_rule_matches_is_named() -> None:
    with pytest.raises(LookupError, match=r"parameter decoder\.weight is in no group"):
        match("decoder.weight", rules(tiny_encoder(), TRAIN))


def test_every_trained_parameter_is_in_the_optimizer_once_and_no_other_is() -> None:
    schedule = Schedule(model(protocol="dialogue"), TRAIN)
    inside = [id(p) for group in schedule.optimizer().param_groups for p in group["params"]]
    assert schedule.fixed == {"head.linear_path.weight", "head.linear_path.bias"}
    members = [item for group in ("encoder", "head") for item in schedule.members[group].items()]
    trained = [id(p) for name, p in members if name not in schedule.fixed]
    assert sorted(inside) == sorted(trained)
    assert len(set(inside)) == len(inside)


def test_a_frozen_encoder_is_in_no_optimizer() -> None:
    schedule = Schedule(model(FROZEN), TRAIN)
    assert schedule.groups == ["head"]
    assert {group["group"] for group in schedule.optimizer().param_groups} == {"head"}


def test_norms_biases_and_layer_weights_do_not_decay() -> None:
    schedule = Schedule(model(protocol="dialogue"), TRAIN)
    names = {id(p): n for named in schedule.members.values() for n, p in named.items()}
    for group in schedule.optimizer().param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            one_dimensional = parameter.ndim == 1 or "layer_weights" in name or "gru_rel_pos_const" in name
            assert (group["weight_decay"] == 0) == one_dimensional, name


def test_layer_weights_learn_at_their_own_rate_and_follow_the_schedule_of_the_head() -> None:
    schedule = Schedule(model(), TRAIN.model_copy(update={"layer_weights_lr": 0.03}))
    optimizer = schedule.optimizer()
    layer_weights = schedule.members["head"]["head.mix.layer_weights"]
    for update in (0, 10, 60):
        schedule.set_learning_rates(optimizer, update, updates_per_epoch=10)
        for group in optimizer.param_groups:
            factor = 30 if any(p is layer_weights for p in group["params"]) else 1
            assert group["lr"] == pytest.approx(factor * schedule.learning_rate(group["group"], update, 10))


@pytest.mark.parametrize("stable", [False, True])
def test_with_unfreeze_layers_only_the_top_ones_train(stable: bool) -> None:
    schedule = Schedule(model(TOP_LAYER, stable=stable), TRAIN)
    schedule.begin_epoch(1)
    trained = {n.removeprefix("encoder.backbone.") for n, p in schedule.members["encoder"].items() if p.requires_grad}
    below = {n.removeprefix("encoder.backbone.") for n in schedule.members["encoder_below"]}
    assert {n for n in trained if not n.startswith("encoder.layers.1.")} == (
        {"encoder.layer_norm.weight", "encoder.layer_norm.bias"} if stable else set()
    )
    assert {n.split(".")[0] for n in below} == {"encoder", "feature_projection", "masked_spec_embed"}
    assert not [n for n, p in schedule.members["encoder_below"].items() if p.requires_grad]
    assert schedule.groups == ["encoder", "head"]


def test_the_encoder_joins_after_freeze_epochs() -> None:
    train = TrainConfig(epochs=4, freeze_epochs=2)
    assert adaptation_of(ModelConfig(freeze_speech_encoder=False), train).start_epoch == 3
    schedule = Schedule(model(Adaptation("full", start_epoch=3)), TrainConfig(epochs=4))
    for epoch, expected in ((1, False), (2, False), (3, True), (4, True)):
        schedule.begin_epoch(epoch)
        assert {p.requires_grad for p in schedule.members["encoder"].values()} == {expected}
        assert {p.requires_grad for p in schedule.members["front_end"].values()} == {False}
        moving = {p.requires_grad for n, p in schedule.members["head"].items() if n not in schedule.fixed}
        assert moving == {True}


def test_a_fixed_ema_decay_stays_fixed() -> None:
    config = ModelConfig(
        width=16,
        protocol="dialogue",
        ema={"decay": 0.7, "learnable": False},  # type: ignore[arg-type]
        mamba=MambaConfig(state_size=4, head_dim=8, layers=1),
    )
    whole = MambaEMAModel(tiny_encoder(), config, 2)
    Schedule(whole, TRAIN).begin_epoch(1)
    assert not whole.head.turn_ema.ema_logit.requires_grad


def test_learning_rates_warm_up_from_each_groups_own_start_and_end_near_zero() -> None:
    schedule = Schedule(model(Adaptation("full", start_epoch=6)), TrainConfig(epochs=10, lr=1e-3, encoder_lr=1e-5))
    head = [schedule.learning_rate("head", i, 20) for i in range(200)]
    encoder = [schedule.learning_rate("encoder", i, 20) for i in range(200)]
    assert max(head) == pytest.approx(1e-3)
    assert head.index(max(head)) == 19
    assert encoder[:100] == [0.0] * 100
    assert max(encoder) == pytest.approx(1e-5)
    assert encoder.index(max(encoder)) == 109
    for rates in (head, encoder):
        assert rates[-1] < 0.01 * max(rates)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_counts_add_up(frozen: bool) -> None:
    whole = model(FROZEN if frozen else FULL)
    count = Schedule(whole, TRAIN).count()
    assert count.total == sum(p.numel() for p in whole.parameters()) == sum(count.groups.values())
    assert count.trainable == count.groups["head"] + (0 if frozen else count.groups["encoder"])


class TestWeightChange:
    NORMS = {"front_end": 0.0, "encoder": 1.0, "head": 1.0}  # noqa: RUF012

    def moved(self, whole: MambaEMAModel, *prefixes: str) -> None:
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                if name.startswith(prefixes):
                    parameter.mul_(1.01)

    def test_it_is_the_relative_distance_from_the_start(self) -> None:
        whole = model()
        schedule = Schedule(whole, TRAIN)
        assert set(schedule.weight_change().values()) == {0.0}
        self.moved(whole, "head.")
        assert schedule.weight_change()["head"] == pytest.approx(0.01, rel=1e-4)
        assert schedule.weight_change()["encoder"] == 0

    def test_an_unfrozen_encoder_that_stands_still_is_an_error(self) -> None:
        whole = model()
        schedule = Schedule(whole, TRAIN)
        self.moved(whole, "head.")
        with pytest.raises(WeightChangeError, match="encoder should train since epoch 1, but after epoch 1"):
            schedule.check_weight_change(1, schedule.weight_change(), self.NORMS)

    def test_weight_decay_alone_does_not_count_as_fine_tuning(self) -> None:
        whole = model()
        schedule = Schedule(whole, TRAIN)
        self.moved(whole, "head.", "encoder.backbone.encoder.")
        schedule.check_weight_change(1, schedule.weight_change(), self.NORMS)
        with pytest.raises(WeightChangeError, match="gradient norm of 0"):
            schedule.check_weight_change(1, schedule.weight_change(), {**self.NORMS, "encoder": 0.0})

    @pytest.mark.parametrize(
        ("frozen", "prefix"), [(True, "encoder.backbone.encoder."), (False, "encoder.backbone.feature_extractor.")]
    )
    def test_what_is_frozen_and_moved_is_an_error(self, frozen: bool, prefix: str) -> None:
        whole = model(FROZEN if frozen else FULL)
        schedule = Schedule(whole, TRAIN)
        self.moved(whole, prefix, "head.", "encoder.backbone.encoder.")
        with pytest.raises(WeightChangeError, match=r"is frozen in epoch 1, but its weights moved by 0\.0"):
            schedule.check_weight_change(1, schedule.weight_change(), self.NORMS)


def test_the_implied_change_is_that_of_adam_on_gradients_without_a_direction() -> None:
    schedule = Schedule(model(), TrainConfig(epochs=10, lr=1e-3, encoder_lr=1e-5))
    schedule.begin_epoch(1)
    optimizer, random = schedule.optimizer(), torch.Generator().manual_seed(0)
    for update in range(200):
        for named in schedule.members.values():
            for parameter in named.values():
                if parameter.requires_grad:
                    parameter.grad = torch.randn(parameter.shape, generator=random)
        schedule.set_learning_rates(optimizer, update, 20)
        optimizer.step()
    for group, change in schedule.weight_change().items():
        if group in schedule.groups:
            assert change == pytest.approx(schedule.implied_change(group, 200, 20), rel=0.3)


def test_a_group_has_barely_moved_below_a_hundredth_of_what_its_learning_rate_implies() -> None:
    assert barely_moved(9e-5, implied=1e-2)
    assert not barely_moved(2e-4, implied=1e-2)
    # A learning rate so small that next to nothing is implied.
    assert barely_moved(9e-7, implied=1e-6)
    assert barely_moved(0.0, implied=0.0)


def test_never_is_after_every_epoch() -> None:
    assert all(rule.start == NEVER for rule in rules(tiny_encoder(), TRAIN) if rule.group != "head")
