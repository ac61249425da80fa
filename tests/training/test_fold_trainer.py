"""One trial whole: what it leaves, that it resumes bit for bit, and that it fails when it does not do what it says."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import audmetric
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cvrunner.data.batches import Update
from cvrunner.encoders.encoder import Boundary, Encoded, SpeechEncoder
from cvrunner.encoders.files import check_encoder
from cvrunner.encoders.loading import load_backbone
from cvrunner.errors import EncoderError, MemoryLimitError, NonFiniteError, Stopped, TrialInUseError, WeightChangeError
from cvrunner.model.mamba_ema import MambaEMAModel
from cvrunner.records.results import EpochRecord, FeatureProgress, TrialResult, TrialStarted, Waiting
from cvrunner.records.run_directory import TrialDirectory, read_events
from cvrunner.training import fold_trainer
from cvrunner.training import learner as learner_module
from cvrunner.training.checkpoint import Position
from cvrunner.training.inputs import pack
from cvrunner.training.learner import Learner, draw_seed
from cvrunner.training.trial import Trial
from tests.trials import learner, pick, tiny_trials, train, trainer

CONDITIONS = ("frozen", "unfrozen")


def directory(folder: Path, trial: Trial, name: str = "run") -> TrialDirectory:
    return TrialDirectory(folder / name / trial.name)


def outcome(folder: Path, trial: Trial, name: str) -> tuple[dict[str, Any], bytes, dict[str, bytes]]:
    """All of a trial that must be bit-identical: the result but for times and memory, the predictions, the weights."""
    files = directory(folder, trial, name)
    result = json.loads(files.result_file.read_bytes())
    for key in ("train_s", "total_s", "peak_memory_mib"):
        del result[key]
    weights = {n: t.numpy().tobytes() for n, t in load_file(files.model.weights).items()}
    return result, files.predictions.read_bytes(), weights


def break_off_after_epoch_2(trial: Trial, folder: Path) -> None:
    """Train in `folder/parts` and go away between two epochs, without a word."""
    events = trainer(trial, folder, "parts").run()
    while not (isinstance(event := next(events), EpochRecord) and event.epoch == 2):
        pass
    events.close()


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trial, Path]:
    """An unfrozen trial and its folder: finished in `whole`, and broken off after two epochs in `parts`."""
    folder = tmp_path_factory.mktemp("broken-off")
    trial = pick(tiny_trials(folder), "unfrozen")
    train(trial, folder, "whole")
    break_off_after_epoch_2(trial, folder)
    return trial, folder


@pytest.fixture
def halfway(broken_off: tuple[Trial, Path], tmp_path: Path) -> Trial:
    """The trial of `broken_off`, with a copy of its folder in `tmp_path`."""
    trial, folder = broken_off
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return trial


def test_the_conditions_of_a_fold_start_from_the_same_head_and_the_folds_of_a_seed_from_different_ones(
    tmp_path: Path,
) -> None:
    trials = tiny_trials(tmp_path)
    heads = {
        (condition, fold): learner(pick(trials, condition, fold), tmp_path).model.head.state_dict()
        for condition in CONDITIONS
        for fold in (1, 2)
    }
    same, other = heads["unfrozen", 1], heads["frozen", 2]
    for name, tensor in heads["frozen", 1].items():
        assert torch.equal(tensor, same[name]), name
    assert not torch.equal(heads["frozen", 1]["projection.weight"], other["projection.weight"])


def test_draws_depend_on_seed_fold_epoch_and_update() -> None:
    places = list(itertools.product(range(3), repeat=4))
    assert len({draw_seed(*place) for place in places}) == len(places)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_trial_tells_what_it_does_and_leaves_its_records(tmp_path: Path, condition: str) -> None:
    trial = pick(tiny_trials(tmp_path), condition)
    events = train(trial, tmp_path)
    kinds = [type(e) for e in events if not isinstance(e, FeatureProgress)]
    assert kinds == [TrialStarted, EpochRecord, EpochRecord, EpochRecord, TrialResult]
    files = directory(tmp_path, trial)
    result = files.result(trial.key)
    assert result == events[-1]
    assert files.result("another key") is None
    assert not files.checkpoint.exists()
    epochs = list(read_events(files.journal, "epoch"))
    assert [e["epoch"] for e in epochs] == [1, 2, 3]
    assert result.best_epoch == max(epochs, key=lambda e: e["validation_ccc"]["avg"])["epoch"]
    assert result.weight_change.keys() == ({"head"} if condition == "frozen" else {"encoder", "head"})


def test_the_test_scores_are_those_of_the_predictions_on_the_rating_scale(tmp_path: Path) -> None:
    trial = pick(tiny_trials(tmp_path), "frozen")
    result = train(trial, tmp_path)[-1]
    assert isinstance(result, TrialResult)
    rows = list(csv.DictReader(directory(tmp_path, trial).predictions.read_text().splitlines()))
    assert [row["utterance"] for row in rows] == [u.id for u in trial.fold.test]
    assert [float(row["valence_true"]) for row in rows] == [u.valence for u in trial.fold.test]
    for dimension in ("valence", "arousal"):
        true, predicted = (np.array([float(r[f"{dimension}_{k}"]) for r in rows]) for k in ("true", "predicted"))
        assert result.test_ccc[dimension] == pytest.approx(audmetric.concordance_cc(true, predicted))


def test_the_test_set_is_predicted_once_after_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = pick(tiny_trials(tmp_path), "frozen")
    predicted: list[tuple[str, ...]] = []
    original = Learner.predict
    monkeypatch.setattr(
        Learner,
        "predict",
        lambda self, utterances: predicted.append(tuple(u.id for u in utterances)) or original(self, utterances),
    )
    train(trial, tmp_path)
    validation, test = (tuple(u.id for u in part) for part in (trial.fold.validation, trial.fold.test))
    assert predicted == [validation] * 3 + [test]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_two_trainings_are_bit_identical(tmp_path: Path, condition: str) -> None:
    trial = pick(tiny_trials(tmp_path), condition)
    for name in ("one", "two"):
        train(trial, tmp_path, name)
    assert outcome(tmp_path, trial, "one") == outcome(tmp_path, trial, "two")


@pytest.mark.parametrize("stop_at", [1, 4, 6, 9])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_stopped_at_any_update_and_continued_it_is_bit_identical(tmp_path: Path, condition: str, stop_at: int) -> None:
    trial = pick(tiny_trials(tmp_path, train={"ema_decay": 0.9}), condition)
    train(trial, tmp_path, "whole")
    polled, started = itertools.count(1), TrialDirectory(tmp_path / "parts" / trial.name).journal
    with pytest.raises(Stopped):
        # Before training, while the linear path is fitted, nothing would be kept.
        train(trial, tmp_path, "parts", should_stop=lambda: started.exists() and next(polled) == stop_at)
    started = next(e for e in train(trial, tmp_path, "parts") if isinstance(e, TrialStarted))
    updates = len(trial.fold.train) // 4 + bool(len(trial.fold.train) % 4)
    assert (started.resumed_epoch - 1) * updates + started.resumed_update == stop_at - 1
    assert outcome(tmp_path, trial, "whole") == outcome(tmp_path, trial, "parts")


def test_killed_between_epochs_it_goes_on_from_the_last_one(tmp_path: Path, halfway: Trial) -> None:
    again = train(halfway, tmp_path, "parts")
    assert [e.epoch for e in again if isinstance(e, EpochRecord)] == [3]
    assert outcome(tmp_path, halfway, "whole") == outcome(tmp_path, halfway, "parts")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["weights.safetensors", "state.json", "sha256.json"])
@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(p.read_bytes()[:100]), lambda p: p.unlink(), flip_a_bit])
def test_a_damaged_checkpoint_costs_one_generation_and_is_mentioned(
    tmp_path: Path, halfway: Trial, damage: Callable[[Path], object], file: str
) -> None:
    newest = sorted(directory(tmp_path, halfway, "parts").checkpoint.glob("0*"))[-1]
    damage(newest / file)
    again = train(halfway, tmp_path, "parts")
    started = next(e for e in again if isinstance(e, TrialStarted))
    assert started.resumed_epoch == 2
    assert started.note is not None
    assert f"checkpoint {newest.name} is damaged" in started.note
    assert outcome(tmp_path, halfway, "whole") == outcome(tmp_path, halfway, "parts")


def test_damaged_weights_of_the_best_epoch_are_never_tested(tmp_path: Path, halfway: Trial) -> None:
    for best in directory(tmp_path, halfway, "parts").checkpoint.glob("best-*"):
        flip_a_bit(best)
    started = next(e for e in train(halfway, tmp_path, "parts") if isinstance(e, TrialStarted))
    assert started.note is not None
    assert "does not match its hash" in started.note
    assert outcome(tmp_path, halfway, "whole") == outcome(tmp_path, halfway, "parts")


def test_a_start_tells_what_saving_takes_and_not_what_came_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = pick(tiny_trials(tmp_path), "unfrozen")
    hour, fit = [0], Learner.fit_linear_path
    monkeypatch.setattr(fold_trainer, "time", SimpleNamespace(monotonic=lambda: 3600 * hour[0] + time.monotonic()))

    def fit_for_an_hour(*args: Any) -> None:
        fit(*args)
        hour[0] += 1

    monkeypatch.setattr(Learner, "fit_linear_path", fit_for_an_hour)
    events = trainer(trial, tmp_path).run()
    started = next(e for e in events if isinstance(e, TrialStarted))
    assert hour == [1]
    assert started.checkpoint_mib * 2**20 == pytest.approx(3 * 4 * started.parameters.trainable)
    assert 0 < started.checkpoint_s < 3600
    assert [p.name for p in directory(tmp_path, trial).checkpoint.iterdir()] == ["0001-000000"]
    events.close()


def test_a_finished_trial_is_not_trained_again_and_a_changed_one_is(tmp_path: Path) -> None:
    trial = pick(tiny_trials(tmp_path), "frozen")
    result = train(trial, tmp_path)[-1]
    assert train(trial, tmp_path) == [result]
    changed = pick(tiny_trials(tmp_path, train={"lr": 2e-3}), "frozen")
    assert changed.key != trial.key
    assert len(train(changed, tmp_path)) > 1


def test_keys_depend_on_settings_that_matter_and_on_no_others(tmp_path: Path) -> None:
    trial = pick(tiny_trials(tmp_path), "frozen")
    same = pick(tiny_trials(tmp_path, results={"root": "elsewhere"}, tracking={"enabled": False}), "frozen")
    assert same.key == trial.key
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "wavlm", moved / "wavlm")
    assert pick(tiny_trials(moved), "frozen").key == trial.key
    keys = {t.key for t in tiny_trials(tmp_path)}
    assert len(keys) == 6


def test_both_conditions_of_a_fold_see_the_same_updates_and_start_from_the_same_head(tmp_path: Path) -> None:
    learners = [learner(pick(tiny_trials(tmp_path), c), tmp_path) for c in CONDITIONS]
    first, second = ([[u.id for u in update.utterances] for update in one.updates(2)] for one in learners)
    assert first == second
    heads = [one.model.head.state_dict() for one in learners]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_a_frozen_encoder_is_bit_identical_after_training(tmp_path: Path) -> None:
    trial = pick(tiny_trials(tmp_path), "frozen")
    one = trainer(trial, tmp_path)
    list(one.run())
    pretrained = load_backbone(trial.encoder).state_dict()
    assert all(
        torch.equal(value, pretrained[name]) for name, value in one.learner.model.encoder.backbone.state_dict().items()
    )
    weights = load_file(directory(tmp_path, trial).model.weights)
    assert all(name.startswith("head.") for name in weights)


def test_an_unfrozen_encoder_moves_but_for_its_front_end(tmp_path: Path) -> None:
    trial = pick(tiny_trials(tmp_path), "unfrozen")
    one = trainer(trial, tmp_path)
    list(one.run())
    pretrained = load_backbone(trial.encoder).state_dict()
    trained = one.learner.model.encoder.backbone.state_dict()
    assert all(torch.equal(trained[n], pretrained[n]) for n in trained if n.startswith("feature_extractor"))
    assert not torch.equal(
        trained["encoder.layers.0.attention.q_proj.weight"], pretrained["encoder.layers.0.attention.q_proj.weight"]
    )


def test_cached_features_equal_live_ones(tmp_path: Path) -> None:
    """The frozen trial reads hidden states; the same encoder on conv features gives them, up to float16."""
    trial = pick(tiny_trials(tmp_path), "frozen")
    one = learner(trial, tmp_path)
    list(one.inputs.fill_cache())
    update = one.updates(1)[0]
    for cached in one.inputs.batches(update):
        conv = [one.inputs.conv.read(update.utterances[i]) for i in cached.positions]
        live = one.model.encoder(pack(conv).float(), torch.tensor([len(array) for array in conv]))
        assert isinstance(cached.features, Encoded)
        assert torch.equal(live.lengths, cached.lengths)
        torch.testing.assert_close(live.states, cached.features.states, atol=5e-3, rtol=5e-3)
        torch.testing.assert_close(live.statistics, cached.features.statistics, atol=1e-5, rtol=1e-4)


def test_what_lies_below_the_boundary_comes_from_the_cache_and_is_shared_with_the_frozen_condition(
    tmp_path: Path,
) -> None:
    trials = tiny_trials(tmp_path, model={"unfreeze_top_layers": 1})
    one, frozen = learner(pick(trials, "unfrozen"), tmp_path), learner(pick(trials, "frozen"), tmp_path)
    assert [progress.kind for progress in one.inputs.fill_cache()][-1] == "hidden states at the boundary"
    assert not frozen.inputs.hidden.missing()
    update = one.updates(1)[0]
    cached = next(one.inputs.batches(update))
    assert isinstance(cached.features, Boundary)
    conv = pack([one.inputs.conv.read(update.utterances[i]) for i in cached.positions]).float()
    one.model.eval()
    torch.testing.assert_close(
        one.model.encode(cached.features, cached.lengths), one.model.encode(conv, cached.lengths), atol=5e-3, rtol=5e-3
    )


def test_masking_is_refused_for_an_encoder_without_a_mask_embedding(tmp_path: Path) -> None:
    folder = tiny_trials(tmp_path)[0].encoder.folder
    settings = json.loads((folder / "config.json").read_text()) | {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(settings))
    rule = r"model\.spec_augment true: mask_time_prob in config\.json of the encoder .* is 0\.0, must be above 0"
    with pytest.raises(EncoderError, match=rule):
        learner(pick(tiny_trials(tmp_path, model={"spec_augment": True}), "unfrozen"), tmp_path)
    with pytest.raises(EncoderError, match=rule):
        check_encoder(str(folder), None, (), masks_input=True)
    check_encoder(str(folder), None, ())
    learner(pick(tiny_trials(tmp_path, model={"spec_augment": True}), "frozen"), tmp_path)


def test_the_guard_stops_an_unfrozen_trial_whose_encoder_gets_no_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old script's mistake: features detached from the encoder that should learn."""
    forward = SpeechEncoder.forward

    def detached(self: Any, *inputs: Any) -> Encoded:
        return Encoded(*(part.detach() for part in forward(self, *inputs)))

    monkeypatch.setattr(SpeechEncoder, "forward", detached)
    with pytest.raises(WeightChangeError, match="the loss does not reach it"):
        train(pick(tiny_trials(tmp_path), "unfrozen"), tmp_path)


