"""The protocol of an experiment: what its run will compare and how it will decide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cvrunner
from cvrunner.config.schema import digest
from cvrunner.run.prepare import Experiment
from cvrunner.training.trial import Trial, code_digest
from cvrunner.verdict.protocol import (
    DECISION,
    SELECTION,
    ConditionProtocol,
    Protocol,
    cluster_unit,
    question,
)


def make_protocol(experiment: Experiment, trials: Sequence[Trial], conditions: Sequence[str]) -> Protocol:
    """Return the protocol of an experiment and its trials. The first of `conditions` is the baseline."""
    config, (baseline, *others) = experiment.config, conditions
    verdict, first = config.verdict, trials[0]
    outcomes = [*config.corpus.dimensions, "avg"]
    return Protocol(
        question=question(baseline, others, verdict.primary),
        primary=verdict.primary,
        secondary=[outcome for outcome in outcomes if outcome != verdict.primary],
        margin=verdict.margin,
        cluster=cluster_unit(verdict, ((u.session, u.speaker) for u in experiment.corpus.utterances)),
        baseline=baseline,
        conditions={
            name: _condition([trial for trial in trials if trial.condition == name], config.conditions[name])
            for name in conditions
        },
        seeds=list(config.train.seeds),
        folds=[fold.number for fold in experiment.folds],
        scheme=config.folds.scheme,
        selection=SELECTION,
        decision=list(DECISION),
        settings=config.numerics,
        settings_from=config.settings_from.model_dump(mode="json"),
        corpus=experiment.corpus.describe(),
        corpus_digest=first.corpus_digest,
        split_digest=first.split_digest,
        code_digest=code_digest(),
        cvrunner_version=cvrunner.__version__,
    )


def _condition(trials: Sequence[Trial], overrides: dict[str, object]) -> ConditionProtocol:
    encoder = trials[0].encoder
    # A set, because folds may have settings of their own.
    settings = sorted({digest(trial.config.numerics) for trial in trials})
    return ConditionProtocol(
        overrides=overrides,
        seeds=sorted({trial.seed for trial in trials}),
        # A local folder by its own name: its place must not change the protocol.
        encoder=encoder.name if encoder.revision else Path(encoder.name).name,
        encoder_digest=encoder.digest,
        digest=digest([settings, encoder.digest]),
    )
