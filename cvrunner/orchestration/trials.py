"""The trials of a run, their order, and the key of the run."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cvrunner.config.schema import Config, digest
from cvrunner.data.folds import Fold, split_digest
from cvrunner.data.utterance import Corpus
from cvrunner.encoders.files import find_encoder
from cvrunner.orchestration.resources import device_type
from cvrunner.training.trial import LinearProbe, Trial

UNFROZEN_COST = 10.0
"""An unfrozen epoch takes several times as long as a frozen one; only the order depends on it."""


def plan_trials(config: Config, corpus: Corpus, folds: Sequence[Fold]) -> list[Trial]:
    """Return every condition x fold x seed, longest first.

    Raises EncoderError and ConfigError before anything is trained.
    """
    split, digest_of_corpus = split_digest(folds), corpus.digest
    trials = []
    for condition in config.conditions:
        common = config.for_condition(condition)
        encoder = find_encoder(common.model.encoder, common.model.revision, common.model.allow_tuned_encoder)
        device = device_type(common.train.device, os.environ)
        own = {fold: config.for_condition(condition, fold) for fold in config.folds_of(condition)}
        trials += [
            Trial(condition, fold, seed, own.get(fold.number, common), encoder, split, digest_of_corpus, device)
            for seed in common.train.seeds
            for fold in folds
        ]
    # Longest first: the last trials to end are short, so few GPUs are idle at the end.
    return sorted(trials, key=cost, reverse=True)


def plan_probes(trials: Sequence[Trial], baseline: str) -> list[LinearProbe]:
    """Return the linear probe of each fold of a run, on the encoder of the condition `baseline`."""
    by_fold = {t.fold.number: t for t in trials if t.condition == baseline}
    return [
        LinearProbe(
            fold=t.fold,
            config=t.config,
            encoder=t.encoder,
            split_digest=t.split_digest,
            corpus_digest=t.corpus_digest,
            device=t.device,
        )
        for _, t in sorted(by_fold.items())
    ]


def cost(trial: Trial) -> float:
    """Return a relative cost of a trial: seconds of audio x epochs, more if the encoder is trained."""
    seconds = sum(u.duration_s for u in trial.fold.train)
    return seconds * trial.config.train.epochs * (UNFROZEN_COST if trial.config.adaptation.trains_encoder else 1.0)


def run_key(trials: Sequence[Trial]) -> str:
    """Return a hash of the trials' keys and names: the same command on the same data and code gives the same run."""
    return digest(sorted([trial.name, trial.key] for trial in trials))[:32]
