"""Mamba-2 blocks (Dao and Gu 2024, arXiv 2405.21060) over sequences of unlike length.

The mixer is transformers' own: over long sequences it takes mamba-ssm's kernels when they are installed on a CUDA
machine, and otherwise runs the same weights in plain PyTorch; short ones take the dual form. `S` steps of width `W`,
sequence after sequence.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from cvrunner.config.sections import MambaConfig
from cvrunner.encoders.packing import Group, Packing
from cvrunner.model.dual_form import LONGEST, dual_form


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
        form = dual_form if packing.frames <= LONGEST else scan
        return x + form(self.mixer, self.norm(x), packing.whole)


class MambaStack(nn.Module):
    """Blocks one after the other; with `bidirectional`, a second stack reads each sequence from its real end."""

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
    """Each of the `sequences` in `x [S, W]` in chunks; padding needs no mask, for no step hears a later one."""
    return sequences.pack(mixer(sequences.pad(x)))
