"""The sections of the configuration: every key with its default, its limits and, below it, its meaning and unit.

Defaults are defined here and nowhere else.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

DEMO_UTTERANCES: Final = 240
SMALLEST_DEMO: Final = 40
"""Default and minimum size of the demo corpus, for every command and function that writes it."""


def _tuple_of_list(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _check_unique(value: object) -> object:
    if isinstance(value, tuple) and (not value or len(set(value)) != len(value)):
        raise ValueError("must name one or more, each once")
    return value


# YAML has lists; a frozen model needs tuples.
LIST = BeforeValidator(_tuple_of_list)
UNIQUE = AfterValidator(_check_unique)
Dimension = Literal["valence", "arousal", "dominance"]
CccQuantity = Literal["ccc_valence", "ccc_arousal", "ccc_dominance", "ccc_avg"]
Condition = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=40)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of the configuration: immutable, without unknown keys, and strict: a quoted number is no number."""

    # The docstrings of the fields are the reference of the configuration in the documentation.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DemoCorpus(Section):
    seed: int = 0
    """Seed of the synthetic corpus."""
    utterances: Annotated[int, Field(ge=SMALLEST_DEMO, le=5000)] = DEMO_UTTERANCES
    """Number of utterances to synthesise."""


class AudformatConfig(Section):
    """Where a database in audformat has what a manifest would list (docs/corpora.md)."""

    tables: Annotated[tuple[str, ...], LIST] = ()
    """Tables with the labels; each of their files is an utterance. Their splits become the column `split`."""
    columns: dict[str, str] = {}
    """Column of the database by column of a manifest: `arousal: arousal` in each of these tables, `speaker:
    files.speaker` in another table, `gender: files.speaker:gender` a field of the labels of its scheme."""


CorpusFormat = Literal["iemocap", "manifest", "msp_podcast", "audformat", "demo"]
TABLES: Final = ("manifest", "msp_podcast", "audformat")
"""Formats that are one table of utterances."""


class CorpusConfig(Section):
    format: CorpusFormat = "demo"
    """`iemocap`: the published tree; `manifest`: a CSV or JSONL file; `msp_podcast`: the folder with Labels and Audios;
    `audformat`: the folder of a database; `demo`: a synthetic IEMOCAP, made if absent."""
    root: str = "demo-corpus"
    """The corpus folder or the manifest file. A relative path starts at the working directory."""
    labels: Literal["header", "observers", "all_raters"] = "header"
    """Label variant of IEMOCAP. Results with different variants are not comparable."""
    dimensions: Annotated[tuple[Dimension, ...], LIST, UNIQUE] = ("valence", "arousal")
    """The dimensions to predict."""
    scale: Annotated[tuple[float, float], LIST] = (1.0, 5.0)
    """Lowest and highest value of the rating scale. Training maps this range to 0..1."""
    resample: bool = False
    """Accept audio with any sample rate and number of channels, and convert it to 16 kHz mono (soxr)."""
    ratings: str | None = None
    """Long table of individual ratings of a manifest's or database's utterances, CSV or JSONL: `utterance`, `rater` and
    `valence`, `arousal` or `dominance`."""
    audformat: AudformatConfig = AudformatConfig()
    partial: bool = False
    """Accept an IEMOCAP that lacks whole sessions of the published one."""
    demo: DemoCorpus = DemoCorpus()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale must go from low to high, not {list(self.scale)}")
        if self.ratings is not None and self.format not in TABLES:
            raise ValueError(f"ratings are for a table of utterances ({', '.join(TABLES)}), not for {self.format}")
        return self


class FoldsConfig(Section):
    scheme: Literal["leave_one_session_out", "manifest_split"] = "leave_one_session_out"
    """`leave_one_session_out`: each fold tests one session and validates on the next one; `manifest_split`: one fold,
    as the manifest's `split` column says."""


