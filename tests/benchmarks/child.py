"""One measurement in a process of its own: `python -m tests.benchmarks.child MODULE FUNCTION WORKLOAD`.

Imports, threads and peak memory of one rival cannot help or harm another. The last line of its output is the answer.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.workload import Workload

REPOSITORY = Path(__file__).parent.parent.parent
Answer = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A function of one of the modules here, by name, and what it is called with."""

    function: str
    """`rivals.old_epochs`"""
    workload: Workload


def run(task: Task) -> Answer:
    """The task's answer, from a fresh process."""
    return run_together([task], at_once=1)[0]


def run_together(tasks: Sequence[Task], at_once: int) -> list[Answer]:
    """The tasks' answers, with `at_once` processes side by side, as shell background jobs are."""
    waiting = list(enumerate(tasks))
    running: dict[int, subprocess.Popen[str]] = {}
    answers: dict[int, Answer] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                index, task = waiting.pop(0)
                running[index] = _start(task)
            for index, process in list(running.items()):
                if process.poll() is not None:
                    answers[index] = _answer(running.pop(index), tasks[index])
            time.sleep(0.02)
    finally:
        for process in running.values():
            process.terminate()
    return [answers[index] for index in range(len(tasks))]


def environment(threads: int) -> dict[str, str]:
    """The same limits for every rival: threads of OpenMP and so of torch, no look-ups on the network, no cluster."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CVRUNNER_"))}
    limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return {**keep, **limits, "PYTHONPATH": str(REPOSITORY), "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}


def _start(task: Task) -> subprocess.Popen[str]:
    module, function = task.function.split(".")
    return subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.child", module, function, task.workload.to_json()],
        cwd=REPOSITORY,
        env=environment(task.workload.threads),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _answer(process: subprocess.Popen[str], task: Task) -> Answer:
    out, error = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{task.function} of {task.workload} ended with {process.returncode}:\n{error[-4000:]}")
    answer: Answer = json.loads(out.strip().rpartition("\n")[2])
    return answer


def main() -> None:
    module, function, workload = sys.argv[1:]
    given = Workload.from_json(workload)
    import torch

    torch.set_num_threads(given.threads)
    if given.cpu_clock:
        # All that is measured, cvrunner's own epochs included, asks one of these two.
        time.perf_counter = time.monotonic = time.process_time
    answer = getattr(importlib.import_module(f"tests.benchmarks.{module}"), function)(given)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
