"""cvrunner against the old script, Hugging Face's Trainer and the limit."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median
from time import perf_counter
from typing import Any, Literal

from tests.benchmarks import ours
from tests.benchmarks.child import Task, run, run_together
from tests.benchmarks.table import Options, Row, faster, share_of_limit, slower
from tests.benchmarks.workload import Workload, prepare

FOLDS = (1, 2, 3, 4, 5)
OLD = "old script"
TRAINER = "HF Trainer"
FAST_HEAD = f"{TRAINER} with cvrunner's fast Mamba-2"
EXTRAPOLATED_EPOCHS = 50


def unfrozen_epoch(options: Options, encoder: Literal["demo", "base"]) -> list[Row]:
    """One training epoch of an unfrozen encoder, one process with all threads, effective batch 8."""
    epochs = {"demo": (2, 4), "base": (1, 2)}[encoder][not options.quick]
    workload = Workload(str(options.folder), encoder, _size(options, encoder), epochs=epochs, threads=options.threads)
    prepare(workload)
    tasks = {
        "cvrunner": Task("ours.epochs", workload),
        OLD: Task("rivals.old_script", workload),
        TRAINER: Task("rivals.trainer", workload),
        FAST_HEAD: Task("rivals.trainer", workload.but(fast_head=True)),
        "limit": Task("limit.epochs", workload),
    }
    found = {name: [_epoch_s(answer) for answer in answers] for name, answers in _rounds(options, tasks).items()}
    what = f"unfrozen epoch, {encoder} encoder, {_trained(workload)} utterances"
    targets = (2.0, 1.5, 0.85) if encoder == "demo" else (1.0, 1.0, 0.90)
    return [
        faster(what, found["cvrunner"], OLD, found[OLD], targets[0]),
        faster(what, found["cvrunner"], TRAINER, found[TRAINER], targets[1]),
        faster(what, found["cvrunner"], FAST_HEAD, found[FAST_HEAD], 1.0),
        share_of_limit(what, found["cvrunner"], found["limit"], targets[2]),
    ]


def frozen_demo(options: Options) -> list[Row]:
    """Five folds of a frozen demo encoder, really run, from the command to the report."""
    epochs = 3 if options.quick else 20
    workload = Workload(str(options.folder), "demo", _size(options, "demo"), "frozen", epochs=epochs, threads=1)
    prepare(workload)
    found: dict[str, list[float]] = {"cvrunner": [], OLD: [], TRAINER: [], "limit": []}
    for _ in range(options.rounds):
        found["cvrunner"].append(ours.all_folds(workload, at_once=options.threads))
        found[OLD].append(_side_by_side(_each_fold("rivals.old_script", workload), len(FOLDS)))
        found[TRAINER].append(_side_by_side(_each_fold("rivals.trainer", workload), options.threads))
        found["limit"].append(_frozen_limit_s(workload, options.threads))
    what = f"frozen, 5 folds x {epochs} epochs, demo encoder, {workload.utterances} utterances, all included"
    return [
        faster(what, found["cvrunner"], OLD, found[OLD], 8.0),
        faster(what, found["cvrunner"], TRAINER, found[TRAINER], 6.0),
        slower(what, found["cvrunner"], "encoder pass + head-only training", found["limit"], 1.3),
    ]


def frozen_base(options: Options) -> list[Row]:
    """Five folds x 50 epochs of a frozen WavLM-base shape: cvrunner really run, the rivals from one timed epoch."""
    workload = Workload(str(options.folder), "base", _size(options, "base"), "frozen", epochs=2, threads=1)
    prepare(workload)
    found: dict[str, list[float]] = {"cvrunner": [], OLD: [], TRAINER: []}
    for _ in range(options.rounds):
        found["cvrunner"].append(ours.all_folds(workload.but(epochs=EXTRAPOLATED_EPOCHS), at_once=options.threads))
        at_once = {OLD: len(FOLDS), TRAINER: options.threads}
        for name, function in ((OLD, "rivals.old_script"), (TRAINER, "rivals.trainer")):
            tasks = _each_fold(function, workload)[: at_once[name]]
            answers = run_together(tasks, at_once[name])
            epoch_s = mean(_epoch_s(answer, "train_s") + _epoch_s(answer, "validation_s") for answer in answers)
            found[name].append(len(FOLDS) / at_once[name] * EXTRAPOLATED_EPOCHS * epoch_s)
    what = f"frozen, 5 folds x {EXTRAPOLATED_EPOCHS} epochs, WavLM-base shape, {workload.utterances} utterances"
    note = "cvrunner really run, all included; rival: one epoch of training and validation timed, total extrapolated"
    return [
        faster(what, found["cvrunner"], OLD, found[OLD], 40.0, note),
        faster(what, found["cvrunner"], TRAINER, found[TRAINER], 30.0, note),
    ]


def _size(options: Options, encoder: str) -> int:
    """Utterances of the corpus; three fifths of them train."""
    if encoder == "base":
        return 40 if options.quick else 60
    return 60 if options.quick else 480


def _trained(workload: Workload) -> int:
    return len(workload.trial().fold.train)


def _rounds(options: Options, tasks: dict[str, Task]) -> dict[str, list[dict[str, Any]]]:
    """Every task once a round, in turn, so that a busy minute hits all alike."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in tasks}
    for _ in range(options.rounds):
        for name, task in tasks.items():
            answers[name].append(run(task))
    return answers


def _epoch_s(answer: dict[str, Any], key: str = "train_s") -> float:
    """The median epoch, without the first, which warms up, where there are more."""
    return float(median(answer[key][1:] or answer[key]))


def _each_fold(function: str, workload: Workload) -> list[Task]:
    return [Task(function, workload.but(fold=fold)) for fold in FOLDS]


def _side_by_side(tasks: Sequence[Task], at_once: int) -> float:
    """Seconds until all are done, starting their processes included."""
    start = perf_counter()
    run_together(tasks, at_once)
    return perf_counter() - start


def _frozen_limit_s(workload: Workload, at_once: int) -> float:
    """One encoder pass shared by as many processes, then the heads of all folds, without anything around it."""
    passes = [Task("limit.encoder_pass", workload.but(part=i, parts=at_once)) for i in range(at_once)]
    encoder_s = max(answer["pass_s"] for answer in run_together(passes, at_once))
    heads = run_together(_each_fold("limit.epochs", workload), at_once)
    return float(encoder_s) + _makespan([sum(answer["train_s"]) for answer in heads], at_once)


def _makespan(durations: Sequence[float], slots: int) -> float:
    ends = [0.0] * slots
    for duration in durations:
        first = ends.index(min(ends))
        ends[first] += duration
    return max(ends)
