"""Packed utterances: nothing gets lost, nothing mixes, groups have little padding."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from cvrunner.encoders.attention import _attend, _gated, relative_position_bias, self_attention
from cvrunner.encoders.dropout import Place
from cvrunner.encoders.packing import GROUP_PADDING, Packing
from tests.tiny_encoders import tiny_wavlm

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=9)


@given(LENGTHS)
def test_padding_and_packing_again_gives_back_every_frame(lengths: list[int]) -> None:
    packing = Packing(lengths, CPU)
    x = torch.randn(sum(lengths), 3)
    for groups in (packing.groups, packing.singles):
        parts = zip(groups, packing.parts(x, groups), strict=True)
        assert torch.equal(torch.cat([group.pack(group.pad(part)) for group, part in parts]), x)


@given(LENGTHS)
def test_groups_are_neighbours_in_order_with_little_padding(lengths: list[int]) -> None:
    packing = Packing(sorted(lengths), CPU)
    assert [n for group in packing.groups for n in group.lengths] == sorted(lengths)
    for group in packing.groups:
        assert group.frames * len(group.lengths) <= (1 + GROUP_PADDING) * sum(group.lengths)


def test_padding_is_zero_and_utterances_stay_apart() -> None:
    (group,) = Packing([10, 11], CPU).groups
    padded = group.pad(torch.arange(1.0, 22.0)[:, None])
    assert padded[0, :, 0].tolist() == [*range(1, 11), 0]
    assert padded[1, :, 0].tolist() == [*range(11, 22)]


def test_frames_are_averaged_over_what_is_there() -> None:
    states = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 10, 11, 12, 13, 14])[:, None]
    means = Packing([7, 5], CPU).averaged([states, -states], 4)
    assert means[:, 0, 0].tolist() == [1.5, 5.0, 11.5, 14.0]
    assert torch.equal(means[:, 1], -means[:, 0])


@given(LENGTHS)
def test_every_frame_belongs_to_its_utterance_and_is_found_backwards(lengths: list[int]) -> None:
    packing = Packing(lengths, CPU)
    frames = torch.arange(sum(lengths))
    parts = frames.split(lengths)
    assert [frames[owned].tolist() for owned in packing.owned] == [part.tolist() for part in parts]
    assert torch.equal(packing.backwards, torch.cat([part.flip(0) for part in parts]))
    assert torch.equal(packing.whole.pack(packing.whole.pad(frames[:, None]))[:, 0], frames)


@pytest.mark.parametrize("frames", [1, 2, 50])
def test_the_position_bias_equals_that_of_transformers(frames: int) -> None:
    attention = tiny_wavlm().encoder.layers[0].attention
    assert torch.equal(relative_position_bias(attention, frames), attention.compute_bias(frames, frames))


def test_attention_written_out_equals_the_fused_one() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 7, 5).unbind()
    mask = torch.randn(2, 4, 7, 7)
    packing, place = Packing([7, 7], CPU), Place(0.0, "attention")
    written_out, fused = (
        _attend(query, key, value, mask, place.train(mode), packing.whole, packing.draws) for mode in (True, False)
    )
    torch.testing.assert_close(written_out, fused)


@given(LENGTHS, st.sampled_from([1, 2, 4]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_averages_equal_bit_for_bit_those_of_index_add_in_order(
    lengths: list[int], group: int, dtype: torch.dtype
) -> None:
    states = torch.randn(sum(lengths), 3).to(dtype)
    steps = [-(-n // group) for n in lengths]
    slots = torch.cat([torch.arange(n) // group + sum(steps[:i]) for i, n in enumerate(lengths)])
    expected = torch.zeros(sum(steps), 3).index_add(0, slots, states.float()) / torch.bincount(slots)[:, None]
    assert torch.equal(Packing(lengths, CPU).averaged([states], group)[:, 0], expected)


@pytest.mark.parametrize("deterministic", [False, True])
def test_on_a_gpu_attention_uses_kernels_that_differentiate_its_bias(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    enabled: dict[str, bool] = {}
    backends = torch.backends.cuda

    def attention(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        for name in ("flash", "mem_efficient", "math", "cudnn"):
            enabled[name] = getattr(backends, f"{name}_sdp_enabled")()
        return query

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    seeds = mock.Mock()
    monkeypatch.setattr(torch.cuda, "default_generators", [seeds])
    packing, before = Packing([3], CPU, keys=[7]), backends.cudnn_sdp_enabled()
    with FakeTensorMode():
        query, mask = torch.empty(1, 2, 3, 4, device="cuda"), torch.empty(1, 2, 3, 3, device="cuda")
        _attend(query, query, query, mask, Place(0.1, "attention"), packing.groups[0], packing.draws)
    assert enabled == {"flash": False, "mem_efficient": not deterministic, "math": True, "cudnn": False}
    assert backends.cudnn_sdp_enabled() == before
    seeds.manual_seed.assert_called_once_with(packing.draws.seed(0, "attention 0"))


def test_queries_keys_and_values_keep_the_type_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[torch.dtype] = []

    def record(*inputs: Any) -> torch.Tensor:
        found.extend(x.dtype for x in inputs[:3])
        return _attend(*inputs)

    monkeypatch.setattr("cvrunner.encoders.attention._attend", record)
    with torch.autocast("cpu", torch.bfloat16):
        layer, packing = tiny_wavlm().encoder.layers[0].attention, Packing([5, 9], CPU)
        layer.place = Place(0.1, "attention")
        self_attention(layer, torch.randn(14, 16), relative_position_bias(layer, 9), packing)
    assert set(found) == {torch.bfloat16}


def test_statistics_are_those_of_each_utterance_and_have_their_gradient() -> None:
    torch.manual_seed(0)
    states = [torch.randn(12, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    packing = Packing([7, 1, 4], CPU)
    found = packing.statistics(states)
    for layer, state in enumerate(states):
        for row, part in enumerate(state.split([7, 1, 4])):
            torch.testing.assert_close(found[row, layer, 0], part.mean(0))
            torch.testing.assert_close(found[row, layer, 1], part.std(0, correction=0))
    # An utterance of one frame has a deviation of 0, which has no derivative; its gradient is that of the mean.
    weights = torch.randn(found.shape, dtype=torch.float64)
    (found * weights).sum().backward()
    torch.testing.assert_close(states[0].grad[7], weights[1, 0, 0])
    smooth = Packing([7, 5], CPU)
    assert torch.autograd.gradcheck(lambda *x: smooth.statistics(x), states)
    assert Packing([7, 5], CPU).statistics([states[0].detach().bfloat16()]).dtype == torch.float32


def test_layers_that_are_summarised_together_give_what_each_gives_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    states = [torch.randn(12, 3, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    found = []
    for count in (1, 2, 12):
        packing = Packing([7, 5], CPU)
        monkeypatch.setattr(packing, "_together", lambda s, n=count: [s[i : i + n] for i in range(0, len(s), n)])
        summaries = packing.averaged(states, 4), packing.statistics(states)
        gradient = torch.autograd.grad(sum(x.square().sum() for x in summaries), states)
        found.append((*summaries, *gradient))
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, same)


def test_the_mask_in_bfloat16_is_the_rounded_product_and_its_rows_are_aligned() -> None:
    torch.manual_seed(0)
    for batch in (1, 2):
        gate, bias = torch.randn(batch, 3, 5, requires_grad=True), torch.randn(3, 5, 5, requires_grad=True)
        exact, rounded = _gated(gate, bias, torch.float32), _gated(gate, bias, torch.bfloat16)
        assert torch.equal(rounded, exact.bfloat16())
        assert all(stride % 8 == 0 for stride in rounded.stride()[:-1])
        weights = torch.randn(exact.shape).bfloat16()
        expected = torch.autograd.grad(exact, (gate, bias), weights.float())
        for one, same in zip(torch.autograd.grad(rounded, (gate, bias), weights), expected, strict=True):
            torch.testing.assert_close(one, same)
