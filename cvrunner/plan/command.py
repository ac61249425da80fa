"""The command `plan`: measured costs per condition, disk, and the run on several sets of GPUs, on one screen."""

from __future__ import annotations

import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from cvrunner.config.sections import Claim
from cvrunner.orchestration.resources import NODE_GPUS, possible_resources
from cvrunner.orchestration.trials import plan_trials
from cvrunner.plan.cards import find_card
from cvrunner.run.estimate import TOLERANCE, Assignment, Forecast, RunOnResources, as_json, forecast
from cvrunner.run.prepare import prepare
from cvrunner.text import DASH, Table, format_bytes, format_duration, line_printer, plural, tables_as_text

if TYPE_CHECKING:
    from rich.console import Console

    from cvrunner.training.probe import ConditionProbe, Estimate

WIDTH = 100
BAR = 64
"""Columns of a bar, which stands for the whole run."""
UNITS = {"memory_gb": "GB", "minutes_per_epoch": "min"}
"""Units of the quantities that others stated."""


def plan(
    config_path: Path | None,
    overrides: Sequence[str],
    gpus: int | None,
    json: bool,
    console: Console,
    card_name: str | None = None,
) -> int:
    """Estimate what the run would cost, from real updates of each condition; trains nothing and keeps nothing.

    `card_name`: a GPU that is not here; the cost of updates is then an estimate from counted calls. Without `gpus` and
    without a cluster, the run is planned for a node of them.
    """
    began = time.monotonic()
    card = None
    if card_name is not None:
        card = find_card(card_name)
        if not os.environ.get("RAY_ADDRESS"):
            gpus = gpus or NODE_GPUS
    prepared = prepare(config_path, overrides)
    resources = possible_resources(prepared.config.cluster, gpus, os.environ)
    trials = plan_trials(prepared.config, prepared.corpus, prepared.folds)
    # Imported here because they import torch, which takes seconds: a wrong configuration is reported before.
    from cvrunner.orchestration.attempt import training_device
    from cvrunner.training.probe import hardest, probe, resident_mib

    prepare_s = time.monotonic() - began
    # All conditions are compared with the size of the process before the first one.
    base_mib, probes = resident_mib(), []
    with tempfile.TemporaryDirectory(prefix="cvrunner-plan-") as folder:
        for condition in prepared.config.conditions:
            trial = hardest(t for t in trials if t.condition == condition)
            if card is not None:
                from cvrunner.plan.counting import estimate

                print(f"{condition}: estimate for {card.name} from counted calls ...", file=sys.stderr, flush=True)
                probes.append(estimate(trial, card, Path(folder)))
                continue
            device = training_device(trial)
            print(f"{condition}: a few real updates on {device.type} ...", file=sys.stderr, flush=True)
            probes.append(probe(trial, device, Path(folder), base_mib))
    found = forecast(trials, prepared.corpus.utterances, probes, resources, prepare_s)
    line_printer(console)(as_json(found) if json else plan_text(found))
    return 0


def plan_text(found: Forecast) -> str:
    """Return the whole screen; its last line is the answer."""
    first = found.runs[0]
    by_seeds = [f"{plural(count, 'seed')} {format_duration(seconds)}" for count, seconds in first.by_seeds.items()]
    # How many seeds a claim needs is a matter of hours.
    seeds = f"on {_gpus(first)}: {', '.join(by_seeds)}. A claim needs two seeds, with a single fold three."
    answer = f"all-folds would take about {format_duration(first.total_s)} on {_gpus(first)}"
    notes = "\n".join(textwrap.fill(note, WIDTH) for note in _notes(found))
    if (estimated := found.conditions[0].probe.estimate) is not None:
        seeds, answer = f"By this estimate, {seeds}", f"An estimate, never measured: {answer}, {estimated.card}"
    parts = [
        textwrap.fill(_heading(found), WIDTH),
        tables_as_text([conditions_table(found)], WIDTH, notes).rstrip("\n"),
        tables_as_text([resources_table(found)], WIDTH, "\n".join(_bars(found))).rstrip("\n"),
        textwrap.fill(f"{seeds[0].upper()}{seeds[1:]}", WIDTH),
        answer,
    ]
    return "\n\n".join(parts)


