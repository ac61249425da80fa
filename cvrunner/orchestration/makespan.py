"""How long a run takes on so many GPUs, which of them stand idle, and what more would fit there. Pure.

The order is that of the run: longest trials first, each on the GPU that is free first.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

TOLERANCE = 0.05
"""By how much more trials may lengthen a run and still fill idle GPUs only."""


@dataclass(frozen=True)
class Job:
    """A trial as it is scheduled."""

    name: str
    condition: str
    cost: float
    """What the run orders trials by, the highest first."""
    duration_s: float


@dataclass(frozen=True)
class Stint:
    """A job on a GPU; times since the start of the run."""

    job: Job
    gpu: int
    """From 0."""
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timetable:
    """All jobs on all GPUs."""

    gpus: int
    stints: tuple[Stint, ...]
    """In the order in which they start."""

    @property
    def makespan_s(self) -> float:
        """When the last job ends."""
        return max((one.end_s for one in self.stints), default=0.0)

    @property
    def work_s(self) -> float:
        """Of all jobs together."""
        return sum(one.job.duration_s for one in self.stints)

    @property
    def idle_s(self) -> float:
        """GPU time until the end of the run in which nothing is trained."""
        return self.gpus * self.makespan_s - self.work_s

    @property
    def idle_share(self) -> float:
        """0..1."""
        return self.idle_s / (self.gpus * self.makespan_s) if self.makespan_s else 0.0

    @property
    def bound_s(self) -> float:
        """No schedule of whole trials is shorter than all work evenly on all GPUs, or than the longest trial."""
        return max(self.work_s / self.gpus, *(one.job.duration_s for one in self.stints), 0.0)

    def of_gpu(self, gpu: int) -> tuple[Stint, ...]:
        """What a GPU does, in order."""
        return tuple(one for one in self.stints if one.gpu == gpu)


def timetable(jobs: Sequence[Job], gpus: int) -> Timetable:
    """Jobs in the order given, each on the GPU that is free first; of several, on the first."""
    free = [(0.0, gpu) for gpu in range(gpus)]
    stints = []
    for job in jobs:
        start_s, gpu = heapq.heappop(free)
        stints.append(Stint(job, gpu, start_s, start_s + job.duration_s))
        heapq.heappush(free, (start_s + job.duration_s, gpu))
    return Timetable(gpus, tuple(stints))


def room_for(block: Sequence[Job], jobs: Sequence[Job], gpus: int) -> int:
    """How many times `block` (the trials of one more seed, of one more condition) can be added to `jobs` until the run
    gets longer by more than TOLERANCE.

    Raises ValueError for a block that takes no time, of which there would be no end.
    """
    if not sum(job.duration_s for job in block) > 0:
        raise ValueError("a block of jobs must take some time")
    limit_s = (1 + TOLERANCE) * timetable(jobs, gpus).makespan_s
    count, more = 0, [*jobs, *block]
    while timetable(longest_first(more), gpus).makespan_s <= limit_s:
        count, more = count + 1, [*more, *block]
    return count


def longest_first(jobs: Sequence[Job]) -> list[Job]:
    """In the order of a run."""
    return sorted(jobs, key=lambda job: job.cost, reverse=True)
