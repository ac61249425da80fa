"""Time, memory and disk that a run would take, and its schedule on different GPUs. Pure, and without torch.

A schedule follows the run: longest trials first, each on the GPU that is free first. The ETA of a run is computed by
the same rule (orchestration/eta.py).
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from cvrunner.config.sections import Claim
from cvrunner.data.utterance import Utterance
from cvrunner.orchestration.eta import longest_without_pause_s
from cvrunner.orchestration.resources import Resources
from cvrunner.orchestration.trials import cost
from cvrunner.records.run_directory import GENERATIONS
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from cvrunner.training.probe import ConditionProbe, FeaturePass  # imports torch, which `doctor` does without

RAY_AND_REPORT_S = 12.0
"""Starting Ray and an actor's process (5 to 8 s), and writing report, figures and MLflow at the end (4 to 7 s), as
measured on two cores; both hardly depend on the run."""
TOLERANCE = 0.05
"""Share by which more trials may lengthen a run and still count as filling idle GPUs only."""
MOMENTS = 2
"""Values that the optimizer keeps for each trained weight."""
FEATURE_ITEM_BYTES = 2
"""Features are float16."""
STATISTICS_ITEM_BYTES = 4
"""Their statistics for the linear probe are float32."""
CONV_FRAMES_PER_S = 50.0


# --- sizes on disk ----------------------------------------------------------------------------------------------------


def most_checkpoint_bytes(trials: Iterable[tuple[int, int]], slots: int) -> int:
    """Return the most that checkpoints take at a time, with `slots` trials running.

    `trials`: size of a checkpoint and of the trained weights of each trial. For each generation it keeps the checkpoint
    and the weights of its best epoch, and the oldest is deleted only after the next is complete.
    """
    sizes = ((GENERATIONS + 1) * (checkpoint + trained) for checkpoint, trained in trials)
    return sum(sorted(sizes, reverse=True)[:slots])


def feature_bytes(channels: int, hidden: Iterable[tuple[int, int, float]], audio_s: float) -> int:
    """Return the size of the feature cache for `audio_s` seconds of audio.

    `channels`: of the front-end; `hidden`: number of layers, their width and frame rate, for each set of hidden states.
    """
    items_per_s = channels * CONV_FRAMES_PER_S + sum(states * width * rate_hz for states, width, rate_hz in hidden)
    return int(audio_s * items_per_s * FEATURE_ITEM_BYTES)


# --- schedules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A trial to schedule."""

    name: str
    condition: str
    cost: float
    """The run orders trials by it, the highest first."""
    duration_s: float


@dataclass(frozen=True)
class Assignment:
    """A job on a GPU; times since the start of the run."""

    job: Job
    gpu: int
    """From 0."""
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Schedule:
    """All jobs on all GPUs."""

    gpus: int
    assignments: tuple[Assignment, ...]
    """In the order in which they start."""

    @property
    def makespan_s(self) -> float:
        """Time from the start of the first job to the end of the last."""
        return max((one.end_s for one in self.assignments), default=0.0)

    @property
    def work_s(self) -> float:
        """Duration of all jobs together."""
        return sum(one.job.duration_s for one in self.assignments)

    @property
    def idle_share(self) -> float:
        """Share of the GPU time until the end of the run in which nothing is trained, 0..1."""
        gpu_s = self.gpus * self.makespan_s
        return (gpu_s - self.work_s) / gpu_s if gpu_s else 0.0

    @property
    def lower_bound_s(self) -> float:
        """No schedule of whole trials is shorter than all work spread evenly, or than the longest trial."""
        return max(self.work_s / self.gpus, *(one.job.duration_s for one in self.assignments), 0.0)

    def of_gpu(self, gpu: int) -> tuple[Assignment, ...]:
        """Return the assignments of one GPU in order."""
        return tuple(one for one in self.assignments if one.gpu == gpu)


