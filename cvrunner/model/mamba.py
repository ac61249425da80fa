"""Mamba-2 blocks (Dao and Gu 2024, arXiv 2405.21060) over sequences of different lengths.

The mixer is transformers' own. On a GPU, long sequences use the kernels of mamba-ssm and causal-conv1d if both are
installed, and otherwise plain PyTorch with the same weights. Short sequences use the dual form, attention with a
decaying mask: the same function of the same weights, as one product of `N x N` matrices, which is faster while `N` is
small.

`S` steps of width `W`, sequence after sequence; `B` sequences of up to `N` steps when padded; `H` heads.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Mamba2Config
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from cvrunner.config.sections import MambaConfig
from cvrunner.encoders.packing import Group, Packing

LONGEST = 128
"""Longest sequence for the dual form; beyond, the scan in chunks takes less time and memory."""

try:
    KERNELS = bool(importlib.import_module("causal_conv1d") and importlib.import_module("mamba_ssm"))
except Exception:  # not installed, or built for another torch or CUDA
    KERNELS = False


@contextmanager
def without_kernels() -> Iterator[None]:
    """Use plain PyTorch inside the `with` block, to compare the two."""
    global KERNELS
    before, KERNELS = KERNELS, False
    try:
        yield
    finally:
        KERNELS = before


def _by_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return transformers' `function` with its kernel for CUDA tensors alone, and its plain PyTorch for all others."""
    plain = inspect.unwrap(function)

    @functools.wraps(plain)
    def chosen(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # The kernels add in an order that differs between runs.
        if KERNELS and x.is_cuda and not torch.are_deterministic_algorithms_enabled():
            return function(x, *args, **kwargs)
        return plain(x, *args, **kwargs)

    return chosen


# transformers takes the kernels of whatever it can import, on a CPU and with one of the two packages too, and fails.
for _name in ("causal_conv1d_fn", "mamba2_split_conv1d_scan_combined", "mamba2_chunk_scan"):
    setattr(modeling_mamba2, _name, _by_device(getattr(modeling_mamba2, _name)))


class MambaBlock(nn.Module):
    """`x + mixer(norm(x))`."""

    def __init__(self, width: int, config: MambaConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.mixer = Mamba2Mixer(
            Mamba2Config(
                hidden_size=width,
                state_size=config.state_size,
                expand=config.expand,
                head_dim=config.head_dim,
                num_heads=config.expand * width // config.head_dim,
                n_groups=1,
                conv_kernel=config.conv_kernel,
                chunk_size=config.chunk_size,
                num_hidden_layers=1,
            ),
            layer_idx=0,
        )

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """`[S, W]` to `[S, W]`."""
        form = dual_form if packing.whole.frames <= LONGEST else scan
        return x + form(self.mixer, self.norm(x), packing.whole)


class MambaStack(nn.Module):
    """A stack of blocks; with `bidirectional`, a second stack reads each sequence backwards from its real end."""

    def __init__(self, width: int, layers: int, config: MambaConfig, bidirectional: bool = False) -> None:
        super().__init__()
        self.forwards = nn.ModuleList(MambaBlock(width, config) for _ in range(layers))
        self.backwards = nn.ModuleList(MambaBlock(width, config) for _ in range(layers if bidirectional else 0))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """`[S, W]` to `[S, W]`; without `bidirectional`, a step depends on no later one."""
        y = x
        for block in self.forwards:
            y = block(y, packing)
        if len(self.backwards):
            z = x.index_select(0, packing.backwards)
            for block in self.backwards:
                z = block(z, packing)
            y = y + z.index_select(0, packing.backwards)
        normed: Tensor = self.norm(y)
        return normed


def scan(mixer: Mamba2Mixer, x: Tensor, sequences: Group) -> Tensor:
    """Apply the mixer to each of the `sequences` in `x [S, W]`, in chunks. Padding needs no mask: no step depends on a
    later one."""
    return sequences.pack(mixer(sequences.pad(x)))


def dual_form(mixer: Any, x: Tensor, sequences: Group) -> Tensor:
    """Apply a Mamba2Mixer with one group to each of the `sequences` in `x [S, W]`, in its dual form: `[S, W]`."""
    inner = mixer.intermediate_size
    gate, mixed = torch.split(mixer.in_proj(x), [inner, mixer.conv_dim + mixer.num_heads], dim=1)
    y = sequences.pack(_over_time(mixer, sequences.pad(mixed)))
    normed = functional.rms_norm(y * functional.silu(gate), (inner,), mixer.norm.weight, mixer.norm.variance_epsilon)
    return mixer.out_proj(normed)  # type: ignore[no-any-return]


def _over_time(mixer: Any, x: Tensor) -> Tensor:
    """Map `[B, N, conv_dim + H]` to `[B, N, inner]`. Padding needs no mask: no step depends on a later one."""
    batch, steps, _ = x.shape
    inner, state = mixer.intermediate_size, mixer.ssm_state_size
    mixed, dt = torch.split(x, [mixer.conv_dim, mixer.num_heads], dim=2)
    # The depthwise convolution as a sum over its few taps: `[B, N, C]` need not be transposed.
    conv = mixer.conv1d
    taps = conv.weight.shape[2]
    padded, convolved = functional.pad(mixed, (0, 0, taps - 1, 0)), conv.bias
    for tap in range(taps):
        convolved = torch.addcmul(convolved, padded[:, tap : tap + steps], conv.weight[:, 0, tap])
    mixed = functional.silu(convolved)
    values, b, c = torch.split(mixed, [inner, state, state], dim=2)
    values = values.view(batch, steps, mixer.num_heads, mixer.head_dim)
    dt = functional.softplus(dt + mixer.dt_bias).clamp(*mixer.time_step_limit)
    # `[B, H, N, N]`: what is left at step n of the input of step m <= n.
    total = (dt * -torch.exp(mixer.A_log)).cumsum(1).transpose(1, 2)
    future = torch.ones(steps, steps, dtype=torch.bool, device=total.device).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(future, -torch.inf).exp()
    scores = torch.bmm(c, b.transpose(1, 2))[:, None] * decay
    y = torch.matmul(scores, (values * dt[..., None]).transpose(1, 2)).transpose(1, 2)
    return torch.addcmul(y, values, mixer.D[:, None]).reshape(batch, steps, inner)
