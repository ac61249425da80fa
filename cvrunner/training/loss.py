"""The CCC as a loss.

`ccc = 2 cov(p, t) / (var(p) + var(t) + (mean(p) - mean(t))^2)` with moments divided by N (Lin 1989, Biometrics 45).
For reported numbers see `verdict/ccc.py`; this one is for gradients only.
"""

from __future__ import annotations

from torch import Tensor

EPSILON = 1e-8


def batch_ccc(predicted: Tensor, true: Tensor) -> Tensor:
    """CCC of each column: `[B, K]`, `[B, K]` to `[K]`, on centred data, in float32 or better.

    A constant column of truth and an equal constant prediction give 0, not NaN.
    """
    predicted, true = _at_least_float32(predicted), _at_least_float32(true)
    shift = true.mean(0, keepdim=True)
    # Both around the same point first: labels around 1e6 must not cancel.
    predicted, true = predicted - shift, true - shift
    mean_p, mean_t = predicted.mean(0), true.mean(0)
    p, t = predicted - mean_p, true - mean_t
    covariance = (p * t).mean(0)
    spread = p.square().mean(0) + t.square().mean(0) + (mean_p - mean_t).square()
    return 2 * covariance / (spread + EPSILON)


def ccc_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """`1 - mean over dimensions of CCC`, a scalar in 0..2."""
    return 1 - batch_ccc(predicted, true).mean()


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()
