"""The demo's frozen condition compared with itself: how often does the verdict find a difference that is not there?

    python -m tests.benchmarks.same_condition [FOLDER]

Trains the frozen condition with 20 seeds in all five folds (resumable, in FOLDER), and then compares disjoint sets of
seeds as if they were two conditions: level 1 on CCC-Avg, 95 %. The interval of the rejection rate resamples seeds,
because the comparisons share their trainings.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml
from rich.console import Console

from cvrunner import paths
from cvrunner.records.run_directory import RunDirectory
from cvrunner.report.report import Report, read_report
from cvrunner.run import commands
from cvrunner.text import Table, tables_as_text
from cvrunner.verdict.comparison import AVG
from cvrunner.verdict.levels import corpus_levels, speakers_level
from cvrunner.verdict.statistics import Compared, bootstrap

SEEDS = 20
SIZES = (1, 2, 3, 5)
"""Seeds per side."""
PAIRS, REPLICATES, PAIRS_PER_REPLICATE = 1000, 200, 25
RESAMPLES = 1000
MARGIN = 0.02
Floats = npt.NDArray[np.float64]


def trained(folder: Path) -> Report:
    """Train what is missing and return the run."""
    config = folder / "same-condition.yaml"
    settings = {
        "base": str(paths.default_config()),
        "train": {"seeds": list(range(SEEDS))},
        "results": {"root": str(folder / "results")},
        "tracking": {"enabled": False},
    }
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    only = ["conditions={frozen: {model: {freeze_speech_encoder: true}}}"]
    code = commands.all_folds(config, only, new=False, quiet=False, console=Console(width=100))
    if code:
        sys.exit(code)
    (run,) = (folder / "results").glob("*/run.json")
    return read_report(RunDirectory(run.parent))


def pairs(
    random: np.random.Generator, seeds: list[int], size: int, count: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Draw pairs of disjoint sets of `size` different seeds from a list that may hold a seed several times.

    None if it holds fewer than `2 size` different ones.
    """
    different = sorted(set(seeds))
    # With a seed's multiplicity as its weight, and never on both sides.
    weights = np.array([seeds.count(seed) for seed in different], dtype=np.float64)
    for _ in range(count if len(different) >= 2 * size else 0):
        chosen = random.choice(different, 2 * size, replace=False, p=weights / weights.sum()).tolist()
        yield chosen[:size], chosen[size:]


def rejects(ccc: Floats, draws: Floats, df: int, ratio: float, one: list[int], other: list[int]) -> tuple[bool, bool]:
    """Whether level 1 and level 2 find a difference between two sets of seeds; with one seed, the dialogues alone.

    `ccc [F, seeds]` as measured, `draws [R, seeds]` resampled.
    """
    differences, resampled = ccc[:, other] - ccc[:, one], draws[:, other] - draws[:, one]
    if len(one) == 1:
        low, high = np.quantile(resampled, [0.025, 0.975])
    else:
        (level,) = corpus_levels(differences[None], resampled[:, None], df, MARGIN)
        low, high = level.interval.low, level.interval.high
    speakers = speakers_level(differences.mean(axis=1), ratio, MARGIN)
    second = speakers is not None and speakers.interval.low * speakers.interval.high > 0
    return bool(low > 0 or high < 0), second


def main() -> int:
    report = trained(Path(sys.argv[1] if len(sys.argv) > 1 else "same-condition").absolute())
    data, scores = report.out_of_fold, report.summary.scores["frozen"][AVG].by_trial
    assert data is not None
    ccc = np.array([[scores[f"fold-{f}/seed-{s}"] for s in report.run.seeds] for f in report.run.folds], dtype=float)
    columns = (data.about[name].to_numpy() for name in ("fold", "session", "dialogue"))
    drawn = bootstrap(Compared(data.predicted, data.truth, *columns), "dialogue", RESAMPLES)
    draws = drawn.ccc["frozen"][:, :, -1]
    ratio = float(np.mean([r.test_utterances / r.train_utterances for r in report.results.values()]))
    random, rows = np.random.default_rng(0), []
    everyone = list(range(SEEDS))
    for size in SIZES:
        found = [rejects(ccc, draws, drawn.df, ratio, *pair) for pair in pairs(random, everyone, size, PAIRS)]
        rates = []
        for _ in range(REPLICATES):
            resampled = random.choice(SEEDS, SEEDS).tolist()
            some = pairs(random, resampled, size, PAIRS_PER_REPLICATE)
            if rejected := [rejects(ccc, draws, drawn.df, ratio, *pair)[0] for pair in some]:
                rates.append(np.mean(rejected))
        low, high = np.quantile(rates, [0.025, 0.975])
        first, second = (100 * float(np.mean(level)) for level in zip(*found, strict=True))
        name = "dialogues alone" if size == 1 else "level 1"
        rows.append([str(size), name, f"{first:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %", f"{second:.1f} %"])
    title = f"{len(report.run.folds)} folds, {SEEDS} seeds of frozen, {PAIRS} pairs of disjoint sets"
    heading = ["seeds per side", "interval", "finds a difference", "95 %, over seeds", "level 2 finds one"]
    within, between = ccc.std(axis=1, ddof=1).mean(), float(np.std(ccc.mean(axis=0), ddof=1))
    print(tables_as_text([Table(title, heading, rows)], 100))
    print(f"standard deviation over seeds: {within:.4f} of a trial, {between:.4f} of the mean over folds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
