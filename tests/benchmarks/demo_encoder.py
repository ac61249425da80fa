"""Is the demo's encoder worth its pretraining? Frozen, it against the same network with random weights, five folds.

    python -m tests.benchmarks.demo_encoder [FOLDER]

Runs cvrunner's own main job with two conditions on the synthetic corpus; the table goes to the model card.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
import yaml
from transformers import WavLMConfig, WavLMModel

from cvrunner import paths
from cvrunner.encoders.files import DEMO
from cvrunner.run import commands


def random_encoder(folder: Path) -> Path:
    """The demo's encoder with the weights it would start pretraining from, seed 0."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    WavLMModel(WavLMConfig.from_pretrained(DEMO)).save_pretrained(folder)
    shutil.copy(DEMO / "preprocessor_config.json", folder)
    return folder


def main() -> int:
    from rich.console import Console

    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmark-encoder").absolute()
    random = random_encoder(folder / "random-wavlm")
    config = folder / "encoders.yaml"
    conditions = {
        "random": {"model": {"encoder": str(random)}},
        "pretrained": {"model": {"encoder": "demo"}},
    }
    layers = {
        "base": str(paths.default_config()),
        "train": {"epochs": 20, "seeds": [0]},
        "results": {"root": str(folder / "results")},
    }
    config.write_text(yaml.safe_dump({**layers, "conditions": conditions}, sort_keys=False))
    return commands.all_folds(config, [], new=False, quiet=False, console=Console(width=160))


if __name__ == "__main__":
    sys.exit(main())
