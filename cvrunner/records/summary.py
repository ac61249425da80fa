"""Typed records of a comparison: scores, differences at two levels, and the summary of a run, stored as JSON."""
# ruff: noqa: RUF012 (pydantic copies defaults)

from __future__ import annotations

from typing import Literal

from cvrunner.records.results import Ccc, Record, RunRecord, RunStatus, Score

Decision = Literal[
    "better",
    "worse",
    "better, but by less than the margin",
    "worse, but by less than the margin",
    "practically equal",
    "not distinguishable",
    "no claim",
]


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
    """A confidence interval."""

    low: float
    high: float
    level: float

    def __str__(self) -> str:
        """Return `+0.0102 to +0.0522`."""
        return f"{self.low:+.4f} to {self.high:+.4f}"


class CorpusLevel(Record):
    """Level 1: what holds on this corpus. Covers the choice of test dialogues and the randomness of training."""

    # Sessions and training sets are given: another corpus, or new speakers, are level 2's question.
    interval: Interval
    """95 %; simultaneous if several conditions are compared with the baseline."""
    equivalence: Interval
    """90 %: within the margin on both sides, the conditions are practically equal (two one-sided tests at 5 %)."""
    standard_error: float
    df: float
    """Degrees of freedom (Welch-Satterthwaite)."""
    p: float
    """Two-sided; adjusted if several conditions are compared with the baseline."""
    holm_p: float | None = None
    """Of a secondary outcome: adjusted for the number of secondary outcomes and conditions (Holm)."""
    detectable: float
    """Smallest true difference that the 95 % interval finds with 80 % power."""
    equality_power: float
    """Probability of finding practical equality if the true difference is 0."""
    dialogues_sd: float
    """Standard deviation of the mean difference due to the choice of test dialogues (or speakers)."""
    training_sd: float
    """Standard deviation of the mean difference due to the randomness of training."""
    sessions_sd: float | None
    """Standard deviation of the true difference over sessions; None for one fold."""
    one_more_seed: float
    """Half-width of the 95 % interval with one more seed."""
    other_unit: Interval | None = None
    """The 95 % interval if the other unit (dialogue or speaker) is resampled."""


class SpeakersLevel(Record):
    """Level 2: what can be expected for new speakers. Nadeau and Bengio's corrected t over folds."""

    interval: Interval
    """95 %."""
    t: float
    df: int
    p: float
    folds: int
    test_train_ratio: float
    detectable: float
    """Smallest true difference that the interval finds with 80 % power."""
    worse: float
    """Probability that the true difference is below minus the margin (Bayesian correlated t)."""
    equal: float
    """Probability that it is within the margin."""
    better: float
    """Probability that it is above the margin."""
    one_more_session: float
    """Half-width of the interval with one more session."""


class Difference(Record):
    """A condition minus the baseline in one dimension, paired by fold and seed."""

    mean: float | None
    std: float | None
    """Over trials, n - 1."""
    by_trial: dict[str, float | None]
    pooled: float | None
    on_corpus: CorpusLevel | None = None
    no_corpus_level: str | None = None
    """Why there is no level 1, if there is none."""
    as_trained: Interval | None = None
    """95 %, over test dialogues only: for these trained models, not for another training of them."""
    new_speakers: SpeakersLevel | None = None


class Convergence(Record):
    """Whether the trials of one condition trained for long enough, judged by their validation curves alone."""

    converged: bool | None
    """None: no trial could be judged."""
    trials_converged: int
    trials: int
    """Finished trials whose curve could be judged."""
    reason: str
    """What the curves show, as a clause."""


class Reference(Record):
    """A predictor that is no condition, such as the no-audio floor, and each condition's lead over it."""

    scores: dict[str, Score]
    """By dimension or `avg`."""
    leads: dict[str, dict[str, Difference]]
    """Condition minus reference, by condition, then dimension or `avg`."""


class SubsetDifference(Record):
    """A condition minus the baseline on the primary outcome, pooled over a subset of the test data."""

    utterances: int
    mean: float | None
    """Mean over seeds."""
    interval: Interval | None = None
    """95 %, at level 1; None if there are too few seeds or clusters."""


class Cost(Record):
    """What it takes to train one condition."""

    parameters: int
    """Parameters that train in some epoch, in the trial that has the most."""
    adapters: int
    """Number of these parameters that belong to adapters (LoRA)."""
    hours: float
    """Training and validation of all trials together, over all attempts."""


class Summary(Record):
    """summary.json: the comparison behind tables, report and MLflow."""

    run: str
    status: RunStatus
    missing: list[str]
    """Trials without a result; if there are any, there are no aggregates."""
    baseline: str
    scores: dict[str, dict[str, Aggregate]]
    """By condition, then dimension or `avg`."""
    differences: dict[str, dict[str, Difference]]
    """By condition other than the baseline, then dimension or `avg`."""
    primary: str = "avg"
    """The outcome that decides, declared before the run; all others are secondary."""
    margin: float = 0.02
    """Differences within the margin are practically nothing; declared before the run."""
    cluster: str = "dialogue"
    """Unit that is resampled: `dialogue` or `speaker`."""
    clusters: int = 0
    """Number of them, over all sessions."""
    # On one outcome only, chosen in advance: a test per outcome would find something too often.
    decisions: dict[str, Decision] = {}
    """By condition other than the baseline: level 1 on the primary outcome."""
    for_new_speakers: dict[str, bool] = {}
    """Whether level 2 confirms a decision for better or worse; empty without such a decision."""
    references: dict[str, Reference] = {}
    """By name: `no-audio floor`, `linear probe`."""
    groups: dict[str, dict[str, Ccc]] = {}
    """By condition, then part of the test data (`gender F`, `speaker 01M`, `scripted`): pooled, mean over seeds."""
    convergence: dict[str, Convergence] = {}
    """By condition, from the validation curves."""
    costs: dict[str, Cost] = {}
    """By condition; empty: not recorded."""
    added_after_look: list[str] = []
    """Seeds and conditions that were added after test scores of the corpus had been seen."""
    subsets: dict[str, dict[str, SubsetDifference]] = {}
    """By condition other than the baseline, then part of the test data."""
    verdict: str
    """One sentence."""

    @property
    def is_ladder(self) -> bool:
        """Whether the conditions are steps of adaptation: three or more, or one with adapters."""
        return len(self.costs) >= 3 or any(cost.adapters for cost in self.costs.values())


class Evaluation(RunRecord):
    """evaluations/<name>/evaluation.json: the models of a run on another corpus, as a run whose folds share their test.

    `run` is the name of the evaluation, `key` that of its inputs. `corpus`, its digest and `floor` are of the other
    corpus; `folds` are those whose models score some of it, and `cvrunner_version` is that of the training.
    """

    scale: tuple[float, float]
    """Rating scale of the corpus, and of the predictions."""
    run_scale: tuple[float, float]
    """Rating scale of the run: predictions were mapped linearly from here."""
    cluster: Literal["dialogue", "speaker"] | None
    """Unit to resample; None: as the speakers per session decide."""
    utterances: int
    """Number in the corpus."""
    left_out: list[str]
    """Utterances without a model that may score them."""
    same_speakers: dict[str, list[str]]
    """By speaker of the corpus: who this is in the run's corpus."""
    same_audio: dict[str, list[str]]
    """By utterance of the corpus: utterances of the run's corpus with the same audio."""
    speakers_differ: bool
    """Whether the user declared that equal names are different people."""

    @property
    def folds_share_test(self) -> bool:
        return True
