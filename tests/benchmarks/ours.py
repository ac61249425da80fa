"""cvrunner itself: one trial in this process, or the command as a user types it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cvrunner.records.results import EpochRecord
from cvrunner.records.run_directory import TrialDirectory
from tests.benchmarks.child import environment
from tests.benchmarks.workload import Workload

Answer = dict[str, Any]


def epochs(workload: Workload) -> Answer:
    """Seconds of each epoch on a filled cache: training, validation, and all with records and checkpoints."""
    from tests.benchmarks.material import Material

    Material(workload).inputs  # noqa: B018 (fills the cache)
    return trial(workload)


def trial(workload: Workload) -> Answer:
    """One trial from start to end, as a background process of its own would run it."""
    from cvrunner.training.fold_trainer import FoldTrainer, TrialContext
    from tests.benchmarks.material import CPU

    records, epoch_s = [], []
    with tempfile.TemporaryDirectory(dir=workload.folder) as folder:
        place = TrialContext(TrialDirectory(Path(folder)), workload.cache_dir, CPU)
        began = mark = time.perf_counter()
        for event in FoldTrainer(workload.trial(), place).run():
            now = time.perf_counter()
            if isinstance(event, EpochRecord):
                records.append(event)
                epoch_s.append(now - mark)
            mark = now
    return {
        "train_s": [record.train_s for record in records],
        "validation_s": [record.validation_s for record in records],
        "epoch_s": epoch_s,
        "padding_share": records[-1].padding_share,
        "total_s": time.perf_counter() - began,
    }


def all_folds(workload: Workload, at_once: int, conditions: dict[str, Any] | None = None) -> float:
    """Seconds of `cvrunner all-folds` from an empty cache and without results, everything included."""
    shutil.rmtree(_place(workload), ignore_errors=True)
    return all_folds_again(workload, at_once, conditions)


def all_folds_again(workload: Workload, at_once: int, conditions: dict[str, Any] | None = None) -> float:
    """Seconds of the same command where there are results."""
    place = _place(workload)
    config = workload.write_config(
        place / "run.yaml",
        results={"root": str(place / "results")},
        cluster={"cache_dir": str(place / "cache"), "max_concurrent": at_once},
        **({"conditions": conditions} if conditions else {}),
    )
    return command(["all-folds", "--config", str(config)], workload)


def command(arguments: list[str], workload: Workload) -> float:
    """Seconds of `python -m cvrunner ...`, which must end well."""
    start = time.perf_counter()
    finished = subprocess.run(
        [sys.executable, "-m", "cvrunner", *arguments],
        env=environment(workload.threads),
        cwd=workload.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    taken = time.perf_counter() - start
    if finished.returncode:
        raise RuntimeError(f"cvrunner {' '.join(arguments)}: {finished.stdout[-2000:]}{finished.stderr[-4000:]}")
    return taken


def _place(workload: Workload) -> Path:
    return Path(workload.folder) / "all-folds"
