"""Exact accumulation: however an effective batch is cut, the gradient is that of the whole."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import WhisperFeatureExtractor

from cvrunner.config.sections import MambaConfig, ModelConfig
from cvrunner.encoders.dropout import Draws, Dropout
from cvrunner.encoders.encoder import Encoded, SpeechEncoder
from cvrunner.encoders.waveform import WaveformEncoder
from cvrunner.encoders.whisper import WhisperEncoder
from cvrunner.model.mamba_ema import MambaEMAModel
from cvrunner.plan.counting import autocast
from cvrunner.training.accumulation import MicroBatch, averaged_backward, ccc_loss, exact_backward
from tests.tiny_encoders import FULL, MASKED, tiny_encoder, tiny_wavlm, tiny_whisper
from tests.training.test_waits import Waits

CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]


class Linear(nn.Module):
    """The smallest model with dropout on both sides of the cut, all in float64."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), Dropout(dropout, "below")).double()
        self.above = nn.Sequential(Dropout(dropout, "above"), nn.Linear(7, 2)).double()
        self.encoded: list[int] = []

    def encode(self, features: Tensor, lengths: Tensor, keys: Sequence[int] = ()) -> Tensor:
        self.encoded.append(len(features) if torch.is_grad_enabled() else -len(features))
        with Draws(keys, [1] * len(features), features.device).used():
            return self.below(features)  # type: ignore[no-any-return]

    def predict(self, z: Tensor, turns: list[int], keys: Sequence[int] = ()) -> Tensor:
        with Draws(keys, [1] * len(z), z.device).used():
            return self.above(z)  # type: ignore[no-any-return]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def cut(features: Sequence[Any], size: int, order: list[int]) -> list[MicroBatch]:
    """Micro-batches of `size` in this order, one utterance after the other."""
    batches = []
    for start in range(0, len(features), size):
        positions = order[start : start + size]
        members = [features[i] for i in positions]
        lengths = torch.tensor([len(f) for f in members])
        if isinstance(members[0], Encoded):
            states, lengths, statistics = (torch.cat(parts) for parts in zip(*members, strict=True))
            joined = Encoded(states, lengths, statistics)
        else:
            joined = torch.cat(members)
        batches.append(MicroBatch(joined, lengths, tuple(positions)))
    return batches


ORDER = [3, 1, 7, 0, 2, 6, 5, 4]
KEYS = [11 * 2**40 + i for i in range(8)]
LABELS = torch.rand(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("size", "steps"), CUTS)
def test_without_dropout_every_cut_gives_the_gradient_of_the_whole_in_float64(size: int, steps: int) -> None:
    model = Linear(dropout=0.0)
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = ccc_loss(model.predict(model.encode(x, x), []), LABELS)
    loss.backward()
    expected = gradients(model)
    batches = [MicroBatch(x[i], torch.ones(len(i)), tuple(i)) for i in (ORDER[s : s + size] for s in range(0, 8, size))]
    assert len(batches) == steps
    assert exact_backward(model, batches, LABELS, [1] * 8, KEYS).item() == pytest.approx(loss.item(), abs=1e-12)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("size", "steps"), CUTS)
def test_with_dropout_it_equals_one_graph_over_the_whole(size: int, steps: int) -> None:
    model = Linear(dropout=0.4).train()
    x = torch.randn(8, 5, dtype=torch.float64)
    ccc_loss(model.predict(model.encode(x, x, KEYS), [], KEYS), LABELS).backward()
    expected, state = gradients(model), torch.get_rng_state()
    batches = [MicroBatch(x[s : s + size], torch.ones(size), tuple(range(s, s + size))) for s in range(0, 8, size)]
    assert len(batches) == steps
    exact_backward(model, batches, LABELS, [1] * 8, KEYS)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-10)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn from torch's own stream"


def test_each_earlier_micro_batch_is_encoded_twice_and_the_last_once() -> None:
    model = Linear(dropout=0.0)
    x = torch.randn(8, 5, dtype=torch.float64)
    batches = [MicroBatch(x[s : s + 2], torch.ones(2), tuple(range(s, s + 2))) for s in range(0, 8, 2)]
    exact_backward(model, batches, LABELS, [1] * 8, KEYS)
    assert model.encoded == [-2, -2, -2, 2, 2, 2, 2]


