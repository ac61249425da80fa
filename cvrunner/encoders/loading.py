"""From verified files to an encoder in memory: the family is chosen by `model_type`, and all weights are compared."""

from __future__ import annotations

import json
from logging import CRITICAL
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Data2VecAudioModel, HubertModel, Wav2Vec2Model, WavLMModel, WhisperFeatureExtractor
from transformers.models.whisper import modeling_whisper
from transformers.utils import logging

from cvrunner.config.adaptation import Adaptation
from cvrunner.config.sections import ModelConfig
from cvrunner.encoders.encoder import SpeechEncoder
from cvrunner.encoders.files import EncoderFiles, check_masking, plain_name
from cvrunner.encoders.hub import first_line
from cvrunner.encoders.waveform import WaveformEncoder
from cvrunner.encoders.whisper import PaddedWhisperEncoder, WhisperEncoder
from cvrunner.errors import EncoderError

MODELS: dict[str, Any] = {
    "wavlm": WavLMModel,
    "wav2vec2": Wav2Vec2Model,
    "hubert": HubertModel,
    "data2vec-audio": Data2VecAudioModel,
    "whisper": modeling_whisper.WhisperEncoder,
}
"""Class of transformers by `model_type`."""
WHISPERS = {family.WINDOW: family for family in (WhisperEncoder, PaddedWhisperEncoder)}


def build_encoder(
    files: EncoderFiles,
    config: ModelConfig,
    adaptation: Adaptation,
    precision: torch.dtype,
    gradient_checkpointing: bool = False,
) -> SpeechEncoder:
    """Return the pretrained encoder as configured. Raises EncoderError if its files do not allow that."""
    if adaptation.masks_input:
        check_masking(files.name, files.settings)
    backbone = load_backbone(files, config.encoder_dropout)
    settings: dict[str, Any] = {
        "layers": None if config.layers == "all" else config.layers,
        "frame_rate_hz": config.frame_rate_hz,
        "adaptation": adaptation,
        "normalize": files.settings.normalize,
        "limits": (files.settings.shortest_samples, files.settings.longest_samples),
        "gradient_checkpointing": gradient_checkpointing,
        "precision": precision,
    }
    if files.settings.model_type == "whisper":
        preprocessing = json.loads((files.folder / "preprocessor_config.json").read_bytes())
        family = WHISPERS[config.whisper_window]
        # Dither adds random noise, so that features would differ from one run to the next.
        extractor = WhisperFeatureExtractor(**preprocessing | {"dither": 0.0})  # type: ignore[no-untyped-call]
        return family(backbone, extractor, **settings)
    return WaveformEncoder(backbone, **settings)


def load_backbone(files: EncoderFiles, dropout: float | None = None) -> Any:
    """Return transformers' pretrained model in float32, without layer drop.

    Raises EncoderError if weights are missing, would not be used, have another shape, or are not finite.
    """
    changes: dict[str, Any] = {"layerdrop": 0.0}
    names = ["hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"]
    if files.settings.model_type == "whisper":
        # The decoder is not loaded, and the encoder's weights have the names of the encoder alone.
        changes = {"encoder_layerdrop": 0.0, "key_mapping": {r"^(model\.)?encoder\.": ""}}
        names = ["dropout", "attention_dropout", "activation_dropout"]
    if dropout is not None:
        changes |= dict.fromkeys(names, dropout)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # transformers prints tables about weights that do not fit; the errors below say it in one sentence.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        loaded: Any = MODELS[files.settings.model_type].from_pretrained(
            files.folder,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **changes,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise EncoderError(f"model.encoder {files.name}: {first_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    backbone, info = loaded
    # Heads of the pretraining, or of speech recognition, are left out; they have names of their own.
    own = {name.partition(".")[0] for name, _ in backbone.named_parameters()}
    unused = {name for name in info["unexpected_keys"] if plain_name(name).partition(".")[0] in own}
    wrong = {
        "are missing in its files": {name for name in info["missing_keys"] if name != "masked_spec_embed"},
        "of its files would not be used": unused,
        "have another shape in its files": {str(key[0]) for key in info["mismatched_keys"]},
        "are not finite": {name for name, p in backbone.named_parameters() if not p.isfinite().all()},
    }
    for what, found in wrong.items():
        if found:
            raise EncoderError(
                f"model.encoder {files.name}: {len(found)} weights {what}, first {min(found)}; copy the folder again, "
                "with the config.json that belongs to the weights"
            )
    return backbone