def test_a_loss_that_is_not_a_number_stops_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = pick(tiny_trials(tmp_path), "frozen")
    one = learner(trial, tmp_path)
    list(one.inputs.fill_cache())
    one.begin_epoch(1)
    before = {name: weight.detach().clone() for name, weight in one.weights.items()}
    monkeypatch.setattr(learner_module, "scaled_labels", lambda u, *_: torch.full((len(u), 2), torch.nan))
    with pytest.raises(NonFiniteError, match="epoch 1, update 1: loss nan"):
        one.update(one.updates(1)[0], Position(1, 0, 0))
    assert all(torch.equal(before[name], weight) for name, weight in one.weights.items())
    with pytest.raises(NonFiniteError, match="epoch 1, update 1: loss nan"):
        train(trial, tmp_path)
    (line,) = read_events(directory(tmp_path, trial).journal, "not_finite")
    assert (line["epoch"], line["update"]) == (1, 0)


@pytest.mark.parametrize(
    ("condition", "lora", "rate"), [("frozen", 0, "lr"), ("unfrozen", 0, "encoder_lr"), ("unfrozen", 2, "lora_lr")]
)
def test_advice_on_learning_rates_comes_only_after_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, condition: str, lora: int, rate: str
) -> None:
    one = learner(pick(tiny_trials(tmp_path, model={"lora": {"rank": lora}}), condition), tmp_path)
    list(one.inputs.fill_cache())
    one.begin_epoch(1)
    first, second, *_ = one.updates(1)
    monkeypatch.setattr(learner_module, "scaled_labels", lambda u, *_: torch.full((len(u), 2), torch.nan))
    with pytest.raises(NonFiniteError, match="No update has been made yet, so the cause is not a learning rate"):
        one.update(first, Position(1, 0, 0))
    with pytest.raises(NonFiniteError, match=rf"Try a lower train\.{rate} "):
        one.update(second, Position(1, 1, 1))


