"""`verify`: one fold of one condition before a long run, its result beside the reference and the target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cvrunner import paths
from cvrunner.config.reading import load_config
from cvrunner.config.schema import Config
from cvrunner.errors import TARGET_MISSED, ConfigError, TrialError
from cvrunner.run.steps import Experiment, announce, close, open_run, prepare, raise_outcome, train_on_ray

if TYPE_CHECKING:
    from rich.console import Console


def verify(config_path: Path | None, overrides: Sequence[str], quiet: bool, console: Console) -> int:
    """Train the fold on Ray, as `all-folds` would and in its run; 0 where the target is met, 3 where it is missed."""
    path = config_path or paths.default_config("finetune.yaml")
    condition = _checked_condition(load_config(path, overrides))
    experiment = prepare(path, overrides)
    _check_fold(experiment)
    if not quiet:
        _show_gpus(console)
    with open_run(experiment, False, quiet, console) as run:
        fold = experiment.config.verify.fold
        trial = next(t for t in reversed(run.trials) if (t.fold.number, t.condition) == (fold, condition))
        pending = run.pending([trial])
        announce(run, [trial], pending)
        ending = train_on_ray(run, pending) if pending else None
        status = close(run, ending)
        result = run.store.result(trial)
        if result is None:
            raise_outcome(ending, status)
            raise TrialError(f"{trial.name} has no result: {run.store.record.trials[trial.name].error}")
        from cvrunner.run.verify_text import missed, verify_text

        text = verify_text(experiment.config, result, experiment.corpus.synthetic, console.width)
        console.print(
            text, f"results  {run.store.directory.path}", markup=False, highlight=False, soft_wrap=True, sep=""
        )
        return TARGET_MISSED if missed(experiment.config.verify.least_ccc, result.test_ccc) else 0


def _checked_condition(config: Config) -> str:
    """The condition to train. Raises ConfigError for it, and for a target that no result could have."""
    there = (*config.corpus.dimensions, "avg")
    for dimension in config.verify.least_ccc:
        if dimension not in there:
            raise ConfigError(f"verify.target.ccc_{dimension}: {dimension} is not predicted, only {', '.join(there)}")
    return config.chosen_condition(config.verify.condition, "verify.condition")


def _check_fold(experiment: Experiment) -> None:
    if (fold := experiment.config.verify.fold) > len(experiment.folds):
        raise ConfigError(f"verify.fold {fold}: there are folds 1 to {len(experiment.folds)}")


def _show_gpus(console: Console) -> None:
    from cvrunner.orchestration.machine import find_gpus, gpu_lines

    console.print("\n".join(gpu_lines(find_gpus())), markup=False, highlight=False, soft_wrap=True)
