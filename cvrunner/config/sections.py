"""The sections of the configuration: every key with its default, its limits and, below it, its meaning and unit.

Defaults live here and nowhere else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

Dimension = Literal["valence", "arousal", "dominance"]
Condition = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=40)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Retries = Annotated[int, Field(ge=0)]
LISTED = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""YAML has lists, and what is frozen has tuples."""
CccQuantity = Literal["ccc_valence", "ccc_arousal", "ccc_dominance", "ccc_avg"]


class Section(BaseModel):
    """A part of the configuration: frozen, every key known, numbers not parsed out of strings."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DemoCorpus(Section):
    seed: int = 0
    """Seed of the synthetic corpus."""
    utterances: Annotated[int, Field(ge=40, le=5000)] = 480
    """How many utterances to synthesise, about."""


class CorpusConfig(Section):
    format: Literal["iemocap", "manifest", "demo"] = "demo"
    """`iemocap`: the published tree; `manifest`: a CSV or JSONL file; `demo`: a synthetic IEMOCAP, made if absent."""
    root: str = "demo-corpus"
    """The corpus folder, or the manifest file. Relative: to the working directory."""
    labels: Literal["header", "observers", "all_raters"] = "header"
    """IEMOCAP label variant; they are not comparable with each other."""
    dimensions: Annotated[tuple[Dimension, ...], LISTED] = ("valence", "arousal")
    """The dimensions to predict."""
    scale: Annotated[tuple[float, float], LISTED] = (1.0, 5.0)
    """Lowest and highest value of the rating scale; labels are scaled to 0..1 by it for training."""
    resample: bool = False
    """Accept audio of any rate and any number of channels, convert to 16 kHz mono (soxr)."""
    demo: DemoCorpus = DemoCorpus()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.dimensions or len(set(self.dimensions)) != len(self.dimensions):
            raise ValueError("dimensions must name one dimension or more, each once")
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale must go from low to high, not {list(self.scale)}")
        return self


class FoldsConfig(Section):
    scheme: Literal["leave_one_session_out", "manifest_split"] = "leave_one_session_out"
    """`leave_one_session_out`: test a session, validate on the next; `manifest_split`: the manifest's own, one fold."""


class MambaConfig(Section):
    layers: Count = 2
    """Mamba2 blocks over the frames of an utterance."""
    state_size: Count = 32
    """Values that each channel of a block remembers."""
    expand: Count = 2
    """Inner width = expand x width."""
    head_dim: Count = 32
    """Channels that share one decay; divides expand x width."""
    conv_kernel: Count = 4
    """Steps that the convolution before the scan sees."""
    chunk_size: Count = 32
    """Steps of the scan done at once; speed only. 32 is the fastest on a CPU."""
    bidirectional: bool = False
    """A second set of blocks reads the frames backwards."""


class EmaConfig(Section):
    """The exponential moving average over the turns of a dialogue (`protocol: dialogue`)."""

    decay: Annotated[float, Field(ge=0.6, le=0.9)] = 0.8
    """`a` in `c_t = a c_(t-1) + (1 - a) u_t`, at the start."""
    learnable: bool = True
    """Learn `a`, one value per dimension, within 0.6..0.9."""


class ModelConfig(Section):
    encoder: str = "demo"
    """`demo` (comes with cvrunner), a local `from_pretrained` folder, or a hub name."""
    revision: str | None = None
    """Revision of a hub encoder (branch, tag or commit)."""
    layers: Annotated[Literal["all"] | tuple[Annotated[int, Field(ge=0)], ...], LISTED] = "all"
    """Hidden states to mix: 0 is the input of the first transformer layer."""
    freeze_speech_encoder: bool = True
    """Frozen: no gradient, no dropout, features from the cache."""
    unfreeze_top_layers: Count | None = None
    """Of an unfrozen encoder, so many transformer layers from the top train, and what is below them stays frozen and
    runs once, for the cache; null: all of it but the convolutional front-end trains."""
    frame_rate_hz: float = 12.5
    """50, 25 or 12.5: encoder frames (50 a second) are averaged to this rate before the layer mix."""
    width: Count = 128
    """Width of the head."""
    dropout: Fraction = 0.1
    """Dropout of the head."""
    encoder_dropout: Fraction | None = None
    """Dropout of an unfrozen encoder; null: the checkpoint's own values."""
    spec_augment: bool = False
    """Mask spans of frames of an unfrozen encoder while training (SpecAugment)."""
    pooling: Literal["mean", "attentive_statistics"] = "attentive_statistics"
    """How the frames of an utterance become one vector; attentive statistics: weighted mean and deviation."""
    protocol: Literal["utterance", "dialogue"] = "utterance"
    """`utterance`: each by itself, as in the literature; `dialogue`: with the turns before it."""
    output: Literal["linear", "sigmoid"] = "linear"
    """`sigmoid` keeps predictions within the scale."""
    mamba: MambaConfig = MambaConfig()
    ema: EmaConfig = EmaConfig()

    @field_validator("frame_rate_hz")
    @classmethod
    def _known_rate(cls, value: float) -> float:
        if value not in (50.0, 25.0, 12.5):
            raise ValueError(f"must be 50, 25 or 12.5, not {value:g}")
        return value

    @field_validator("layers")
    @classmethod
    def _layers_once(cls, value: object) -> object:
        if isinstance(value, tuple) and (not value or len(set(value)) != len(value)):
            raise ValueError("layers must name one layer or more, each once")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.mamba.expand * self.width) % self.mamba.head_dim:
            raise ValueError(
                f"mamba.head_dim {self.mamba.head_dim} must divide expand x width = {self.mamba.expand * self.width}"
            )
        return self


