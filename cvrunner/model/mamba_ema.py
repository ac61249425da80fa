"""The whole model: speech encoder, layer mix, Mamba over frames, pooling, and, for dialogues, Mamba and EMA over turns.

    conv features -> encoder -> hidden states `[S, L, D]`               (from the cache if frozen)
    -> layer mix, one set of weights per dimension -> projection -> Mamba over frames -> pooling -> `z [B, Z]`
                                                                        (and next to it: statistics -> linear path)
    utterance: heads on `z_t`
    dialogue:  `u_t = Mamba([z_1..z_t])`, `c_t = a c_(t-1) + (1 - a) u_t`, heads on `[z_t ; c_t]`

`encode` stops at `z`, where exact accumulation cuts the graph; `predict` continues from there. `S` frames at the
model's frame rate, utterance after utterance; `K` dimensions; outputs are labels scaled to 0..1 over the rating scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cvrunner.config.sections import EmaConfig, ModelConfig
from cvrunner.encoders.dropout import Draws, Dropout
from cvrunner.encoders.encoder import Boundary, Encoded, Features, SpeechEncoder
from cvrunner.encoders.packing import Packing
from cvrunner.model.mamba import MambaStack

EMA_RANGE = (0.6, 0.9)
MIDDLE = {"linear": 0.5, "sigmoid": 0.0}
"""Output in the middle of the scale, with which training starts."""


class LayerMix(nn.Module):
    """Softmax-weighted sums of the hidden states, one set of weights per dimension."""

    def __init__(self, dimensions: int, layers: int, width: int, norm: str) -> None:
        super().__init__()
        self.layer_weights = nn.Parameter(torch.zeros(dimensions, layers))
        # Before the mix without weights: the projection that follows has its own.
        self.norm_layers = norm == "each_layer"
        self.norm = nn.LayerNorm(width, elementwise_affine=not self.norm_layers)

    def forward(self, states: Tensor) -> Tensor:
        """`[S, L, D]` to `[S, K * D]`."""
        if self.norm_layers:
            states = self.norm(states)
        # bmm, because einsum would copy the states in another order.
        mixed = torch.bmm(self.layer_weights.softmax(dim=-1).expand(len(states), -1, -1), states)
        if not self.norm_layers:
            mixed = self.norm(mixed)
        return mixed.flatten(1)


class LinearPath(nn.Module):
    """Linear outputs from the mean and standard deviation per layer of an utterance's hidden states.

    Fitted by ridge regression before the first epoch and not changed by training; an encoder that trains does see its
    loss. Training an encoder after such a linear probe distorts its features less than training with a new head alone
    (Kumar et al. 2022, arXiv 2202.10054).
    """

    def __init__(self, dimensions: int, layers: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers * 2 * width, dimensions), requires_grad=False)
        self.bias = nn.Parameter(torch.full((dimensions,), 0.5), requires_grad=False)

    def forward(self, statistics: Tensor) -> Tensor:
        """`[B, L, 2, D]` to `[B, K]`, on the scale 0..1."""
        return statistics.flatten(1) @ self.weight + self.bias


class MeanPooling(nn.Module):
    """Mean over the frames of each utterance: `[S, W]` to `[B, W]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        owned = packing.owned.to(x.dtype)
        return owned @ x / owned.sum(1, keepdim=True)


class AttentiveStatisticsPooling(nn.Module):
    """Attention-weighted mean and standard deviation (Okabe et al. 2018, arXiv 1803.10963) over an utterance's
    frames: `[S, W]` to `[B, 2 W]`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = 2 * width
        # One scalar score per frame, as in the paper's single-head attention.
        self.score = nn.Sequential(nn.Linear(width, width // 2), nn.Tanh(), nn.Linear(width // 2, 1))

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        owned = packing.owned
        weights = torch.where(owned, self.score(x).T, -torch.inf).softmax(dim=1)
        mean = weights @ x
        # Around the mean, in a second pass: E[x^2] - E[x]^2 would cancel in float32.
        variance = weights @ (x - owned.T.to(x.dtype) @ mean).square()
        return torch.cat([mean, torch.sqrt(variance + 1e-5)], dim=-1)


POOLINGS: dict[str, type[MeanPooling] | type[AttentiveStatisticsPooling]] = {
    "mean": MeanPooling,
    "attentive_statistics": AttentiveStatisticsPooling,
}


class TurnEma(nn.Module):
    """`c_t = a c_(t-1) + (1 - a) u_t` with `c_0 = 0` and one `a` in .6 ... .9 per dimension."""

    def __init__(self, dimensions: int, config: EmaConfig) -> None:
        super().__init__()
        low, high = EMA_RANGE
        # Just inside the range: at its very ends a sigmoid has no gradient.
        share = min(max((config.decay - low) / (high - low), 0.01), 0.99)
        start = torch.full((dimensions,), share).logit()
        self.ema_logit = nn.Parameter(start, requires_grad=config.learnable)

    @property
    def decay(self) -> Tensor:
        """`a [K]`."""
        low, high = EMA_RANGE
        return low + (high - low) * torch.sigmoid(self.ema_logit)

    def forward(self, u: Tensor) -> Tensor:
        """`[dialogues, turns, W]` to `[dialogues, turns, K, W]`, as one product with the lower triangle `a^(t-s)`."""
        turns = torch.arange(u.shape[1], device=u.device)
        age = turns[:, None] - turns
        decay = self.decay[:, None, None]
        weights = torch.where(age >= 0, (1 - decay) * decay ** age.clamp(min=0), 0.0)
        return torch.einsum("kts,dsw->dtkw", weights, u)


class Head(nn.Module):
    """Everything after the encoder, always in float32."""

    def __init__(self, config: ModelConfig, dimensions: int, layers: int, encoder_width: int) -> None:
        super().__init__()
        self.protocol = config.protocol
        self.output = config.output
        self.mix = LayerMix(dimensions, layers, encoder_width, config.layer_norm)
        self.projection = nn.Linear(dimensions * encoder_width, config.width)
        self.dropout = Dropout(config.dropout, "head frames")
        self.output_dropout = Dropout(config.dropout, "head outputs")
        self.linear_path = LinearPath(dimensions, layers, encoder_width) if config.linear_path else None
        self.frame_mamba = MambaStack(config.width, config.mamba.layers, config.mamba, config.mamba.bidirectional)
        self.pooling = POOLINGS[config.pooling](config.width)
        context = 0
        if config.protocol == "dialogue":
            context = config.width
            self.turn_projection = nn.Linear(self.pooling.width, config.width)
            self.turn_mamba = MambaStack(config.width, 1, config.mamba)
            self.turn_ema = TurnEma(dimensions, config.ema)
        self.weight = nn.Parameter(torch.empty(dimensions, self.pooling.width + context))
        self.bias = nn.Parameter(torch.full((dimensions,), MIDDLE[config.output]))
        nn.init.xavier_uniform_(self.weight)

    def encode(self, encoded: Encoded, keys: Sequence[int] = ()) -> Tensor:
        """Map hidden states and statistics to utterance vectors `z [B, Z]`; their last K values are the outputs of the
        linear path, if there is one. `keys`: what the dropout of each utterance is drawn from."""
        states, lengths, statistics = encoded
        packing = Packing(lengths.tolist(), states.device, keys)
        with packing.draws.used():
            x = self.dropout(self.projection(self.mix(states.to(self.bias.dtype))))
        z: Tensor = self.pooling(self.frame_mamba(x, packing), packing)
        if self.linear_path is None:
            return z
        return torch.cat([z, self.linear_path(statistics.to(self.bias.dtype))], dim=1)

    def predict(self, z: Tensor, turns: list[int], keys: Sequence[int] = ()) -> Tensor:
        """Map `z [B, Z]`, dialogue after dialogue with `turns` utterances each, to `[B, K]` on the scale 0..1.

        With a linear path that is the mean of two predictions. In training mode both are returned, `[B, 2, K]`, since
        each is compared with the labels by itself: the Mamba would otherwise learn what the ridge regression has left
        of the training labels, which is little and says nothing about other speakers.
        """
        z, linear = z[:, : self.pooling.width], z[:, self.pooling.width :]
        if self.protocol == "dialogue":
            # `[B, K, W]`: what the turns of the dialogue so far contribute to each turn.
            packing = Packing(turns, z.device)
            u = self.turn_mamba(self.turn_projection(z), packing)
            c = self.turn_ema(packing.whole.pad(u))
            context = packing.whole.pack(c).view(len(z), *c.shape[2:])
            inputs = torch.cat([z[:, None].expand(-1, context.shape[1], -1), context], dim=-1)
        else:
            inputs = z[:, None]
        with Draws(keys, [1] * len(z), z.device).used():
            y: Tensor = (self.output_dropout(inputs) * self.weight).sum(-1) + self.bias
        if self.output == "sigmoid":
            y, linear = y.sigmoid(), linear.clamp(0, 1)
        if self.linear_path is None:
            return y
        paths = torch.stack([y, linear], dim=1)
        return paths if self.training else paths.mean(1)


class MambaEMAModel(nn.Module):
    """Speech encoder and head."""

    def __init__(self, encoder: SpeechEncoder, config: ModelConfig, dimensions: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = Head(config, dimensions, len(encoder.layers), encoder.width)

    def encode(self, features: Features, lengths: Tensor, keys: Sequence[int] = ()) -> Tensor:
        """Return utterance vectors `z [B, Z]`.

        `features`: conv features `[S, C]`, utterance after utterance, the boundary of a partly frozen encoder, or what
        a frozen encoder has returned. `lengths [B]`: frames of each utterance among the conv features or the states.
        `keys`: what the dropout of each utterance is drawn from, while training.
        """
        if isinstance(features, Encoded):
            encoded = features
        elif isinstance(features, Boundary):
            encoded = self.encoder.from_boundary(features, lengths, keys)
        else:
            encoded = self.encoder(features, lengths, keys)
        z: Tensor = self.head.encode(encoded, keys)
        return z

    def predict(self, z: Tensor, turns: list[int], keys: Sequence[int] = ()) -> Tensor:
        """Return labels `[B, K]` on the scale 0..1; see `Head.predict`."""
        return self.head.predict(z, turns, keys)

    def layer_weights(self) -> list[list[float]]:
        """Return the softmax weights of the mixed layers, one list per dimension."""
        weights: list[list[float]] = self.head.mix.layer_weights.detach().softmax(-1).tolist()
        return weights

    def ema_decay(self) -> list[float]:
        """Return `a` per dimension; empty without dialogues."""
        if self.head.protocol != "dialogue":
            return []
        decay: list[float] = self.head.turn_ema.decay.tolist()
        return decay