def conditions_table(found: Forecast) -> Table:
    """Return a row for each condition: what was measured, and what others stated."""
    memory = found.conditions[0].probe.memory
    columns = ["condition", "typical", "longest", f"{memory} memory", "largest batch_size", "epoch", "trial"]
    rows = []
    for condition in found.conditions:
        probe = condition.probe
        rows.append(
            [
                probe.condition,
                f"{probe.typical.step_s:.3g} s",
                f"{probe.longest.step_s:.3g} s",
                format_bytes(probe.peak_memory_mib * 2**20),
                str(probe.fits or "no limit"),
                format_duration(condition.epoch_s),
                format_duration(condition.trial_s),
            ]
        )
    if any(condition.stated for condition in found.conditions):
        columns += ["stated memory", "stated epoch"]
        for row, condition in zip(rows, found.conditions, strict=True):
            stated = {claim.quantity: _claimed(claim) for claim in condition.stated}
            row += [stated.get("memory_gb", DASH), stated.get("minutes_per_epoch", DASH)]
    origin = "Measured" if found.conditions[0].probe.estimate is None else "Estimate"
    return Table(f"{origin} per condition: a typical update, the longest one, memory, an epoch, a trial", columns, rows)


def resources_table(found: Forecast) -> Table:
    """Return a row for each set of GPUs."""
    columns = ["GPUs", "makespan", "expected", "idle", f"fits on idle GPUs, run at most {100 * TOLERANCE:g} % longer"]
    rows = []
    for run in found.runs:
        extra = [f"{plural(count, 'condition')} like {name}" for name, count in run.conditions.items() if count]
        if run.seeds:
            extra.insert(0, plural(run.seeds, "seed"))
        rows.append(
            [
                f"{run.resources.name}: {_gpus(run)}",
                format_duration(run.schedule.makespan_s),
                format_duration(run.trials_s),
                f"{100 * run.schedule.idle_share:.0f} %",
                ", or ".join(extra) or "nothing more",
            ]
        )
    title = "The run"
    if found.conditions[0].probe.estimate is not None:
        title += ", by this estimate"
    return Table(title, columns, rows)


# --- words ------------------------------------------------------------------------------------------------------------


def _heading(found: Forecast) -> str:
    probe = found.conditions[0].probe
    counts = [(len(found.conditions), "condition"), (found.folds, "fold"), (found.seeds, "seed")]
    product = " x ".join(plural(number, word) for number, word in counts)
    text = f"{found.trials} trials ({product}), at most {plural(found.epochs, 'epoch')}. "
    if probe.estimate is not None:
        card, assumptions = probe.estimate.card, probe.estimate.assumptions
        return f"{text}Estimate for {card} in {probe.precision}, never measured; it assumes {assumptions}."
    text += f"Measured on {probe.device} in {probe.precision}; nothing was trained."
    if probe.memory == "host":
        text += " Memory is host memory, the growth of this process, as there is no GPU here; on a GPU it differs."
    return text