def assign(jobs: Sequence[Job], gpus: int) -> Schedule:
    """Assign jobs, the costliest first, each to the GPU that is free first; of several, to the first."""
    free = [(0.0, gpu) for gpu in range(gpus)]
    assignments = []
    for job in sorted(jobs, key=lambda job: job.cost, reverse=True):
        start_s, gpu = heapq.heappop(free)
        assignments.append(Assignment(job, gpu, start_s, start_s + job.duration_s))
        heapq.heappush(free, (start_s + job.duration_s, gpu))
    return Schedule(gpus, tuple(assignments))


def max_extra(block: Sequence[Job], jobs: Sequence[Job], gpus: int) -> int:
    """Return how many times `block` can be added to `jobs` before the run takes longer by more than TOLERANCE.

    `block`: the trials of one more seed, or of one more condition. Raises ValueError for a block that takes no time, as
    it could be added without end.
    """
    if not sum(job.duration_s for job in block) > 0:
        raise ValueError("a block of jobs must take some time")
    limit_s = (1 + TOLERANCE) * assign(jobs, gpus).makespan_s
    count, more = 0, [*jobs, *block]
    while assign(more, gpus).makespan_s <= limit_s:
        count, more = count + 1, [*more, *block]
    return count


# --- the estimate -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConditionForecast:
    """What was measured of a condition, and what follows for its trials."""

    probe: ConditionProbe
    epoch_s: float
    """Mean over its trials."""
    trial_s: float
    """Mean over its trials."""
    stated: tuple[Claim, ...]
    """Memory and time that others stated for it; never measured here."""


@dataclass(frozen=True)
class Disk:
    """Bytes, starting from an empty cache and an empty results folder."""

    features: Mapping[str, int]
    """Per kind; on each node."""
    checkpoints: int
    """Most at a time, on the GPUs that the run would have."""
    weights: int
    """Trained weights that stay in the results."""


@dataclass(frozen=True)
class RunOnResources:
    """The run on certain GPUs."""

    resources: Resources
    schedule: Schedule
    """Without pauses."""
    trials_s: float
    """Expected time of all trials, with pauses if the configuration allows them."""
    start_s: float
    """Start-up of driver, Ray and the first trials, and the report at the end."""
    features_s: float
    """Filling the cache before training, with all GPUs of a node."""
    seeds: int
    """Number of further seeds of everything that lengthen the run by at most TOLERANCE."""
    conditions: Mapping[str, int]
    """The same for further conditions, by the condition that they would be like."""
    linear_probes_s: float = 0.0
    """Fitting the linear probes of all folds after training."""
    by_seeds: Mapping[int, float] = field(default_factory=dict)
    """Total time of the run with one, two and three seeds, in seconds."""

    @property
    def total_s(self) -> float:
        return self.start_s + self.features_s + self.trials_s + self.linear_probes_s


@dataclass(frozen=True)
class Forecast:
    """Everything that `plan` shows."""

    trials: int
    folds: int
    seeds: int
    epochs: int
    """The most of any condition; training may stop early."""
    conditions: tuple[ConditionForecast, ...]
    disk: Disk
    runs: tuple[RunOnResources, ...]
    """The first is on the GPUs that the run would have."""
    also_stated: tuple[Claim, ...]
    """Claims about settings that are no condition of this run."""
    source: str
    """Source of the claims."""


