"""Trials small enough to train in a second: a tiny encoder, a dozen short utterances a session."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cvrunner.config.schema import Config, validate
from cvrunner.data.folds import make_folds
from cvrunner.data.utterance import Corpus
from cvrunner.orchestration.trials import plan_trials
from cvrunner.records.run_directory import TrialDirectory
from cvrunner.training.fold_trainer import Event, FoldTrainer, TrialContext
from cvrunner.training.learner import Learner
from cvrunner.training.trial import Trial
from tests.corpora import corpus, read_noise_corpus
from tests.tiny_encoders import save_encoder


def tiny_config(encoder: Path, **sections: Mapping[str, Any]) -> Config:
    data: dict[str, Any] = {
        "model": {"encoder": str(encoder), "width": 16, "mamba": {"state_size": 4, "head_dim": 8, "layers": 1}},
        "train": {"batch_size": 2, "accumulation_steps": 2, "epochs": 3, "lr": 1e-3, "encoder_lr": 1e-3},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section}
    return validate(data, "test")


def tiny_trials(folder: Path, sessions: int = 3, **sections: Mapping[str, Any]) -> list[Trial]:
    """All trials of a corpus of noise under `folder`, which is made once."""
    encoder = folder / "wavlm"
    if not encoder.exists():
        save_encoder(encoder)
    config = tiny_config(encoder, **sections)
    return plan_trials(
        config, tiny_corpus(folder, sessions), make_folds(tiny_corpus(folder, sessions), "leave_one_session_out")
    )


def tiny_corpus(folder: Path, sessions: int = 3) -> Corpus:
    return read_noise_corpus(folder / "audio", corpus(sessions=sessions, turns=6))


def pick(trials: list[Trial], condition: str, fold: int = 1) -> Trial:
    return next(t for t in trials if t.condition == condition and t.fold.number == fold)


def train(trial: Trial, folder: Path, name: str = "run", **place: Any) -> list[Event]:
    """The events of a trial trained in `folder/name`; the cache is shared."""
    return list(trainer(trial, folder, name, **place).run())


def learner(trial: Trial, folder: Path) -> Learner:
    return Learner(trial, folder / "cache", torch.device("cpu"))


def trainer(trial: Trial, folder: Path, name: str = "run", **place: Any) -> FoldTrainer:
    directory = TrialDirectory(folder / name / trial.name)
    return FoldTrainer(trial, TrialContext(directory, folder / "cache", torch.device("cpu"), **place))
