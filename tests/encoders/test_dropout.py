"""Dropout: its draws depend on the utterance and the place, and on nothing else in the batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cvrunner.encoders.dropout import Draws, Dropout, Place, drop, number_places, replace_dropouts

CPU = torch.device("cpu")
LENGTHS = [30, 7, 51, 18]
KEYS = [3, 2**63 + 1, 5, 8]


def rows(keys: list[int], lengths: list[int], width: int, p: float = 0.25) -> list[torch.Tensor]:
    """The masks of each utterance."""
    return list(torch.split(Draws(keys, lengths, CPU).mask(Place(p, "hidden"), width), lengths))


@pytest.mark.parametrize("width", [1, 6, 16])
def test_an_utterance_is_dropped_alike_whoever_is_next_to_it_and_in_whatever_order(width: int) -> None:
    together = rows(KEYS, LENGTHS, width)
    order = [2, 0, 3, 1]
    for i, mask in zip(order, rows([KEYS[i] for i in order], [LENGTHS[i] for i in order], width), strict=True):
        assert torch.equal(mask, together[i])
        assert torch.equal(mask, *rows([KEYS[i]], [LENGTHS[i]], width))


def test_attention_is_dropped_alike_with_and_without_padding() -> None:
    draws, place = Draws(KEYS, LENGTHS, CPU), Place(0.25, "attention")
    padded = draws.attention_mask(place, 1, LENGTHS[1:], 3)
    for i in (1, 2, 3):
        alone = Draws([KEYS[i]], [LENGTHS[i]], CPU).attention_mask(place, 0, [LENGTHS[i]], 3)
        assert torch.equal(padded[i - 1, :, : LENGTHS[i], : LENGTHS[i]], alone[0])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.003])
def test_the_share_that_is_dropped_is_the_probability_and_the_mean_is_kept(p: float) -> None:
    (mask,) = rows([5], [2000], 501, p)
    share, error = 1 - mask.double().mean().item(), (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(share - p) < 5 * error
    dropped = drop(torch.ones(2000, 501), mask, p)
    assert dropped.mean().item() == pytest.approx(1, abs=6 * error / (1 - p))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-4)


def test_places_keys_and_kinds_have_draws_of_their_own() -> None:
    model = nn.Sequential(Dropout(0.5, "a"), Dropout(0.5, "a"), Dropout(0.5, "b"), Dropout(0.25, "a")).train()
    number_places(model)
    masks = [Draws([key], [40], CPU).mask(place, 16) for key in (1, 2) for place in model]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            # Two fair masks of 640 agree in half of the values, with a standard deviation of 2 %.
            assert (one == other).double().mean().item() < 0.62


def test_the_gradient_passes_through_what_is_kept() -> None:
    model = Dropout(0.5, "a").train()
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    with Draws([1, 2], [4, 2], CPU).used():
        assert torch.autograd.gradcheck(model, x)
        assert (model(x) == 0).any()


@pytest.mark.parametrize(("p", "kept"), [(0.0, 1), (1.0, 0)])
def test_none_or_all_can_be_dropped(p: float, kept: int) -> None:
    with Draws([1], [9], CPU).used():
        assert torch.equal(Dropout(p, "a").train()(torch.ones(9, 4)), torch.full((9, 4), float(kept)))


def test_in_evaluation_mode_nothing_is_dropped_and_without_keys_torch_draws() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    replace_dropouts(model, lambda name: f"kind of {name}")
    assert isinstance(model[1], Dropout)
    assert (model[1].p, model[1].kind) == (0.5, "kind of 1")
    x = torch.ones(9, 4)
    torch.manual_seed(1)
    found = model[1](x)
    torch.manual_seed(1)
    assert torch.equal(found, nn.functional.dropout(x, 0.5))
    with Draws([1], [9], CPU).used():
        assert torch.equal(model.eval()[1](x), x)
