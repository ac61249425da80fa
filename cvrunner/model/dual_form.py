"""Mamba-2 over short sequences in its dual form (Dao and Gu 2024, arXiv 2405.21060): attention with a decaying mask.

The same function of the same weights as the scan in chunks. It is one product of `N x N` matrices, so it is the faster
one while sequences are short. `B` sequences of up to `N` steps, `S` steps of all one after the other; width `W`, `H`
heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cvrunner.encoders.packing import Group

LONGEST = 128
"""Most steps: beyond, the scan in chunks takes less time and memory."""


def dual_form(mixer: Any, x: Tensor, sequences: Group) -> Tensor:
    """What a Mamba2Mixer with one group makes of each of the `sequences` in `x [S, W]`: `[S, W]`."""
    inner = mixer.intermediate_size
    gate, mixed = torch.split(mixer.in_proj(x), [inner, mixer.conv_dim + mixer.num_heads], dim=1)
    y = sequences.pack(_over_time(mixer, sequences.pad(mixed)))
    normed = functional.rms_norm(y * functional.silu(gate), (inner,), mixer.norm.weight, mixer.norm.variance_epsilon)
    return mixer.out_proj(normed)  # type: ignore[no-any-return]


def _over_time(mixer: Any, x: Tensor) -> Tensor:
    """`[B, N, conv_dim + H]` to `[B, N, inner]`. Padding needs no mask, for no step hears a later one."""
    batch, steps, _ = x.shape
    inner, state = mixer.intermediate_size, mixer.ssm_state_size
    mixed, dt = torch.split(x, [mixer.conv_dim, mixer.num_heads], dim=2)
    mixed = functional.silu(_causal_convolution(mixed, mixer.conv1d))
    values, b, c = torch.split(mixed, [inner, state, state], dim=2)
    values = values.view(batch, steps, mixer.num_heads, mixer.head_dim)
    dt = functional.softplus(dt + mixer.dt_bias).clamp(*mixer.time_step_limit)
    scores = torch.bmm(c, b.transpose(1, 2))[:, None] * _decay(dt * -torch.exp(mixer.A_log))
    y = torch.matmul(scores, (values * dt[..., None]).transpose(1, 2)).transpose(1, 2)
    return torch.addcmul(y, values, mixer.D[:, None]).reshape(batch, steps, inner)


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
