"""The model card: a README.md with the front matter that Hugging Face's tools read."""

from __future__ import annotations

from collections.abc import Sequence

import cvrunner
from cvrunner.records.model_folder import ModelDescription
from cvrunner.records.results import TrialResult
from cvrunner.records.run_directory import trial_name

CORPORA = {"iemocap": "IEMOCAP", "manifest": "a corpus of a manifest", "demo": "cvrunner's synthetic demo corpus"}
SYNTHETIC = (
    "**Synthetic**: trained and tested on a speech synthesiser's output; the scores say nothing about people's speech."
)
NOT_FOR = (
    "Not for decisions about people (work, school, health, credit, law), and not for reading the feelings of people "
    "who have not agreed. It estimates how the raters of its corpus would have rated a recording, not what anyone "
    "feels; other languages, microphones and situations were not tested."
)


def model_card(
    description: ModelDescription, result: TrialResult, corpus_format: str, labels: str, licence: str | None
) -> str:
    """The card of one trial's model. `licence`: as the encoder's own files state it, None where they do not."""
    scores = [(d, result.validation_ccc.get(d), result.test_ccc.get(d)) for d in [*description.dimensions, "avg"]]
    about = {
        "data": f"{CORPORA[corpus_format]}, labels: {labels}, digest `{result.corpus_digest}`",
        "split": f"fold {result.fold}, digest `{result.split_digest}`",
        "protocol": description.model.protocol,
        "encoder": _encoder(description),
        "encoder's licence": licence or "see the encoder's card",
        "epoch": f"{result.best_epoch} of {result.epochs_run}, chosen by validation CCC-Avg; test scored once, after",
        "made with": f"cvrunner {cvrunner.__version__}, {_versions(result)}, {result.device}, {result.precision}",
        "trial": f"`{result.key}`",
    }
    parts = [
        f"---\n{_front_matter(description, scores, corpus_format)}\n---\n",
        f"# {trial_name(result.condition, result.fold, result.seed)}\n",
        f"{', '.join(description.dimensions).capitalize()} of speech, on a scale of {description.scale[0]:g} to "
        f"{description.scale[1]:g}: {'frozen' if description.frozen else 'fine-tuned'} WavLM with a Mamba head.",
        *([SYNTHETIC] if description.synthetic else []),
        "\n| CCC | validation | test |\n|---|---|---|",
        *[f"| {name} | {_number(validation)} | {_number(test)} |" for name, validation, test in scores],
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
        if value is not None
    ]
    data = ModelCardData(
        library_name="cvrunner",
        pipeline_tag="audio-classification",
        tags=["speech-emotion-recognition", *description.dimensions, *(["synthetic"] if description.synthetic else [])],
        base_model=description.model.encoder if description.encoder_revision else None,
        model_name=f"{description.condition}-fold-{description.fold}-seed-{description.seed}",
        eval_results=results,
    )
    return data.to_yaml().strip()


def _encoder(description: ModelDescription) -> str:
    revision = f" at {description.encoder_revision}" if description.encoder_revision else ""
    kept = "no weights of it in this folder" if description.frozen else "only what was trained of it in this folder"
    return f"{description.model.encoder}{revision}, digest `{description.encoder_digest}`; {kept}"


def _versions(result: TrialResult) -> str:
    return ", ".join(f"{name} {version}" for name, version in result.versions.items())


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
