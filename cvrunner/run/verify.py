"""`verify`: train one fold of one condition before a long run, and compare its validation CCC with a target."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cvrunner import paths
from cvrunner.config.reading import load_config
from cvrunner.config.schema import Config
from cvrunner.errors import TARGET_MISSED, ConfigError, TrialError
from cvrunner.orchestration.machine import find_gpus, gpu_lines
from cvrunner.records.results import Ccc, TrainingFinished, ccc_label
from cvrunner.run.prepare import check_fold, prepare_config
from cvrunner.run.session import Run, announce, close, open_run, raise_for_outcome, train_on_ray
from cvrunner.text import DASH, Table, format_score, line_printer, plural, tables_as_text
from cvrunner.training.trial import Trial

if TYPE_CHECKING:
    from rich.console import Console


def verify(
    config_path: Path | None, overrides: Sequence[str], quiet: bool, console: Console, test: bool = False
) -> int:
    """Train the fold on Ray, in the run of `all-folds`; returns 0 if the target is met and 3 if it is missed.

    The target is for validation CCC. With `test`, the test set is scored too, which counts as a look at it.
    """
    path = config_path or paths.default_config("finetune.yaml")
    config = load_config(path, overrides)
    # Wrong settings are reported before the corpus is read, which may take minutes.
    predicted = (*config.corpus.dimensions, "avg")
    for dimension in config.verify.least_ccc:
        if dimension not in predicted:
            rule = f"{dimension} is not predicted, only {', '.join(predicted)}"
            raise ConfigError(f"verify.target.ccc_{dimension}: {rule}")
    condition = config.chosen_condition(config.verify.condition, "verify.condition")
    experiment = prepare_config(config, path.stem)
    fold = config.verify.fold
    check_fold(fold, len(experiment.folds), "verify.fold", ConfigError)
    print_line = line_printer(console)
    if not quiet:
        print_line("\n".join(gpu_lines(find_gpus(), os.environ)))
    with open_run(experiment, False, quiet, console) as run:
        # Of several seeds, one is enough for a quick check.
        trial = next(t for t in reversed(run.trials) if (t.fold.number, t.condition) == (fold, condition))
        if not test:
            # The same key: `all-folds` continues with its checkpoint and only scores the test set.
            trial = replace(trial, fold=replace(trial.fold, test=()))
        pending = run.pending([trial])
        if not test and trained(run, trial) is not None:
            pending = []
        announce(run, [trial], pending)
        outcome = train_on_ray(run, pending)
        # Not `conclude`, which prints a comparison that one fold cannot give.
        status, _ = close(run, outcome)
        ended, test_ccc = trained(run, trial), None
        if test and (result := run.store.trial_directory(trial).result(trial.key)) is not None:
            test_ccc = result.test_ccc
        if ended is None or (test and test_ccc is None):
            raise_for_outcome(outcome, status)
            raise TrialError(f"{trial.name} has no result: {run.store.record.trials[trial.name].error}")
        print_line(verify_text(config, trial, ended, test_ccc, experiment.corpus.synthetic, console.width).rstrip())
        if test and (before := run.store.record.looks_before) is not None:
            print_line(f"one look at the test session; this corpus had {plural(before, 'look')} before (ledger.jsonl)")
        print_line(f"results  {run.store.directory.path}")
        return TARGET_MISSED if missed(config.verify.least_ccc, ended.validation_ccc) else 0


def trained(run: Run, trial: Trial) -> TrainingFinished | None:
    """Return how the training of a trial ended, whether or not its test set was scored; None if it has not."""
    if (result := run.store.trial_directory(trial).result(trial.key)) is not None:
        return TrainingFinished(**result.model_dump(include=set(TrainingFinished.model_fields)))
    ended = run.store.record.trials[trial.name].trained
    return ended if ended is not None and ended.key == trial.key else None


def missed(least_ccc: Mapping[str, float], ccc: Ccc) -> list[str]:
    """Return the dimensions whose CCC is undefined or below its target."""
    return [d for d, least in least_ccc.items() if (value := ccc.get(d)) is None or value < least]


def verify_text(
    config: Config, trial: Trial, ended: TrainingFinished, test_ccc: Ccc | None, synthetic: bool, width: int
) -> str:
    """Return a table of scores, the source of the claims in it, and a sentence about the target."""
    least, scores = config.verify.least_ccc, ended.validation_ccc
    claims = {dimension: _claims(config, trial.condition, dimension) for dimension in scores}
    columns, rows = ["quantity", "validation", "target", "claimed"], []
    for dimension, value in scores.items():
        cells = [format_score(value), format_score(least.get(dimension)), "; ".join(claims[dimension]) or DASH]
        if test_ccc is not None:
            cells.insert(1, format_score(test_ccc.get(dimension)))
        rows.append([ccc_label(dimension), *cells])
    if test_ccc is not None:
        columns.insert(2, "test")
    epoch = f"epoch {ended.best_epoch} of {ended.epochs_run}, chosen by validation"
    table = Table(f"{trial.condition}, fold {trial.fold.number}: {epoch}", columns, rows)
    note = ""
    if any(claims.values()):
        source = "Claims:"
        if config.reference.source:
            source = f"Claimed by {config.reference.source};"
        note = f"{source} not measured here, and one fold is not the mean test CCC over all folds.\n"
    text = "no target is set (verify.target); the fold is trained"
    if least:
        below = missed(least, scores)
        parts = [
            f"{ccc_label(d)} {format_score(scores.get(d))} {'is below' if d in below else 'reaches'} {value:g}"
            for d, value in least.items()
        ]
        text = f"target {'missed' if below else 'met'} on validation: {', '.join(parts)}"
    if synthetic:
        text += " (synthetic data)"
    return tables_as_text([table], width, note + text)


def _claims(config: Config, condition: str, dimension: str) -> list[str]:
    """Return the claims about the baseline and about the condition itself, as text."""
    found = []
    for claim in config.reference.claims:
        # The first condition is the baseline; claims about the remaining ones say nothing about this fold.
        if claim.condition in (next(iter(config.conditions)), condition) and claim.quantity == f"ccc_{dimension}":
            value = f"{claim.low:g}"
            if claim.high is not None:
                value += f" to {claim.high:g}"
            found.append(f"{value} ({claim.condition}, {claim.name})")
    return found
