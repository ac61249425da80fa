"""Coverage, size and power of the verdict in simulated studies: `python -m tests.benchmarks.coverage` (`--quick`).

A study has labels with session, speaker, scenario and dialogue effects, two conditions whose errors share a part per
dialogue, and a randomness of training per condition, fold and seed: the size of the error, its bias and its details
change with it. Sessions may differ in how much a condition gains. Each study goes through the program's own bootstrap,
levels and decision. The truth is computed, not simulated: the CCCs of the population of dialogues, by the model's
moments.

Truth at level 1: expected difference over other dialogues and other trainings, for the study's sessions and speakers.
Truth at level 2: the same for new sessions and speakers.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt
from scipy import optimize

from cvrunner.records.summary import Difference
from cvrunner.text import Table, tables_as_text
from cvrunner.verdict.levels import corpus_levels, speakers_level, too_few_seeds
from cvrunner.verdict.sentence import confirmed, decide
from cvrunner.verdict.statistics import Compared, bootstrap, ccc_of_sums

Floats = npt.NDArray[np.float64]

MARGIN = 0.02
SLOPE = 0.6
"""Of a prediction on the label."""
# Standard deviations on the rating scale, roughly those of IEMOCAP's valence.
SESSION, SPEAKER, SCENARIO, DIALOGUE, UTTERANCE = 0.10, 0.15, 0.45, 0.35, 0.60
COMMON_ERROR, OWN_ERROR, NOISE = 0.25, 0.12, 0.45
"""Errors per dialogue, shared by the conditions and of each condition, and errors per utterance."""
DIMENSIONS = 2


@dataclass(frozen=True)
class Cell:
    """One kind of study."""

    name: str
    folds: int
    dialogues: int
    """Per session."""
    turns: int
    """Per dialogue."""
    seeds: int
    training: float = 0.10
    """Relative standard deviation of the size of the error over trainings; 0.10 makes the CCC of a trial vary by about
    0.02."""
    sessions: float = 0.0
    """Standard deviation over sessions of the relative gain of the second condition."""
    gain: float = 0.0
    """By how much, relatively, the second condition errs less."""
    scenarios: int = 8


@dataclass(frozen=True)
class Study:
    """What one simulated study gives."""

    truth: float
    """Level 1."""
    estimate: float
    low: float
    high: float
    detectable: float
    speakers_low: float
    speakers_high: float
    speakers_detectable: float
    decision: str
    for_new_speakers: bool
    trained_low: float
    trained_high: float


def trainings(cell: Cell, random: np.random.Generator, count: int) -> tuple[Floats, Floats]:
    """Draw `count` trainings: the relative size of the error, and the bias, which is common to all utterances."""
    return np.exp(random.normal(0, cell.training, count)), random.normal(0, cell.training, count)


def population_ccc(
    cell: Cell, offset: float, speaker: Floats, scenario: Floats, size: Floats, bias: Floats, speaker_error: Floats
) -> Floats:
    """Return the CCC of the population of a session's dialogues for every training `[T]`, from the model's moments.

    `offset`: the session's effect; `speaker`, `speaker_error` `[2]`; `scenario [J]`; `size`, `bias` `[T]`.
    """
    # Speakers and scenarios are equally frequent and independent of dialogue and noise.
    label_variance = speaker.var() + scenario.var() + DIALOGUE**2 + UTTERANCE**2
    label_mean = offset + speaker.mean() + scenario.mean()
    error_variance = COMMON_ERROR**2 + OWN_ERROR**2 + NOISE**2
    shared = np.mean((speaker - speaker.mean()) * (speaker_error - speaker_error.mean()))
    variance = SLOPE**2 * label_variance + size**2 * (error_variance + speaker_error.var()) + 2 * SLOPE * size * shared
    covariance = SLOPE * label_variance + size * shared
    # The prediction is centred on the scale like the labels, but for its bias and the shrinkage towards 0.
    mean = SLOPE * label_mean + bias + size * speaker_error.mean()
    return np.asarray(2 * covariance / (label_variance + variance + (label_mean - mean) ** 2))


def simulate(cell: Cell, seed: int, resamples: int) -> Study:
    """Draw one study and decide it."""
    random = np.random.default_rng([seed, cell.seeds, cell.folds, cell.dialogues])
    scenario = random.normal(0, SCENARIO, (DIMENSIONS, cell.scenarios))
    predicted = {"baseline": [], "other": []}  # type: dict[str, list[Floats]]
    truth, labels = [], []
    for _ in range(cell.folds):
        offset = random.normal(0, SESSION, DIMENSIONS)
        speaker, speaker_error = random.normal(0, (SPEAKER, 0.1), (DIMENSIONS, 2, 2)).transpose(2, 0, 1)
        relative = 1 - cell.gain + random.normal(0, cell.sessions)
        rows = cell.dialogues * cell.turns
        # Every session acts the scenarios in turn, and the speakers alternate.
        act = np.repeat(np.arange(cell.dialogues) % cell.scenarios, cell.turns)
        turn = np.arange(rows) % 2
        dialogue = np.repeat(random.normal(0, DIALOGUE, (DIMENSIONS, cell.dialogues)), cell.turns, axis=1)
        label = offset[:, None] + speaker[:, turn] + scenario[:, act] + dialogue
        label = label + random.normal(0, UTTERANCE, label.shape)
        labels.append(label.T)
        common = np.repeat(random.normal(0, COMMON_ERROR, (DIMENSIONS, cell.dialogues)), cell.turns, axis=1)
        differences = []
        for sign, (name, factor) in zip((-1, 1), (("baseline", 1.0), ("other", relative)), strict=True):
            own = np.repeat(random.normal(0, OWN_ERROR, (DIMENSIONS, cell.dialogues)), cell.turns, axis=1)
            # Half of an utterance's error is the same in every training of a condition, half is new in each.
            noise = random.normal(0, NOISE / np.sqrt(2), label.shape)
            by_seed = []
            for size, bias in zip(*trainings(cell, random, cell.seeds), strict=True):
                error = common + own + speaker_error[:, turn] + noise
                error = error + random.normal(0, NOISE / np.sqrt(2), label.shape)
                by_seed.append((SLOPE * label + bias + factor * size * error).T)
            predicted[name].append(np.stack(by_seed))
            size, bias = trainings(cell, np.random.default_rng(1), 2000)
            expected = [
                population_ccc(cell, offset[k], speaker[k], scenario[k], factor * size, bias, speaker_error[k]).mean()
                for k in range(DIMENSIONS)
            ]
            differences.append(sign * np.mean(expected))
        truth.append(sum(differences))
    return decided(cell, {name: np.concatenate(parts, axis=1) for name, parts in predicted.items()},
                   np.concatenate(labels), float(np.mean(truth)), resamples, seed)  # fmt: skip


def decided(cell: Cell, predicted: dict[str, Floats], labels: Floats, truth: float, resamples: int, seed: int) -> Study:
    """Take a study through the program: bootstrap, both levels, decision."""
    rows = cell.dialogues * cell.turns
    fold, dialogue = np.arange(len(labels)) // rows, np.arange(len(labels)) // cell.turns
    drawn = bootstrap(Compared(predicted, labels, fold, fold, dialogue), "dialogue", resamples, seed)
    draws = drawn.differences(["other"], "baseline", -1)
    assert draws is not None
    by_trial = {
        name: np.stack([ccc_of(p[:, fold == f], labels[fold == f]) for f in range(cell.folds)])
        for name, p in predicted.items()
    }
    differences = by_trial["other"] - by_trial["baseline"]
    level = None
    if too_few_seeds(cell.folds, cell.seeds) is None:
        (level,) = corpus_levels(differences[None], draws, drawn.df, MARGIN)
    # Leave one session out with a validation session: n_test / n_train is 1 / (F - 2).
    speakers = speakers_level(differences.mean(axis=1), 1 / max(1, cell.folds - 2), MARGIN)
    mean = float(differences.mean())
    found = Difference(mean=mean, std=None, by_trial={}, pooled=None, on_corpus=level, new_speakers=speakers)
    decision = decide(found, MARGIN)
    trained = np.quantile(draws[:, 0].mean(axis=1), [0.025, 0.975])
    nothing = float("nan")
    return Study(
        truth=truth,
        estimate=mean,
        low=level.interval.low if level else nothing,
        high=level.interval.high if level else nothing,
        detectable=level.detectable if level else nothing,
        speakers_low=speakers.interval.low if speakers else nothing,
        speakers_high=speakers.interval.high if speakers else nothing,
        speakers_detectable=speakers.detectable if speakers else nothing,
        decision=decision,
        for_new_speakers=confirmed(decision, found),
        trained_low=float(trained[0]),
        trained_high=float(trained[1]),
    )


def ccc_of(predicted: Floats, labels: Floats) -> Floats:
    """Return CCC-Avg per seed `[S]` of predictions `[S, N, K]`."""
    p, t = predicted, np.broadcast_to(labels, predicted.shape)
    sums = np.stack([np.ones_like(p), p, t, p * p, t * t, p * t], axis=-1).sum(axis=1)
    return np.asarray(ccc_of_sums(sums).mean(axis=-1))


def expected_difference(cell: Cell, gain: float) -> float:
    """Return the truth of level 2 for a gain: the mean over many sessions, speakers, scenarios and trainings."""
    random = np.random.default_rng(2)
    total = 0.0
    for _ in range(400):
        offset, scenario = random.normal(0, SESSION), random.normal(0, SCENARIO, cell.scenarios)
        speaker, error = random.normal(0, SPEAKER, 2), random.normal(0, 0.1, 2)
        size, bias = trainings(cell, random, 100)
        relative = 1 - gain + random.normal(0, cell.sessions)
        one = population_ccc(cell, offset, speaker, scenario, size, bias, error)
        total += float((population_ccc(cell, offset, speaker, scenario, relative * size, bias, error) - one).mean())
    return total / 400


def with_difference(cell: Cell, difference: float) -> Cell | None:
    """Return the cell with the gain that makes the expected difference this one; None if no gain does."""
    if expected_difference(cell, 0.95) < difference:
        return None
    gain = optimize.brentq(lambda value: expected_difference(cell, value) - difference, -0.2, 0.95, xtol=1e-4)
    return replace(cell, gain=float(gain))


def at_printed(
    cell: Cell, level: str, resamples: int, pool: ProcessPoolExecutor, pilots: int = 3, studies: int = 100
) -> tuple[Cell, float] | None:
    """Return the cell whose true difference is what its own studies print as detectable, and that difference.

    The printed value depends on the true difference, because a better condition errs less; a few pilots settle it. None
    if no gain gives such a difference.
    """
    printed, found = 0.0, cell
    for pilot in range(pilots + 1):
        sample = run(found, studies, resamples, pool, first=10_000 + pilot * studies)
        printed = float(np.mean([getattr(study, level) for study in sample]))
        larger = with_difference(cell, printed)
        if larger is None:
            return None
        found = larger
    return found, printed


def _chunk(cell: Cell, seeds: Iterable[int], resamples: int) -> list[Study]:
    return [simulate(cell, seed, resamples) for seed in seeds]


def run(cell: Cell, studies: int, resamples: int, pool: ProcessPoolExecutor, first: int = 0) -> list[Study]:
    """Simulate studies in parallel; always the same ones for the same cell."""
    parts = [range(start, min(start + 25, first + studies)) for start in range(first, first + studies, 25)]
    futures = [pool.submit(_chunk, cell, part, resamples) for part in parts]
    return [study for future in futures for study in future.result()]


def share(found: Iterable[bool]) -> str:
    """Return a share in percent with its Monte Carlo error."""
    values = list(found)
    mean = sum(values) / len(values)
    return f"{100 * mean:.1f} ± {100 * (mean * (1 - mean) / len(values)) ** 0.5:.1f}"


def claims(study: Study) -> bool:
    return study.decision.startswith(("better", "worse"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000, help="per cell")
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="60 studies per cell")
    arguments = parser.parse_args()
    studies = 60 if arguments.quick else arguments.studies
    started = time.monotonic()
    iemocap, demo = Cell("IEMOCAP's size", 5, 30, 66, 0), Cell("demo's size", 5, 8, 6, 0)
    cells = [replace(size, seeds=seeds) for size in (iemocap, demo) for seeds in (1, 2, 3, 5)]
    cells += [replace(iemocap, name="one fold", folds=1, dialogues=60, turns=33, seeds=seeds) for seeds in (3, 5)]
    cells += [
        replace(demo, name="little training variance", training=0.025, seeds=2),
        replace(demo, name="much training variance", training=0.30, seeds=2),
        replace(demo, name="3 sessions x 4 dialogues", folds=3, dialogues=4, turns=20, seeds=3),
    ]
    # One thread each, so that the processes do not compete for the cores.
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        tables = [
            level_1(cells, studies, arguments.resamples, pool),
            level_2(cells, studies, arguments.resamples, pool),
        ]
    print(tables_as_text(tables, 120))
    print(f"{studies} studies per cell, {arguments.resamples} resamples, {(time.monotonic() - started) / 60:.0f} min")


def level_1(cells: list[Cell], studies: int, resamples: int, pool: ProcessPoolExecutor) -> Table:
    """Return coverage and size without a difference, and power at the printed detectable difference."""
    rows = []
    for cell in cells:
        null = run(cell, studies, resamples, pool)
        trained = share(s.trained_low <= s.truth <= s.trained_high for s in null)
        row = [cell.name, f"{cell.folds} x {cell.seeds}"]
        if np.isnan(null[0].low):
            rows.append([*row, "-", "-", share(claims(s) for s in null), "-", "-", trained])
            continue
        covered = detectable = power = "out of reach"
        if (reached := at_printed(cell, "detectable", resamples, pool)) is not None:
            real = run(reached[0], studies, resamples, pool, first=studies)
            covered = share(s.low <= s.truth <= s.high for s in real)
            detectable, power = f"{reached[1]:.3f}", share(s.decision.startswith("better") for s in real)
        size = share(claims(s) for s in null)
        rows.append([*row, share(s.low <= s.truth <= s.high for s in null), covered, size, detectable, power, trained])
    columns = ["studies of", "folds x seeds", "coverage, d = 0", "coverage, d > 0", "size", "detectable d"]
    columns += ["power there", "coverage of dialogues alone"]
    return Table("Level 1, on this corpus (%, ± Monte Carlo error)", columns, rows)


def level_2(cells: list[Cell], studies: int, resamples: int, pool: ProcessPoolExecutor) -> Table:
    """Return the same for level 2, with sessions that differ in their gain."""
    rows = []
    for cell in cells:
        if cell.folds == 1:
            continue
        mixed = replace(cell, sessions=0.05)
        null = run(with_difference(mixed, 0.0) or mixed, studies, resamples, pool)
        covered = detectable = power = "out of reach"
        if (reached := at_printed(mixed, "speakers_detectable", resamples, pool)) is not None:
            real = run(reached[0], studies, resamples, pool, first=studies)
            covered = share(s.speakers_low <= reached[1] <= s.speakers_high for s in real)
            detectable, power = f"{reached[1]:.3f}", share(s.speakers_low > 0 for s in real)
        width = np.mean([s.speakers_high - s.speakers_low for s in null]) / spread(null)
        rows.append(
            [
                cell.name,
                f"{cell.folds} x {cell.seeds}",
                share(s.speakers_low <= 0 <= s.speakers_high for s in null),
                covered,
                share(s.for_new_speakers for s in null),
                detectable,
                power,
                f"{width:.2f}",
            ]
        )
    columns = ["studies of", "folds x seeds", "coverage, d = 0", "coverage, d > 0", "size of the sentence"]
    columns += ["detectable d", "power there", "width / exact width"]
    return Table("Level 2, for new speakers, sessions that differ (%, ± Monte Carlo error)", columns, rows)


def spread(studies: list[Study]) -> float:
    """Return the width that a 95 % interval would need if the standard error were known."""
    return float(2 * 1.959964 * np.std([s.estimate for s in studies]))


if __name__ == "__main__":
    main()
