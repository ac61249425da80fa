"""A trained model, rebuilt from its folder and the encoder that it was trained on.

`B` utterances, `T` samples at 16 kHz, `Z` width of an utterance's vector, `K` dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cvrunner.config.adaptation import adaptation_of
from cvrunner.config.sections import TrainConfig
from cvrunner.data.utterance import SAMPLE_RATE_HZ, check_length, mono_16khz
from cvrunner.encoders.encoder import Encoded, Features, SpeechEncoder
from cvrunner.encoders.files import find_encoder
from cvrunner.encoders.loading import build_encoder
from cvrunner.errors import EncoderError, ResultsError
from cvrunner.model.mamba_ema import MambaEMAModel
from cvrunner.records import legacy
from cvrunner.records.model_folder import NOT_FOR, ModelDescription, ModelFolder
from cvrunner.text import Table
from cvrunner.training.device import choose_precision
from cvrunner.training.freezing import NEVER, match, rules
from cvrunner.training.inputs import Waveform, conv_features, hidden_states_and_statistics, ratings


@dataclass(frozen=True, repr=False)
class EmotionModel:
    """The model of one trial, ready to rate speech."""

    description: ModelDescription
    network: MambaEMAModel
    """In evaluation mode."""
    device: torch.device

    def __repr__(self) -> str:
        about = self.description
        scale = f"on {about.scale[0]:g} to {about.scale[1]:g}"
        return f"<EmotionModel {about.condition}/{about.name}: {', '.join(self.dimensions)} {scale}, {self.device}>"

    def _repr_html_(self) -> str:
        """What the model rates and what it is made of; its scores are in the card next to its weights."""
        about, weights = self.description, self.network.parameters()
        encoder = f"{about.model.encoder}, {adaptation_of(about.model).label}"
        rows = [
            ["rates", f"{', '.join(self.dimensions)}, on {about.scale[0]:g} to {about.scale[1]:g}"],
            ["encoder", encoder],
            ["protocol", about.model.protocol],
            ["parameters", f"{sum(weight.numel() for weight in weights):,}"],
            ["device", str(self.device)],
            ["trained on", "synthetic speech: says nothing about people's" if about.synthetic else "see its card"],
        ]
        return Table(f"Model of {about.condition}/{about.name}", ["", ""], rows, NOT_FOR).as_html()

    @property
    def dimensions(self) -> tuple[str, ...]:
        return tuple(self.description.dimensions)

    def predict(self, waveform: npt.ArrayLike, sample_rate_hz: int = SAMPLE_RATE_HZ) -> dict[str, float]:
        """Rate one utterance, `[T]` or `[T, channels]` in -1..1 at any rate; by dimension, on the rating scale.

        A model with `protocol: dialogue` rates it as the first turn of a dialogue. Raises AudioError.
        """
        return self.predict_dialogue([waveform], sample_rate_hz)[0]

    def predict_dialogue(
        self, waveforms: Sequence[npt.ArrayLike], sample_rate_hz: int = SAMPLE_RATE_HZ
    ) -> list[dict[str, float]]:
        """Rate the turns of a dialogue, in order. With `protocol: utterance` each turn is rated by itself.

        Raises AudioError.
        """
        turns = []
        for waveform in waveforms:
            samples = np.asarray(waveform, dtype=np.float32)
            if samples.ndim != 2:
                samples = samples.reshape(-1, 1)
            mono = mono_16khz(samples, sample_rate_hz)
            check_length(mono, self.network.encoder.shortest_samples, self.network.encoder.longest_samples)
            turns.append(self.encode(self.features(mono)))
        values = self.rate(turns)
        return [dict(zip(self.dimensions, row, strict=True)) for row in values.tolist()]

    @torch.no_grad()
    def features(self, waveform: Waveform) -> Features:
        """Return what training reads from its cache, from `[T]` at 16 kHz; models with one frozen encoder share it."""
        encoder, device = self.network.encoder, self.device
        conv = conv_features(encoder, waveform, device)
        if encoder.adaptation.trains_encoder:
            return torch.from_numpy(conv).to(device, torch.float32)
        [(hidden, statistics)] = hidden_states_and_statistics(encoder, [conv], device)
        # Cached features are float16; training reads them as float32, too.
        states = torch.from_numpy(hidden).to(device, torch.float32)
        return Encoded(states, torch.tensor([len(hidden)]), torch.from_numpy(statistics[:, encoder.layers]).to(device))

    @torch.no_grad()
    def encode(self, features: Features) -> Tensor:
        """Return an utterance's vector `[1, Z]`."""
        frames = len(features) if isinstance(features, Tensor) else len(features[0])
        return self.network.encode(features, torch.tensor([frames]))

    @torch.no_grad()
    def rate(self, turns: Sequence[Tensor]) -> npt.NDArray[np.float64]:
        """Return ratings `[B, K]` of vectors `[1, Z]`, the turns of one dialogue in order."""
        return ratings(self.network.predict(torch.cat(list(turns)), [len(turns)]), self.description.scale)


