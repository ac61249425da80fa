"""Builders of bad input: each writes files into a folder and returns the command line that reads them.

Without a defect to build in, the command line works.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

from tests.corpora import (
    Row,
    label_file,
    manifest_rows,
    wav_file,
    write_bytes,
    write_iemocap,
    write_manifest,
)
from tests.tiny_encoders import save_encoder

Build = Callable[[Path], list[str]]
Change = Callable[[Path], object]
TABLE = "corpus/table.csv"
BAD_WAV = "corpus/audio/s2t0.wav"
"""Audio of line 4 of the manifest."""
LABELS = "Ses02F_impro01"
TURN = f"{LABELS}_F000"


def command(*settings: str, root: str = TABLE, form: str = "manifest") -> list[str]:
    """Return the command line of the main job for a corpus in the working directory."""
    places = [f"corpus.format={form}", f"corpus.root={root}", "tracking.enabled=false", *settings]
    return ["all-folds", *(part for place in places for part in ("--set", place))]


def config(content: str | bytes, *arguments: str) -> Build:
    """Build config.yaml with `content`."""

    def build(folder: Path) -> list[str]:
        write_bytes(folder / "config.yaml", content if isinstance(content, bytes) else content.encode())
        return ["all-folds", "--config", "config.yaml", *arguments]

    return build


def overlay(**contents: str) -> Build:
    """Build several configurations; the command line names `top`."""

    def build(folder: Path) -> list[str]:
        for name, content in contents.items():
            write_bytes(folder / f"{name}.yaml", content.encode())
        return ["all-folds", "--config", "top.yaml"]

    return build


def arguments(*given: str) -> Build:
    """Build a command line that needs no files."""
    return lambda _: list(given)


def settings(*given: str) -> Build:
    """Build a valid corpus; the command line has these settings."""
    return rows(lambda _: None, *given)


def manifest(content: bytes, name: str = "table.csv") -> Build:
    """Build a manifest with `content`."""

    def build(folder: Path) -> list[str]:
        write_bytes(folder / "corpus" / name, content)
        return command(root=f"corpus/{name}")

    return build


def rows(change: Callable[[list[Row]], object], *given: str, name: str = "table.csv") -> Build:
    """Build a valid manifest with changed rows; `change` edits them or returns new ones."""

    def build(folder: Path) -> list[str]:
        good = manifest_rows(folder / "corpus")
        changed = change(good)
        write_manifest(folder / "corpus" / name, changed if isinstance(changed, list) else good)
        return command(*given, root=f"corpus/{name}")

    return build


def row(**cells: object) -> Build:
    """Build a manifest that is valid except for some cells of line 4."""
    return rows(lambda good: good[2].update(cells))


def every_row(**cells: object) -> Build:
    """Build a manifest with the same cells in all rows."""
    return rows(lambda good: [one | cells for one in good])


def changed(change: Change, *given: str) -> Build:
    """Build a valid manifest, then call `change` with the working directory."""

    def build(folder: Path) -> list[str]:
        line = settings(*given)(folder)
        change(folder)
        return line

    return build


def audio(write: Change, *given: str) -> Build:
    """Build a valid manifest, then delete an audio file and call `write` with its path."""

    def change(folder: Path) -> None:
        (folder / BAD_WAV).unlink()
        write(folder / BAD_WAV)

    return changed(change, *given)


def cut(path: Path, size: int) -> None:
    """Keep the first `size` bytes of a file; all but the last ones if `size` is negative."""
    path.write_bytes(path.read_bytes()[:size])


def tree(change: Change, sessions: int = 3, root: str = "IEMOCAP", *given: str) -> Build:
    """Build a tree like IEMOCAP's, then call `change` with its root."""

    def build(folder: Path) -> list[str]:
        change(write_iemocap(folder / "IEMOCAP", sessions))
        return command("corpus.partial=true", *given, root=root, form="iemocap")

    return build


def labels(old: str, new: str) -> Build:
    """Build a tree in which a label file has `new` in place of the first `old`."""

    def change(root: Path) -> None:
        path = label_file(root, LABELS)
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return tree(change)


def instead_of_labels(make: Change) -> Build:
    """Build a tree, then delete a label file and call `make` with its path."""

    def change(root: Path) -> None:
        label_file(root, LABELS).unlink()
        make(label_file(root, LABELS))

    return tree(change)


def turn_audio(root: Path) -> Path:
    """Return the audio of the first turn in the label file that builders change."""
    return wav_file(root, TURN)


def encoder(change: Change, name: str = "wavlm", *given: str) -> Build:
    """Build a valid corpus and an encoder folder, then call `change` with the folder."""

    def build(folder: Path) -> list[str]:
        change(save_encoder(folder / name))
        return settings(f"model.encoder=./{name}", *given)(folder)

    return build


def encoder_json(file: str = "config.json", **values: object) -> Build:
    """Build an encoder with other values in one of its JSON files; None removes the key."""

    def change(folder: Path) -> None:
        data = {**json.loads((folder / file).read_text()), **values}
        write_bytes(folder / file, json.dumps({k: v for k, v in data.items() if v is not None}).encode())

    return encoder(change)


def only_pickle(folder: Path) -> None:
    """Replace the safetensors file by malicious pickled weights."""
    (folder / "model.safetensors").unlink()
    add_pickle(folder)


def add_pickle(folder: Path) -> Path:
    """Write pickled weights that create `owned` next to the encoder if they are unpickled."""
    path = folder / "pytorch_model.bin"
    write_bytes(path, pickle.dumps(_Malicious(str(folder.parent / "owned"))))
    return path


class _Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (self.path,)
