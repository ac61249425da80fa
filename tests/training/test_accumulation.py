"""Exact accumulation: however an effective batch is cut, the gradient is that of the whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cvrunner.config.sections import MambaConfig, ModelConfig
from cvrunner.encoders.waveform import WaveformEncoder
from cvrunner.model.mamba_ema import MambaEMAModel
from cvrunner.training.accumulation import averaged_backward, ccc_loss, exact_backward
from tests.tiny_encoders import FULL, MASKED, tiny_encoder, tiny_wavlm

CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]


@dataclass
class Batch:
    features: Tensor
    lengths: Tensor
    positions: Tensor


class Linear(nn.Module):
    """The smallest model with dropout on both sides of the cut, all in float64."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(dropout)).double()
        self.above = nn.Sequential(nn.Dropout(dropout), nn.Linear(7, 2)).double()
        self.encoded: list[int] = []

    def encode(self, features: Tensor, lengths: Tensor) -> Tensor:
        self.encoded.append(len(features) if torch.is_grad_enabled() else -len(features))
        return self.below(features)  # type: ignore[no-any-return]

    def predict(self, z: Tensor, turns: list[int]) -> Tensor:
        return self.above(z)  # type: ignore[no-any-return]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def cut(features: list[Tensor], size: int, order: list[int]) -> list[Batch]:
    """Micro-batches of `size` in this order, one utterance after the other."""
    batches = []
    for start in range(0, len(features), size):
        positions = order[start : start + size]
        members = [features[i] for i in positions]
        lengths = torch.tensor([len(f) for f in members])
        batches.append(Batch(torch.cat(members), lengths, torch.tensor(positions)))
    return batches


ORDER = [3, 1, 7, 0, 2, 6, 5, 4]
LABELS = torch.rand(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("size", "steps"), CUTS)
def test_without_dropout_every_cut_gives_the_gradient_of_the_whole_in_float64(size: int, steps: int) -> None:
    model = Linear(dropout=0.0)
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = ccc_loss(model.predict(model.encode(x, x), []), LABELS)
    loss.backward()
    expected = gradients(model)
    batches = [
        Batch(x[i], torch.ones(len(i)), torch.tensor(i)) for i in (ORDER[s : s + size] for s in range(0, 8, size))
    ]
    assert len(batches) == steps
    assert exact_backward(model, batches, LABELS, [1] * 8).item() == pytest.approx(loss.item(), abs=1e-12)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("size", "steps"), CUTS)
def test_with_dropout_it_equals_one_graph_over_the_same_random_draws(size: int, steps: int) -> None:
    """Replay: all micro-batches encoded with their graphs kept, in the same order from the same seed."""
    model = Linear(dropout=0.4).train()
    x = torch.randn(8, 5, dtype=torch.float64)
    batches = [Batch(x[s : s + size], torch.ones(size), torch.arange(s, s + size)) for s in range(0, 8, size)]
    torch.manual_seed(3)
    z = torch.cat([model.encode(b.features, b.lengths) for b in batches])
    ccc_loss(model.predict(z, []), LABELS).backward()
    expected, state = gradients(model), torch.get_rng_state()
    torch.manual_seed(3)
    exact_backward(model, batches, LABELS, [1] * 8)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-10)
    assert torch.equal(torch.get_rng_state(), state), "what follows draws on as if nothing had been repeated"


def test_each_earlier_micro_batch_is_encoded_twice_and_the_last_once() -> None:
    model = Linear(dropout=0.0)
    x = torch.randn(8, 5, dtype=torch.float64)
    batches = [Batch(x[s : s + 2], torch.ones(2), torch.arange(s, s + 2)) for s in range(0, 8, 2)]
    exact_backward(model, batches, LABELS, [1] * 8)
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
    exact_backward(model, cut(conv, 8, ORDER), LABELS, turns)
    expected = gradients(model)
    exact_backward(model, cut(conv, size, ORDER), LABELS, turns)
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert any(name.startswith("encoder.backbone.encoder.layers.0") for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-8)


def test_the_whole_model_repeats_its_dropout_in_the_second_encoding() -> None:
    wavlm = tiny_wavlm(hidden_dropout=0.3, attention_dropout=0.3, activation_dropout=0.3)
    encoder = WaveformEncoder(wavlm, adaptation=MASKED)
    config = ModelConfig(width=16, dropout=0.3, mamba=MambaConfig(state_size=4, head_dim=8, layers=1))
    model = MambaEMAModel(encoder, config, 2).double().train()
    batches = cut([encoder.conv_features(torch.randn(4000 + 500 * i, dtype=torch.float64)) for i in range(8)], 2, ORDER)
    torch.manual_seed(3)
    z = torch.cat([model.encode(b.features, b.lengths) for b in batches])
    order = torch.cat([b.positions for b in batches]).argsort()
    ccc_loss(model.predict(z[order], [1] * 8), LABELS).backward()
    expected = gradients(model)
    torch.manual_seed(3)
    exact_backward(model, batches, LABELS, [1] * 8)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-8)


def test_averaged_accumulation_is_another_gradient() -> None:
    """The old script's: the mean of the micro-batches' CCCs, kept to reproduce it."""
    model = Linear(dropout=0.0)
    x = torch.randn(8, 5, dtype=torch.float64)
    batches = [Batch(x[s : s + 4], torch.ones(4), torch.arange(s, s + 4)) for s in (0, 4)]
    loss = averaged_backward(model, batches, LABELS, [1] * 8)
    averaged = gradients(model)
    halves = [ccc_loss(model.predict(model.encode(b.features, b.lengths), []), LABELS[b.positions]) for b in batches]
    (sum(halves) / 2).backward()  # type: ignore[union-attr]
    expected = gradients(model)
    assert loss.item() == pytest.approx(sum(half.item() for half in halves) / 2)
    exact_backward(model, batches, LABELS, [1] * 8)
    exact = gradients(model)
    for name in expected:
        torch.testing.assert_close(averaged[name], expected[name])
    assert not torch.allclose(exact["below.0.weight"], expected["below.0.weight"], rtol=0.05)


class CastsOf(TorchDispatchMode):
    """Counts the casts of a weight, found by its shape, to bfloat16."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = weight.shape
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.shape == self.shape and out.dtype == torch.bfloat16:
            self.count += 1
        return out


def test_a_weight_is_cast_once_without_and_once_with_gradient_whatever_the_cut() -> None:
    encoder = tiny_encoder(adaptation=FULL, precision=torch.bfloat16)
    model = MambaEMAModel(encoder, ModelConfig(width=16, mamba=MambaConfig(state_size=4, head_dim=8)), 2).train()
    features = [torch.randn(n, 8) for n in (9, 12, 15, 20, 31, 8, 22, 17)]
    weight = encoder.backbone.encoder.layers[0].feed_forward.intermediate_dense.weight
    layers = len(encoder.backbone.encoder.layers)
    found = {}
    for size in (8, 2):
        torch.manual_seed(0)
        with CastsOf(weight) as casts:
            exact_backward(model, cut(features, size, ORDER), torch.rand(8, 2), [1] * 8)
        found[size] = casts.count
        assert {name for name, g in gradients(model).items() if g.abs().sum() > 0} >= {
            f"encoder.backbone.encoder.layers.{layer}.feed_forward.intermediate_dense.weight" for layer in range(layers)
        }
    assert found == {8: layers, 2: 2 * layers}
