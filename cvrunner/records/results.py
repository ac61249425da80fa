"""What is written down about epochs, trials and runs: typed records that go to JSON and come back the same.

A CCC is keyed by dimension name (`valence`, `arousal`, `dominance`) and `avg`; it is None where it is undefined.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from cvrunner.errors import ResultsError

Ccc = dict[str, float | None]
RunStatus = Literal["RUNNING", "COMPLETE", "INCOMPLETE", "STOPPED"]
TrialStatus = Literal["WAITING", "RUNNING", "DONE", "FAILED", "STOPPED"]


class Record(BaseModel):
    """A frozen record; unknown fields of newer versions are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """Parse a record. Raises ResultsError naming `where`."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ResultsError(f"{where}: not a {cls.__name__}: {place}: {first['msg']}") from None

    def to_json(self) -> str:
        """Indented JSON with a newline at the end."""
        return self.model_dump_json(indent=2) + "\n"


class GroupRecord(Record):
    """One parameter group in one epoch."""

    learning_rate: float
    gradient_norm: float
    """Mean over the epoch's updates, before clipping."""
    movement: float
    """`||w - w0|| / ||w0||` since the start of training."""


class EpochRecord(Record):
    """One epoch of one trial: a journal line, an MLflow step, a line on the screen."""

    epoch: int
    """From 1."""
    epochs: int
    updates: int
    """Optimizer steps since the start of training."""
    train_loss: float
    """Mean over the epoch's updates."""
    validation_ccc: Ccc
    best: bool
    """Whether the validation CCC-Avg is the best so far."""
    train_s: float
    validation_s: float
    utterances_per_s: float
    """While training."""
    padding_share: float
    """Share of the encoder's or head's frames that are padding, while training."""
    peak_memory_mib: float
    """Of the GPU; on a CPU of the process."""
    groups: dict[str, GroupRecord]
    layer_weights: dict[str, list[float]]
    """By dimension: softmax weights over the mixed layers."""
    ema_decay: dict[str, float] = {}
    """By dimension; with `protocol: dialogue`."""


class ParameterCount(Record):
    total: int
    trainable: int
    """Trained at any time of the schedule."""
    groups: dict[str, int]


class TrialResult(Record):
    """The outcome of one trial, written once, after its test set was scored."""

    key: str
    condition: str
    fold: int
    seed: int
    best_epoch: int
    epochs_run: int
    validation_ccc: Ccc
    """At the best epoch."""
    test_ccc: Ccc
    collapsed: list[str]
    """Dimensions whose test predictions are constant."""
    train_utterances: int
    validation_utterances: int
    test_utterances: int
    parameters: ParameterCount
    movement: dict[str, float]
    """By group, at the last epoch."""
    layer_weights: dict[str, list[float]]
    """By dimension, at the best epoch."""
    labels_outside_scale: int
    split_digest: str
    corpus_digest: str
    encoder: str
    encoder_digest: str
    device: str
    precision: str
    peak_memory_mib: float
    train_s: float
    """All epochs, over all attempts."""
    total_s: float
    """This attempt, start to end."""
    versions: dict[str, str]


class TrialState(Record):
    """How far a trial is, in run.json."""

    key: str
    condition: str
    fold: int
    seed: int
    status: TrialStatus = "WAITING"
    attempts: int = 0
    error: str | None = None


class RunRecord(Record):
    """run.json: what this run is and how it stands."""

    run: str
    key: str
    status: RunStatus
    started_at: str
    finished_at: str | None = None
    command: list[str]
    host: str
    cvrunner_version: str
    corpus: str
    """One line: utterances, sessions, speakers, label variant."""
    split_digest: str
    corpus_digest: str
    synthetic: bool
    """Whether the corpus is cvrunner's own synthetic one."""
    dimensions: list[str]
    protocol: str
    conditions: list[str]
    """The first is the baseline."""
    folds: list[int]
    seeds: list[int]
    trials: dict[str, TrialState]
    """By trial name, such as `frozen/fold-1/seed-0`."""


class Aggregate(Record):
    """One dimension of one condition over all folds and seeds."""

    mean: float | None
    """`ccc_mean`: over trials."""
    std: float | None
    """`ccc_std`: over trials, n - 1; None for one trial."""
    pooled: float | None
    """`ccc_pooled`: of all out-of-fold predictions together, mean over seeds."""
    by_trial: dict[str, float | None]
    """By `fold-<k>/seed-<s>`."""


class Difference(Record):
    """One dimension, a condition minus the baseline, paired by fold and seed."""

    mean: float | None
    std: float | None
    by_trial: dict[str, float | None]
    pooled: float | None


class Summary(Record):
    """summary.json: the comparison, from which table, report and MLflow are made."""

    run: str
    status: RunStatus
    missing: list[str]
    """Trials without a result; while there are any, there are no aggregates."""
    baseline: str
    scores: dict[str, dict[str, Aggregate]]
    """By condition, then dimension or `avg`."""
    differences: dict[str, dict[str, Difference]]
    """By condition other than the baseline, then dimension or `avg`."""
    verdict: str
