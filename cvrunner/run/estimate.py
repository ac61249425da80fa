"""What a run would cost, from what was measured of each condition: time, memory, disk, and on which GPUs. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cvrunner.config.sections import Claim
from cvrunner.data.utterance import Utterance
from cvrunner.orchestration.makespan import Job, Timetable, longest_first, room_for, timetable
from cvrunner.orchestration.resources import Resources
from cvrunner.orchestration.trials import cost
from cvrunner.training.checkpoint import GENERATIONS
from cvrunner.training.probe import ConditionProbe, FeaturePass
from cvrunner.training.trial import Trial


@dataclass(frozen=True)
class ConditionForecast:
    """A condition: what was measured, and what follows for its trials."""

    probe: ConditionProbe
    epoch_s: float
    """Mean over its trials."""
    trial_s: float
    stated: tuple[Claim, ...]
    """What others said of its memory and time: never measured here."""


@dataclass(frozen=True)
class Disk:
    """Bytes, in an empty cache and an empty results folder."""

    features: Mapping[str, int]
    """By kind; on each node."""
    checkpoints: int
    """At most at a time, on the GPUs that the run would have."""
    weights: int
    """What stays in the results."""


@dataclass(frozen=True)
class Schedule:
    """The run on some GPUs."""

    resources: Resources
    timetable: Timetable
    features_s: float
    """Filling the cache before training, all GPUs of a node together."""
    seeds: int
    """How many more seeds of everything would leave the run as long as it is, but for 5 %."""
    conditions: Mapping[str, int]
    """The same for more conditions, by the one that they would be like."""

    @property
    def total_s(self) -> float:
        return self.features_s + self.timetable.makespan_s


@dataclass(frozen=True)
class Forecast:
    """All that `plan` tells."""

    trials: int
    folds: int
    seeds: int
    epochs: int
    """The most of any condition; training may stop early."""
    conditions: tuple[ConditionForecast, ...]
    disk: Disk
    schedules: tuple[Schedule, ...]
    """The first is the one that the run would have."""
    also_stated: tuple[Claim, ...]
    """Claims about settings that are no condition of this run."""
    source: str
    """Where the claims come from."""


def forecast(
    trials: Sequence[Trial],
    corpus: Sequence[Utterance],
    probes: Sequence[ConditionProbe],
    places: Sequence[Resources],
) -> Forecast:
    """For `trials` in the order of the run, a probe for each condition, and the GPUs that they would run on."""
    by_condition = {probe.condition: probe for probe in probes}
    jobs = [Job(t.name, t.condition, cost(t), by_condition[t.condition].trial_s(t)) for t in trials]
    passes = {(one.kind, one.key): one for probe in probes for one in probe.features}
    audio_s = sum(u.duration_s for u in {u.audio_digest: u for u in corpus}.values())
    schedules = tuple(_schedule(trials, jobs, resources, audio_s, list(passes.values())) for resources in places)
    reference = trials[0].config.reference
    stated = [claim for claim in reference.claims if not claim.quantity.startswith("ccc")]
    return Forecast(
        trials=len(trials),
        folds=len({t.fold.number for t in trials}),
        seeds=len({t.seed for t in trials}),
        epochs=max(t.config.train.epochs for t in trials),
        conditions=tuple(_condition(probe, trials, stated) for probe in probes),
        disk=_disk(trials, by_condition, list(passes.values()), audio_s, places[0].slots),
        schedules=schedules,
        also_stated=tuple(claim for claim in stated if claim.condition not in by_condition),
        source=reference.source,
    )


def as_json(found: Forecast) -> str:
    """All fields, times in seconds, and the sums that `Timetable` makes of its own."""
    data: dict[str, Any] = asdict(found)
    for row, schedule in zip(data["schedules"], found.schedules, strict=True):
        table = schedule.timetable
        row["total_s"], row["makespan_s"] = schedule.total_s, table.makespan_s
        row["bound_s"], row["idle_share"] = table.bound_s, table.idle_share
    for row, condition in zip(data["conditions"], found.conditions, strict=True):
        row["stated"] = [claim.model_dump() for claim in condition.stated]
    data["also_stated"] = [claim.model_dump() for claim in found.also_stated]
    return json.dumps(data, indent=1)


def _condition(probe: ConditionProbe, trials: Sequence[Trial], stated: Sequence[Claim]) -> ConditionForecast:
    own = [trial for trial in trials if trial.condition == probe.condition]
    return ConditionForecast(
        probe,
        epoch_s=sum(map(probe.epoch_s, own)) / len(own),
        trial_s=sum(map(probe.trial_s, own)) / len(own),
        stated=tuple(claim for claim in stated if claim.condition == probe.condition),
    )


def _disk(
    trials: Sequence[Trial],
    probes: Mapping[str, ConditionProbe],
    passes: Sequence[FeaturePass],
    audio_s: float,
    slots: int,
) -> Disk:
    features: dict[str, int] = {}
    for one in passes:
        features[one.kind] = features.get(one.kind, 0) + int(one.size * audio_s)
    each = [probes[trial.condition] for trial in trials]
    kept = sorted((GENERATIONS * (p.checkpoint_bytes + p.trained_bytes) for p in each), reverse=True)
    return Disk(features, checkpoints=sum(kept[:slots]), weights=sum(p.trained_bytes for p in each))


def _schedule(
    trials: Sequence[Trial], jobs: Sequence[Job], resources: Resources, audio_s: float, passes: Sequence[FeaturePass]
) -> Schedule:
    one_seed = [job for job, trial in zip(jobs, trials, strict=True) if trial.seed == trial.config.train.seeds[0]]
    alike: dict[str, list[Job]] = {}
    for job in jobs:
        alike.setdefault(job.condition, []).append(job)
    at_work = max(1, min(resources.slots, len(jobs)) // resources.nodes)
    return Schedule(
        resources,
        timetable(longest_first(jobs), resources.slots),
        features_s=sum(one.cost for one in passes) * audio_s / at_work,
        seeds=room_for(one_seed, jobs, resources.slots),
        conditions={name: room_for(block, jobs, resources.slots) for name, block in alike.items()},
    )