class MambaConfig(Section):
    layers: Count = 2
    """Number of Mamba2 blocks over the frames of an utterance."""
    state_size: Count = 32
    """State size of each channel."""
    expand: Count = 2
    """Inner width of a block = expand x width."""
    head_dim: Count = 32
    """Number of channels that share one decay. Must divide expand x width."""
    conv_kernel: Count = 4
    """Kernel size of the convolution before the scan, in frames."""
    chunk_size: Count = 32
    """Number of frames per step of the scan. Affects speed only; 32 is the fastest on a CPU."""
    bidirectional: bool = False
    """Add a second set of blocks that reads the frames backwards."""


class EmaConfig(Section):
    """The exponential moving average over the turns of a dialogue (`protocol: dialogue`)."""

    decay: Annotated[float, Field(ge=0.6, le=0.9)] = 0.8
    """Initial value of `a` in `c_t = a c_(t-1) + (1 - a) u_t`."""
    learnable: bool = True
    """Learn `a`, one value per dimension, within 0.6..0.9."""


class LoraConfig(Section):
    """Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) in an encoder that is not frozen. Only they train."""

    rank: Annotated[int, Field(ge=0, le=1024)] = 0
    """Rank of the adapters, usually 4 to 16. 0: no adapters."""
    alpha: Count = 16
    """Adapters are scaled by alpha / rank."""
    dropout: Fraction = 0.1
    """Dropout probability of the input of the adapters."""
    targets: Annotated[tuple[Literal["q", "k", "v", "out"], ...], LIST, UNIQUE] = ("q", "k", "v", "out")
    """Projections of the self-attention that get adapters."""


