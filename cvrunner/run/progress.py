"""What a running job shows: a live table on a terminal, one plain line for each event elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cvrunner.orchestration.eta import Eta
from cvrunner.orchestration.events import format_event
from cvrunner.orchestration.failures import Decision, Failure
from cvrunner.records.results import EpochRecord, TrialResult, TrialStarted, Waiting, ccc_label
from cvrunner.text import format_score
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from rich.console import Console

    from cvrunner.training.fold_trainer import Event


FATE = {
    Decision.RETRY: "; tried again from its checkpoint",
    Decision.PAUSE: "; it gives way to a trial that has more before it, and goes on later",
    Decision.FAIL: "; given up",
    Decision.ABORT: "; the run ends, since every trial would meet the same",
    Decision.STOP: "",
}


class Progress:
    """An observer that tells people. Use as a context: the live table is there in between."""

    def __init__(self, trials: Sequence[Trial], slots: int, console: Console, quiet: bool = False) -> None:
        self.eta = Eta(trials, slots)
        self.console = console
        self.quiet = quiet
        self.dimensions = (*trials[0].config.corpus.dimensions, "avg") if trials else ()
        self.live: Any = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal and not self.quiet:
            from rich.live import Live

            self.live = Live(console=self.console, get_renderable=self._table, refresh_per_second=2)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def attempt(self, trial: Trial, number: int) -> None:
        self.eta.attempt(trial, number)
        self._say(f"{trial.name}  starts" + (f", attempt {number}" if number > 1 else ""))

    def event(self, trial: Trial, event: Event) -> None:
        self.eta.event(trial, event)
        if text := format_event(event, self.dimensions):
            left = f"  | {self._left()}" if isinstance(event, (EpochRecord, TrialResult)) else ""
            self._say(f"{trial.name}  {text}{left}", important=isinstance(event, Waiting))
        if isinstance(event, TrialStarted) and event.note:
            self._say(f"{trial.name}  {event.note}", important=True)

    def failed(self, trial: Trial, failure: Failure, decision: Decision) -> None:
        self.eta.failed(trial, failure, decision)
        self._say(f"{trial.name}  {format_event(failure, self.dimensions)}{FATE[decision]}", important=True)

    def _left(self) -> str:
        """`12 of 80 epochs, ETA 3 min`."""
        left = self.eta.remaining_s()
        eta = f", ETA {duration(left)}" if left is not None else ""
        return f"{self.eta.epochs_done} of {self.eta.epochs} epochs{eta}"

    def _say(self, text: str, important: bool = False) -> None:
        if self.live is None and (important or not self.quiet):
            self.console.print(f"{time.strftime('%H:%M:%S')}  {text}", markup=False, highlight=False, soft_wrap=True)
        elif self.live is not None and important:
            self.live.console.print(text, markup=False, highlight=False)

    def _table(self) -> Any:
        from rich.table import Table

        table = Table(caption=self._left(), caption_justify="left", box=None, pad_edge=False)
        for column in ("trial", "state", "epoch", *map(ccc_label, self.dimensions), "s/epoch"):
            table.add_column(column, justify="left" if column in ("trial", "state") else "right")
        for name, row in self.eta.trials.items():
            scores = [format_score(row.ccc.get(d)) for d in self.dimensions]
            seconds = f"{row.epoch_s[-1]:.1f}" if row.epoch_s else ""
            style = {"done": "green", "failed": "red", "waiting": "dim"}.get(row.state, "")
            table.add_row(name, row.state, f"{row.epoch}/{row.epochs}", *scores, seconds, style=style)
        return table


def line_printer(console: Console) -> Callable[[str], None]:
    """A function that prints one plain line."""
    return lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds up to 90, then minutes up to 90, then hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