def test_a_result_has_the_weight_change_of_the_tested_epoch(tmp_path: Path) -> None:
    trial = pick(tiny_trials(tmp_path), "unfrozen")
    result = train(trial, tmp_path)[-1]
    assert isinstance(result, TrialResult)
    groups = [line["groups"] for line in read_events(directory(tmp_path, trial).journal, "epoch")]
    assert result.weight_change_best == {g: v["weight_change"] for g, v in groups[result.best_epoch - 1].items()}
    assert result.weight_change == {g: v["weight_change"] for g, v in groups[-1].items()}
    assert result.barely_moved == {}
    # Real gradients move the weights as far as the rule says, within a factor of a few.
    for values in groups[-1].values():
        assert 0.2 < values["weight_change"] / values["implied_change"] < 5


def test_a_group_that_barely_moves_is_in_the_result(tmp_path: Path) -> None:
    trial = pick(tiny_trials(tmp_path, train={"encoder_lr": 1e-9, "weight_decay": 0.0}), "unfrozen")
    result = train(trial, tmp_path)[-1]
    assert isinstance(result, TrialResult)
    assert set(result.barely_moved) == {"encoder"}
    assert result.weight_change["encoder"] > 0


def test_two_processes_do_not_train_one_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_trainer, "LOCK_S", 0.1)
    trial = pick(tiny_trials(tmp_path), "frozen")
    first = trainer(trial, tmp_path).run()
    next(first)
    second = trainer(trial, tmp_path).run()
    assert "another process" in next(second).what
    with pytest.raises(TrialInUseError, match="is being trained by another process"):
        next(second)
    first.close()
    train(trial, tmp_path)


