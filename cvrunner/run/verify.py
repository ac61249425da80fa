"""`verify`: train one fold of one condition before a long run, and compare the result with claims and a target."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cvrunner import paths
from cvrunner.config.reading import load_config
from cvrunner.config.schema import Config
from cvrunner.errors import TARGET_MISSED, ConfigError, TrialError
from cvrunner.orchestration.machine import find_gpus, gpu_lines
from cvrunner.records.results import Ccc, TrialResult, ccc_label
from cvrunner.run.prepare import check_fold, prepare_config
from cvrunner.run.session import announce, close, open_run, raise_for_outcome, train_on_ray
from cvrunner.text import DASH, Table, format_score, line_printer, tables_as_text

if TYPE_CHECKING:
    from rich.console import Console


def verify(config_path: Path | None, overrides: Sequence[str], quiet: bool, console: Console) -> int:
    """Train the fold on Ray, in the run of `all-folds`; returns 0 if the target is met and 3 if it is missed."""
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
        pending = run.pending([trial])
        announce(run, [trial], pending)
        outcome = train_on_ray(run, pending)
        # Not `conclude`, which prints a comparison that one fold cannot give.
        status, _ = close(run, outcome)
        result = run.store.trial_directory(trial).result(trial.key)
        if result is None:
            raise_for_outcome(outcome, status)
            raise TrialError(f"{trial.name} has no result: {run.store.record.trials[trial.name].error}")
        text = verify_text(config, result, experiment.corpus.synthetic, console.width)
        print_line(f"{text}results  {run.store.directory.path}")
        return TARGET_MISSED if missed(config.verify.least_ccc, result.test_ccc) else 0


def missed(least_ccc: Mapping[str, float], ccc: Ccc) -> list[str]:
    """Return the dimensions whose CCC is undefined or below its target."""
    return [d for d, least in least_ccc.items() if (value := ccc.get(d)) is None or value < least]


def verify_text(config: Config, result: TrialResult, synthetic: bool, width: int) -> str:
    """Return a table of scores, the source of the claims in it, and a sentence about the target."""
    least = config.verify.least_ccc
    claims = {dimension: _claims(config, result.condition, dimension) for dimension in result.test_ccc}
    rows = [
        [
            ccc_label(dimension),
            format_score(result.validation_ccc.get(dimension)),
            format_score(value),
            format_score(least.get(dimension)),
            "; ".join(claims[dimension]) or DASH,
        ]
        for dimension, value in result.test_ccc.items()
    ]
    epoch = f"epoch {result.best_epoch} of {result.epochs_run}, chosen by validation"
    title = f"{result.condition}, fold {result.fold}: {epoch}"
    table = Table(title, ["quantity", "validation", "test", "target", "claimed"], rows)
    note = ""
    if any(claims.values()):
        source = "Claims:"
        if config.reference.source:
            source = f"Claimed by {config.reference.source};"
        note = f"{source} not measured here, and one fold is not the mean over all folds.\n"
    text = "no target is set (verify.target); the fold is trained"
    if least:
        below = missed(least, result.test_ccc)
        parts = [
            f"{ccc_label(d)} {format_score(result.test_ccc.get(d))} {'is below' if d in below else 'reaches'} {value:g}"
            for d, value in least.items()
        ]
        text = f"target {'missed' if below else 'met'}: {', '.join(parts)}"
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
