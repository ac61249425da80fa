"""What a setting is judged by: the mean over its folds of the validation CCC, epoch by epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cvrunner.records.results import Ccc, EpochRecord
from cvrunner.tune.records import SettingEpoch
from cvrunner.verdict.ccc import mean_if_all

UNDEFINED = -1.0
"""The score of an undefined CCC where a number is needed: the lowest that there is."""


class Objective:
    """Collects the epochs of a setting's folds, which come in any order between folds."""

    def __init__(self, folds: Sequence[int]) -> None:
        self.best: dict[int, list[Ccc]] = {fold: [] for fold in folds}
        self.ended: set[int] = set()
        self.told = 0

    def epoch(self, fold: int, record: EpochRecord) -> None:
        """A fold has finished an epoch; one that is known already, repeated after a kill, changes nothing."""
        known = self.best[fold]
        if record.epoch == len(known) + 1:
            better = not known or _average(record.validation_ccc) > _average(known[-1])
            known.append(record.validation_ccc if better else known[-1])

    def end(self, fold: int) -> None:
        """A fold has no more epochs."""
        self.ended.add(fold)

    def news(self) -> Iterator[SettingEpoch]:
        """The epochs that all folds have finished, or stopped before, and that were not told yet."""
        while self._reached() > self.told:
            self.told += 1
            folds = {fold: known[min(self.told, len(known)) - 1] for fold, known in self.best.items()}
            score = mean_if_all(ccc["avg"] for ccc in folds.values())
            yield SettingEpoch(epoch=self.told, folds=folds, score=score)

    def _reached(self) -> int:
        open_folds = [len(known) for fold, known in self.best.items() if fold not in self.ended]
        return min(open_folds) if open_folds else max(len(known) for known in self.best.values())


def _average(ccc: Ccc) -> float:
    average = ccc["avg"]
    return UNDEFINED - 0.5 if average is None else average
