"""The process that holds a GPU on Ray and trains one trial after the other."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

import ray

from cvrunner.orchestration.events import format_event
from cvrunner.orchestration.failures import Failure
from cvrunner.records.results import WorkerStarted
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.text import timed
from cvrunner.training.faults import Chaos
from cvrunner.training.trial import Trial

if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    # Read when torch is imported, which an actor does after this module. Batches of speech differ in length, so blocks
    # of fixed size would leave gaps that no later batch fits into.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# Ray counts GPUs as nvidia-smi and `verify` do. CUDA alone would begin with the fastest one, and a trial would train on
# another GPU than the one that it was given.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


class FoldActor:
    """Holds one GPU and trains the trials it is given, one at a time."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.stopping = threading.Event()
        self.pausing: str | None = None
        """Name of the trial that was asked to pause."""

    # Ray asks only once, when the actor starts, so this cannot name the trial; every log line does.
    def __repr__(self) -> str:
        return self.label

    def run(self, trial: Trial, directory: TrialDirectory, cache_dir: Path, chaos: Chaos) -> Any:
        """Yield the trial's events; the last one is its result or its failure."""
        yield WorkerStarted(host=socket.gethostname(), node=ray.get_runtime_context().get_node_id(), pid=os.getpid())
        # Imported here because they import torch, which takes seconds: the driver does without it, and reports the
        # worker before.
        from cvrunner.orchestration.attempt import attempt, training_device
        from cvrunner.training.fold_trainer import TrialContext

        should_stop = lambda: self.stopping.is_set() or self.pausing == trial.name  # noqa: E731
        context = TrialContext(directory, cache_dir, training_device(trial), should_stop, chaos)
        for event in attempt(trial, context):
            # Printed lines are the actor's log in Ray's dashboard.
            if text := format_event(event, (*trial.config.corpus.dimensions, "avg")):
                print(timed(f"{trial.name}  {text}"), flush=True)
            if isinstance(event, Failure) and event.details:
                print(event.details, flush=True)
            yield event
        self.pausing = None

    # These run on a second thread ("control"), so that they are heard while a trial trains. Cancelling the task instead
    # would end its stream of events at once, and the driver could not wait for what the trial still saves.
    @ray.method(concurrency_group="control")
    def pause(self, trial_name: str) -> None:
        """Ask this trial to save and end, if it still runs; the actor is used again."""
        self.pausing = trial_name

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Ask the running trial to save and end."""
        self.stopping.set()

    @ray.method(concurrency_group="control")
    def read(self, directory: TrialDirectory) -> dict[str, bytes]:
        """Return the files of a finished trial or linear probe by their path in its folder, the result last."""
        kept = (path for path in directory.kept if path.is_file())
        return {str(path.relative_to(directory.path)): path.read_bytes() for path in kept}
