"""The command `demo-data`."""

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