class TrainConfig(Section):
    batch_size: Count = 8
    """Utterances encoded at once: memory only, when accumulation is exact."""
    accumulation_steps: Count = 1
    """Batches per update; batch_size x accumulation_steps = effective batch."""
    accumulation: Literal["exact", "averaged"] = "exact"
    """`exact`: the CCC of the effective batch; `averaged`: mean CCC of the batches, as the old script."""
    length_bucket_batches: Count = 1
    """Effective batches are cut from length-sorted pools of so many: less padding, but a CCC of utterances of like
    length teaches less. 1: drawn at random; only the micro-batches inside are of like length."""
    max_batch_s: Positive | None = None
    """Most seconds of audio encoded at once: long utterances then make smaller batches. Memory only, as batch_size;
    null: no limit."""
    gradient_checkpointing: bool = False
    """Compute an unfrozen encoder's layers again in the backward pass: less memory, about a third more time."""
    epochs: Count = 20
    """Passes over the training utterances."""
    lr: Positive = 1e-4
    """Learning rate of everything but the encoder."""
    encoder_lr: Positive = 1e-5
    """Learning rate of an unfrozen encoder."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW; never on norms, biases, layer weights and state-space parameters."""
    grad_clip: Positive = 1.0
    """Largest gradient norm over all trained parameters."""
    warmup_ratio: Fraction = 0.1
    """Share of the updates with a rising learning rate; then cosine to 0."""
    freeze_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs that train the head alone before an unfrozen encoder joins."""
    early_stopping_patience: Count | None = None
    """Stop after so many epochs without a better validation CCC; null: never."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Evaluate with an exponential moving average of the weights, of this decay per update; null: off."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], LISTED] = (0,)
    """Every condition and fold is trained once per seed."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the encoder; auto: bfloat16 on GPUs that have it, else float32. The head is float32."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must name one seed or more, each once")
        if self.freeze_epochs >= self.epochs:
            raise ValueError(f"freeze_epochs {self.freeze_epochs} must be below epochs {self.epochs}")
        return self

    @property
    def effective_batch(self) -> int:
        """Utterances per update."""
        return self.batch_size * self.accumulation_steps


class RetriesConfig(Section):
    """How often a trial is tried again after a failure of a kind, counted since it last finished an epoch. The loss of
    a node has no limit; what would only repeat itself is never tried again (docs/reliability.md)."""

    worker_died: Retries = 3
    """Its process died."""
    host_memory: Retries = 3
    """Ended by Ray's memory monitor; from then on fewer trials run at a time."""
    gpu_memory: Retries = 1
    """GPU memory ran out outside of an update. Within one, the micro-batch is halved instead."""
    gpu: Retries = 2
    """The GPU reported an error; tried again on another one where there is one."""
    io: Retries = 3
    """A disk or network error that lasted longer than the waiting for it."""
    non_finite: Retries = 1
    """Loss or gradient was not a number; back to the last checkpoint."""
    bug: Retries = 1
    """Any other exception; the same one twice is never tried again."""


class ClusterConfig(Section):
    gpus_per_trial: Annotated[float, Field(gt=0, le=1)] = 1.0
    """GPUs a trial holds; below 1, small trials share one."""
    cpus_per_trial: Count = 1
    """Cores, and so threads, of a trial. On a CPU part of what makes results bit-identical."""
    max_concurrent: Count | None = None
    """Most trials at a time; null: as many as fit."""
    retries: RetriesConfig = RetriesConfig()
    preempt: bool = True
    """Trials may give way to one another at the ends of epochs, where the run then ends earlier; what is trained stays
    the same. Off in any case with node_dir."""
    checkpoint_every_s: Annotated[float, Field(ge=0)] = 300.0
    """Longest training time between two checkpoints within an epoch; there is one after every epoch in any case."""
    cache_dir: str = "~/.cache/cvrunner"
    """Where features are kept, on each node."""
    node_dir: str | None = None
    """For nodes that share no disk: where a trial keeps its files on its node until they are brought to `results.root`
    at its end. null: in `results.root` itself."""