class ModelConfig(Section):
    encoder: str = "demo"
    """`demo` (comes with cvrunner), a local `from_pretrained` folder, or a name on the Hugging Face hub."""
    revision: str | None = None
    """Revision of a hub encoder (branch, tag or commit). `null`: the default branch."""
    allow_tuned_encoder: bool = False
    """Accept an encoder that was probably tuned on emotion data, and state it in the report."""
    whisper_window: Literal["unpadded", "30s"] = "unpadded"
    """Whether Whisper's encoder runs on the utterance alone, or on a padded window, as it was trained: more time."""
    layers: Annotated[Literal["all"] | tuple[NonNegative, ...], LIST, UNIQUE] = "all"
    """Hidden states to mix; 0 is the input of the first transformer layer."""
    freeze_speech_encoder: bool = True
    """Freeze the encoder: no gradient, no dropout, features from the cache."""
    unfreeze_top_layers: Count | None = None
    """Number of transformer layers to train, or with `lora` to adapt, counted from the top, if the encoder is not
    frozen. The layers below them run once, for the cache. `null`: all layers; the convolutional front-end never
    trains."""
    frame_rate_hz: float = 12.5
    """Frame rate in Hz: 50, 25 or 12.5. Encoder frames (50 Hz) are averaged to this rate before the layer mix."""
    layer_norm: Literal["each_layer", "mix"] = "each_layer"
    """`each_layer`: normalise each hidden state before the mix, so that no layer dominates by its scale; `mix`:
    normalise the mixed states, as earlier versions did."""
    width: Count = 128
    """Width of the head."""
    dropout: Fraction = 0.1
    """Dropout probability in the head."""
    encoder_dropout: Fraction | None = None
    """Dropout probability in an encoder that is not frozen. `null`: the values of the checkpoint."""
    spec_augment: bool = False
    """Mask spans of frames while an encoder that is not frozen trains (SpecAugment)."""
    pooling: Literal["mean", "attentive_statistics"] = "attentive_statistics"
    """How the frames of an utterance become one vector; `attentive_statistics`: weighted mean and deviation."""
    protocol: Literal["utterance", "dialogue"] = "utterance"
    """`utterance`: predict each utterance by itself, as in the literature; `dialogue`: with the turns before it."""
    output: Literal["linear", "sigmoid"] = "linear"
    """`sigmoid` keeps predictions within the rating scale."""
    linear_path: bool = True
    """Average the Mamba's prediction with a linear one, fitted by ridge regression before the first epoch."""
    lora: LoraConfig = LoraConfig()
    mamba: MambaConfig = MambaConfig()
    ema: EmaConfig = EmaConfig()

    @field_validator("frame_rate_hz")
    @classmethod
    def _check_rate(cls, value: float) -> float:
        if value not in (50.0, 25.0, 12.5):
            raise ValueError(f"must be 50, 25 or 12.5, not {value:g}")
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
    """Number of utterances encoded at once. With exact accumulation it affects memory only."""
    accumulation_steps: Count = 1
    """Batches per update; batch_size x accumulation_steps = effective batch."""
    accumulation: Literal["exact", "averaged"] = "exact"
    """`exact`: the CCC of the effective batch; `averaged`: the mean CCC of its batches, as in the original script."""
    length_bucket_batches: Count = 1
    """Number of effective batches per length-sorted bucket. More means less padding, but a CCC over utterances of
    similar length teaches less. 1: effective batches are drawn at random, and only their micro-batches are sorted."""
    max_batch_s: Positive | None = None
    """Maximum audio encoded at once, in seconds: long utterances form smaller batches. `null`: no limit."""
    gradient_checkpointing: bool = False
    """Recompute the layers of a trained encoder in the backward pass: less memory, about a third more time."""
    epochs: Count = 20
    """Passes over the training utterances."""
    lr: Positive = 1e-4
    """Peak learning rate of the head, except its layer weights."""
    layer_weights_lr: Positive = 0.01
    """Peak learning rate of the layer weights. They are softmax logits: at the rate of the head they would stay
    uniform."""
    encoder_lr: Positive = 1e-5
    """Peak learning rate of an encoder that is not frozen, without adapters."""
    lora_lr: Positive = 1e-4
    """Peak learning rate of the adapters (`model.lora`)."""
    layer_lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate from each layer of the encoder, or its adapters, to the layer below. 1: all learn at
    one rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay of AdamW. Norms, biases, layer weights and state-space parameters have none."""
    grad_clip: Positive = 1.0
    """Maximum gradient norm over all trained parameters."""
    warmup_ratio: Fraction = 0.1
    """Share of the updates in which the learning rate rises; after them it falls to 0 as a cosine."""
    freeze_epochs: NonNegative = 0
    """Number of epochs in which only the head trains, before an encoder that is not frozen starts to."""
    unfreeze_layers_per_epoch: NonNegative = 0
    """Gradual unfreezing: number of layers, from the top, that start to train in each epoch after `freeze_epochs`.
    0: all at once."""
    early_stopping_patience: Count | None = None
    """Stop after this number of epochs without a better validation CCC. `null`: never."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per update of the exponential moving average of the weights used for evaluation. `null`: no average."""
    seeds: Annotated[tuple[NonNegative, ...], LIST, UNIQUE] = (0,)
    """Seeds; every condition and fold is trained once per seed."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the encoder. `auto`: bfloat16 on GPUs that support it, else float32. The head is always float32."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto`: a GPU if NVIDIA's driver or Ray shows one, else the CPU. A trial that cannot use its GPU fails."""
    deterministic: bool = False
    """Use deterministic algorithms on a GPU, which are slower and take more memory. A CPU always repeats itself."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.freeze_epochs >= self.epochs:
            raise ValueError(f"freeze_epochs {self.freeze_epochs} must be below epochs {self.epochs}")
        return self

    @property
    def effective_batch(self) -> int:
        """Number of utterances per update."""
        return self.batch_size * self.accumulation_steps


class RetriesConfig(Section):
    """Number of retries of a trial per kind of failure, counted since it last finished an epoch. Losing a node has no
    limit; a failure that would only repeat itself is never retried (docs/reliability.md)."""

    worker_died: NonNegative = 3
    """The trial's process died."""
    host_memory: NonNegative = 3
    """Ray's memory monitor ended the trial; from then on fewer trials run at a time."""
    gpu_memory: NonNegative = 1
    """GPU memory ran out outside an update. Within an update its micro-batches are split instead."""
    gpu: NonNegative = 2
    """The GPU reported an error. The retry uses another GPU if there is one."""
    io: NonNegative = 3
    """A disk or network error outlasted the built-in waiting."""
    non_finite: NonNegative = 1
    """The loss or a gradient was NaN or infinite. The retry starts from the last checkpoint."""
    bug: NonNegative = 1
    """Any other exception. If the same one occurs twice, it is not retried again."""


