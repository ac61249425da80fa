"""What memory a trial takes: with a corpus ten times as large, and with exact against averaged accumulation. And what
the fit of a linear probe takes.

On one thread, as trials have by default: here cvrunner is held against itself.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from tests.benchmarks.child import Task, run
from tests.benchmarks.table import Options, Row, slower
from tests.benchmarks.workload import Workload, prepare

SAMPLE_EVERY_S = 0.005
TIMES = 10
IEMOCAP_UTTERANCES = 10_039
LARGE_HIDDEN_STATES, LARGE_WIDTH = 25, 1024


def corpus_size(options: Options) -> list[Row]:
    """A trial's peak memory and its time per utterance, corpus ten times larger."""
    small = Workload(str(options.folder), utterances=60 if options.quick else 480, threads=1)
    rows = []
    for condition in ("frozen", "unfrozen"):
        workload = small.but(condition=condition)
        sizes = [workload, workload.but(utterances=TIMES * workload.utterances)]
        for size in sizes:
            prepare(size)
            run(Task("memory.fill_cache", size))
        rounds = [[run(Task("memory.trial", size)) for size in sizes] for _ in range(options.rounds)]
        rows += _growth(condition, sizes, rounds)
    return rows


def accumulation(options: Options) -> list[Row]:
    """Exact (4 x 2) against averaged: time of an epoch and peak memory."""
    workload = Workload(
        str(options.folder),
        utterances=60 if options.quick else 480,
        epochs=2 if options.quick else 3,
        batch_size=4,
        accumulation_steps=2,
        threads=1,
    )
    prepare(workload)
    run(Task("memory.fill_cache", workload))
    found: dict[str, list[dict[str, Any]]] = {"exact": [], "averaged": []}
    for _ in range(options.rounds):
        for kind, answers in found.items():
            answers.append(run(Task("memory.trial", workload.but(accumulation=kind))))
    seconds = {kind: [answer["train_s"][-1] for answer in answers] for kind, answers in found.items()}
    peaks = [a["peak_mib"] / b["peak_mib"] for a, b in zip(found["exact"], found["averaged"], strict=True)]
    added = [_added_mib(answers[0]) for answers in found.values()]
    return [
        slower("exact 4 x 2, unfrozen demo encoder", seconds["exact"], "averaged", seconds["averaged"], 1.25),
        Row(
            "exact 4 x 2: peak memory against averaged",
            f"exact {found['exact'][0]['peak_mib']:.0f} MiB, averaged {found['averaged'][0]['peak_mib']:.0f} MiB",
            peaks,
            1.05,
            at_least=False,
            note=f"of the process; above what it had before training: {added[0]:.0f} and {added[1]:.0f} MiB",
        ),
    ]


def linear_probe(options: Options) -> list[Row]:
    """Fit of the probe of one fold, with the number of IEMOCAP's utterances and the size of WavLM-large."""
    workload = Workload(str(options.folder), utterances=100 if options.quick else IEMOCAP_UTTERANCES, threads=1)
    answers = [run(Task("memory.fit_probe", workload)) for _ in range(options.rounds)]
    what = f"linear probe, {workload.utterances} utterances, {2 * LARGE_HIDDEN_STATES * LARGE_WIDTH} features"
    return [
        Row(f"{what}: {figure}", "", [answer[key] for answer in answers], None, at_least=False, unit=unit)
        for figure, key, unit in (("fit", "fit_s", "s"), ("peak memory of the process", "peak_mib", "MiB"))
    ]


def _growth(condition: str, sizes: list[Workload], rounds: list[list[dict[str, Any]]]) -> list[Row]:
    grown = [large["peak_anonymous_mib"] - small["peak_anonymous_mib"] for small, large in rounds]
    mapped = [large["peak_mib"] - small["peak_mib"] for small, large in rounds]
    per_utterance = [large["utterance_s"] / small["utterance_s"] for small, large in rounds]
    first = rounds[0]
    what = f"{condition} trial, {sizes[0].utterances} and {sizes[1].utterances} utterances"
    return [
        Row(
            f"{what}: memory grows by",
            f"{first[0]['peak_anonymous_mib']:.0f} and {first[1]['peak_anonymous_mib']:.0f} MiB",
            grown,
            50.0,
            at_least=False,
            unit="MiB",
            note=f"anonymous; with pages of the mapped cache, which the system shares and drops: {mapped[0]:.0f} MiB",
        ),
        Row(
            f"{what}: training time per utterance",
            f"{1000 * first[0]['utterance_s']:.3g} and {1000 * first[1]['utterance_s']:.3g} ms",
            per_utterance,
            1.05,
            at_least=False,
        ),
    ]


def _added_mib(answer: dict[str, Any]) -> float:
    return float(answer["peak_mib"] - answer["before_mib"])


# --- in a process of its own ------------------------------------------------------------------------------------------


def fill_cache(workload: Workload) -> dict[str, Any]:
    """Make the features, so that making them is not part of what is measured."""
    from tests.benchmarks.material import Material

    start = time.perf_counter()
    Material(workload).inputs  # noqa: B018 (fills the cache)
    return {"fill_s": time.perf_counter() - start}


def trial(workload: Workload) -> dict[str, Any]:
    """Peak memory of one trial on ready features."""
    from tests.benchmarks import material, ours  # noqa: F401 (imports are part of what there was before)

    before = _status("VmRSS")
    with _peaks() as peaks:
        answer = ours.trial(workload)
    utterances = len(workload.trial().fold.train)
    return {**answer, **peaks, "before_mib": before, "utterance_s": min(answer["train_s"]) / utterances}


def fit_probe(workload: Workload) -> dict[str, Any]:
    """Fit and choose on random statistics: three of five sessions train, one validates."""
    from cvrunner.training.ridge import choose, chosen, fit_ridge

    sizes = {"train": 3 * workload.utterances // 5, "validation": workload.utterances // 5}

    def read(part: str, layer: int) -> Any:
        return np.random.default_rng([sizes[part], layer]).standard_normal((sizes[part], 2 * LARGE_WIDTH), np.float32)

    labels = {part: np.random.default_rng(0).standard_normal((size, 2)) for part, size in sizes.items()}
    start = time.perf_counter()
    with threadpool_limits(workload.threads), _peaks() as peaks:
        ridge = fit_ridge(partial(read, "train"), LARGE_HIDDEN_STATES, labels["train"])
        choices = choose(ridge.deviations(partial(read, "validation")), labels["validation"], ridge.centre)
        chosen(ridge, choices)
    return {**peaks, "fit_s": time.perf_counter() - start}


@contextlib.contextmanager
def _peaks() -> Iterator[dict[str, float]]:
    """Peak memory inside the `with`: `peak_mib` by the kernel, `peak_anonymous_mib` (no mapped files) by sampling."""
    Path("/proc/self/clear_refs").write_text("5")
    peaks = {"peak_anonymous_mib": 0.0}
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_EVERY_S):
            peaks["peak_anonymous_mib"] = max(peaks["peak_anonymous_mib"], _status("RssAnon"))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peaks
    finally:
        done.set()
        sampler.join()
        peaks["peak_mib"] = _status("VmHWM")


def _status(key: str) -> float:
    """A figure of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(f"/proc/self/status has no {key}")
