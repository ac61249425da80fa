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
from cvrunner.tracking import names
from cvrunner.tracking.mirror import first_line
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
    about = {"run": run.run, "condition": condition, "synthetic": str(run.synthetic).lower()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".cvrunner-export-", dir=folder.parent) as temporary:
        gathered = Path(temporary) / "ensemble"
        _gather(members, files, gathered)
        write_folder_atomically(folder, lambda new: save_pyfunc(new, CODE, gathered, description.dimensions, about))


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
        raise ResultsError(f"MLflow ({uri}) cannot be written: {first_line(error)}") from error


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
        # A hard link does not copy gigabytes; MLflow does not follow symbolic links. It works within one disk only.
        try:
            place.hardlink_to(path.resolve())
        except OSError:
            shutil.copyfile(path, place)
