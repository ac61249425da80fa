"""What is written down about epochs, trials and runs: typed records that go to JSON and come back the same.

A CCC is keyed by dimension name (`valence`, `arousal`, `dominance`) and `avg`; it is None where it is undefined.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from cvrunner.errors import ResultsError

Ccc = dict[str, float | None]
RunStatus = Literal["RUNNING", "COMPLETE", "INCOMPLETE", "STOPPED"]
Decision = Literal["better", "worse", "not distinguishable"]
TrialStatus = Literal["WAITING", "RUNNING", "DONE", "FAILED", "STOPPED"]


def ccc_label(dimension: str) -> str:
    """`CCC-V` for `valence`, `CCC-Avg` for `avg`."""
    return "CCC-Avg" if dimension == "avg" else f"CCC-{dimension[0].upper()}"


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
    weight_change: float
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
    """While training: share of the frames that are padding in the attention of an encoder that trains, or in the head's
    Mamba where it is frozen."""
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


class TrialStarted(Record):
    """A trial has its data and its model."""

    parameters: ParameterCount
    device: str
    precision: str
    updates_per_epoch: int
    resumed_epoch: int
    """The epoch that training goes on in; 1 at the very start."""
    resumed_update: int
    """Updates of that epoch already done."""
    checkpoint_s: float
    """About how long saving takes, and so stopping."""
    checkpoint_mib: float
    """Size of a checkpoint."""
    note: str | None = None
    """What was wrong with a newer checkpoint, where there was one."""


class WorkerStarted(Record):
    """An attempt has a process."""

    host: str
    node: str
    """Ray's id of the node."""
    pid: int


class Waiting(Record):
    """A trial cannot go on yet."""

    what: str
    """What it waits for."""


class FeatureProgress(Record):
    """The feature cache is being filled."""

    kind: str
    done: int
    shards: int


class TrainingFinished(Record):
    """The last event of a trial that has no test part, as in a sweep: its epochs are all there will be."""

    key: str
    best_epoch: int
    epochs_run: int


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
    weight_change: dict[str, float]
    """By group, at the last epoch."""
    layer_weights: dict[str, list[float]]
    """By dimension, at the best epoch."""
    batch_size: int = 0
    """Utterances encoded at once in the end: below the configured one after an out-of-memory error. 0: not recorded."""
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
    predictions_sha256: str = ""
    """Of predictions.csv; empty: not recorded."""


class Score(Record):
    """A CCC of one dimension, by the two statistics that are never mixed."""

    mean: float | None
    """`ccc_mean`: over the folds."""
    pooled: float | None
    """`ccc_pooled`: of all out-of-fold predictions together."""


class FloorRecord(Record):
    """What predictions without audio, and human raters, reach on the same folds."""

    scores: dict[str, dict[str, Score]] = {}
    """By predictor (`scenario`, `scenario+gender+side`), then dimension or `avg`."""
    reason: str | None = None
    """Why there are no scores, where there are none."""
    controlled: dict[str, dict[str, Score]] = {}
    """By condition, then dimension or `avg`: its CCC with the scenario's training mean taken out of both sides."""
    ceiling: dict[str, Score] = {}
    """By dimension: one rater held against the mean of the others."""
    ceiling_reason: str | None = None


class TrialState(Record):
    """How far a trial is, in run.json."""

    key: str
    condition: str
    fold: int
    seed: int
    status: TrialStatus = "WAITING"
    attempts: int = 0
    failures: dict[str, int] = {}
    """Of all attempts, by kind (docs/reliability.md)."""
    node: str | None = None
    """Ray's id of the node it was last on."""
    error: str | None = None


class Provenance(Record):
    """What a run, or a sweep, was made from, when and by what, and how it stands."""

    run: str
    """Its name."""
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


class RunRecord(Provenance):
    """run.json."""

    conditions: list[str]
    """The first is the baseline."""
    folds: list[int]
    seeds: list[int]
    trials: dict[str, TrialState]
    """By trial name, such as `frozen/fold-1/seed-0`."""
    floor: FloorRecord | None = None
    """The no-audio floor on the run's folds, once it is known."""
    links: dict[str, str] = {}
    """By name: addresses of the run in MLflow."""


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


class Interval(Record):
    """A bootstrap interval of a difference: whole dialogues resampled within sessions."""

    low: float
    high: float
    standard_error: float
    detectable: float
    """The smallest true difference that this design finds with 80 % power at the two-sided 5 % level."""
    level: float
    resamples: int


class CorrectedT(Record):
    """Nadeau and Bengio's corrected resampled t test over folds, each fold's difference averaged over seeds."""

    t: float
    p: float
    folds: int
    test_train_ratio: float


class SignCount(Record):
    """In how many folds the condition was above and below the baseline."""

    above: int
    below: int
    p: float
    """Two-sided, exact."""
    smallest_p: float
    """What the test can reach at best with so many folds."""


class Difference(Record):
    """One dimension, a condition minus the baseline, paired by fold and seed."""

    mean: float | None
    std: float | None
    """Over trials, n - 1."""
    by_trial: dict[str, float | None]
    pooled: float | None
    interval: Interval | None = None
    """Of `mean`."""
    pooled_interval: Interval | None = None
    """Of `pooled`."""
    interval_reason: str | None = None
    """Why there is no interval, where there is none."""
    corrected_t: CorrectedT | None = None
    signs: SignCount | None = None


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
    decisions: dict[str, Decision] = {}
    """By condition other than the baseline, on CCC-Avg."""
    groups: dict[str, dict[str, Ccc]] = {}
    """By condition, then part of the test data (`gender F`, `speaker 01M`, `scripted`): pooled, mean over seeds."""
    verdict: str
    """One sentence."""
