"""Makers of bad input: each writes into a folder what a user might bring, and gives the command line that meets it.

A maker that is given nothing bad gives a command line that works.
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
    """The main job on a corpus in the working directory."""
    places = [f"corpus.format={form}", f"corpus.root={root}", "tracking.enabled=false", *settings]
    return ["all-folds", *(part for place in places for part in ("--set", place))]


def config(content: str | bytes, *arguments: str) -> Build:
    """`content` as config.yaml."""

    def build(folder: Path) -> list[str]:
        write_bytes(folder / "config.yaml", content if isinstance(content, bytes) else content.encode())
        return ["all-folds", "--config", "config.yaml", *arguments]

    return build


def overlay(**contents: str) -> Build:
    """Several configurations, of which `top` is given."""

    def build(folder: Path) -> list[str]:
        for name, content in contents.items():
            write_bytes(folder / f"{name}.yaml", content.encode())
        return ["all-folds", "--config", "top.yaml"]

    return build


def arguments(*given: str) -> Build:
    """A command line that needs nothing on disk."""
    return lambda _: list(given)


def settings(*given: str) -> Build:
    """A good corpus and settings."""
    return rows(lambda _: None, *given)


def manifest(content: bytes, name: str = "table.csv") -> Build:
    """`content` as the manifest."""

    def build(folder: Path) -> list[str]:
        write_bytes(folder / "corpus" / name, content)
        return command(root=f"corpus/{name}")

    return build


def rows(change: Callable[[list[Row]], object], *given: str, name: str = "table.csv") -> Build:
    """A good manifest whose rows are changed; `change` may return other ones."""

    def build(folder: Path) -> list[str]:
        good = manifest_rows(folder / "corpus")
        changed = change(good)
        write_manifest(folder / "corpus" / name, changed if isinstance(changed, list) else good)
        return command(*given, root=f"corpus/{name}")

    return build


def row(**cells: object) -> Build:
    """A good manifest but for some cells of line 4."""
    return rows(lambda good: good[2].update(cells))


def every_row(**cells: object) -> Build:
    """A manifest with the same cells in all rows."""
    return rows(lambda good: [one | cells for one in good])


def changed(change: Change, *given: str) -> Build:
    """A good manifest; then `change` is called with the working directory."""

    def build(folder: Path) -> list[str]:
        line = settings(*given)(folder)
        change(folder)
        return line

    return build


def audio(write: Change, *given: str) -> Build:
    """A good manifest; `write` is called with the path of a file that is there no more."""

    def change(folder: Path) -> None:
        (folder / BAD_WAV).unlink()
        write(folder / BAD_WAV)

    return changed(change, *given)


def cut(path: Path, size: int) -> None:
    """Keep the first bytes of a file, all but the last where `size` is negative."""
    path.write_bytes(path.read_bytes()[:size])


def tree(change: Change, sessions: int = 3, root: str = "IEMOCAP", *given: str) -> Build:
    """A tree as IEMOCAP's; `change` is called with its root."""

    def build(folder: Path) -> list[str]:
        change(write_iemocap(folder / "IEMOCAP", sessions))
        return command(*given, root=root, form="iemocap")

    return build


def labels(old: str, new: str) -> Build:
    """A tree with a label file in which the first `old` is `new`."""

    def change(root: Path) -> None:
        path = label_file(root, LABELS)
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return tree(change)


def instead_of_labels(make: Change) -> Build:
    """A tree without a label file; `make` is called with its path."""

    def change(root: Path) -> None:
        label_file(root, LABELS).unlink()
        make(label_file(root, LABELS))

    return tree(change)


def turn_audio(root: Path) -> Path:
    """The audio of the first turn of the label file that makers change."""
    return wav_file(root, TURN)


def encoder(change: Change, name: str = "wavlm", *given: str) -> Build:
    """A good corpus and an encoder folder; `change` is called with the folder."""

    def build(folder: Path) -> list[str]:
        change(save_encoder(folder / name))
        return settings(f"model.encoder=./{name}", *given)(folder)

    return build


def encoder_json(file: str = "config.json", **values: object) -> Build:
    """An encoder with other values in one of its JSON files; None: the key is taken out."""

    def change(folder: Path) -> None:
        data = {**json.loads((folder / file).read_text()), **values}
        write_bytes(folder / file, json.dumps({k: v for k, v in data.items() if v is not None}).encode())

    return encoder(change)


def only_pickle(folder: Path) -> None:
    """Malicious weights in place of safetensors."""
    (folder / "model.safetensors").unlink()
    add_pickle(folder)


def add_pickle(folder: Path) -> Path:
    """Weights that write `owned` beside the encoder when they are unpickled."""
    path = folder / "pytorch_model.bin"
    write_bytes(path, pickle.dumps(_Malicious(str(folder.parent / "owned"))))
    return path


class _Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (self.path,)