@pytest.mark.parametrize("protocol", ["utterance", "dialogue"])
@pytest.mark.parametrize(("size", "steps"), CUTS[1:])
def test_the_whole_model_gives_the_same_gradient_for_every_cut(protocol: str, size: int, steps: int) -> None:
    encoder = tiny_encoder(adaptation=FULL).double()
    config = ModelConfig(
        width=16, dropout=0.0, protocol=protocol, mamba=MambaConfig(state_size=4, head_dim=8, layers=1)
    )
    model = MambaEMAModel(encoder, config, 2).double().eval()
    torch.manual_seed(2)
    conv = [encoder.conv_features(torch.randn(4000 + 500 * i, dtype=torch.float64)) for i in range(8)]
    turns = [3, 5] if protocol == "dialogue" else [1] * 8
    exact_backward(model, cut(conv, 8, ORDER), LABELS, turns, KEYS)
    expected = gradients(model)
    exact_backward(model, cut(conv, size, ORDER), LABELS, turns, KEYS)
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert any(name.startswith("encoder.backbone.encoder.layers.0") for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-8)


DROPPING = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.3)


def dropping_encoder(kind: str) -> SpeechEncoder:
    """An encoder of which every part drops, in float64."""
    if kind == "whisper":
        whisper = tiny_whisper()
        for layer in whisper.encoder.layers:
            layer.dropout = layer.activation_dropout = layer.self_attn.dropout = 0.3
        extractor = WhisperFeatureExtractor(feature_size=10)  # type: ignore[no-untyped-call]
        return WhisperEncoder(whisper.encoder, extractor, adaptation=FULL).double()
    settings: dict[str, Any] = {"full": {"adaptation": FULL}, "masked": {"adaptation": MASKED}, "frozen": {}}.get(
        kind, {"adaptation": FULL, "gradient_checkpointing": True}
    )
    return WaveformEncoder(tiny_wavlm(stable=kind == "masked", **DROPPING), **settings).double()


@pytest.mark.parametrize("protocol", ["utterance", "dialogue"])
@pytest.mark.parametrize("kind", ["full", "masked", "checkpointing", "whisper", "frozen"])
def test_with_dropout_the_whole_model_gives_the_same_gradient_for_every_cut(kind: str, protocol: str) -> None:
    encoder = dropping_encoder(kind)
    mamba = MambaConfig(state_size=4, head_dim=8, layers=1)
    model = MambaEMAModel(encoder, ModelConfig(width=16, dropout=0.3, protocol=protocol, mamba=mamba), 2).double()
    torch.manual_seed(2)
    # Lengths of which some are padded together and some are not.
    features = [encoder.conv_features(torch.randn(n, dtype=torch.float64)) for n in range(8000, 13000, 625)]
    if kind == "frozen":
        features = [encoder(f, torch.tensor([len(f)])) for f in features]
    model.train()
    turns = [3, 5] if protocol == "dialogue" else [1] * 8
    found, state = {}, torch.get_rng_state()
    for size, _ in CUTS:
        losses = [exact_backward(model, cut(features, size, ORDER), LABELS, turns, KEYS)]
        found[size] = gradients(model) | {"loss": losses[0]}
    assert any(name.startswith("encoder.") for name in found[8]) == (kind != "frozen")
    for size in (4, 2, 1):
        assert found[size].keys() == found[8].keys()
        for name, gradient in found[size].items():
            torch.testing.assert_close(gradient, found[8][name], atol=1e-12, rtol=1e-7, msg=f"{name}, {size}")
    other = exact_backward(model, cut(features, 8, ORDER), LABELS, turns, [key + 1 for key in KEYS])
    assert not torch.isclose(other, found[8]["loss"]), "other keys, other draws"
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn from torch's own stream"


def test_averaged_accumulation_is_another_gradient() -> None:
    """The old script's: the mean of the micro-batches' CCCs, kept to reproduce it."""
    model = Linear(dropout=0.0)
    x = torch.randn(8, 5, dtype=torch.float64)
    batches = [MicroBatch(x[s : s + 4], torch.ones(4), tuple(range(s, s + 4))) for s in (0, 4)]
    loss = averaged_backward(model, batches, LABELS, [1] * 8, KEYS)
    averaged = gradients(model)
    halves = []
    for batch in batches:
        z = model.encode(batch.features, batch.lengths)
        halves.append(ccc_loss(model.predict(z, []), LABELS[list(batch.positions)]))
    (sum(halves) / 2).backward()  # type: ignore[union-attr]
    expected = gradients(model)
    assert loss.item() == pytest.approx(sum(half.item() for half in halves) / 2)
    exact_backward(model, batches, LABELS, [1] * 8, KEYS)
    exact = gradients(model)
    for name in expected:
        torch.testing.assert_close(averaged[name], expected[name])
    assert not torch.allclose(exact["below.0.weight"], expected["below.0.weight"], rtol=0.05)