def _notes(found: Forecast) -> Iterator[str]:
    first = found.conditions[0].probe
    yield (
        f"An update has {first.longest.utterances} utterances in micro-batches of {first.batch_size}: the typical one "
        f"of up to {first.typical.longest_s:.1f} s of audio each, the hardest one that the epochs draw of up to "
        f"{first.longest.longest_s:.1f} s."
    )
    for condition in found.conditions:
        probe = condition.probe
        if probe.batch_size < probe.configured:
            cost = "counted" if probe.estimate else "measured"
            yield (
                f"{probe.condition}: train.batch_size {probe.configured} does not fit the longest batch; {cost} with "
                f"{probe.batch_size}, to which exact accumulation would reduce it."
            )
        if probe.larger_mib:
            sizes = [f"{format_bytes(mib * 2**20)} at batch_size {size}" for size, mib in probe.larger_mib.items()]
            yield f"{probe.condition}: {', '.join(sizes)}."
        if probe.estimate is not None:
            yield _counted(probe, probe.estimate)
        if probe.plain_mamba_s is not None:
            yield (
                f"{probe.condition}: the typical update takes {probe.typical.step_s:.3g} s with the Mamba kernels, "
                f"{probe.plain_mamba_s:.3g} s in plain PyTorch."
            )
    if any(condition.stated for condition in found.conditions) or found.also_stated:
        also = "".join(f"; {claim.name}: {_claimed(claim)}" for claim in found.also_stated)
        yield f"Stated by others, not measured here{also}. Source: {found.source or 'not given'}."
    start, filling, fitting = map(
        format_duration, (found.runs[0].start_s, found.runs[0].features_s, found.runs[0].linear_probes_s)
    )
    features = found.disk.features
    kinds = ", ".join(f"{format_bytes(size)} {kind}" for kind, size in features.items())
    yield (
        f"Disk: features {format_bytes(sum(features.values()))} on each node ({kinds}); checkpoints at most "
        f"{format_bytes(found.disk.checkpoints)} at a time; weights in the results {format_bytes(found.disk.weights)}. "
        f"Filling the feature cache takes {filling} once on each node; the linear probes, after "
        f"the trials, about {fitting}; start-up and report {start}. The trials are expected to take less than their "
        "makespan where pausing some of them gains time (cluster.preempt)."
    )


def _counted(probe: ConditionProbe, estimate: Estimate) -> str:
    """Return what the estimate of a condition is made of."""
    updates = [
        f"the {name} update {counted.launches:,} launches, {(counted.bfloat16 + counted.float32) / 1e12:.3g} TFLOP, "
        f"{format_bytes(counted.moved_bytes)} read and written"
        for name, counted in (("typical", estimate.typical), ("longest", estimate.longest))
    ]
    return (
        f"{probe.condition}, counted for the estimate: {'; '.join(updates)}. Weights and optimizer take "
        f"{format_bytes(estimate.fixed_bytes)}; activations, gradients and casts at most "
        f"{format_bytes(estimate.longest.peak_bytes)}."
    )


def _claimed(claim: Claim) -> str:
    text = f"{claim.low:g}"
    if claim.high is not None:
        text += f" to {claim.high:g}"
    return f"{text} {UNITS[claim.quantity]}"


def _gpus(run: RunOnResources) -> str:
    text = plural(run.resources.gpus, "GPU")
    if run.resources.slots != run.resources.gpus:
        text += f", {run.resources.slots} trials at a time"
    return text


# --- bars -------------------------------------------------------------------------------------------------------------


def _bars(found: Forecast) -> list[str]:
    """Return a bar for each GPU; GPUs with the same conditions in the same order share one."""
    names = [condition.probe.condition for condition in found.conditions]
    letters = {name: name[0].upper() for name in names}
    if len(set(letters.values())) < len(names):
        letters = {name: chr(ord("a") + index % 26) for index, name in enumerate(names)}
    legend = ", ".join(f"{letter} {name}" for name, letter in letters.items())
    lines = [f"Each trial begins with its letter ({legend}); dots are idle."]
    for run in found.runs:
        lines.append(f"{run.resources.name}: {_gpus(run)}")
        rows = [run.schedule.of_gpu(gpu) for gpu in range(run.schedule.gpus)]
        for conditions, alike in groupby(rows, key=lambda row: [one.job.condition for one in row]):
            same = list(alike)
            # Of GPUs that share a bar, the one that ends last stands for all.
            shown = max(same, key=lambda row: max((one.end_s for one in row), default=0.0))
            line = f"  {len(same):>3} x {bar_of(shown, run.schedule.makespan_s, letters)}"
            if not conditions:
                line += "  idle"
            lines.append(line)
    return lines


def bar_of(assignments: Sequence[Assignment], makespan_s: float, letters: dict[str, str]) -> str:
    """Return the BAR columns of one GPU."""
    bar = ["."] * BAR
    for one in assignments:
        begin, end = (round(at / makespan_s * BAR) for at in (one.start_s, one.end_s))
        bar[begin:end] = "=" * (end - begin)
        # A trial that is too short for a column shows its letter all the same.
        bar[min(begin, BAR - 1)] = letters[one.job.condition]
    return "".join(bar)
