"""A run's models as one MLflow model that needs neither the run's folder nor a model hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from cvrunner.encoders.files import EncoderFiles, find_encoder
from cvrunner.errors import CvrunnerError, EncoderError, ResultsError, UsageError
from cvrunner.files import link_or_copy, write_folder_atomically
from cvrunner.records.model_folder import NOT_FOR, SYNTHETIC, ModelDescription, ModelFolder
from cvrunner.records.results import ccc_label
from cvrunner.records.run_directory import RunDirectory
from cvrunner.text import DASH, Table, format_score, plural
from cvrunner.tracking import names
from cvrunner.tracking.mirror import first_line, mlflow_problem
from cvrunner.tracking.mlflow_store import MlflowStore, save_pyfunc
from cvrunner.tracking.tracker import tracking_uri

CODE = Path(__file__).with_name("pyfunc_model.py")
ENCODER_FILES = ("config.json", "preprocessor_config.json", "model*.safetensors", "README.md", "LICENSE*")


def export_model(
    directory: RunDirectory, condition: str, members: Sequence[ModelFolder], folder: Path, encoder: str | None
) -> None:
    """Write the MLflow model of these members, with their encoder, to `folder`, which must not exist.

    Raises EncoderError if the encoder is missing or is not the one that they were trained on.
    """
    run, description = directory.read_run(), members[0].read()
    # Training asked whether it was tuned for emotion; now its digest decides.
    if encoder:
        files = find_encoder(encoder, None, allow_tuned=True)
    else:
        files = find_encoder(description.model.encoder, description.encoder_revision, allow_tuned=True)
    if files.digest != description.encoder_digest:
        raise EncoderError(f"model.encoder {files.name}: not the files that the models were trained on (`encoder`)")
    card = ensemble_card(directory, condition, [member.read() for member in members])
    about = {"run": run.run, "condition": condition, "synthetic": str(run.synthetic).lower()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".cvrunner-export-", dir=folder.parent) as temporary:
        gathered = Path(temporary) / "ensemble"
        _gather(members, files, gathered)

        def write(new: Path) -> None:
            save_pyfunc(new, CODE, gathered, description.dimensions, about)
            (new / "README.md").write_text(card, encoding="utf-8")

        write_folder_atomically(folder, write)


def ensemble_card(directory: RunDirectory, condition: str, members: Sequence[ModelDescription]) -> str:
    """Return the card of an exported model: test scores of its members, and what it must not be used for."""
    run, first = directory.read_run(), members[0]
    results = [result for name, result in directory.results(run).items() if run.trials[name].condition == condition]
    rows = []
    for dimension in (*first.dimensions, "avg"):
        values = [value for result in results if (value := result.test_ccc.get(dimension)) is not None]
        spread = format_score(stdev(values)) if len(values) > 1 else DASH
        rows.append([ccc_label(dimension), format_score(fmean(values) if values else None), spread])
    note = "Mean and standard deviation over folds and seeds, each scored on its own test session; not of the ensemble."
    table = Table("Test CCC", ["dimension", "mean", "sd"], rows, note)
    tags = ["speech-emotion-recognition", *first.dimensions, *(["synthetic"] if run.synthetic else [])]
    data = ModelCardData(library_name="cvrunner", pipeline_tag="audio-classification", tags=tags)
    parts = [
        f"---\n{data.to_yaml().strip()}\n---\n",
        f"# {condition}, {len(members)} models of {run.run}\n",
        f"{', '.join(first.dimensions).capitalize()} of speech, on a scale of {first.scale[0]:g} to "
        f"{first.scale[1]:g}, by {plural(len(members), 'model')} with the encoder {first.model.encoder}. The cards of "
        "the models are in `artifacts/ensemble/models`; the encoder's files, under its own licence, in "
        "`artifacts/ensemble/encoder`.\n",
        *([f"{SYNTHETIC}\n"] if run.synthetic else []),
        f"{table.as_markdown()}\n",
        "## Use\n\n```python\nimport mlflow, pandas\n\nmodel = mlflow.pyfunc.load_model('FOLDER')  # this folder\n"
        "model.predict(pandas.DataFrame({'path': ['interview.wav']}))\n```\n",
        f"## Not for\n\n{NOT_FOR}\n",
    ]
    return "\n".join(parts)


def check_hub_name(name: str) -> None:
    """Raise UsageError unless `name` is USER/NAME, as the hub allows it."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"--hub {name}: {error}") from None
    if name.count("/") != 1:
        raise UsageError(f"--hub {name}: must be USER/NAME")


def upload(folder: Path, name: str, private: bool) -> str:
    """Upload an exported model to the Hugging Face hub and return its address; nothing is uploaded to a public
    repository unless `private` is False.

    Raises ResultsError if the hub refuses or does not answer.
    """
    api = HfApi()
    try:
        address = str(api.create_repo(name, private=private, exist_ok=True))
        if private and not api.model_info(name).private:
            raise ResultsError(f"--hub {name}: exists already and is public; give another name, or --public")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="cvrunner export")
    except CvrunnerError:
        raise
    except Exception as error:  # the hub's client raises whatever its HTTP library does
        refused = re.search(r"\b(401|403)\b|token", f"{error} {first_line(error)}")
        login = "; log in with `hf auth login`, or set HF_TOKEN" if refused else ""
        where = f"the model is in {folder}, and `hf upload {name} {folder} --private` uploads it"
        raise ResultsError(f"--hub {name}: {first_line(error)}{login}; {where}") from error
    return address


def log_model(directory: RunDirectory, condition: str, folder: Path) -> str:
    """Log an exported model to the condition's run in MLflow and return its address there.

    Raises ResultsError if the run is not in MLflow yet, or MLflow cannot be written.
    """
    run, config = directory.read_run(), directory.read_config()
    uri = tracking_uri(config, directory.path.parent)
    try:
        store = MlflowStore(uri)
        experiment = store.experiment(f"{config.tracking.experiment}-{run.protocol}")
        parent = store.find(experiment, names.run_tags(run, "parent", f"{run.key}/{condition}"))
        if parent is None:
            raise ResultsError(f"{run.run}: not in MLflow ({uri}) yet; `cvrunner sync {run.run}` writes it")
        return store.log_model(parent.id, experiment, f"{condition}-{run.run}", folder)
    except CvrunnerError:
        raise
    except Exception as error:  # mlflow raises whatever its database and its HTTP client do
        raise ResultsError(f"MLflow ({uri}) cannot be written: {mlflow_problem(error)}") from error


def _gather(members: Sequence[ModelFolder], encoder: EncoderFiles, folder: Path) -> None:
    """Gather the files that MLflow copies, in the layout that `pyfunc_model.py` reads, and nothing else."""
    # Not the whole folder of the encoder, which may hold the same weights again in other formats.
    found = [path for pattern in ENCODER_FILES for path in encoder.folder.glob(pattern)]
    places = {folder / "encoder" / path.name: path for path in found}
    for member in members:
        description = member.read()
        # Sorted by name, the folders are in the order of the members.
        name = f"fold-{description.fold:02d}-seed-{description.seed:04d}"
        places |= {folder / "models" / name / path.name: path for path in member.files}
    for place, path in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        # A hard link does not copy gigabytes; MLflow does not follow symbolic links.
        link_or_copy(path.resolve(), place)