def load_model(folder: Path, device: torch.device, encoder: str | None = None) -> EmotionModel:
    """Load the model in a folder. `encoder`: its path now, if the encoder was moved.

    Raises ResultsError for a folder without a complete model, and EncoderError if the encoder is not the one that the
    model was trained on.
    """
    return load_models([folder], device, encoder)[0]


def load_models(folders: Sequence[Path], device: torch.device, encoder: str | None = None) -> list[EmotionModel]:
    """Load models of one condition that share a frozen encoder, or one model. Raises as `load_model`."""
    descriptions = [ModelFolder(folder).read() for folder in folders]
    shared = _encoder(descriptions[0], device, encoder)
    return [
        _rebuilt(ModelFolder(folder), description, shared, device)
        for folder, description in zip(folders, descriptions, strict=True)
    ]


def _encoder(description: ModelDescription, device: torch.device, elsewhere: str | None) -> SpeechEncoder:
    """Build the encoder from its files, which must be those of training."""
    name, revision = description.model.encoder, description.encoder_revision
    if elsewhere:
        # A folder has no revisions; the digest below tells whether it is the right one.
        name, revision = elsewhere, None
    try:
        # Training asked whether it was tuned for emotion; now its digest decides.
        files = find_encoder(name, revision, allow_tuned=True)
    except EncoderError as error:
        raise EncoderError(f"{error}; if it was moved, give its path as `encoder`") from None
    if files.digest != description.encoder_digest:
        raise EncoderError(
            f"model.encoder {name}: its files have digest {files.digest[:12]}, the model was trained on "
            f"{description.encoder_digest[:12]}; give the path of the files of that time as `encoder`"
        )
    return build_encoder(
        files, description.model, adaptation_of(description.model), choose_precision(description.precision, device)
    )


def _rebuilt(
    folder: ModelFolder, description: ModelDescription, encoder: SpeechEncoder, device: torch.device
) -> EmotionModel:
    """Build the network around the encoder and load the trained weights. Raises ResultsError if they do not fit."""
    network = MambaEMAModel(encoder, description.model, len(description.dimensions))
    try:
        weights = {legacy.weight_name(name): value for name, value in load_file(folder.weights).items()}
    except (OSError, SafetensorError) as error:
        raise ResultsError(f"{folder.weights}: cannot be read, copy it again: {error}") from None
    # The same table as in training decides which tensors there must be: those that some epoch changes.
    table = rules(encoder, TrainConfig())
    expected = {name: p.shape for name, p in network.named_parameters() if match(name, table).start < NEVER}
    found = {name: p.shape for name, p in weights.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise ResultsError(f"{folder.weights}: not of the model that config.json describes: {wrong[0]} does not fit")
    # Not strict, since the folder holds only what was trained; the rest comes from the encoder's own files.
    network.load_state_dict(weights, strict=False)
    return EmotionModel(description, network.to(device).eval(), device)
