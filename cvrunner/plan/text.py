"""What `plan` prints: measured costs by condition, disk, and the run on several sets of GPUs, on one screen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby

from cvrunner.config.sections import Claim
from cvrunner.orchestration.makespan import TOLERANCE, Stint, Timetable
from cvrunner.run.estimate import ConditionForecast, Disk, Forecast, Schedule
from cvrunner.text import DASH as NONE
from cvrunner.text import Table, format_duration, tables_as_text
from cvrunner.training.probe import ConditionProbe

WIDTH = 100
BAR = 64
"""Columns of a bar: the whole run."""


def plan_text(found: Forecast) -> str:
    """The whole screen; its last line is the answer."""
    first = found.schedules[0]
    parts = [
        _paragraph(_heading(found)),
        tables_as_text([conditions_table(found)], WIDTH, "\n".join(map(_paragraph, _notes(found)))).rstrip("\n"),
        tables_as_text([schedules_table(found)], WIDTH, "\n".join(_bars(found))).rstrip("\n"),
        f"all-folds would take about {format_duration(first.total_s)} on {_gpus(first)}",
    ]
    return "\n\n".join(parts)


def conditions_table(found: Forecast) -> Table:
    """A row for each condition: what was measured, and what others stated."""
    memory = found.conditions[0].probe.memory
    columns = ["condition", "typical", "longest", f"{memory} memory", "largest batch_size", "epoch", "trial"]
    claimed = any(condition.stated for condition in found.conditions)
    columns += ["stated memory", "stated epoch"] if claimed else []
    rows = [[*_measured(c), *(_stated(c) if claimed else [])] for c in found.conditions]
    return Table("Measured by condition: a typical step, the longest one, memory, an epoch, a trial", columns, rows)


def schedules_table(found: Forecast) -> Table:
    """A row for each set of GPUs."""
    columns = ["GPUs", "makespan", "at best", "idle", f"idle GPUs, run {100 * TOLERANCE:g} % longer at most"]
    rows = [
        [
            f"{schedule.resources.name}: {_gpus(schedule)}",
            format_duration(schedule.timetable.makespan_s),
            format_duration(schedule.timetable.bound_s),
            f"{100 * schedule.timetable.idle_share:.0f} %",
            _room(schedule),
        ]
        for schedule in found.schedules
    ]
    return Table("The run", columns, rows)


# --- words ------------------------------------------------------------------------------------------------------------


def _heading(found: Forecast) -> str:
    probe = found.conditions[0].probe
    counts = [(len(found.conditions), "condition"), (found.folds, "fold"), (found.seeds, "seed")]
    product = " x ".join(_count(number, word) for number, word in counts)
    host = (
        "Memory is host memory, by how much this process grew: there is no GPU here, and on one it is another figure."
    )
    return (
        f"{found.trials} trials ({product}), {_count(found.epochs, 'epoch')} at most. Measured on {probe.device} in "
        f"{probe.precision}; nothing was trained. {host if probe.memory == 'host' else ''}"
    )


def _notes(found: Forecast) -> Iterator[str]:
    yield _batches(found.conditions[0].probe)
    for condition in found.conditions:
        yield from _batch_size_notes(condition.probe)
    if any(condition.stated for condition in found.conditions) or found.also_stated:
        also = "".join(f"; {claim.name}: {_claimed(claim)}" for claim in found.also_stated)
        yield f"Stated by others, not measured here{also}. Source: {found.source or 'not given'}."
    filling = format_duration(found.schedules[0].features_s)
    yield f"{_disk(found.disk)} Filling the features takes {filling} once on each node."


def _batches(probe: ConditionProbe) -> str:
    typical, longest = probe.typical, probe.longest
    return (
        f"Step: an update of {longest.utterances} utterances in micro-batches of {probe.batch_size}, typical with up "
        f"to {typical.longest_s:.1f} s of audio each, longest with up to {longest.longest_s:.1f} s."
    )


def _batch_size_notes(probe: ConditionProbe) -> Iterator[str]:
    if probe.batch_size < probe.configured:
        yield (
            f"{probe.condition}: train.batch_size {probe.configured} does not fit the longest batch; measured with "
            f"{probe.batch_size}, to which exact accumulation goes by itself."
        )
    if probe.larger_mib:
        sizes = ", ".join(f"{_gigabytes(mib * 2**20)} at batch_size {size}" for size, mib in probe.larger_mib.items())
        yield f"{probe.condition}: {sizes}."


def _disk(disk: Disk) -> str:
    features = ", ".join(f"{_gigabytes(size)} {kind}" for kind, size in disk.features.items())
    return (
        f"Disk: features {_gigabytes(sum(disk.features.values()))} on each node ({features}); checkpoints at most "
        f"{_gigabytes(disk.checkpoints)} at a time; weights in the results {_gigabytes(disk.weights)}."
    )


def _measured(condition: ConditionForecast) -> list[str]:
    probe = condition.probe
    return [
        probe.condition,
        f"{probe.typical.step_s:.3g} s",
        f"{probe.longest.step_s:.3g} s",
        _gigabytes(probe.peak_memory_mib * 2**20),
        "no limit" if probe.fits is None else str(probe.fits),
        format_duration(condition.epoch_s),
        format_duration(condition.trial_s),
    ]


def _stated(condition: ConditionForecast) -> list[str]:
    by_quantity = {"memory_gb": NONE, "minutes_per_epoch": NONE}
    by_quantity |= {claim.quantity: _claimed(claim) for claim in condition.stated}
    return list(by_quantity.values())


def _claimed(claim: Claim) -> str:
    unit = "GB" if claim.quantity == "memory_gb" else "min"
    return f"{claim.low:g}{'' if claim.high is None else f' to {claim.high:g}'} {unit}"


def _room(schedule: Schedule) -> str:
    parts = [_count(schedule.seeds, "seed")] if schedule.seeds else []
    parts += [f"{_count(count, 'condition')} like {name}" for name, count in schedule.conditions.items() if count]
    return f"room for {', or '.join(parts) or 'nothing more'}"


def _gpus(schedule: Schedule) -> str:
    resources = schedule.resources
    at_a_time = f", {resources.slots} trials at a time" if resources.slots != resources.gpus else ""
    return f"{_count(resources.gpus, 'GPU')}{at_a_time}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e9:.2g} GB"


def _paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH)


# --- bars -------------------------------------------------------------------------------------------------------------


def _bars(found: Forecast) -> list[str]:
    """A bar for each GPU; GPUs that do the same share one."""
    letters = _letters([condition.probe.condition for condition in found.conditions])
    legend = ", ".join(f"{letter} {name}" for name, letter in letters.items())
    lines = [f"Each trial begins with its letter ({legend}); dots are idle."]
    for schedule in found.schedules:
        lines.append(f"{schedule.resources.name}: {_gpus(schedule)}")
        lines += _bars_of(schedule.timetable, letters)
    return lines


def _bars_of(table: Timetable, letters: dict[str, str]) -> Iterator[str]:
    rows = [table.of_gpu(gpu) for gpu in range(table.gpus)]
    for conditions, alike in groupby(rows, key=lambda row: [stint.job.condition for stint in row]):
        same = list(alike)
        bar = bar_of(max(same, key=lambda row: row[-1].end_s if row else 0.0), table.makespan_s, letters)
        yield f"  {len(same):>3} x {bar}" if conditions else f"  {len(same):>3} x {bar}  idle"


def bar_of(stints: Sequence[Stint], makespan_s: float, letters: dict[str, str]) -> str:
    """BAR columns of one GPU."""
    bar = ["."] * BAR
    for stint in stints:
        begin, end = (round(at / makespan_s * BAR) for at in (stint.start_s, stint.end_s))
        bar[begin:end] = "=" * (end - begin)
        bar[min(begin, BAR - 1)] = letters[stint.job.condition]
    return "".join(bar)


def _letters(conditions: Sequence[str]) -> dict[str, str]:
    """A letter for each condition: its first where these differ, else a, b, c."""
    first = [name[0].upper() for name in conditions]
    if len(set(first)) == len(first):
        return dict(zip(conditions, first, strict=True))
    return {name: chr(ord("a") + index % 26) for index, name in enumerate(conditions)}
