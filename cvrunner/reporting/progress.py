"""What a running job shows: a live table on a terminal, one plain line for each event elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cvrunner.orchestration.failures import Decision, Failure
from cvrunner.records.results import Ccc, EpochRecord, FeatureProgress, TrialResult, TrialStarted, Waiting
from cvrunner.reporting.report import ccc_label
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from rich.console import Console

    from cvrunner.training.fold_trainer import Event


FATE = {
    Decision.RETRY: ("waiting", "; tried again from its checkpoint"),
    Decision.FAIL: ("failed", "; given up"),
    Decision.ABORT: ("failed", "; the run ends, since every trial would meet the same"),
    Decision.STOP: ("stopped", ""),
}


@dataclass
class Row:
    """One trial on the screen."""

    condition: str
    epochs: int
    state: str = "waiting"
    epoch: int = 0
    ccc: Ccc = field(default_factory=dict)
    epoch_s: list[float] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.state in ("done", "failed", "stopped")


class Progress:
    """An observer that tells people. Use as a context: the live table is there in between."""

    def __init__(self, trials: Sequence[Trial], slots: int, console: Console, quiet: bool = False) -> None:
        self.rows = {t.name: Row(t.condition, t.config.train.epochs) for t in trials}
        self.slots = slots
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
        self.rows[trial.name].state = "starting"
        self._say(f"{trial.name}  starts" + (f", attempt {number}" if number > 1 else ""))

    def event(self, trial: Trial, event: Event) -> None:
        row = self.rows[trial.name]
        if isinstance(event, Waiting):
            row.state = "waiting"
            self._say(f"{trial.name}  waits for {event.what}", important=True)
        elif isinstance(event, FeatureProgress):
            row.state = f"{event.kind} {event.done}/{event.shards}"
            self._say(f"{trial.name}  {event.kind}: {event.done} of {event.shards} shards in the cache")
        elif isinstance(event, TrialStarted):
            row.state = "training"
            self._say(f"{trial.name}  {_started(event)}")
            if event.note:
                self._say(f"{trial.name}  {event.note}", important=True)
        elif isinstance(event, EpochRecord):
            row.epoch, row.ccc = event.epoch, event.validation_ccc
            row.epoch_s.append(event.train_s + event.validation_s)
            best = "  best" if event.best else ""
            self._say(
                f"{trial.name}  epoch {event.epoch}/{event.epochs}  loss {event.train_loss:.3f}  validation "
                f"{self._scores(event.validation_ccc)}  {row.epoch_s[-1]:.1f} s{best}  | {self.outlook()}"
            )
        elif isinstance(event, TrialResult):
            row.state, row.ccc = "done", event.test_ccc
            scores = self._scores(event.test_ccc)
            self._say(f"{trial.name}  done: test {scores} at epoch {event.best_epoch}  | {self.outlook()}")

    def failed(self, trial: Trial, failure: Failure, decision: Decision) -> None:
        row = self.rows[trial.name]
        row.state, then = FATE[decision]
        row.epoch_s = []
        self._say(f"{trial.name}  {failure.kind.replace('_', ' ')}: {failure.message}{then}", important=True)

    def outlook(self) -> str:
        """`12 of 80 epochs, ETA 3 min`."""
        done = sum(row.epochs if row.state == "done" else row.epoch for row in self.rows.values())
        total = sum(row.epochs for row in self.rows.values())
        left = remaining_s(list(self.rows.values()), self.slots)
        return f"{done} of {total} epochs" + (f", ETA {duration(left)}" if left is not None else "")

    def _scores(self, ccc: Ccc) -> str:
        return "  ".join(f"{ccc_label(d)} {_number(ccc.get(d))}" for d in self.dimensions)

    def _say(self, text: str, important: bool = False) -> None:
        if self.live is None and (important or not self.quiet):
            self.console.print(f"{time.strftime('%H:%M:%S')}  {text}", markup=False, highlight=False, soft_wrap=True)
        elif self.live is not None and important:
            self.live.console.print(text, markup=False, highlight=False)

    def _table(self) -> Any:
        from rich.table import Table

        table = Table(caption=self.outlook(), caption_justify="left", box=None, pad_edge=False)
        for column in ("trial", "state", "epoch", *map(ccc_label, self.dimensions), "s/epoch"):
            table.add_column(column, justify="left" if column in ("trial", "state") else "right")
        for name, row in self.rows.items():
            scores = [_number(row.ccc.get(d)) for d in self.dimensions]
            seconds = f"{row.epoch_s[-1]:.1f}" if row.epoch_s else ""
            style = {"done": "green", "failed": "red", "waiting": "dim"}.get(row.state, "")
            table.add_row(name, row.state, f"{row.epoch}/{row.epochs}", *scores, seconds, style=style)
        return table


def remaining_s(rows: Sequence[Row], slots: int) -> float | None:
    """Seconds until the last trial ends, from the mean epoch of each condition; None before the first epoch.

    A condition without an epoch yet is taken to be as slow as the slowest one.
    """
    measured: dict[str, list[float]] = {}
    for row in rows:
        measured.setdefault(row.condition, []).extend(row.epoch_s)
    means = {condition: sum(s) / len(s) for condition, s in measured.items() if s}
    if not means:
        return None
    open_rows = [row for row in rows if not row.done]
    work = [(row.epochs - row.epoch) * means.get(row.condition, max(means.values())) for row in open_rows]
    return max(sum(work) / slots, max(work, default=0.0))


def teller(console: Console) -> Callable[[str], None]:
    """A function that prints one plain line."""
    return lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)


def _started(event: TrialStarted) -> str:
    groups = ", ".join(f"{name} {count:,}" for name, count in event.parameters.groups.items())
    resumed = (
        f", goes on in epoch {event.resumed_epoch} after update {event.resumed_update}"
        if (event.resumed_epoch, event.resumed_update) != (1, 0)
        else ""
    )
    return (
        f"on {event.device} in {event.precision}: {event.parameters.total:,} parameters ({groups}), "
        f"{event.parameters.trainable:,} trained, {event.updates_per_epoch} updates an epoch, saving takes about "
        f"{event.checkpoint_s:.1f} s ({event.checkpoint_mib:,.0f} MiB){resumed}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Seconds up to 90, then minutes up to 90, then hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
