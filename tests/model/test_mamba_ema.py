"""Mamba against a loop over time, packing, causality, the EMA's definition, and both protocols."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from cvrunner.config.sections import EmaConfig, MambaConfig, ModelConfig
from cvrunner.encoders.encoder import Encoded
from cvrunner.encoders.packing import Packing
from cvrunner.model.mamba import LONGEST, MambaBlock, MambaStack, dual_form, scan
from cvrunner.model.mamba_ema import AttentiveStatisticsPooling, Head, MeanPooling, TurnEma

SMALL = MambaConfig(state_size=4, head_dim=8, chunk_size=4)


def _head(**settings: Any) -> Head:
    torch.manual_seed(0)
    return Head(ModelConfig(width=16, mamba=SMALL, **settings), dimensions=2, layers=3, encoder_width=6).eval()


def _encoded(states: torch.Tensor, *lengths: int) -> Encoded:
    """Hidden states `[S, L, D]` with their statistics, at one frame rate."""
    return Encoded(states, torch.tensor(lengths), _packing(*lengths).statistics(states.unbind(1)))


def _vectors(utterances: int, head: Head) -> torch.Tensor:
    """Utterance vectors, which end with the two outputs of the linear path."""
    return torch.randn(utterances, head.pooling.width + 2)


def _packing(*lengths: int) -> Packing:
    return Packing(lengths, torch.device("cpu"))


def naive_mixer(mixer: Any, x: torch.Tensor) -> torch.Tensor:
    """Mamba-2 as its recurrence, `h_t = exp(dt A) h_(t-1) + dt B_t x_t`, `y_t = C_t h_t + D x_t`; `x [N, W]`."""
    inner, state = mixer.intermediate_size, mixer.ssm_state_size
    heads, width = mixer.num_heads, mixer.head_dim
    gate, values, dt = mixer.in_proj(x).split([inner, inner + 2 * state, heads], dim=-1)
    history = functional.pad(values.T, (mixer.conv_kernel_size - 1, 0))
    convolved = torch.stack(
        [
            (history[:, n : n + mixer.conv_kernel_size] * mixer.conv1d.weight[:, 0]).sum(-1) + mixer.conv1d.bias
            for n in range(len(x))
        ]
    )
    u, b, c = functional.silu(convolved).split([inner, state, state], dim=-1)
    step = functional.softplus(dt + mixer.dt_bias)
    h = torch.zeros(heads, width, state)
    outputs = []
    for n in range(len(x)):
        u_n = u[n].view(heads, width)
        decay = torch.exp(-step[n] * torch.exp(mixer.A_log))
        h = decay[:, None, None] * h + step[n][:, None, None] * u_n[..., None] * b[n]
        outputs.append((h @ c[n] + mixer.D[:, None] * u_n).flatten())
    return mixer.out_proj(mixer.norm(torch.stack(outputs), gate))  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", [dual_form, scan])
def test_both_forms_of_the_mixer_equal_a_naive_loop_over_time(form: Any) -> None:
    torch.manual_seed(0)
    mixer = MambaBlock(16, SMALL).mixer
    packing = _packing(1, 3, 4, 11)
    x = torch.randn(19, 16)
    with torch.no_grad():
        naive = torch.cat([naive_mixer(mixer, sequence) for sequence in x.split(packing.lengths)])
        torch.testing.assert_close(form(mixer, x, packing.whole), naive, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", [9, LONGEST])
def test_both_forms_have_the_same_gradients(steps: int) -> None:
    torch.manual_seed(0)
    mixer = MambaBlock(16, SMALL).mixer
    sequences = _packing(steps, steps - 4).whole
    gradients = []
    for form in (dual_form, scan):
        x = torch.randn(2 * steps - 4, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        mixer.zero_grad()
        form(mixer, x, sequences).square().sum().backward()
        gradients.append({"x": x.grad, **{name: p.grad for name, p in mixer.named_parameters()}})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-3)


def test_long_sequences_are_scanned_in_chunks_with_the_same_result() -> None:
    torch.manual_seed(0)
    block = MambaBlock(16, SMALL).eval()
    x = torch.randn(LONGEST + 40, 16)
    with torch.no_grad():
        whole = block(x, _packing(LONGEST + 40))
        start = block(x[:LONGEST], _packing(LONGEST))
    torch.testing.assert_close(whole[:LONGEST], start, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("longest", [9, LONGEST + 1])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_sequences_do_not_hear_each_other(bidirectional: bool, longest: int) -> None:
    torch.manual_seed(0)
    stack = MambaStack(16, 2, SMALL, bidirectional).eval()
    lengths = [longest, 5, 2]
    x = torch.randn(sum(lengths), 16)
    with torch.no_grad():
        alone = torch.cat([stack(sequence, _packing(len(sequence))) for sequence in x.split(lengths)])
        torch.testing.assert_close(stack(x, _packing(*lengths)), alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("bidirectional", "causal"), [(False, True), (True, False)])
def test_one_direction_is_causal_and_two_are_not(bidirectional: bool, causal: bool) -> None:
    torch.manual_seed(0)
    stack = MambaStack(16, 2, SMALL, bidirectional).eval()
    x = torch.randn(9, 16)
    changed = x.clone()
    changed[6] += 1
    with torch.no_grad():
        one, other = stack(x, _packing(9)), stack(changed, _packing(9))
    assert torch.equal(one[:6], other[:6]) == causal
    assert not torch.equal(one[6:], other[6:])


@pytest.mark.parametrize("learnable", [True, False])
def test_the_ema_is_its_recurrence(learnable: bool) -> None:
    ema = TurnEma(2, EmaConfig(decay=0.7, learnable=learnable))
    assert ema.ema_logit.requires_grad == learnable
    torch.testing.assert_close(ema.decay, torch.tensor([0.7, 0.7]), atol=1e-6, rtol=0)
    with torch.no_grad():
        ema.ema_logit[1] = 2.0
        u = torch.randn(3, 8, 5)
        c = torch.zeros(3, 2, 5)
        for turn in range(8):
            c = ema.decay[:, None] * c + (1 - ema.decay[:, None]) * u[:, turn, None]
            torch.testing.assert_close(ema(u)[:, turn], c)


def test_the_decay_stays_in_its_range_and_gets_a_gradient_at_its_ends() -> None:
    for decay in (0.6, 0.9):
        ema = TurnEma(1, EmaConfig(decay=decay))
        assert 0.6 < ema.decay.item() < 0.9
        ema(torch.randn(1, 3, 4)).sum().backward()
        assert ema.ema_logit.grad is not None
        assert ema.ema_logit.grad.abs().item() > 0


def test_a_dialogue_does_not_hear_its_future_nor_other_dialogues() -> None:
    head = _head(protocol="dialogue")
    z = _vectors(9, head)
    with torch.no_grad():
        both = head.predict(z, [4, 5])
        torch.testing.assert_close(both[4:], head.predict(z[4:], [5]), atol=1e-6, rtol=1e-5)
        later = z.clone()
        later[3] += 1
        changed = head.predict(later, [4, 5])
    assert torch.equal(changed[:3], both[:3])
    assert not torch.equal(changed[3], both[3])
    torch.testing.assert_close(changed[4:], both[4:])


def test_a_dialogue_does_hear_its_past() -> None:
    head = _head(protocol="dialogue")
    z = _vectors(4, head)
    earlier = z.clone()
    earlier[0] += 1
    with torch.no_grad():
        assert not torch.equal(head.predict(z, [4])[3], head.predict(earlier, [4])[3])


def test_without_dialogues_each_utterance_stands_alone() -> None:
    head = _head()
    z = _vectors(5, head)
    with torch.no_grad():
        torch.testing.assert_close(head.predict(z, [1] * 5)[2:3], head.predict(z[2:3], [1]))


@pytest.mark.parametrize("pooling", ["mean", "attentive_statistics"])
def test_an_utterance_has_the_same_vector_in_any_company(pooling: str) -> None:
    head = _head(pooling=pooling)
    states = torch.cat([50 * torch.randn(7, 3, 6), torch.randn(4, 3, 6)])
    with torch.no_grad():
        alone = head.encode(_encoded(states[7:], 4))
        both = head.encode(_encoded(states, 7, 4))
    torch.testing.assert_close(both[1], alone[0], atol=1e-5, rtol=1e-4)


def test_pooling_is_over_the_frames_of_each_utterance() -> None:
    x = torch.randn(7, 4)
    mean, statistics = MeanPooling(4), AttentiveStatisticsPooling(4)
    for parameter in statistics.score.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        pooled = statistics(x, _packing(5, 2))
        for row, frames in enumerate(x.split([5, 2])):
            torch.testing.assert_close(mean(x, _packing(5, 2))[row], frames.mean(0))
            torch.testing.assert_close(pooled[row, :4], frames.mean(0))
            torch.testing.assert_close(pooled[row, 4:], (frames.var(0, correction=0) + 1e-5).sqrt())


def test_a_constant_utterance_has_a_finite_gradient_through_the_deviation() -> None:
    head = _head(pooling="attentive_statistics")
    states = torch.ones(1, 3, 6, requires_grad=True)
    head.encode(_encoded(states, 1)).sum().backward()
    assert states.grad is not None
    assert torch.isfinite(states.grad).all()


@pytest.mark.parametrize("layer_norm", ["each_layer", "mix"])
def test_each_dimension_has_layer_weights_of_its_own(layer_norm: str) -> None:
    head = _head(layer_norm=layer_norm)
    states = torch.randn(4, 3, 6)
    with torch.no_grad():
        head.mix.layer_weights[0] = torch.tensor([50.0, 0.0, 0.0])
        head.mix.layer_weights[1] = torch.tensor([0.0, 0.0, 50.0])
        mixed = head.mix(states)
        torch.testing.assert_close(mixed[:, :6], head.mix.norm(states[:, 0]))
        torch.testing.assert_close(mixed[:, 6:], head.mix.norm(states[:, 2]))


@pytest.mark.parametrize(("layer_norm", "dominates"), [("each_layer", False), ("mix", True)])
def test_a_layer_with_large_values_dominates_the_mix_only_without_a_norm_of_its_own(
    layer_norm: str, dominates: bool
) -> None:
    mix = _head(layer_norm=layer_norm).mix
    states = torch.randn(4, 3, 6)
    louder = states.clone()
    louder[:, 1] *= 1000
    with torch.no_grad():
        alone = functional.layer_norm(states[:, 1], (6,))
        assert torch.allclose(mix(louder)[:, :6], alone, atol=0.02) == dominates
        assert torch.allclose(mix(louder), mix(states), atol=1e-3) != dominates


@pytest.mark.parametrize("protocol", ["utterance", "dialogue"])
def test_the_prediction_is_the_mean_of_two_paths_and_training_sees_both(protocol: str) -> None:
    head, alone = _head(protocol=protocol), _head(protocol=protocol, linear_path=False)
    assert head.linear_path is not None
    nn.init.normal_(head.linear_path.weight, std=0.1)
    alone.load_state_dict({n: p for n, p in head.state_dict().items() if not n.startswith("linear_path")})
    states = torch.randn(12, 3, 6)
    encoded = _encoded(states, 7, 5)
    with torch.no_grad():
        z = head.encode(encoded)
        mamba = alone.predict(alone.encode(encoded), [2])
        by_layer = [torch.stack([x.mean(0), x.std(0, correction=0)], dim=1) for x in states.split([7, 5])]
        linear = torch.stack(by_layer).flatten(1) @ head.linear_path.weight + head.linear_path.bias
        torch.testing.assert_close(head.predict(z, [2]), (mamba + linear) / 2)
        head.train()
        head.output_dropout.p = 0.0
        torch.testing.assert_close(head.predict(z, [2]), torch.stack([mamba, linear], dim=1))


def test_sigmoid_outputs_stay_between_zero_and_one() -> None:
    head = _head(output="sigmoid")
    with torch.no_grad():
        y = head.predict(100 * _vectors(20, head), [1] * 20)
    assert y.min() >= 0
    assert y.max() <= 1
