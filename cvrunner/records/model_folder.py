"""model/: a trained model that can be loaded again, laid out as a Hugging Face model folder.

model/
    model.safetensors  the trained tensors of the best epoch; of the encoder only what was trained
    config.json        `ModelDescription`: all that the model is rebuilt from
    README.md          the model card
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cvrunner.config.sections import Dimension, ModelConfig
from cvrunner.errors import ResultsError
from cvrunner.records.results import Record

FORMAT = 1


class ModelDescription(Record):
    """config.json of a trained model. The encoder is not in the folder, but for what was trained of it."""

    model_type: Literal["cvrunner"] = "cvrunner"
    format: int = FORMAT
    model: ModelConfig
    """`encoder` is its name as the configuration had it."""
    encoder_revision: str | None
    """Commit of a hub encoder."""
    encoder_digest: str
    encoder_normalize: bool
    """Whether waveforms are scaled to mean 0, variance 1 first."""
    precision: Literal["auto", "float32", "bfloat16"]
    """`train.precision`, which the encoder predicts in too."""
    dimensions: list[Dimension]
    scale: tuple[float, float]
    """Lowest and highest value of the rating scale."""
    sample_rate_hz: int
    condition: str
    fold: int
    seed: int
    trial_key: str
    synthetic: bool
    """Trained on cvrunner's own synthetic corpus."""

    @property
    def frozen(self) -> bool:
        return self.model.freeze_speech_encoder

    @property
    def name(self) -> str:
        """Fold and seed, as a column or a sentence has it."""
        return f"fold-{self.fold}/seed-{self.seed}"


@dataclass(frozen=True)
class ModelFolder:
    """The files of one trained model."""

    path: Path

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    @property
    def files(self) -> tuple[Path, ...]:
        return self.weights, self.config, self.card

    def read(self) -> ModelDescription:
        """config.json. Raises ResultsError where there is no model, or none that this version can rebuild."""
        if missing := [path.name for path in (self.config, self.weights) if not path.is_file()]:
            raise ResultsError(f"{self.path}: no trained model here ({', '.join(missing)} missing)")
        description = ModelDescription.from_json(self.config.read_bytes(), str(self.config))
        if description.format > FORMAT:
            raise ResultsError(
                f"{self.config}: format {description.format} is of a newer cvrunner, this one reads {FORMAT}: update it"
            )
        return description