def test_a_second_process_goes_on_once_the_first_one_lets_go(tmp_path: Path) -> None:
    trial = pick(tiny_trials(tmp_path), "frozen")
    first, second = trainer(trial, tmp_path).run(), trainer(trial, tmp_path).run()
    next(first)
    assert isinstance(next(second), Waiting)
    first.close()
    assert isinstance(list(second)[-1], TrialResult)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"protocol": "dialogue"}},
        {"model": {"pooling": "mean", "output": "sigmoid", "frame_rate_hz": 50.0}},
        {"model": {"layers": [0, 2], "spec_augment": True}},
        {"model": {"layers": [2], "unfreeze_top_layers": 1}},
        {"train": {"accumulation": "averaged", "length_bucket_batches": 1}},
        {"train": {"freeze_epochs": 1}},
        {"train": {"precision": "bfloat16"}},
        {"corpus": {"dimensions": ["arousal"]}},
    ],
)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_setting_trains(tmp_path: Path, condition: str, sections: dict[str, Any]) -> None:
    trial = pick(tiny_trials(tmp_path, **sections), condition)
    result = train(trial, tmp_path)[-1]
    assert isinstance(result, TrialResult)
    assert set(result.test_ccc) == {*trial.config.corpus.dimensions, "avg"}


def test_gradient_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    numbers = []
    for name in ("kept", "again"):
        settings = {"gradient_checkpointing": name == "again"}
        trial = pick(tiny_trials(tmp_path, train=settings), "unfrozen")
        train(trial, tmp_path, name)
        result, *rest = outcome(tmp_path, trial, name)
        numbers.append((result | {"key": None}, rest))
    assert numbers[0] == numbers[1]


