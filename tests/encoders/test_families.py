"""Every family equals transformers' own forward pass, hidden states and gradients, packed with other utterances."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from cvrunner.encoders.dropout import Place
from cvrunner.encoders.encoder import Boundary, SpeechEncoder
from cvrunner.encoders.waveform import WaveformEncoder
from cvrunner.encoders.whisper import PaddedWhisperEncoder, WhisperEncoder
from tests.tiny_encoders import FULL, TOP_LAYERS, WAVEFORM, layers_of, tiny_backbone, tiny_whisper

SAMPLES = (8000, 2560, 12800)
"""Whole numbers of mel frame pairs, so that a Whisper with a table of this length exists."""
EXTRACTOR = WhisperFeatureExtractor(feature_size=10)
Reference = Callable[[Tensor], list[Tensor]]
Make = Callable[..., SpeechEncoder]


def waveform_family(kind: str) -> tuple[Make, Any, Reference]:
    """Our encoder, transformers' model, and its hidden states `[F, D]` of one utterance, the last one normed."""
    model = tiny_backbone(kind)

    def reference(waveform: Tensor) -> list[Tensor]:
        out = model(waveform[None], output_hidden_states=True)
        return [*(states[0] for states in out.hidden_states[:-1]), out.last_hidden_state[0]]

    return WaveformEncoder, model, reference


def whisper_unpadded() -> tuple[Make, Any, Reference]:
    """The reference for an utterance is the same model with its position table cut to the utterance."""
    encoder = tiny_whisper().encoder

    def reference(waveform: Tensor) -> list[Tensor]:
        mel = EXTRACTOR(waveform.float().numpy(), sampling_rate=16000, padding="do_not_pad", return_tensors="pt")
        features = mel["input_features"].to(waveform)
        frames = features.shape[2] // 2
        cut = tiny_whisper(frames).encoder
        # The same parameters, so that their gradients add up over the utterances.
        weights = dict(encoder.named_parameters())
        weights["embed_positions.weight"] = weights["embed_positions.weight"][:frames]
        states = torch.func.functional_call(cut, weights, features, {"output_hidden_states": True}).hidden_states
        return [one[0] for one in states]

    return _with_extractor(WhisperEncoder), encoder, reference


def whisper_padded() -> tuple[Make, Any, Reference]:
    """The reference is the forward pass over the whole window, of which the utterance's frames are compared."""
    encoder = tiny_whisper().encoder

    def reference(waveform: Tensor) -> list[Tensor]:
        mel = EXTRACTOR(waveform.float().numpy(), sampling_rate=16000, return_tensors="pt")["input_features"]
        states = encoder(mel.to(waveform), output_hidden_states=True).hidden_states
        return [one[0, : len(waveform) // 320] for one in states]

    return _with_extractor(PaddedWhisperEncoder), encoder, reference


def _with_extractor(family: type[WhisperEncoder]) -> Make:
    return lambda backbone, **settings: family(backbone, EXTRACTOR, **settings)


CASES: dict[str, Callable[[], tuple[Make, Any, Reference]]] = {
    **{kind: lambda kind=kind: waveform_family(kind) for kind in WAVEFORM},  # type: ignore[misc]
    "whisper, unpadded": whisper_unpadded,
    "whisper, 30 s": whisper_padded,
}


def packed(encoder: SpeechEncoder, waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    conv = [encoder.conv_features(waveform) for waveform in waveforms]
    assert [len(one) for one in conv] == [encoder.frames(len(waveform)) for waveform in waveforms]
    return torch.cat(conv), torch.tensor([len(one) for one in conv])


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_equal_those_of_transformers(case: str) -> None:
    make, backbone, reference = CASES[case]()
    encoder = make(backbone, frame_rate_hz=50.0)
    torch.manual_seed(1)
    waveforms = [torch.randn(samples) for samples in SAMPLES]
    states, lengths, _ = encoder(*packed(encoder, waveforms))
    assert lengths.tolist() == [encoder.averaged_frames(samples) for samples in SAMPLES]
    for waveform, ours in zip(waveforms, states.split(lengths.tolist()), strict=True):
        with torch.no_grad():
            expected = torch.stack(reference(waveform), dim=1)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        # What is compared differs from layer to layer.
        assert (expected[:, 1:] - expected[:, :-1]).abs().amax(dim=(0, 2)).min() > 0.01


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_transformers(case: str) -> None:
    make, backbone, reference = CASES[case]()
    backbone.double()
    encoder = make(backbone, frame_rate_hz=50.0, adaptation=FULL).eval()
    torch.manual_seed(1)
    waveforms = [torch.randn(samples, dtype=torch.float64) for samples in SAMPLES]
    sum((states**2).mean() * states.shape[0] for w in waveforms for states in reference(w)).backward()  # type: ignore[union-attr]
    expected = {name: p.grad for name, p in encoder.named_parameters()}
    encoder.zero_grad()
    # The path of training, without dropout, which draws in another order than transformers does.
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, Place):
            module.p = 0.0
    states = encoder(*packed(encoder, waveforms)).states
    # The same loss: the squares of all frames and layers.
    ((states**2).sum() / states.shape[2]).backward()
    compared = 0
    front_end = tuple(f"backbone.{name}." for name in encoder.FRONT_END)
    for name, parameter in encoder.named_parameters():
        if name.startswith(front_end):
            assert parameter.grad is None
        elif expected[name] is not None:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-10, rtol=1e-10)
            compared += 1
    assert compared > 3 * 14


@pytest.mark.parametrize("case", CASES)
def test_from_the_boundary_on_states_are_the_same(case: str) -> None:
    make, backbone, _ = CASES[case]()
    encoder = make(backbone, adaptation=TOP_LAYERS)
    features, lengths = packed(encoder, [torch.randn(samples) for samples in SAMPLES])
    encoder.eval()
    whole = encoder(features, lengths)
    mixed = layers_of(whole, encoder.layers_below)
    found = encoder.from_boundary(Boundary(encoder.to_boundary(features, lengths), mixed), lengths)
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", CASES)
def test_a_parameter_of_a_layer_changes_its_hidden_state_and_no_lower_one(case: str) -> None:
    make, backbone, _ = CASES[case]()
    encoder = make(backbone)
    features, lengths = packed(encoder, [torch.randn(4000)])
    before = encoder(features, lengths).states
    patterns = dict(encoder.parameter_layers())
    for layer in range(encoder.depth + 1):
        changed = copy.deepcopy(encoder)
        with torch.no_grad():
            for name, parameter in changed.named_parameters():
                matching = (n for p, n in patterns.items() if name.startswith(p.rstrip("*")))
                if next(matching) == layer and "masked_spec" not in name:
                    parameter.mul_(1.5)
        after = changed(features, lengths).states
        assert torch.equal(after[:, :layer], before[:, :layer])
        if layer or encoder.INPUTS:
            assert not torch.allclose(after[:, layer], before[:, layer])
