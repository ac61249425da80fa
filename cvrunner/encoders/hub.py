"""Checkpoints on the Hugging Face hub: what the hub has, and what of it is on this machine."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from pathlib import Path

# As a module: its names are imported when they are used, which takes 0.3 s, and local encoders do not need them.
import huggingface_hub

from cvrunner.errors import EncoderError

HUB_TIMEOUT_S = 10.0
DESCRIPTION = ("*.json", "README.md")
SAFETENSORS = ("model.safetensors", "model-*.safetensors")
PICKLED = ("pytorch_model.bin", "pytorch_model-*.bin")
"""Names of files of an encoder. The same weights may be there in other precisions, such as `model.fp32-...`."""


def ask_hub(name: str, revision: str | None, weights: Sequence[str] = SAFETENSORS) -> Exception | None:
    """Return why the hub does not answer, or None. Raises EncoderError if it has no `weights` of this encoder."""
    try:
        # `snapshot_download` asks the same, but without a time limit.
        files = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S).siblings or []
    except Exception as error:
        return error
    names = [file.rfilename for file in files]
    if not matching(names, weights):
        remedy = conversion(name) if weights == SAFETENSORS and matching(names, PICKLED) else ": use another checkpoint"
        raise EncoderError(f"model.encoder {name}: has no {weights[0]} on the hub{remedy}")
    return None


def from_hub(name: str, revision: str | None, patterns: Sequence[str], weights: Sequence[str] = SAFETENSORS) -> Path:
    """Return the folder of a hub encoder in the local cache; missing files are downloaded if the hub answers.

    Raises EncoderError if the hub has no `weights` of it or, if the hub does not answer, the cache does not.
    """
    trouble = ask_hub(name, revision, weights)
    offline = trouble is not None
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), local_files_only=offline
        )
    except Exception as error:
        raise EncoderError(
            f"model.encoder {name}: no such folder, and the hub does not give it: {first_line(trouble or error)} "
            "(check the name and the network, or give a local folder, which "
            f"`python -m cvrunner encoder {name} FOLDER` writes where there is a network)"
        ) from None
    folder = Path(found)
    if trouble is not None and not matching(folder, weights):
        if weights == SAFETENSORS and matching(folder, PICKLED):
            raise EncoderError(f"model.encoder {name}: no {weights[0]} in {folder}{conversion(name)}")
        raise EncoderError(
            f"model.encoder {name}: its download is incomplete: {folder} has no weights, and the hub does not answer: "
            f"{first_line(trouble)}{download(name)}"
        )
    return folder


def matching(files: Path | Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names of those files that match a pattern; of a folder, those that can be opened."""
    names = [path.name for path in files.iterdir() if path.is_file()] if isinstance(files, Path) else files
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def conversion(name: str) -> str:
    """Return the end of a message about an encoder that has no safetensors."""
    return (
        " (pickled weights are not loaded: they could run code); if you trust its source, convert it once with "
        f"`python -m cvrunner encoder {name} FOLDER --trust-pickle` and set model.encoder to that folder"
    )


def download(name: str) -> str:
    """Return the end of a message about files that are missing on this machine."""
    return f" (type `hf download {name} --include '*.json' '*.safetensors'` where there is a network)"


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message."""
    return str(error).strip().partition("\n")[0]
