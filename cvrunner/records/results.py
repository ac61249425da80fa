"""Typed records of epochs, trials and runs, stored as JSON.

CCCs are keyed by dimension (`valence`, `arousal`, `dominance`) and `avg`; None if undefined.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from cvrunner.errors import ResultsError
from cvrunner.records import legacy

Ccc = dict[str, float | None]
RunStatus = Literal["RUNNING", "COMPLETE", "INCOMPLETE", "STOPPED", "INTERRUPTED"]
TrialStatus = Literal["WAITING", "RUNNING", "DONE", "FAILED", "STOPPED", "INTERRUPTED"]
"""INTERRUPTED: its process was killed, so that nobody could write how it ended."""


def ccc_label(dimension: str) -> str:
    """Return `CCC-V` for `valence` and `CCC-Avg` for `avg`."""
    return "CCC-Avg" if dimension == "avg" else f"CCC-{dimension[0].upper()}"


class Record(BaseModel):
    """A frozen record; unknown fields of newer versions are ignored."""

    # JSON has no NaN: an undefined value must be None, and be seen to be so by the type checker.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    renames: ClassVar[legacy.Renames] = {}
    """Old names to replace on read."""

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """Parse a record, also one that an earlier version wrote. Raises ResultsError naming `where`."""
        try:
            if cls.renames:
                # Text that is not JSON is left to pydantic, whose message names the position.
                with contextlib.suppress(ValueError, RecursionError):
                    text = json.dumps(legacy.with_current_names(json.loads(text), cls.renames))
            return cls.model_validate_json(text)
        except ValidationError as error:
            # One is enough: the user did not write the file and cannot mend it field by field.
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ResultsError(f"{where}: not a {cls.__name__}: {place}: {first['msg']}") from None

    def to_json(self) -> str:
        """Return indented JSON with a newline at the end."""
        return self.model_dump_json(indent=2) + "\n"


class GroupRecord(Record):
    """One parameter group in one epoch."""

    learning_rate: float
    gradient_norm: float
    """Mean over the epoch's updates, before clipping."""
    weight_change: float
    """`||w - w0|| / ||w0||` since the start of training."""
    implied_change: float | None = None
    """Weight change that the learning rates so far imply: that of AdamW if the gradient were noise without a direction
    (training/freezing.py). None: not recorded."""


class EpochRecord(Record):
    """One epoch of one trial: a journal line, an MLflow step, a line in the terminal."""

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
    """While training: share of padding among the frames in the attention of a trainable encoder, or, with a frozen
    encoder, in the head's Mamba."""
    peak_memory_mib: float
    """GPU memory; on a CPU, memory of the process."""
    groups: dict[str, GroupRecord]
    layer_weights: dict[str, list[float]]
    """Softmax weights over the mixed layers, by dimension."""
    # A field that is newer than the first files needs a default, here and below, or those cannot be read any more.
    ema_decay: dict[str, float] = {}
    """By dimension; only with `protocol: dialogue`."""


class ParameterCount(Record):
    total: int
    trainable: int
    """Trained in some epoch of the schedule."""
    groups: dict[str, int]


class TrialStarted(Record):
    """Event: a trial has its data and its model."""

    parameters: ParameterCount
    device: str
    precision: str
    updates_per_epoch: int
    resumed_epoch: int
    """The epoch in which training continues; 1 for a new trial."""
    resumed_update: int
    """Updates of that epoch that are already done."""
    checkpoint_s: float
    """Estimated time to save a checkpoint, and so to stop."""
    checkpoint_mib: float
    """Size of a checkpoint."""
    note: str | None = None
    """Why a newer checkpoint could not be used, if there was one."""


class WorkerStarted(Record):
    """Event: an attempt has a process."""

    host: str
    node: str
    """Ray's node id."""
    pid: int


class Waiting(Record):
    """Event: a trial cannot continue yet."""

    what: str
    """What it is waiting for."""


class FeatureProgress(Record):
    """Event: the feature cache is being filled."""

    kind: str
    done: int
    shards: int


class Ending(Record):
    """Event: the work on a trial or a linear probe has ended as planned."""

    key: str


class TrainingFinished(Ending):
    """Event: a trial without a test part, as in a sweep or in `verify`, has finished its last epoch."""

    best_epoch: int
    epochs_run: int
    validation_ccc: Ccc = {}
    """At the best epoch."""


class Result(Ending):
    """A result.json, written once, after a test set was scored."""

    predictions_sha256: str = ""
    """SHA-256 of predictions.csv; empty: not recorded."""


class ProbeResult(Result):
    """The result of the linear probe of one fold."""

    fold: int
    penalty: dict[str, float]
    """Ridge penalty by dimension, in units of the number of features; chosen by validation CCC."""
    stretch: dict[str, float]
    """Factor on the deviation from the training mean by dimension, chosen with the penalty."""
    validation_ccc: Ccc
    test_ccc: Ccc
    train_utterances: int
    """Number that the probe was fitted on."""
    validation_utterances: int
    test_utterances: int
    layers: int
    """Number of hidden states; all of the encoder's."""
    features: int
    """Mean and standard deviation of every hidden state."""
    split_digest: str
    corpus_digest: str
    encoder: str
    encoder_digest: str
    device: str
    precision: str
    """Precision of the encoder."""
    total_s: float


