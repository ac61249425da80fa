"""Self-attention over packed utterances, for WavLM with its gated position bias (Chen et al. 2022, arXiv 2110.13900).

The weights are transformers' own. `S` frames of all utterances, `D` width, `H` heads; in a padded group `B` utterances
of up to `F` frames.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from cvrunner.encoders.dropout import Draws, Place, drop
from cvrunner.encoders.packing import Group, Packing

CUDA_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Fused kernels with a gradient for an additive mask. On sm_90 and above torch would choose cuDNN's, which has none."""
DETERMINISTIC_KERNELS = [SDPBackend.MATH]
"""The backward pass of the memory-efficient kernel adds in an order that differs between runs."""


def relative_position_bias(attention: Any, frames: int) -> Tensor:
    """Return the position bias `[H, frames, frames]` of the first layer, which all layers share.

    The bias depends on the distance only and is looked up once per distance; transformers looks it up once per pair.
    """
    distances = torch.arange(1 - frames, frames, device=attention.rel_attn_embed.weight.device)
    by_distance = attention.rel_attn_embed(attention._relative_positions_bucket(distances)).T.contiguous()
    # Row i of the matrix is the window of `frames` distances from -i on.
    windows: Tensor = by_distance.unfold(1, frames, 1).flip(1)
    return windows


def self_attention(attention: Any, hidden: Tensor, bias: Tensor | None, packing: Packing) -> Tensor:
    """Apply self-attention within each utterance: `[S, D]` to `[S, D]`. `bias`: WavLM's, `[H, F, F]`."""
    width = hidden.shape[1]
    # Under autocast, each of the products below would cast by itself.
    hidden = hidden.to(attention.q_proj.weight.dtype)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    inputs = torch.cat([projection(hidden) for projection in projections], dim=1)
    place: Place = attention.place
    # A fused kernel draws its dropout from one stream for the whole batch: so each utterance goes by itself.
    alone = place.drops and packing.draws.keys and hidden.device.type != "cpu"
    groups, context = packing.singles if alone else packing.groups, []
    parts = gates = packing.parts(inputs, groups)
    if bias is not None:
        # Apart: under autocast the gate is in float32, to which it would promote the others, at twice their memory.
        gates = packing.parts(_gate(attention, hidden), groups)
    for group, part, gate in zip(groups, parts, gates, strict=True):
        query, key, value = torch.split(group.pad(part), width, dim=2)
        # Added to the scores `[B, H, F, F]`: the gated bias, and -inf for padding.
        mask = None
        if bias is not None:
            mask = _gated(group.pad(gate).transpose(1, 2), bias[:, : group.frames, : group.frames], query.dtype)
        if group.real is not None:
            mask = query.new_zeros(()) if mask is None else mask
            mask = mask.masked_fill(~group.real[:, None, None], -torch.inf)
        if mask is not None:
            mask = mask.expand(-1, attention.num_heads, -1, -1)
        # `[B, F, D]` to `[B, H, F, D / H]`.
        query, key, value = (x.view(*x.shape[:2], attention.num_heads, -1).transpose(1, 2) for x in (query, key, value))
        found = _attend(query, key, value, mask, place, group, packing.draws)
        context.append(group.pack(found.transpose(1, 2)))
    return attention.out_proj(torch.cat(context))  # type: ignore[no-any-return]


def _gate(attention: Any, hidden: Tensor) -> Tensor:
    """Return the gate `[S, H]`: the factor of the position bias of each frame."""
    # Only sums of four of the eight outputs are used, so the weights are summed before the product.
    linear = attention.gru_rel_pos_linear
    weight, bias = (x.view(2, 4, *x.shape[1:]).sum(1, dtype=x.dtype) for x in (linear.weight, linear.bias))
    gates = torch.sigmoid(functional.linear(hidden.view(len(hidden), attention.num_heads, -1), weight, bias))
    first, second = gates.unbind(-1)
    return first * (second * attention.gru_rel_pos_const.flatten() - 1.0) + 2.0  # type: ignore[no-any-return]


def _gated(gate: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask `[B, H, F, F]`: the product of `gate [B, H, F]` and `bias [H, F, F]`."""
    if dtype == bias.dtype:
        return gate[..., None] * bias
    return _GatedBias.apply(gate, bias, dtype)  # type: ignore[no-any-return, no-untyped-call]


class _GatedBias(torch.autograd.Function):
    """The product of a gate and a bias in float32, rounded to `dtype` by the same kernel."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(gate, bias)
        *rows, columns = (len(gate), *bias.shape)
        # The attention kernel would copy a mask whose rows do not start at multiples of 8.
        mask = torch.empty(*rows, -(-columns // 8) * 8, dtype=dtype, device=bias.device)[..., :columns]
        return torch.mul(gate[..., None], bias, out=mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, bias = ctx.saved_tensors
        of_bias = gradients[0] * gate[..., None]
        return (gradients[0] * bias).sum(-1), of_bias[0] if len(gate) == 1 else of_bias.sum(0), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, place: Place, group: Group, draws: Draws
) -> Tensor:
    """Return the context `[B, H, F, D / H]`. `place`: of the dropout of attention weights."""
    dropout = place.p if place.drops else 0.0
    if query.device.type == "cuda":
        if place.drops and draws.keys:
            # The kernel takes its seed from torch's own stream on the host; no launch is needed to set it.
            generator = torch.cuda.default_generators[query.get_device()]
            generator.manual_seed(draws.seed(group.first, f"{place.kind} {place.number}"))
        with sdpa_kernel(DETERMINISTIC_KERNELS if torch.are_deterministic_algorithms_enabled() else CUDA_KERNELS):
            return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    # On a CPU, explicit products train faster than torch's fused attention.
    if not place.training or query.device.type != "cpu":
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    # With `beta` 0 the first argument is ignored.
    m, beta = (q.new_zeros(1), 0) if mask is None else (mask.flatten(0, 1), 1)
    weights = torch.baddbmm(m, q, k.transpose(1, 2), beta=beta, alpha=q.shape[2] ** -0.5).softmax(dim=2)
    if place.drops and draws.keys:
        kept = draws.attention_mask(place, group.first, group.lengths, query.shape[1])
        weights = drop(weights, kept.flatten(0, 1), place.p)
    else:
        weights = functional.dropout(weights, dropout)
    return torch.bmm(weights, v).view_as(query)
