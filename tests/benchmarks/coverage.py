"""How often the 95 % intervals hold the truth, in simulated experiments: `python -m tests.benchmarks.coverage`.

Each experiment has five sessions of dialogues whose utterances share a mood and an error, as in the tests. The truth is
the CCC difference of a population of 4000 dialogues.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator

import audmetric
import numpy as np

from cvrunner.verdict.statistics import Paired, paired_bootstrap
from tests.verdict.test_statistics import paired, simulated

OTHER_NOISE = 0.4
DIALOGUES = (8, 12, 30)
"""By session: the demo's, few, IEMOCAP's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=1000)
    arguments = parser.parse_args()
    truth = population_difference()
    print(f"{arguments.experiments} experiments, {arguments.resamples} resamples, true difference {truth:+.4f}")
    for dialogues in DIALOGUES:
        locked = Counter(coverage(truth, dialogues, arguments.experiments, arguments.resamples))
        for name, count in locked.items():
            share = count / arguments.experiments
            error = (share * (1 - share) / arguments.experiments) ** 0.5
            print(f"{dialogues:3} dialogues a session  {name:37} {100 * share:5.1f} % +- {100 * error:.1f}")


def population_difference() -> float:
    """CCC difference of one large fold."""
    population = simulated(np.random.default_rng(99), other_noise=OTHER_NOISE, dialogues=4000)
    rows = population.fold == 0
    truth = population.truth[rows, 0]
    other, baseline = (audmetric.concordance_cc(truth, p[0, rows, 0]) for p in (population.other, population.baseline))
    return float(other - baseline)


def coverage(truth: float, dialogues: int, experiments: int, resamples: int) -> Iterator[str]:
    """The name of each interval, every time that it holds the truth."""
    random = np.random.default_rng(6)
    for experiment in range(experiments):
        data = simulated(random, other_noise=OTHER_NOISE, dialogues=dialogues)
        for name, resampled in (("dialogues", data), ("utterances (wrong)", _by_utterance(data))):
            found = paired_bootstrap(resampled, resamples, seed=experiment)
            for kind, pooled in (("mean over folds", False), ("pooled", True)):
                interval = found.interval(0, pooled)
                if interval and interval.low <= truth <= interval.high:
                    yield f"{name}, {kind}"


def _by_utterance(data: Paired) -> Paired:
    """The same data with every utterance taken for a dialogue of its own."""
    return paired(data.baseline, data.other, data.truth, data.fold, np.arange(len(data.fold)))


if __name__ == "__main__":
    main()
