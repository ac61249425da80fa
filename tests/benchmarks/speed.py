"""cvrunner against the old script, Hugging Face's Trainer and the limit."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from statistics import mean, median
from time import perf_counter
from typing import Any

from tests.benchmarks import ours
from tests.benchmarks.child import Task, run, run_together
from tests.benchmarks.table import Options, Row, faster, share_of_limit, slower
from tests.benchmarks.workload import Condition, Encoder, Workload, prepare

FOLDS = (1, 2, 3, 4, 5)
OLD = "old script"
TRAINER = "HF Trainer"
FAST_HEAD = f"{TRAINER} with cvrunner's fast Mamba-2"
PADDED = ", padded to 30 s"
NAMES = {"demo": "demo encoder", "base": "WavLM-base shape", "whisper": "Whisper tiny on EmoTale"}


def unfrozen_epoch(options: Options, encoder: Encoder) -> list[Row]:
    """One training epoch of an unfrozen encoder, one process with all threads, effective batch 8."""
    epochs = {"demo": (2, 4), "base": (1, 2), "whisper": (1, 2)}[encoder][not options.quick]
    workload = _workload(options, encoder, epochs=epochs, threads=options.threads, cpu_clock=options.cpu_clock)
    prepare(workload)
    tasks = {"cvrunner": Task("ours.epochs", workload), "limit": Task("limit.epochs", workload)}
    tasks |= _rivals(workload)
    answers = _rounds(options, tasks)
    # A rival that is given fewer utterances is reported for as many as the others.
    share = {
        name: workload.trained / task.workload.trained if workload.trained else 1.0 for name, task in tasks.items()
    }
    found = {name: [_epoch_s(answer) * share[name] for answer in answers[name]] for name in tasks}
    what = f"unfrozen epoch, {NAMES[encoder]}, {len(workload.trial().fold.train)} utterances"
    targets = {
        "demo": {OLD: 2.0, TRAINER: 1.5, FAST_HEAD: 1.0, "limit": 0.85},
        "base": {OLD: 1.0, TRAINER: 1.0, FAST_HEAD: 1.0, "limit": 0.90},
        "whisper": {OLD: 1.0, TRAINER: 1.0},
    }[encoder]
    return [
        *_faster(what, found, targets),
        share_of_limit(what, found["cvrunner"], found["limit"], targets.get("limit")),
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


def frozen_extrapolated(options: Options, encoder: Encoder) -> list[Row]:
    """Five folds of a frozen encoder: cvrunner really run, the rivals from one timed epoch."""
    epochs = {"base": 50, "whisper": 2 if options.quick else 20}[encoder]
    # The first of two epochs is to warm up; on EmoTale an epoch is long enough by itself.
    workload = _workload(options, encoder, "frozen", epochs=2 if encoder == "base" else 1, threads=1)
    prepare(workload)
    rivals = _rivals(workload)
    folds = [trial.fold for trial in workload.trials()]
    found: dict[str, list[float]] = {name: [] for name in ("cvrunner", *rivals)}
    for _ in range(options.rounds):
        found["cvrunner"].append(ours.all_folds(workload.but(epochs=epochs), at_once=options.threads))
        print(f"cvrunner: {found['cvrunner'][-1]:.4g} s", file=sys.stderr, flush=True)
        for name, task in rivals.items():
            # The old script starts all five at once; that is no faster on fewer cores.
            at_once = min(options.threads, len(FOLDS))
            answers = run_together(_each_fold(task.function, task.workload)[:at_once], at_once)
            train_s = mean(_epoch_s(answer, "train_s") / answer["trained"] for answer in answers)
            validation_s = mean(_epoch_s(answer, "validation_s") / answer["validated"] for answer in answers)
            epoch_s = sum(train_s * len(fold.train) + validation_s * len(fold.validation) for fold in folds)
            found[name].append(epochs * epoch_s / at_once)
            print(f"{name}: {found[name][-1]:.4g} s", file=sys.stderr, flush=True)
    what = f"frozen, 5 folds x {epochs} epochs, {NAMES[encoder]}, {len(folds[0].utterances)} utterances"
    note = "cvrunner really run, all included; rival: one epoch of training and validation timed, total extrapolated"
    targets = {"base": {OLD: 40.0, TRAINER: 30.0}, "whisper": {OLD: 10.0, TRAINER: 8.0}}[encoder]
    return _faster(what, found, targets, note)


def _workload(options: Options, encoder: Encoder, condition: Condition = "unfrozen", **settings: int) -> Workload:
    """What a measurement starts from, with its corpus, encoder and features made."""
    settings |= {"trained": 0}
    if encoder == "whisper" and (options.quick or condition == "unfrozen"):
        settings |= {"trained": 16 if options.quick else 64}
    workload = Workload(str(options.folder), encoder, _size(options, encoder), condition, **settings)
    return workload.but(emotale=options.emotale, whisper=options.whisper)


def _rivals(workload: Workload) -> dict[str, Task]:
    """The rivals by name, each of which has been seen to compute the same loss as cvrunner."""
    workloads = {"": workload}
    if workload.encoder == "whisper":
        # One epoch and few utterances, since they take long; all take the same time, whatever their length.
        workloads[PADDED] = workload.but(padded=True, epochs=1, trained=16)
    rivals = {}
    for how, given in workloads.items():
        print(f"first losses{how}: {run(Task('rivals.first_losses', given))}", file=sys.stderr, flush=True)
        rivals |= {OLD + how: Task("rivals.old_script", given), TRAINER + how: Task("rivals.trainer", given)}
    return {**rivals, FAST_HEAD: Task("rivals.trainer", workload.but(fast_head=True))}


def _faster(what: str, found: Mapping[str, Sequence[float]], targets: Mapping[str, float], note: str = "") -> list[Row]:
    """cvrunner against each rival; those padded to 30 s last."""
    rivals = [name for name in found if name not in ("cvrunner", "limit")]
    rivals.sort(key=lambda name: name.endswith(PADDED))
    return [faster(what, found["cvrunner"], name, found[name], targets.get(name), note) for name in rivals]


def _size(options: Options, encoder: str) -> int:
    """Utterances of the corpus; three fifths of them train."""
    if encoder == "base":
        return 40 if options.quick else 60
    return 60 if options.quick else 480


def _rounds(options: Options, tasks: dict[str, Task]) -> dict[str, list[dict[str, Any]]]:
    """Every task once a round, in turn, so that a busy minute hits all alike."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in tasks}
    for _ in range(options.rounds):
        for name, task in tasks.items():
            answers[name].append(run(task))
            print(f"{name}: {answers[name][-1]}", file=sys.stderr, flush=True)
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
