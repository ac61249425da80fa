"""From verified files to an encoder in memory: the family is chosen by `model_type`, and the weights are checked."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import logging

from cvrunner.config.adaptation import Adaptation
from cvrunner.config.sections import ModelConfig
from cvrunner.encoders.encoder import SpeechEncoder
from cvrunner.encoders.files import EncoderFiles, check_masking
from cvrunner.encoders.waveform import WaveformEncoder
from cvrunner.errors import EncoderError

MODELS = {
    "wavlm": "WavLMModel",
    "wav2vec2": "Wav2Vec2Model",
    "hubert": "HubertModel",
    "data2vec-audio": "Data2VecAudioModel",
}
"""Class of transformers by `model_type`."""
DROPOUTS = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout")


def build_encoder(
    files: EncoderFiles,
    config: ModelConfig,
    adaptation: Adaptation,
    precision: torch.dtype,
    gradient_checkpointing: bool = False,
) -> SpeechEncoder:
    """Return the pretrained encoder as configured. Raises EncoderError if its files do not allow that."""
    backbone = load_backbone(files, config.encoder_dropout)
    if adaptation.masks_input:
        check_masking(files.name, files.settings)
    return WaveformEncoder(
        backbone,
        layers=None if config.layers == "all" else config.layers,
        frame_rate_hz=config.frame_rate_hz,
        adaptation=adaptation,
        normalize=files.normalize,
        gradient_checkpointing=gradient_checkpointing,
        precision=precision,
    )


def load_backbone(files: EncoderFiles, dropout: float | None = None) -> Any:
    """Return transformers' pretrained model in float32, without layer drop. Raises EncoderError."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    changes: dict[str, Any] = {"layerdrop": 0.0}
    if dropout is not None:
        changes |= dict.fromkeys(DROPOUTS, dropout)
    try:
        loaded: Any = getattr(transformers, MODELS[files.settings.model_type]).from_pretrained(
            files.folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **changes
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise EncoderError(f"model.encoder {files.name}: {str(error).strip().partition(chr(10))[0]}") from None
    backbone, info = loaded
    missing = sorted(name for name in info["missing_keys"] if name != "masked_spec_embed")
    if missing:
        raise EncoderError(
            f"model.encoder {files.name}: {len(missing)} weights are missing in its files, first {missing[0]}"
        )
    return backbone