class ClusterConfig(Section):
    gpus_per_trial: Annotated[float, Field(gt=0, le=1)] = 1.0
    """GPUs per trial. Below 1, several trials share a GPU."""
    cpus_per_trial: Count = 1
    """CPU cores, and so threads, per trial. On a CPU the number of threads affects the last bits of the results."""
    max_concurrent: Count | None = None
    """Maximum number of trials at a time. `null`: as many as fit."""
    retries: RetriesConfig = RetriesConfig()
    preempt: bool = True
    """Pause a trial at the end of an epoch, so that a longer one can start, if the run then ends earlier. Results stay
    the same. Ignored with node_dir."""
    checkpoint_every_s: Annotated[float, Field(ge=0)] = 300.0
    """Maximum training time between two checkpoints within an epoch, in seconds. Every epoch ends with one anyway."""
    cache_dir: str = "~/.cache/cvrunner"
    """Folder of the feature cache, on each node."""
    node_dir: str | None = None
    """For nodes that share no disk: the folder in which a trial keeps its files until it ends and they are copied to
    `results.root`. `null`: trials write to `results.root` directly."""

    @property
    def pauses_trials(self) -> bool:
        """With node_dir a trial continues only on the node that has its checkpoint, so it must not be paused."""
        return self.preempt and self.node_dir is None


class TrackingConfig(Section):
    enabled: bool = True
    """Write to MLflow during the run. `sync` can also do it later, from the files."""
    uri: str | None = None
    """MLflow tracking URI, without a password. `null`: SQLite in `mlflow.db` in the results folder."""
    experiment: str = "cvrunner"
    """Name of the MLflow experiment; the protocol is appended to it."""

    @field_validator("uri")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        if uri is not None and "@" in urlsplit(uri).netloc:
            raise ValueError(
                "holds a user name or password, which the results would show; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD instead"
            )
        return uri


class ResultsConfig(Section):
    root: str = "results"
    """Folder of all runs. A relative path starts at the working directory, or in a Ray job at $CVRUNNER_HOME (default
    ~/cvrunner)."""


class Claim(Section):
    """A published or stated figure, to be compared with the measurements; it is never printed as a result."""

    name: str
    """Name of the claim in the report."""
    condition: str
    """Condition that the claim is about. If there is none of this name, the claim is not checked."""
    quantity: Literal["ccc_valence", "ccc_arousal", "ccc_avg", "memory_gb", "minutes_per_epoch"]
    """Claimed quantity."""
    low: float
    """The claimed figure, or the lower end of a range."""
    high: float | None = None
    """Upper end of a range. `null`: a single figure."""


class ReferenceConfig(Section):
    source: str = ""
    """Source of the claims."""
    claims: Annotated[tuple[Claim, ...], LIST] = ()


class VerdictConfig(Section):
    """How conditions are compared; declared before a run, recorded in its protocol (docs/protocol.md)."""

    primary: Dimension | Literal["avg"] = "avg"
    """Primary outcome, the only one that the sentence decides on: a dimension of the corpus, or `avg` for CCC-Avg."""
    margin: Positive = 0.02
    """Largest difference in CCC that counts as practically equal."""
    cluster: Literal["dialogue", "speaker"] | None = None
    """Unit that is resampled within sessions: the largest one that was sampled. `null`: `speaker` if a session of the
    corpus has more than two speakers, else `dialogue`."""


class VerifyConfig(Section):
    """The quick check before a long run: one fold of one condition."""

    fold: Count = 1
    """Fold to train."""
    condition: Condition | None = None
    """Condition to train. `null`: `unfrozen` if there is one, else the last."""
    target: dict[CccQuantity, Annotated[float, Field(ge=-1, le=1)]] = {}
    """Minimum validation CCC per quantity, such as `ccc_valence: 0.62`. Empty: no target, so a trained fold passes."""

    @property
    def least_ccc(self) -> dict[str, float]:
        """Minimum validation CCC by dimension or `avg`."""
        return {quantity.removeprefix("ccc_"): least for quantity, least in self.target.items()}
