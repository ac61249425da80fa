"""One small run, really trained on Ray, that the tests of this folder share and leave as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cvrunner.api import Run, load_run
from tests.corpora import manifest_rows, write_manifest
from tests.end_to_end.programs import TIME_LIMIT_S, environment
from tests.tiny_encoders import save_encoder

OVERRIDES = {"train.epochs": 2}
"""The overrides in docs/api.md."""


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a corpus of three sessions and a configuration where the documents have the demo's."""
    folder = tmp_path_factory.mktemp("inference")
    save_encoder(folder / "wavlm")
    manifest = write_manifest(folder / "corpus" / "manifest.csv", manifest_rows(folder / "corpus", turns=6))
    (folder / "configs").mkdir()
    (folder / "configs" / "demo.yaml").write_text(f"""
corpus: {{format: manifest, root: {manifest}, scale: [1, 7]}}
model: {{encoder: {folder / "wavlm"}, width: 16, mamba: {{state_size: 4, head_dim: 8, layers: 1}}}}
train: {{lr: 1e-3, encoder_lr: 1e-3}}
cluster: {{cache_dir: {folder / "cache"}, max_concurrent: 1}}
tracking: {{enabled: false}}
""")
    return folder


@pytest.fixture(scope="session")
def run(home: Path) -> Run:
    """Trained in a separate process: a Ray that has run in this one leaves its token to later tests."""
    call = f"run_all_folds('configs/demo.yaml', {OVERRIDES})"
    code = f"from cvrunner.api import run_all_folds; print({call}.path)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=home,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_run(done.stdout.splitlines()[-1])