def test_a_limit_of_seconds_changes_memory_and_not_the_gradient(tmp_path: Path) -> None:
    losses = []
    for name, limit in (("free", None), ("limited", 0.6)):
        trial = pick(tiny_trials(tmp_path, train={"batch_size": 4, "max_batch_s": limit}), "unfrozen")
        sizes = {len(m) for u in learner(trial, tmp_path).updates(1) for m in u.micro_batches}
        assert (4 in sizes) == (limit is None)
        losses.append([e.train_loss for e in train(trial, tmp_path, name) if isinstance(e, EpochRecord)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_with_unfreeze_layers_what_is_below_does_not_move(tmp_path: Path) -> None:
    trial = pick(tiny_trials(tmp_path, model={"unfreeze_top_layers": 1}), "unfrozen")
    one = trainer(trial, tmp_path)
    list(one.run())
    pretrained, trained = load_backbone(trial.encoder).state_dict(), one.learner.model.encoder.backbone.state_dict()
    moved = {n for n in trained if not torch.equal(trained[n], pretrained[n])}
    assert moved
    assert all(n.startswith("encoder.layers.1.") for n in moved)
    assert not any(module.training for module in one.learner.model.encoder.backbone.encoder.layers[0].modules())
    assert all(
        n.startswith(("head.", "encoder.backbone.encoder.layers.1."))
        for n in load_file(directory(tmp_path, trial).model.weights)
    )


def test_more_unfrozen_layers_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"model\.unfreeze_top_layers 9: the encoder has 2 transformer layers"):
        learner(pick(tiny_trials(tmp_path, model={"unfreeze_top_layers": 9}), "unfrozen"), tmp_path)


def test_early_stopping_ends_after_so_many_epochs_without_a_better_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = pick(tiny_trials(tmp_path, train={"epochs": 30, "early_stopping_patience": 2}), "frozen")
    scores = iter([0.1, 0.3, 0.2, 0.4, 0.3, 0.39, 0.9])
    monkeypatch.setattr(fold_trainer, "ccc_by_dimension", lambda *_: {"avg": next(scores)})
    result = train(trial, tmp_path)[-1]
    assert isinstance(result, TrialResult)
    assert (result.best_epoch, result.epochs_run) == (4, 6)


class TestOutOfMemory:
    @staticmethod
    def limit(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
        """A device that cannot encode more than `largest` utterances at once with their graph."""
        encode = MambaEMAModel.encode

        def limited(self: Any, features: Tensor, lengths: Tensor, *keys: Any) -> Tensor:
            if torch.is_grad_enabled() and len(lengths) > largest:
                raise torch.OutOfMemoryError("injected")
            return encode(self, features, lengths, *keys)

        monkeypatch.setattr(MambaEMAModel, "encode", limited)

    def test_it_goes_on_with_smaller_micro_batches_and_the_same_effective_batch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trial = pick(tiny_trials(tmp_path, train={"batch_size": 4, "accumulation_steps": 1}), "unfrozen")
        whole = train(trial, tmp_path, "whole")
        self.limit(monkeypatch, 1)
        small = train(trial, tmp_path, "small")
        halved = list(read_events(directory(tmp_path, trial, "small").journal, "memory"))
        expected = [(epoch, update, size) for epoch in (1, 2, 3) for update in (0, 1, 2) for size in (2, 1)]
        assert [(line["epoch"], line["update"], line["batch_size"]) for line in halved] == expected
        assert isinstance(small[-1], TrialResult)
        assert small[-1].batch_size == 1
        losses = [[e.train_loss for e in events if isinstance(e, EpochRecord)] for events in (whole, small)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
        assert [e.updates for e in small if isinstance(e, EpochRecord)] == [3, 6, 9]

    def test_only_the_update_that_needs_it_is_split(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trial = pick(tiny_trials(tmp_path, train={"batch_size": 4, "accumulation_steps": 1}), "unfrozen")
        largest, update, encode = 2, Learner.update, MambaEMAModel.encode
        sizes: list[tuple[Position, list[int]]] = []

        def recorded(self: Learner, batch: Update, position: Position, *following: Update) -> Any:
            sizes.append((position, [len(micro) for micro in batch.micro_batches]))
            return update(self, batch, position, *following)

        def limited(self: Any, features: Tensor, lengths: Tensor, *keys: Any) -> Tensor:
            if sizes[-1][0].updates == 1 and torch.is_grad_enabled() and len(lengths) > largest:
                raise torch.OutOfMemoryError("injected")
            return encode(self, features, lengths, *keys)

        monkeypatch.setattr(Learner, "update", recorded)
        monkeypatch.setattr(MambaEMAModel, "encode", limited)
        result = train(trial, tmp_path)[-1]
        assert isinstance(result, TrialResult)
        assert result.batch_size == largest
        assert [micro for position, micro in sizes if position.updates == 1] == [[4], [2, 2]]
        assert [micro for position, micro in sizes if position.updates == 2] == [[4]]

    def test_memory_is_freed_after_the_failed_graph_is_gone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        graphs: list[weakref.ref[Any]] = []
        alive: list[bool] = []
        encode = MambaEMAModel.encode

        def limited(self: Any, features: Tensor, lengths: Tensor, *keys: Any) -> Tensor:
            z = encode(self, features, lengths, *keys)
            if torch.is_grad_enabled() and len(lengths) > 1:
                graphs.append(weakref.ref(z))
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            return z

        monkeypatch.setattr(MambaEMAModel, "encode", limited)
        monkeypatch.setattr(learner_module, "free_memory", lambda _: alive.append(graphs[-1]() is not None))
        assert isinstance(
            train(pick(tiny_trials(tmp_path, train={"epochs": 1}), "unfrozen"), tmp_path)[-1], TrialResult
        )
        assert alive
        assert not any(alive)

    def test_at_one_utterance_it_gives_up_with_advice(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.limit(monkeypatch, 0)
        with pytest.raises(MemoryLimitError, match=r"at train\.batch_size 1 .*use a GPU with more memory"):
            train(pick(tiny_trials(tmp_path), "unfrozen"), tmp_path)

    def test_averaged_accumulation_is_not_made_smaller_in_silence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.limit(monkeypatch, 1)
        with pytest.raises(MemoryLimitError, match=r"or train\.accumulation exact"):
            train(pick(tiny_trials(tmp_path, train={"accumulation": "averaged"}), "unfrozen"), tmp_path)


def test_checkpoints_are_written_within_an_epoch_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the middle of an epoch costs what was done since the last of them."""
    trial = pick(tiny_trials(tmp_path, cluster={"checkpoint_every_s": 0.0}), "unfrozen")
    train(trial, tmp_path, "whole")
    one = trainer(trial, tmp_path, "parts")
    step, steps = Learner.update, itertools.count(1)

    def dies(*arguments: Any) -> Any:
        if next(steps) == 6:
            raise SystemExit
        return step(*arguments)

    monkeypatch.setattr(Learner, "update", dies)
    with pytest.raises(SystemExit):
        list(one.run())
    monkeypatch.undo()
    started = next(e for e in train(trial, tmp_path, "parts") if isinstance(e, TrialStarted))
    assert (started.resumed_epoch, started.resumed_update) == (2, 2)
    assert outcome(tmp_path, trial, "whole") == outcome(tmp_path, trial, "parts")
