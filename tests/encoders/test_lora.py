"""Adapters equal those of peft on transformers' own models, and merge into weights that predict the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cvrunner.config import sections
from cvrunner.config.adaptation import Adaptation
from cvrunner.encoders.encoder import SpeechEncoder
from cvrunner.encoders.lora import add_adapters, merged
from tests.encoders.test_families import CASES, packed
from tests.tiny_encoders import tiny_encoder

SAMPLES = (8000, 2560, 12800)
ADAPTED = ["wavlm, post-norm", "wavlm, pre-norm", "data2vec-audio", "whisper, unpadded", "whisper, 30 s"]


def lora(**settings: Any) -> Adaptation:
    config = sections.LoraConfig(**{"rank": 2, "dropout": 0.0, **settings})
    return Adaptation("lora", start_epoch=1, lora=config)


def shake_adapters(module: nn.Module) -> None:
    """Random values for all adapters: those of `B` are zero at the start, so that nothing would show."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if ".lora_" in name:
                parameter.normal_(0, 0.3)


class Merged(nn.Module):
    """Parametrization of a projection's weight: with the adapter of peft added to it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.delta = [layer.get_delta_weight]

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta[0]("default")


def apply_to_weights(model: nn.Module) -> None:
    """Merge adapters with a gradient. Transformers' WavLM reads the weights of its projections and never calls them,
    so that peft's adapters would have no effect in it."""
    for layer in [module for module in model.modules() if hasattr(module, "get_delta_weight")]:
        parametrize.register_parametrization(layer.base_layer, "weight", Merged(layer))


def without_dropout(encoder: SpeechEncoder) -> None:
    for module in encoder.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(getattr(module, "p", None), float):
            module.p = 0.0


# Transformers' Whisper without padding is a copy of the model, which has no place for adapters.
@pytest.mark.parametrize("case", [case for case in ADAPTED if case != "whisper, unpadded"])
def test_states_and_gradients_equal_those_of_peft_on_transformers_model(case: str) -> None:
    make, backbone, reference = CASES[case]()
    backbone.double()
    encoder = make(copy.deepcopy(backbone), frame_rate_hz=50.0, adaptation=lora())
    add_adapters(encoder)
    # As a user of peft names them: by suffix.
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=16, target_modules=targets), backbone)
    for model in (encoder, backbone):
        model.double()
        shake_adapters(model)
    if "wavlm" in case:
        apply_to_weights(backbone)
    torch.manual_seed(1)
    waveforms = [torch.randn(samples, dtype=torch.float64) for samples in SAMPLES]
    expected = [torch.stack(reference(waveform), dim=1) for waveform in waveforms]
    encoder.train()
    without_dropout(encoder)
    states, lengths, _ = encoder(*packed(encoder, waveforms))
    ours = list(states.split(lengths.tolist()))
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)
    sum((one**2).sum() for one in ours).backward()  # type: ignore[union-attr]
    sum((one**2).sum() for one in expected).backward()  # type: ignore[union-attr]
    gradients = [
        [p.grad for name, p in sorted(model.named_parameters()) if ".lora_" in name] for model in (encoder, backbone)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        assert mine is not None
        assert theirs is not None
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)
    assert len(gradients[0]) == 2 * 4 * encoder.depth


@pytest.mark.parametrize("case", ADAPTED)
def test_adapters_start_as_the_pretrained_encoder_and_merge_into_the_same_states(case: str) -> None:
    make, backbone, _ = CASES[case]()
    backbone.double()
    plain = make(copy.deepcopy(backbone), adaptation=lora()).eval()
    encoder = make(backbone, adaptation=lora())
    add_adapters(encoder)
    encoder.double().eval()
    features, lengths = packed(encoder, [torch.randn(samples, dtype=torch.float64) for samples in SAMPLES])
    for one, other in zip(encoder(features, lengths), plain(features, lengths), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)
    shake_adapters(encoder)
    adapted = encoder(features, lengths)[0]
    assert (adapted - plain(features, lengths)[0]).abs().max() > 0.01
    weights = merged(encoder, {name: p for name, p in encoder.named_parameters() if ".lora_" in name})
    assert len(weights) == 4 * encoder.depth
    result = plain.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    torch.testing.assert_close(plain(features, lengths)[0], adapted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("case", ADAPTED)
def test_from_the_input_of_the_first_layer_on_states_are_the_same(case: str) -> None:
    make, backbone, _ = CASES[case]()
    encoder = make(backbone, adaptation=lora())
    add_adapters(encoder)
    shake_adapters(encoder)
    assert encoder.starts_at_boundary
    features, lengths = packed(encoder, [torch.randn(samples) for samples in SAMPLES])
    encoder.eval()
    hidden = encoder.states_from_boundary(encoder.to_boundary(features, lengths), lengths)[0]
    for number, state in encoder.states(features, lengths)[0].items():
        torch.testing.assert_close(hidden[number], state, atol=1e-5, rtol=1e-5)


def test_only_the_named_projections_of_the_layers_that_count_get_adapters() -> None:
    def adapted(**settings: Any) -> set[tuple[str, str]]:
        encoder = tiny_encoder(**settings)
        add_adapters(encoder)
        names = [name.split(".") for name, _ in encoder.named_parameters() if ".lora_A" in name]
        return {(parts[3], parts[5]) for parts in names}

    assert adapted(adaptation=lora(targets=("q", "v"))) == {(n, p) for n in "01" for p in ("q_proj", "v_proj")}
    top = Adaptation("lora", start_epoch=1, top_layers=1, lora=sections.LoraConfig(rank=2, targets=("k",)))
    assert adapted(adaptation=top) == {("1", "k_proj")}
    # A layer above the topmost mixed hidden state would get no gradient.
    assert adapted(adaptation=lora(targets=("out",)), layers=(0, 1)) == {("0", "out_proj")}
    assert adapted() == set()


def test_the_input_of_the_first_layer_has_no_dropout_and_the_adapted_layers_have() -> None:
    encoder = tiny_encoder(adaptation=lora(dropout=0.5))
    add_adapters(encoder)
    encoder.train()
    assert not encoder.backbone.feature_projection.training
    assert not encoder.backbone.encoder.dropout.training
    assert encoder.backbone.encoder.layers[0].attention.q_proj.lora_dropout["default"].training


def test_dropout_of_the_adapters_repeats_itself_with_the_draws_of_torch() -> None:
    encoder = tiny_encoder(adaptation=lora(dropout=0.5))
    add_adapters(encoder)
    shake_adapters(encoder)
    encoder.train()
    without_dropout(encoder)
    for layer in encoder.transformer:
        for projection in (layer.attention.q_proj, layer.attention.v_proj):
            projection.lora_dropout["default"].p = 0.5
    features, lengths = packed(encoder, [torch.randn(8000)])
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(encoder(features, lengths)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