class TrialResult(Result):
    """The result of one trial, written once, after its test set was scored."""

    renames = legacy.RESULT
    condition: str
    fold: int
    seed: int
    best_epoch: int
    epochs_run: int
    validation_ccc: Ccc
    """At the best epoch."""
    test_ccc: Ccc
    collapsed: list[str]
    """Dimensions whose test predictions have a standard deviation below 5 % of that of the labels. Earlier
    versions listed only those whose test predictions are constant."""
    train_utterances: int
    validation_utterances: int
    test_utterances: int
    parameters: ParameterCount
    weight_change: dict[str, float]
    """By parameter group, at the last epoch."""
    weight_change_best: dict[str, float] = {}
    """By parameter group, at the best epoch, whose weights were tested; empty: not recorded."""
    barely_moved: dict[str, float] = {}
    """Groups that moved far less than their learning rates imply, by the best epoch or the last one, with the implied
    change at that epoch."""
    layer_weights: dict[str, list[float]]
    """By dimension, at the best epoch."""
    batch_size: int = 0
    """Utterances encoded at once by the update that needed the smallest micro-batches: less than configured after an
    out-of-memory error. 0: not recorded."""
    memory: dict[str, list[float]] = {}
    """GPU memory of a micro-batch in `training` and `prediction`, by which updates were cut: constant, bytes per second
    of audio, bytes per square second of each utterance, and the limit. Empty: cut by count."""
    labels_outside_scale: int
    split_digest: str
    corpus_digest: str
    encoder: str
    encoder_digest: str
    encoder_tuned: str | None = None
    """Why the encoder was probably tuned on emotion data, which `model.allow_tuned_encoder` accepted."""
    device: str
    precision: str
    peak_memory_mib: float
    train_s: float
    """Training time over all attempts."""
    total_s: float
    """Duration of the last attempt."""
    versions: dict[str, str]


class Score(Record):
    """The CCC of one dimension, as two statistics that are never mixed."""

    # They differ: the CCC counts a shift between folds as an error only if their predictions are pooled.
    mean: float | None
    """`ccc_mean`: mean over the folds."""
    pooled: float | None
    """`ccc_pooled`: of all out-of-fold predictions together."""


class RaterScore(Score):
    """A CCC that follows from the agreement of raters."""

    low: float | None = None
    """Lower end of the 95 % interval of `mean` over raters; None: see `Panel.interval_reason`."""
    high: float | None = None


class Panel(Record):
    """What the noise of the raters leaves to reach, on the test sets of the folds (verdict/ceiling.py)."""

    raters: float
    """Ratings per utterance, harmonic mean."""
    label_noise: dict[str, float | None]
    """Standard error of a label, the mean of its raters, by dimension; on the rating scale."""
    scores: dict[str, dict[str, RaterScore]]
    """`attainable`, `attainable (stretched)` and `second panel`, by dimension or `avg`."""
    interval_reason: str | None = None
    """Why there are no intervals, if there are none."""


class FloorRecord(Record):
    """Scores of predictions without audio, and of human raters, on the same folds."""

    scores: dict[str, dict[str, Score]] = {}
    """By predictor (`scenario`, `scenario+gender+side`, each also ` (stretched)`), then dimension or `avg`."""
    reason: str | None = None
    """Why there are no scores, if there are none."""
    controlled: dict[str, dict[str, Score]] = {}
    """By condition, then dimension or `avg`: CCC with the scenario means of the test set subtracted from both sides."""
    controlled_constant: dict[str, Score] = {}
    """The same for a constant prediction."""
    ceiling: dict[str, Score] = {}
    """One rater compared with the mean of the others, by dimension."""
    ceiling_reason: str | None = None
    panel: Panel | None = None
    """None: no utterance has two raters, or the run is of an earlier version."""


class TrialState(Record):
    """State of a trial in run.json."""

    key: str
    condition: str
    fold: int
    seed: int
    status: TrialStatus = "WAITING"
    attempts: int = 0
    # By kind: a lost worker says nothing about the trial, while NaN does; one total would hide which it was.
    failures: dict[str, int] = {}
    """Count over all attempts, by kind (docs/reliability.md)."""
    # With node_dir its checkpoint is only there.
    node: str | None = None
    """Ray's id of the last node it ran on."""
    error: str | None = None
    trained: TrainingFinished | None = None
    """Set if `verify` has trained the trial without scoring its test set, which is still to be done."""


class Provenance(Record):
    """Origin and status of a run or a sweep."""

    run: str
    """Name."""
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
    """Whether utterances are predicted by themselves or in a dialogue: `model.protocol`."""
    corpus_warnings: list[str] = []
    """What `audit` counted in the corpus, one line per kind."""


class RunRecord(Provenance):
    """run.json."""

    renames = legacy.RUN
    conditions: list[str]
    """The first one is the baseline."""
    folds: list[int]
    seeds: list[int]
    trials: dict[str, TrialState]
    """By trial name, such as `frozen/fold-1/seed-0`."""
    # It takes the corpus, which is not there when a report is built from the run's files alone.
    floor: FloorRecord | None = None
    """The no-audio floor on the run's folds, if computed."""
    links: dict[str, str] = {}
    """Addresses of the run in MLflow, by name."""
    protocol_sha256: str = ""
    """SHA-256 of the first version in protocol.json; empty in runs of earlier versions."""
    looks_before: int | None = None
    """Number of looks at test scores of the corpus in the results folder before the run's last one."""

    @property
    def folds_share_test(self) -> bool:
        """Whether folds may have been tested on the same utterances, as those of an `Evaluation`."""
        return False

    @property
    def folds_have_own_seeds(self) -> bool:
        """Whether the random draws of two folds are independent: before 0.2.0, all folds of a seed shared them."""
        numbers = [int(number) for number in re.findall(r"\d+", self.cvrunner_version)[:2]]
        return numbers >= [0, 2]
