"""Progress of a running job: a live table on a terminal, one plain line per event elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cvrunner.files import write_atomically
from cvrunner.orchestration.eta import Eta
from cvrunner.orchestration.events import format_event
from cvrunner.orchestration.failures import Decision, Failure
from cvrunner.records.results import EpochRecord, TrialResult, TrialStarted, Waiting, WorkerStarted, ccc_label
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.text import format_duration, format_score, line_printer, timed
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from rich.console import Console

    from cvrunner.training.fold_trainer import Event


CONSEQUENCE = {
    Decision.RETRY: "; retried from its checkpoint",
    Decision.PAUSE: "; paused so that a longer trial can start, resumes later",
    Decision.FAIL: "; given up",
    Decision.ABORT: "; the run ends, since every other trial would fail in the same way",
    Decision.STOP: "",
}


class Progress:
    """An observer that prints. Use it as a context manager: the live table is shown until it exits."""

    def __init__(self, trials: Sequence[Trial], slots: int, console: Console, quiet: bool = False) -> None:
        self.eta = Eta(trials, slots)
        self.console = console
        self.quiet = quiet
        self.dimensions: tuple[str, ...] = ()
        if trials:
            self.dimensions = (*trials[0].config.corpus.dimensions, "avg")
        self.live: Any = None
        self.attempts: dict[str, int] = {}

    def __enter__(self) -> Progress:
        waiting = len(self.eta.trials) - self.eta.slots
        if self.live is None and waiting > 0:
            # Also says why some trials do not start for a long time.
            self._print(f"{self.eta.slots} trials run at a time; {waiting} wait for one of them to end")
        if self.console.is_terminal and not self.quiet:
            # Not needed where output is not a terminal, as in a job.
            from rich.live import Live

            self.live = Live(console=self.console, get_renderable=self._table, refresh_per_second=2)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def attempt(self, trial: Trial, number: int) -> None:
        self.eta.attempt(trial, number)
        self.attempts[trial.name] = number

    def event(self, trial: Trial, event: Event) -> None:
        self.eta.event(trial, event)
        # Not when it was asked for: until then, the trial may wait for a GPU that others use. Without Ray there is no
        # worker, and the trial's own first event counts.
        if isinstance(event, (WorkerStarted, TrialStarted)) and trial.name in self.attempts:
            number = self.attempts.pop(trial.name)
            start = f"{trial.name}  starts"
            if number > 1:
                start += f", attempt {number}"
            self._print(start)
        if text := format_event(event, self.dimensions):
            if isinstance(event, (EpochRecord, TrialResult)):
                text += f"  | {self._epochs_left()}"
            # A trial that waits looks like one that hangs, so the reason is printed even with --quiet.
            self._print(f"{trial.name}  {text}", important=isinstance(event, Waiting))
        if isinstance(event, TrialStarted) and event.note:
            self._print(f"{trial.name}  {event.note}", important=True)

    def failed(self, trial: Trial, failure: Failure, decision: Decision) -> None:
        self.eta.failed(trial, failure, decision)
        self._print(f"{trial.name}  {format_event(failure, self.dimensions)}{CONSEQUENCE[decision]}", important=True)

    def _epochs_left(self) -> str:
        """Return a text such as `12 of 80 epochs, ETA 3 min`, with `up to` if a condition was not measured yet."""
        text = f"{self.eta.epochs_done} of {self.eta.epochs} epochs"
        if (remaining_s := self.eta.remaining_s()) is not None:
            text += f", ETA {'' if self.eta.all_measured else 'up to '}{format_duration(remaining_s)}"
        return text

    def _print(self, text: str, important: bool = False) -> None:
        # The live table already shows ordinary events, so only important ones get a line above it.
        if self.live is None and (important or not self.quiet):
            line_printer(self.console)(timed(text))
        elif self.live is not None and important:
            self.live.console.print(text, markup=False, highlight=False)

    def _table(self) -> Table:
        table = Table(caption=self._epochs_left(), caption_justify="left", box=None, pad_edge=False)
        table.add_column("trial")
        table.add_column("state")
        for column in ("epoch", *map(ccc_label, self.dimensions), "s/epoch"):
            table.add_column(column, justify="right")
        for name, row in self.eta.trials.items():
            scores = [format_score(row.ccc.get(d)) for d in self.dimensions]
            seconds = f"{row.epoch_s[-1]:.1f}" if row.epoch_s else ""
            style = {"done": "green", "failed": "red", "waiting": "dim"}.get(row.state, "")
            table.add_row(name, row.state, f"{row.epoch}/{row.epochs}", *scores, seconds, style=style)
        return table


class ProbeProgress:
    """An observer of linear probes: prints a line per event, and stores the reason of a probe that failed."""

    def __init__(self, console: Console, quiet: bool, directory: Callable[[Trial], TrialDirectory]) -> None:
        self.print_line = line_printer(console)
        self.quiet = quiet
        self.directory = directory

    def attempt(self, trial: Trial, number: int) -> None: ...

    def event(self, trial: Trial, event: Event) -> None:
        text = format_event(event, (*trial.config.corpus.dimensions, "avg"))
        if text and not self.quiet:
            self.print_line(timed(f"{trial.name}  {text}"))

    def failed(self, trial: Trial, failure: Failure, decision: Decision) -> None:
        consequence = ""
        if decision is Decision.RETRY:
            consequence = "; retried"
        elif decision is not Decision.STOP:
            write_atomically(self.directory(trial).error, failure.message)
            consequence = "; no trial depends on it, and the same command tries again"
        self.print_line(timed(f"{trial.name}  {format_event(failure, ())}{consequence}"))
