"""Small WavLMs with random weights, in both published shapes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import WavLMConfig, WavLMModel

from cvrunner.config.adaptation import Adaptation
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


FULL = Adaptation("full", start_epoch=1)
TOP_LAYER = Adaptation("top_layers", start_epoch=1, top_layers=1)
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
