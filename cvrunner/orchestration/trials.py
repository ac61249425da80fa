"""The trials of a run, their order, and the key of the run."""

from __future__ import annotations

from collections.abc import Sequence

from cvrunner.config.schema import Config, digest
from cvrunner.data.folds import Fold, split_digest
from cvrunner.data.utterance import Corpus
from cvrunner.encoders.files import find_encoder
from cvrunner.training.trial import Trial

UNFROZEN_COST = 10.0
"""An unfrozen epoch takes several times as long as a frozen one; only the order depends on it."""


def plan_trials(config: Config, corpus: Corpus, folds: Sequence[Fold]) -> list[Trial]:
    """Return every condition x fold x seed, longest first.

    Raises EncoderError and ConfigError before anything is trained.
    """
    split, digest_of_corpus = split_digest(folds), corpus.digest
    trials = []
    for condition in config.conditions:
        resolved = config.for_condition(condition)
        encoder = find_encoder(resolved.model.encoder, resolved.model.revision, resolved.model.allow_tuned_encoder)
        trials += [
            Trial(condition, fold, seed, resolved, encoder, split, digest_of_corpus)
            for seed in resolved.train.seeds
            for fold in folds
        ]
    # Longest first: the last trials to end are short, so few GPUs are idle at the end.
    return sorted(trials, key=cost, reverse=True)


def cost(trial: Trial) -> float:
    """Return a relative cost of a trial: seconds of audio x epochs, more if the encoder is trained."""
    seconds = sum(u.duration_s for u in trial.fold.train)
    return seconds * trial.config.train.epochs * (UNFROZEN_COST if trial.config.adaptation.trains_encoder else 1.0)


def run_key(trials: Sequence[Trial]) -> str:
    """Return a hash of the trials' keys and names: the same command on the same data and code gives the same run."""
    return digest(sorted([trial.name, trial.key] for trial in trials))[:32]
