"""Mamba-2 over short sequences in its dual form (Dao and Gu 2024, arXiv 2405.21060): attention with a decaying mask.

The same function of the same weights as the scan in chunks. It is one product of `N x N` matrices, so it is the faster
one while sequences are short. `B` sequences of up to `N` steps of width `W`, `H` heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LONGEST = 128
"""Most steps: beyond, the scan in chunks takes less time and memory."""


def dual_form(mixer: Any, x: Tensor, mask: Tensor) -> Tensor:
    """What a Mamba2Mixer with one group makes of `x [B, N, W]` with `mask [B, N]` of 0 and 1: `[B, N, W]`."""
    batch, steps, _ = x.shape
    real = mask[..., None]
    inner, state = mixer.intermediate_size, mixer.ssm_state_size
    gate, mixed, dt = torch.split(mixer.in_proj(x * real), [inner, mixer.conv_dim, mixer.num_heads], dim=-1)
    mixed = functional.silu(_causal_convolution(mixed, mixer.conv1d)) * real
    values, b, c = torch.split(mixed, [inner, state, state], dim=-1)
    values = values.view(batch, steps, mixer.num_heads, mixer.head_dim)
    dt = functional.softplus(dt + mixer.dt_bias).clamp(*mixer.time_step_limit)
    scores = torch.bmm(c, b.transpose(1, 2))[:, None] * _decay(dt * -torch.exp(mixer.A_log))
    y = torch.matmul(scores, (values * dt[..., None]).transpose(1, 2)).transpose(1, 2)
    y = torch.addcmul(y, values, mixer.D[:, None]).reshape(batch, steps, inner)
    normed = functional.rms_norm(y * functional.silu(gate), (inner,), mixer.norm.weight, mixer.norm.variance_epsilon)
    return mixer.out_proj(normed)  # type: ignore[no-any-return]


def _causal_convolution(x: Tensor, conv: Any) -> Tensor:
    """The mixer's depthwise convolution on `[B, N, C]` without transposing: a sum over its few taps."""
    taps = conv.weight.shape[2]
    padded = functional.pad(x, (0, 0, taps - 1, 0))
    y = conv.bias
    for tap in range(taps):
        y = torch.addcmul(y, padded[:, tap : tap + x.shape[1]], conv.weight[:, 0, tap])
    return y  # type: ignore[no-any-return]


def _decay(log_decay: Tensor) -> Tensor:
    """`[B, N, H]` of log decays per step to `[B, H, N, N]`: what is left at step n of what came in at step m <= n."""
    total = log_decay.cumsum(1).transpose(1, 2)
    steps = total.shape[2]
    future = torch.ones(steps, steps, dtype=torch.bool, device=total.device).triu(1)
    return (total[..., :, None] - total[..., None, :]).masked_fill(future, -torch.inf).exp()
