"""A run's models as one MLflow model that needs neither the run's folder nor a model hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cvrunner.encoders.files import EncoderFiles, find_encoder
from cvrunner.errors import CvrunnerError, EncoderError, ResultsError
from cvrunner.files import write_folder_atomically
from cvrunner.records.model_folder import ModelFolder
from cvrunner.records.run_directory import RunDirectory
from cvrunner.tracking import names as names
from cvrunner.tracking.mirror import first_line
from cvrunner.tracking.mlflow_store import MlflowStore, save_pyfunc
from cvrunner.tracking.tracker import tracking_uri

CODE = Path(__file__).with_name("pyfunc_model.py")
ENCODER_FILES = ("config.json", "preprocessor_config.json", "model*.safetensors", "README.md", "LICENSE*")


def export_model(
    directory: RunDirectory, condition: str, members: Sequence[ModelFolder], folder: Path, encoder: str | None
) -> None:
    """Write the MLflow model of these members to `folder`, which is not there yet: their folders, and the encoder's.

    Raises EncoderError where the encoder is gone or another than they were trained on.
    """
    run, description = directory.read_run(), members[0].read()
    files = find_encoder(encoder or description.model.encoder, None if encoder else description.encoder_revision)
    if files.digest != description.encoder_digest:
        raise EncoderError(f"model.encoder {files.name}: not the files that the models were trained on (--encoder)")
    about = {"run": run.run, "condition": condition, "synthetic": str(run.synthetic).lower()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".cvrunner-export-", dir=folder.parent) as temporary:
        gathered = Path(temporary) / "ensemble"
        _gather(members, files, gathered)
        write_folder_atomically(folder, lambda new: save_pyfunc(new, CODE, gathered, description.dimensions, about))


def log_model(directory: RunDirectory, condition: str, folder: Path) -> str:
    """Put an exported model beside the condition's run in MLflow; returns its address there.

    Raises ResultsError where the run is not in MLflow yet, or MLflow cannot be written.
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
        raise ResultsError(f"MLflow ({uri}) cannot be written: {first_line(error)}") from error


def _name(member: ModelFolder) -> str:
    """A folder's name in the model, which sorts as the members do."""
    description = member.read()
    return f"fold-{description.fold:02d}-seed-{description.seed:04d}"


def _gather(members: Sequence[ModelFolder], encoder: EncoderFiles, folder: Path) -> None:
    """What MLflow is to copy, laid out as `pyfunc_model.py` finds it; nothing else of the folders."""
    for pattern in ENCODER_FILES:
        for path in encoder.folder.glob(pattern):
            _place(path, folder / "encoder" / path.name)
    for member in members:
        for path in member.files:
            _place(path, folder / "models" / _name(member) / path.name)


def _place(path: Path, place: Path) -> None:
    """On one disk another name for the file, not its gigabytes again. MLflow follows no symbolic links."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.hardlink_to(path.resolve())
    except OSError:
        shutil.copyfile(path, place)