class CastsOf(TorchDispatchMode):
    """Counts the casts of weights of one shape to bfloat16."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = weight.shape
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._foreach_copy_.default:
            made = args[0]
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten._foreach_copy_.default):
            made = made if isinstance(made, list) else [made]
            self.count += sum(x.shape == self.shape and x.dtype == torch.bfloat16 for x in made)
        return out


def half_model(**settings: Any) -> MambaEMAModel:
    encoder = tiny_encoder(stable=True, adaptation=FULL, precision=torch.bfloat16, **settings)
    return MambaEMAModel(encoder, ModelConfig(width=16, mamba=MambaConfig(state_size=4, head_dim=8)), 2).train()


HALF_FEATURES = [torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (9, 12, 15, 20, 31, 8, 22, 17)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_weight_is_cast_once_per_update_whatever_the_cut(checkpointing: bool) -> None:
    model = half_model(gradient_checkpointing=checkpointing)
    layers = model.encoder.transformer
    for size in (8, 2):
        with CastsOf(layers[0].feed_forward.intermediate_dense.weight) as casts, model.encoder.casts.kept():
            exact_backward(model, cut(HALF_FEATURES, size, ORDER), LABELS.float(), [1] * 8, KEYS)
        assert casts.count == len(layers)
        found = gradients(model)
        for number in range(len(layers)):
            gradient = found[f"encoder.backbone.encoder.layers.{number}.feed_forward.intermediate_dense.weight"]
            assert gradient.dtype == torch.float32
            assert gradient.abs().sum() > 0


def test_kept_casts_give_the_gradients_of_autocast() -> None:
    model, found = half_model(), []
    for kept in (model.encoder.casts.kept(), contextlib.nullcontext()):
        with kept:
            exact_backward(model, cut(HALF_FEATURES, 2, ORDER), LABELS.float(), [1] * 8, KEYS)
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        # Sums of bfloat16 in another order: equal but for its rounding.
        error = (gradient - found[1][name]).norm() / found[1][name].norm().clamp_min(1e-6)
        assert error < 0.05, name


def test_a_cast_follows_its_weight_and_outlives_the_update_only_if_that_is_frozen() -> None:
    encoder = half_model().encoder
    layer = encoder.transformer[0]
    dense = layer.feed_forward.intermediate_dense
    dense.weight.requires_grad_(False)
    parameters = dict(encoder.named_parameters())

    def casts() -> tuple[Tensor, Tensor]:
        with encoder.casts.kept(), encoder.casts.used_by(layer):
            return dense.weight, dense.bias

    (frozen, trained), (again, rebuilt) = casts(), casts()
    assert (frozen.dtype, frozen.requires_grad, trained.requires_grad) == (torch.bfloat16, False, True)
    assert again is frozen
    assert rebuilt is not trained
    with torch.no_grad():
        dense.weight += 1
    assert torch.equal(casts()[0], dense.weight.bfloat16())
    dense.weight.requires_grad_(True)
    assert casts()[0].requires_grad
    # Outside, and after an error inside, the modules have their parameters.
    with pytest.raises(ZeroDivisionError), encoder.casts.kept(), encoder.casts.used_by(layer):
        raise ZeroDivisionError
    assert all(parameter is parameters[name] for name, parameter in encoder.named_parameters())


def test_forward_and_backward_pass_never_wait_for_the_device() -> None:
    model, labels = half_model().to("meta"), torch.empty(8, 2, device="meta")
    batches = [
        MicroBatch(batch.features.to("meta"), batch.lengths, batch.positions) for batch in cut(HALF_FEATURES, 4, ORDER)
    ]
    with mock.patch("torch.autocast", autocast), model.encoder.casts.kept(), Waits() as waits:
        exact_backward(model, batches, labels, [1] * 8, KEYS)
    assert waits.found == []
