"""What a trial's key depends on in the code, and what it does not."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import cvrunner
from cvrunner.training.trial import HASHED, NOT_HASHED, code_digest

PACKAGE = Path(cvrunner.__file__).parent
DECIDE_NO_NUMBERS = {
    "__init__.py": "the version",
    "config/schema.py": "hashed as the resolved settings",
    "config/sections.py": "hashed as the resolved settings",
    "config/tuning.py": "decides no setting of a trial",
    "errors.py": "messages",
    "records/summary.py": "written after the last trial",
    "files.py": "writing files",
    "paths.py": "places of files",
    "records/legacy.py": "names of earlier versions",
    "records/model_folder.py": "description of a trained model",
    "records/results.py": "types of records",
    "records/run_directory.py": "places of files, the journal",
    "text.py": "text for people",
    "verdict/predictions.py": "writing predictions",
}
"""Modules that training imports although no number of a trial depends on their code, and why."""


def hashed() -> set[str]:
    found = {str(path.relative_to(PACKAGE)) for pattern in HASHED for path in PACKAGE.glob(pattern)}
    return found - set(NOT_HASHED)


def imported_by(path: Path) -> set[Path]:
    """Modules of the package that a module imports when it is loaded or later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            module = PACKAGE.parent / Path(*name.split("."))
            if name.startswith("cvrunner") and module.with_suffix(".py").is_file():
                found.add(module.with_suffix(".py"))
    return found


def reached(start: Path) -> set[str]:
    waiting, seen = [start], {start}
    while waiting:
        for path in imported_by(waiting.pop()) - seen:
            seen.add(path)
            waiting.append(path)
    return {str(path.relative_to(PACKAGE)) for path in seen}


def test_every_module_that_training_imports_is_hashed_or_known_to_decide_no_numbers() -> None:
    missing = reached(PACKAGE / "training" / "fold_trainer.py") - hashed() - set(NOT_HASHED) - set(DECIDE_NO_NUMBERS)
    assert not missing


def test_the_algorithm_is_hashed() -> None:
    assert {
        "training/fold_trainer.py", "training/learner.py", "training/accumulation.py", "training/freezing.py",
        "encoders/encoder.py", "encoders/waveform.py",
        "encoders/packing.py", "encoders/attention.py", "model/mamba_ema.py", "model/mamba.py",
        "data/batches.py", "data/folds.py", "data/features.py", "verdict/ccc.py", "config/adaptation.py",
    } <= hashed()  # fmt: skip


def changed(tmp_path: Path, old: str, new: str) -> bool:
    """Whether the digest changes with a replacement in accumulation.py."""
    copy = shutil.copytree(
        PACKAGE, tmp_path / "cvrunner", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
    )
    assert code_digest(copy) == code_digest()
    file = copy / "training" / "learner.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    code_digest.cache_clear()
    return code_digest(copy) != code_digest()


def test_docstrings_comments_and_messages_do_not_count(tmp_path: Path) -> None:
    assert not changed(tmp_path / "message", "use a GPU with", "buy a GPU with")
    assert not changed(tmp_path / "docstring", '"""Take one optimizer step', '"""Do one optimizer step')
    assert not changed(tmp_path / "comment", "# Dropout depends", "# All dropout depends")


def test_an_operation_counts(tmp_path: Path) -> None:
    assert changed(tmp_path, "1 - self.decay", "2 - self.decay")
