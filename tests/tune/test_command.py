"""What cannot be searched is refused in one sentence, before anything is written or trained."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from cvrunner.errors import ConfigError
from cvrunner.tune.command import tune
from tests.run.test_commands import config

__all__ = ["config"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tune.conditions=thawed", "tune.conditions thawed: unknown condition; choose one of frozen, unfrozen"),
        ("tune.folds=[1, 4]", "tune.folds 4: there are folds 1 to 3"),
        (
            "tune.search_space={model.unfreeze_top_layers: {choices: [null, 3]}}",
            "tune.search_space.model.unfreeze_top_layers: 3 is more than the 2 transformer layers of the encoder",
        ),
        (
            "model.unfreeze_top_layers=3",
            "model.unfreeze_top_layers: 3 is more than the 2 transformer layers of the encoder",
        ),
        (
            "tune={conditions: frozen, search_space: {train.encoder_lr: {low: 1e-6, high: 1e-4}}}",
            "tune.search_space: none of its keys changes anything in frozen, whose encoder is frozen",
        ),
        (
            "tune.search_space={train.encoder_lr: {low: 1e-6, high: 1e-4}}",
            "tune.search_space: none of its keys changes anything in frozen, whose encoder is frozen: add train.lr",
        ),
        (
            "tune={nested: true, folds: [1], search_space: {train.lr: {low: 1e-4, high: 1e-3}}}",
            "tune.folds: must be null with tune.nested, because every fold needs settings of its own",
        ),
        (
            "tune={nested: true, search_space: {model.protocol: {choices: [utterance, dialogue]}}}",
            "conditions.frozen.folds.1.model.protocol: must be the same in all folds of a condition",
        ),
        (
            "conditions.frozen.folds.1.train.lr=1e-3",
            "conditions.frozen.folds: settings per fold would override those of the search; remove them",
        ),
        ("cluster.node_dir=/node", "cluster.node_dir: a sweep keeps its files in results.root"),
        (
            "tune={conditions: unfrozen, epochs: 2, search_space: {train.freeze_epochs: {choices: [2]}}}",
            "freeze_epochs 2 must be below epochs 2",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused_before_training(config: Path, override: str, message: str) -> None:
    small = [] if "space" in override else ["tune.search_space={train.lr: {low: 1e-4, high: 1e-3}}"]
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        tune(config, [override, *small], False, True, Console(file=io.StringIO()))
    assert not (config.parent / "results").exists()
