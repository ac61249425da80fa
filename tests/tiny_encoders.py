"""Small encoders of all families with random weights, in all published shapes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperModel,
)

from cvrunner.config.adaptation import Adaptation
from cvrunner.encoders.encoder import Encoded
from cvrunner.encoders.waveform import WaveformEncoder


def tiny_wavlm(stable: bool = False, layers: int = 2, **settings: object) -> WavLMModel:
    """`stable`: pre-norm and layer-norm front-end as WavLM-large; else post-norm and group norm as WavLM-base."""
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8,) * 7,
        conv_bias=stable,
        feat_extract_norm="layer" if stable else "group",
        do_stable_layer_norm=stable,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        **settings,
    )
    model = WavLMModel(config)
    with torch.no_grad():
        for layer in model.encoder.layers:
            # The gate of the position bias starts at one; random, so that a mistake in it shows.
            layer.attention.gru_rel_pos_const.normal_()
    return model


SHAPE = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": (8,) * 7,
    "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0,
}  # fmt: skip
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True, "num_conv_pos_embeddings": 8}
BASE = {"feat_extract_norm": "group", "do_stable_layer_norm": False, "num_conv_pos_embeddings": 7}
DROPOUTS = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout")
WAVEFORM: dict[str, Callable[[], Any]] = {
    "wavlm, post-norm": lambda: WavLMModel(WavLMConfig(**SHAPE, **BASE)),
    "wavlm, pre-norm": lambda: WavLMModel(WavLMConfig(**SHAPE, **LARGE)),
    "wav2vec2, post-norm": lambda: Wav2Vec2Model(Wav2Vec2Config(**SHAPE, **BASE)),
    "wav2vec2, pre-norm": lambda: Wav2Vec2Model(Wav2Vec2Config(**SHAPE, **LARGE)),
    "hubert, post-norm": lambda: HubertModel(HubertConfig(**SHAPE, **BASE)),
    "hubert, pre-norm": lambda: HubertModel(HubertConfig(**SHAPE, **LARGE, feat_proj_layer_norm=False)),
    "hubert, batch norm": lambda: HubertModel(HubertConfig(**SHAPE, **BASE, conv_pos_batch_norm=True)),
    "data2vec-audio": lambda: Data2VecAudioModel(Data2VecAudioConfig(**SHAPE, conv_pos_kernel_size=5)),
}
"""A model of transformers by family and shape."""


def tiny_backbone(kind: str) -> Any:
    """A waveform model with random weights everywhere, so that a mistake shows: biases and norms, too."""
    torch.manual_seed(0)
    model = WAVEFORM[kind]().eval()
    _shake(model)
    return model


def tiny_whisper(positions: int = 1500) -> Any:
    """A Whisper encoder with a random position table."""
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=16, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=24, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=24, vocab_size=11, num_mel_bins=10, max_source_positions=positions,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, dropout=0.1,
    )  # fmt: skip
    model = WhisperModel(config).eval()
    _shake(model)
    return model


def _shake(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)


FULL = Adaptation("full", start_epoch=1)
TOP_LAYER = Adaptation("top_layers", start_epoch=1, top_layers=1)
TOP_LAYERS = Adaptation("top_layers", start_epoch=1, top_layers=2)
MASKED = Adaptation("full", start_epoch=1, masks_input=True)


def tiny_encoder(stable: bool = False, **settings: object) -> WaveformEncoder:
    torch.manual_seed(0)
    return WaveformEncoder(tiny_wavlm(stable), **settings)  # type: ignore[arg-type]


def save_encoder(folder: Path, stable: bool = False, normalize: bool = False) -> Path:
    """A `from_pretrained` folder."""
    torch.manual_seed(0)
    tiny_wavlm(stable).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": normalize, "sampling_rate": 16000}))
    return folder


def layers_of(encoded: Encoded, places: Sequence[int]) -> Encoded:
    """What an encoder returned, of the mixed layers at these places, without a graph."""
    return Encoded(encoded.states[:, places].detach(), encoded.lengths, encoded.statistics[:, places].detach())
