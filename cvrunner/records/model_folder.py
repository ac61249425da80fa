"""A trained model on disk, laid out as a Hugging Face model folder.

model/
    model.safetensors  the trained tensors of the best epoch; of the encoder only what was trained
    config.json        `ModelDescription`: all that is needed to rebuild the model
    README.md          the model card
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import field_validator

import cvrunner
from cvrunner.config.adaptation import adaptation_of
from cvrunner.config.sections import Dimension, ModelConfig
from cvrunner.errors import ResultsError
from cvrunner.records import legacy
from cvrunner.records.results import Record, TrialResult
from cvrunner.text import format_score

FORMAT = 2
"""2: the names of encoder weights begin with `encoder.backbone`, before with `encoder.wavlm`."""
CORPORA = {
    "iemocap": "IEMOCAP",
    "manifest": "a corpus of a manifest",
    "msp_podcast": "MSP-Podcast",
    "audformat": "a database in audformat",
    "demo": "cvrunner's synthetic demo corpus",
}
SYNTHETIC = (
    "**Synthetic**: trained and tested on a speech synthesiser's output; the scores say nothing about people's speech."
)
NOT_FOR = (
    "Not for decisions about people (work, school, health, credit, law), and not for reading the feelings of people "
    "who have not agreed. It estimates how the raters of its corpus would have rated a recording, not what anyone "
    "feels; other languages, microphones and situations were not tested."
)


class ModelDescription(Record):
    """config.json of a trained model. Of the encoder, the folder holds only what was trained."""

    renames = legacy.MODEL
    model_type: Literal["cvrunner"] = "cvrunner"
    format: int = FORMAT
    model: ModelConfig
    """`encoder` is the name given in the configuration."""
    encoder_revision: str | None
    """Commit of a hub encoder."""
    encoder_digest: str
    encoder_normalize: bool
    """Whether waveforms are scaled to mean 0, variance 1 first."""
    precision: Literal["auto", "float32", "bfloat16"]
    """`train.precision`; the encoder also predicts in it."""
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

    @field_validator("model", mode="before")
    @classmethod
    def _with_its_head(cls, model: object) -> object:
        # Versions without these keys normalised the mix and had one path; today's defaults would be another head.
        return {"layer_norm": "mix", "linear_path": False, **model} if isinstance(model, dict) else model

    @property
    def name(self) -> str:
        """Fold and seed, as in a column of a table."""
        return f"fold-{self.fold}/seed-{self.seed}"


class ModelFolder:
    """The files of one trained model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights = path / "model.safetensors"
        self.config = path / "config.json"
        self.card = path / "README.md"
        self.files = (self.weights, self.config, self.card)

    def read(self) -> ModelDescription:
        """Read config.json. Raises ResultsError if there is no model, or none that this version can rebuild."""
        if missing := [path.name for path in (self.config, self.weights) if not path.is_file()]:
            raise ResultsError(f"{self.path}: no trained model here ({', '.join(missing)} missing)")
        # Unlike other records: a field of a newer format may change what the weights mean, so it must not be ignored.
        description = ModelDescription.from_json(self.config.read_bytes(), str(self.config))
        if description.format > FORMAT:
            raise ResultsError(
                f"{self.config}: format {description.format} is of a newer cvrunner, this one reads {FORMAT}: update it"
            )
        return description


# --- the model card --------------------------------------------------------------------------------------------------


def model_card(
    description: ModelDescription, result: TrialResult, corpus_format: str, labels: str, licence: str | None
) -> str:
    """Return the model card (README.md) of one trial's model. `licence`: stated in the encoder's files, if it is."""
    scores = [(d, result.validation_ccc.get(d), result.test_ccc.get(d)) for d in [*description.dimensions, "avg"]]
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    adaptation = adaptation_of(description.model)
    encoder = description.model.encoder
    if description.encoder_revision:
        encoder += f" at {description.encoder_revision}"
    kept = "only what was trained of it" if adaptation.trains_encoder else "no weights of it"
    if adaptation.lora is not None:
        kept = "only the projections that LoRA changed, adapters merged,"
    about = {
        "data": f"{CORPORA[corpus_format]}, labels: {labels}, digest `{result.corpus_digest}`",
        "split": f"fold {result.fold}, digest `{result.split_digest}`",
        "protocol": description.model.protocol,
        "encoder": f"{encoder}, digest `{description.encoder_digest}`; {kept} in this folder",
        "encoder's licence": licence or "see the encoder's card",
        "epoch": f"{result.best_epoch} of {result.epochs_run}, chosen by validation CCC-Avg; test scored once, after",
        "made with": f"cvrunner {cvrunner.__version__}, {versions}, {result.device}, {result.precision}",
        "trial": f"`{result.key}`",
    }
    parts = [
        f"---\n{_front_matter(description, scores, corpus_format)}\n---\n",
        f"# {description.condition}/{description.name}\n",
        f"{', '.join(description.dimensions).capitalize()} of speech, on a scale of {description.scale[0]:g} to "
        f"{description.scale[1]:g}: {adaptation.label} speech encoder with a Mamba head.",
        *([SYNTHETIC] if description.synthetic else []),
        "\n| CCC | validation | test |\n|---|---|---|",
        *[f"| {name} | {format_score(validation)} | {format_score(test)} |" for name, validation, test in scores],
        "\n| | |\n|---|---|",
        *[f"| {name} | {value} |" for name, value in about.items()],
        "\n## Use\n\n```python\nfrom cvrunner.api import load_model\n",
        'model = load_model("FOLDER")  # this folder',
        "model.predict(waveform, sample_rate_hz=16000)  # {dimension: rating}\n```\n",
        f"## Not for\n\n{NOT_FOR}\n",
    ]
    return "\n".join(parts)


def _front_matter(
    description: ModelDescription, scores: Sequence[tuple[str, float | None, float | None]], corpus_format: str
) -> str:
    # Only training writes cards; the import takes longer than a report needs to start.
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="audio-classification",
            task_name="Speech emotion recognition",
            dataset_type=corpus_format,
            dataset_name=f"{CORPORA[corpus_format]}, fold {description.fold}",
            metric_type="ccc",
            metric_name=f"{part} CCC {dimension}",
            metric_value=value,
        )
        for dimension, validation, test in scores
        for part, value in (("validation", validation), ("test", test))
        # The hub accepts only numbers; the table below shows that a score is undefined.
        if value is not None
    ]
    data = ModelCardData(
        library_name="cvrunner",
        pipeline_tag="audio-classification",
        tags=["speech-emotion-recognition", *description.dimensions, *(["synthetic"] if description.synthetic else [])],
        # Without a revision the encoder is a folder on someone's disk, which the hub would take for a name of its own.
        base_model=description.model.encoder if description.encoder_revision else None,
        model_name=f"{description.condition}-fold-{description.fold}-seed-{description.seed}",
        eval_results=results,
    )
    return data.to_yaml().strip()
