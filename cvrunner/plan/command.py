"""The command `plan`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cvrunner.run.prepare import prepare

if TYPE_CHECKING:
    from rich.console import Console


def plan(config_path: Path | None, overrides: Sequence[str], gpus: int | None, as_json: bool, console: Console) -> int:
    """What the run would cost, from real updates of each condition; trains nothing and keeps nothing."""
    prepared = prepare(config_path, overrides)
    from cvrunner.orchestration.resources import possible_resources
    from cvrunner.orchestration.trials import plan_trials
    from cvrunner.plan.text import plan_text
    from cvrunner.run import estimate
    from cvrunner.training.device import default_device
    from cvrunner.training.probe import hardest, probe, resident_mib

    places = possible_resources(prepared.config.cluster, gpus, os.environ)
    trials = plan_trials(prepared.config, prepared.corpus, prepared.folds)
    device, base_mib, probes = default_device(), resident_mib(), []
    with tempfile.TemporaryDirectory(prefix="cvrunner-plan-") as folder:
        for condition in prepared.config.conditions:
            print(f"{condition}: a few real updates on {device.type} ...", file=sys.stderr, flush=True)
            trial = hardest(t for t in trials if t.condition == condition)
            probes.append(probe(trial, device, Path(folder), base_mib))
    found = estimate.forecast(trials, prepared.corpus.utterances, probes, places)
    text = estimate.as_json(found) if as_json else plan_text(found)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0
