"""The CCC loss against audmetric, torchmetrics' definition and a second derivation, also where it is hard."""

from __future__ import annotations

import audmetric
import numpy as np
import pytest
import torch

from cvrunner.training.accumulation import batch_ccc, ccc_loss


def pearson_form(p: torch.Tensor, t: torch.Tensor) -> float:
    """CCC by its other formula: Pearson's r times the bias correction factor (Lin 1989)."""
    p, t = p.double().numpy(), t.double().numpy()
    r = np.corrcoef(p, t)[0, 1]
    v = p.std() / t.std()
    u = (p.mean() - t.mean()) / np.sqrt(p.std() * t.std())
    return float(r * 2 / (v + 1 / v + u**2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 3.0, 1e6])
def test_it_equals_audmetric_and_the_pearson_form(dtype: torch.dtype, offset: float) -> None:
    torch.manual_seed(0)
    true = torch.randn(50, 2, dtype=torch.float64)
    predicted = 0.7 * true + 0.4 * torch.randn(50, 2, dtype=torch.float64) + 0.2
    true, predicted = (true + offset).to(dtype), (predicted + offset).to(dtype)
    ours = batch_ccc(predicted, true)
    for k in range(2):
        reference = audmetric.concordance_cc(true[:, k].double().numpy(), predicted[:, k].double().numpy())
        assert ours[k].item() == pytest.approx(reference, abs=1e-5)
        assert ours[k].item() == pytest.approx(pearson_form(predicted[:, k], true[:, k]), abs=1e-5)


def test_the_loss_is_one_minus_the_mean_over_dimensions() -> None:
    torch.manual_seed(0)
    predicted, true = torch.randn(9, 3), torch.randn(9, 3)
    assert ccc_loss(predicted, true).item() == pytest.approx(1 - batch_ccc(predicted, true).mean().item())


def test_a_perfect_prediction_has_loss_zero_and_its_mirror_image_two() -> None:
    true = torch.randn(20, 2, dtype=torch.float64)
    assert ccc_loss(true, true).item() == pytest.approx(0, abs=1e-6)
    mirrored = 2 * true.mean(0) - true
    assert ccc_loss(mirrored, true).item() == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("size", [1, 7])
def test_constant_and_single_sets_have_ccc_zero_and_a_finite_gradient(size: int) -> None:
    predicted = torch.full((size, 2), 0.3, requires_grad=True)
    ccc_loss(predicted, torch.full((size, 2), 0.3)).backward()
    assert batch_ccc(predicted, torch.full((size, 2), 0.3)).tolist() == [0, 0]
    assert predicted.grad is not None
    assert torch.isfinite(predicted.grad).all()


def test_half_precision_is_computed_in_float32() -> None:
    predicted, true = torch.randn(8, 1).bfloat16(), torch.randn(8, 1).bfloat16()
    assert batch_ccc(predicted, true).dtype == torch.float32
    assert batch_ccc(predicted, true).item() == pytest.approx(
        batch_ccc(predicted.double(), true.double()).item(), abs=1e-6
    )
