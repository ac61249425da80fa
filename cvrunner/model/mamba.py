"""Mamba-2 blocks (Dao and Gu 2024, arXiv 2405.21060) over padded sequences.

The mixer is transformers' own: over long sequences it takes mamba-ssm's kernels when they are installed on a CUDA
machine, and otherwise runs the same weights in plain PyTorch; short ones take the dual form. `B` sequences of up to `N`
steps of width `W`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from cvrunner.config.sections import MambaConfig
from cvrunner.model.dual_form import LONGEST, dual_form


def frame_mask(lengths: Tensor, frames: int) -> Tensor:
    """`[B, frames]`, True where a frame is real, from lengths `[B]`."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


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

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`[B, N, W]` with `mask [B, N]` of 0 and 1 to `[B, N, W]`, 0 at the padding."""
        short = x.shape[1] <= LONGEST
        normed = self.norm(x)
        y: Tensor = dual_form(self.mixer, normed, mask) if short else self.mixer(normed, attention_mask=mask)
        return (x + y) * mask[..., None]


class MambaStack(nn.Module):
    """Blocks one after the other; with `bidirectional`, a second stack reads each sequence from its real end."""

    def __init__(self, width: int, layers: int, config: MambaConfig, bidirectional: bool = False) -> None:
        super().__init__()
        self.forwards = nn.ModuleList(MambaBlock(width, config) for _ in range(layers))
        self.backwards = nn.ModuleList(MambaBlock(width, config) for _ in range(layers if bidirectional else 0))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """`[B, N, W]`, lengths `[B]` to `[B, N, W]`; without `bidirectional`, step n depends on steps 1..n only."""
        mask = frame_mask(lengths, x.shape[1]).to(x.dtype)
        y = x
        for block in self.forwards:
            y = block(y, mask)
        if len(self.backwards):
            z = reverse(x, lengths)
            for block in self.backwards:
                z = block(z, mask)
            y = y + reverse(z, lengths)
        normed: Tensor = self.norm(y)
        return normed


def reverse(x: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence of `[B, N, W]` backwards within its real length, padding left where it is."""
    steps = torch.arange(x.shape[1], device=x.device)
    index = torch.where(frame_mask(lengths, x.shape[1]), lengths[:, None] - 1 - steps, steps)
    return x.gather(1, index[..., None].expand_as(x))
