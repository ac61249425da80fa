"""What cvrunner adds around the training: Ray, records, tracking and report; a second invocation; `--help`."""

from __future__ import annotations

import shutil
from pathlib import Path
from time import perf_counter

from tests.benchmarks import ours
from tests.benchmarks.child import Task, run_together
from tests.benchmarks.speed import FOLDS
from tests.benchmarks.table import Options, Row
from tests.benchmarks.workload import Workload, prepare

ALLOWED_S = 10.0
CONDITIONS = {
    "frozen": {"model": {"freeze_speech_encoder": True}},
    "unfrozen": {"model": {"freeze_speech_encoder": False}},
}


def all_folds(options: Options) -> list[Row]:
    """The main job against the same ten trials as plain background processes, as many at a time."""
    workload = _workload(options)
    prepare(workload)
    cvrunner_s, plain_s = [], []
    for _ in range(options.rounds):
        cvrunner_s.append(ours.all_folds(workload, options.threads, CONDITIONS))
        plain_s.append(_plain_s(workload, options.threads))
    ratios = [(a - ALLOWED_S) / b for a, b in zip(cvrunner_s, plain_s, strict=True)]
    seconds = f"all-folds {min(cvrunner_s):.3g} s, plain {min(plain_s):.3g} s"
    note = f"{ALLOWED_S:g} s taken off first; plain: no Ray, records of trials only, no comparison, no report"
    what = f"all-folds against plain processes, 10 trials x {workload.epochs} epochs"
    return [Row(what, seconds, ratios, 1.05, at_least=False, note=note)]


def start(options: Options) -> list[Row]:
    """A second invocation of a finished run, and `--help`."""
    workload = _workload(options).but(utterances=60, epochs=1)
    prepare(workload)
    ours.all_folds(workload, options.threads, CONDITIONS)
    times = 3 * options.rounds
    again = [ours.all_folds_again(workload, options.threads, CONDITIONS) for _ in range(times)]
    shown = [ours.command(["--help"], workload) for _ in range(times)]
    return [
        Row("second invocation of a finished run", "", again, 5.0, at_least=False, unit="s"),
        Row("cvrunner --help", "", shown, 0.5, at_least=False, unit="s"),
    ]


def _workload(options: Options) -> Workload:
    utterances, epochs = (60, 2) if options.quick else (480, 8)
    return Workload(str(options.folder), "demo", utterances, epochs=epochs, threads=1)


def _plain_s(workload: Workload, at_once: int) -> float:
    """Seconds of ten background processes, unfrozen first, from an empty feature cache."""
    shutil.rmtree(Path(workload.folder) / "plain-cache", ignore_errors=True)
    tasks = [
        Task("ours.trial", workload.but(condition=condition, fold=fold, cache="plain-cache"))
        for condition in ("unfrozen", "frozen")
        for fold in FOLDS
    ]
    began = perf_counter()
    run_together(tasks, at_once)
    return perf_counter() - began