def forecast(
    trials: Sequence[Trial],
    corpus: Sequence[Utterance],
    probes: Sequence[ConditionProbe],
    resources: Sequence[Resources],
    prepare_s: float = 0.0,
) -> Forecast:
    """Estimate a run. `trials` in its order, a probe for each condition, and the GPUs that it would run on.

    `prepare_s`: seconds to read configuration and corpus, and to import torch.
    """
    by_condition = {probe.condition: probe for probe in probes}
    jobs = [Job(t.name, t.condition, cost(t), by_condition[t.condition].trial_s(t)) for t in trials]
    # Conditions with the same features, and utterances with the same audio, share them in the cache.
    passes = list({(one.kind, one.key): one for probe in probes for one in probe.features}.values())
    recordings = {u.audio_digest: u for u in corpus}.values()
    audio_s = sum(u.duration_s for u in recordings)
    # Of the baseline's encoder; those of another are smaller than what else is cached of it.
    statistics_bytes = probes[0].statistics * STATISTICS_ITEM_BYTES * len(recordings)
    reference = trials[0].config.reference
    stated = [claim for claim in reference.claims if not claim.quantity.startswith("ccc")]
    return Forecast(
        trials=len(trials),
        folds=len({t.fold.number for t in trials}),
        seeds=len({t.seed for t in trials}),
        epochs=max(t.config.train.epochs for t in trials),
        conditions=tuple(_condition(probe, trials, stated) for probe in probes),
        disk=_disk(trials, by_condition, passes, statistics_bytes, audio_s, resources[0].slots),
        runs=tuple(
            _run(trials, jobs, one, audio_s, passes, probes[0], len(recordings), prepare_s) for one in resources
        ),
        also_stated=tuple(claim for claim in stated if claim.condition not in by_condition),
        source=reference.source,
    )


def as_json(found: Forecast) -> str:
    """Return all fields, times in seconds, and the values that a Schedule computes."""
    data: dict[str, Any] = asdict(found)
    for row, run in zip(data["runs"], found.runs, strict=True):
        row["total_s"], row["makespan_s"] = run.total_s, run.schedule.makespan_s
        row["lower_bound_s"], row["idle_share"] = run.schedule.lower_bound_s, run.schedule.idle_share
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
    statistics_bytes: int,
    audio_s: float,
    slots: int,
) -> Disk:
    features: dict[str, int] = {}
    for one in passes:
        features[one.kind] = features.get(one.kind, 0) + int(one.size * audio_s)
    features["statistics"] = statistics_bytes
    each = [probes[trial.condition] for trial in trials]
    return Disk(
        features,
        checkpoints=most_checkpoint_bytes([(p.checkpoint_bytes, p.trained_bytes) for p in each], slots),
        weights=sum(p.trained_bytes for p in each),
    )


def _run(
    trials: Sequence[Trial],
    jobs: Sequence[Job],
    resources: Resources,
    audio_s: float,
    passes: Sequence[FeaturePass],
    baseline: ConditionProbe,
    recordings: int,
    prepare_s: float,
) -> RunOnResources:
    one_seed = [job for job, trial in zip(jobs, trials, strict=True) if trial.seed == trial.config.train.seeds[0]]
    alike: dict[str, list[Job]] = {}
    for job in jobs:
        alike.setdefault(job.condition, []).append(job)
    # Each node fills its own cache, with the trials that it runs at the start.
    filling = max(1, min(resources.slots, len(jobs)) // resources.nodes)
    linear_probes_s = math.ceil(len({t.fold.number for t in trials}) / resources.slots) * baseline.linear_probe_s
    # Without a frozen condition, the probes run the encoder once over the corpus, as validation does.
    if "hidden" not in {one.kind for one in passes}:
        linear_probes_s += baseline.validation_s * recordings / filling
    features_s = sum(one.cost for one in passes) * audio_s / filling
    start_s = prepare_s + RAY_AND_REPORT_S

    def trials_s(jobs: Sequence[Job]) -> float:
        whole_s = assign(jobs, resources.slots).makespan_s
        if not trials[0].config.cluster.pauses_trials:
            return whole_s
        return min(whole_s, longest_without_pause_s([job.duration_s for job in jobs], resources.slots))

    besides_s = start_s + features_s + linear_probes_s
    return RunOnResources(
        resources,
        assign(jobs, resources.slots),
        trials_s=trials_s(jobs),
        start_s=start_s,
        features_s=features_s,
        seeds=max_extra(one_seed, jobs, resources.slots),
        conditions={name: max_extra(block, jobs, resources.slots) for name, block in alike.items()},
        linear_probes_s=linear_probes_s,
        by_seeds={count: besides_s + trials_s(one_seed * count) for count in (1, 2, 3)},
    )