class TrackingConfig(Section):
    enabled: bool = True
    """Write to MLflow; `sync` can do it later from the files."""
    uri: str | None = None
    """MLflow tracking URI; null: sqlite in `mlflow.db` in the results folder."""
    experiment: str = "cvrunner"
    """Experiment name; the protocol is added to it."""


class ResultsConfig(Section):
    root: str = "results"
    """Folder of all runs. Relative: to the working directory; in a Ray job, to $CVRUNNER_HOME (default ~/cvrunner)."""


class Claim(Section):
    """A figure that somebody stated, to be held against what is measured; never printed as a result."""

    name: str
    """What the report calls it."""
    condition: str
    """The condition that it is about; without one of this name it is not checked."""
    quantity: Literal["ccc_valence", "ccc_arousal", "ccc_avg", "memory_gb", "minutes_per_epoch"]
    """What was claimed of it."""
    low: float
    """The figure, or the lower end of the range."""
    high: float | None = None
    """Upper end where the claim is a range."""


class ReferenceConfig(Section):
    source: str = ""
    """Where the claims come from."""
    claims: Annotated[tuple[Claim, ...], LISTED] = ()


class VerifyConfig(Section):
    """The quick check before a long run: one fold of one condition."""

    fold: Count = 1
    """The fold that is trained."""
    condition: Condition | None = None
    """The condition that is trained; null: `unfrozen` where there is one, else the last."""
    target: dict[CccQuantity, Annotated[float, Field(ge=-1, le=1)]] = {}
    """The least test CCC by quantity, such as `ccc_valence: 0.62`; empty: no target, all that is trained is good."""

    @property
    def least_ccc(self) -> dict[str, float]:
        """The target by dimension or `avg`."""
        return {quantity.removeprefix("ccc_"): least for quantity, least in self.target.items()}


class SearchRange(Section):
    """Fractions between two ends, drawn evenly; for whole numbers there are `choices`."""

    low: float
    high: float
    scale: Literal["linear", "log"] = "linear"
    """`log`: drawn evenly in the logarithm, as suits learning rates."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"scale log needs low above 0, not {self.low:g}")
        return self

    @property
    def examples(self) -> tuple[Any, ...]:
        """Values that tell whether a key can take all of them: one that is not whole, and the ends."""
        return self.low + (self.high - self.low) / 3.1, self.low, self.high


class SearchChoices(Section):
    """Some values, each as likely as the others."""

    choices: Annotated[tuple[Any, ...], LISTED]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.choices:
            raise ValueError("choices must name one value or more")
        return self

    @property
    def examples(self) -> tuple[Any, ...]:
        """All of them."""
        return self.choices


RANGE, CHOICES = "(range)", "(choices)"
"""Tags of the union: with brackets, so that no message shows them as keys."""


def _kind_of_search(value: object) -> str:
    chosen = "choices" in value if isinstance(value, dict) else isinstance(value, SearchChoices)
    return CHOICES if chosen else RANGE


Search = Annotated[
    Annotated[SearchRange, Tag(RANGE)] | Annotated[SearchChoices, Tag(CHOICES)], Discriminator(_kind_of_search)
]


class TuneConfig(Section):
    """A search for better settings of one condition, by the validation parts of the folds (docs/tuning.md)."""

    num_samples: Count = 12
    """Number of settings; the first is the configuration as it is, the others are drawn."""
    condition: Condition | None = None
    """The condition whose settings are searched; null: `unfrozen` where there is one, else the last."""
    folds: Annotated[tuple[Count, ...] | None, LISTED] = None
    """The folds that a setting is trained on; null: all."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the drawing; training uses the first of `train.seeds`."""
    epochs: Count | None = None
    """Of each setting; null: `train.epochs`."""
    grace_period: Count = 3
    """No setting is stopped before so many epochs."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3.0
    """At epochs grace, grace x factor and so on only the best 1/factor of the settings that came so far go on."""
    search_space: dict[str, Search] = {
        "train.encoder_lr": SearchRange(low=5e-6, high=5e-5, scale="log"),
        "train.lr": SearchRange(low=3e-5, high=1e-3, scale="log"),
        "train.grad_clip": SearchChoices(choices=(0.3, 1.0)),
        "model.unfreeze_top_layers": SearchChoices(choices=(None, 2, 4)),
    }
    """Which keys of `model` and `train` are searched and how: `{low, high, scale: linear or log}` or `{choices: []}`.
    Naming it replaces all of it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.folds is not None and (not self.folds or len(set(self.folds)) != len(self.folds)):
            raise ValueError("folds must name one fold or more, each once")
        if not self.search_space:
            raise ValueError("search_space must name one key or more")
        return self


NOT_SEARCHED = {"train.seeds": "averaged over, not searched", "train.epochs": "set by tune.epochs"}
"""Keys of `train` that a sweep cannot search, and why."""
