"""Folds: the utterances that train, choose the epoch and test, and the proof that these parts share nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from cvrunner.config.schema import digest
from cvrunner.data.utterance import PARTS, Corpus, Utterance, natural_order
from cvrunner.errors import CorpusError, LeakError
from cvrunner.text import plural

Scheme = Literal["leave_one_session_out", "manifest_split"]


@dataclass(frozen=True)
class Fold:
    """One split of the corpus, numbered from 1. Utterances keep the order of the corpus."""

    number: int
    train: tuple[Utterance, ...]
    validation: tuple[Utterance, ...]
    test: tuple[Utterance, ...]

    @property
    def parts(self) -> Mapping[str, tuple[Utterance, ...]]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def utterances(self) -> tuple[Utterance, ...]:
        """Utterances of all three parts."""
        return (*self.train, *self.validation, *self.test)

    @property
    def sessions(self) -> dict[str, tuple[str, ...]]:
        """Names of the sessions by part."""
        return {part: tuple(sorted({u.session for u in some}, key=natural_order)) for part, some in self.parts.items()}


def make_folds(corpus: Corpus, scheme: Scheme) -> tuple[Fold, ...]:
    """Return the folds of a corpus.

    `leave_one_session_out`: fold k tests the k-th session, validates on the next one (the last is followed by the
    first) and trains on the others. `manifest_split`: one fold, as the corpus defines it. Raises CorpusError if the
    corpus does not allow the scheme.
    """
    if scheme == "manifest_split":
        parts = {part: tuple(u for u in corpus.utterances if u.part == part) for part in PARTS}
        absent = [part for part, some in parts.items() if not some]
        if absent:
            rule = f"folds.scheme manifest_split needs a split column with {', '.join(PARTS)}; no utterance has"
            raise CorpusError(corpus.name, [f"{rule} {' or '.join(absent)}"])
        return (Fold(1, **parts),)
    sessions = corpus.sessions
    if len(sessions) < 3:
        raise CorpusError(
            corpus.name,
            [
                f"has {plural(len(sessions), 'session')} ({', '.join(sessions)}); "
                "leave_one_session_out needs three or more, to train, to validate and to test"
            ],
        )
    folds = []
    for index, test in enumerate(sessions):
        validation = sessions[(index + 1) % len(sessions)]
        folds.append(
            Fold(
                number=index + 1,
                train=tuple(u for u in corpus.utterances if u.session not in (test, validation)),
                validation=tuple(u for u in corpus.utterances if u.session == validation),
                test=tuple(u for u in corpus.utterances if u.session == test),
            )
        )
    return tuple(folds)


def split_digest(folds: Iterable[Fold]) -> str:
    """Return the SHA-256 of which utterance is in which part of which fold; their order does not matter."""
    return digest(sorted([f.number, part, u.id] for f in folds for part, some in f.parts.items() for u in some))


def split_table(folds: Sequence[Fold]) -> dict[str, Any]:
    """Return the content of split.json: the digest and, by fold and part, sessions and sorted utterance ids."""
    return {
        "digest": split_digest(folds),
        "folds": [
            {"fold": fold.number}
            | {
                part: {"sessions": list(sessions), "utterances": sorted(u.id for u in fold.parts[part])}
                for part, sessions in fold.sessions.items()
            }
            for fold in folds
        ],
    }


def find_leaks(folds: Iterable[Fold]) -> list[str]:
    """Return one line per speaker, dialogue, utterance or recording that two parts of a fold share."""
    return [leak for fold in folds for one, other in combinations(PARTS, 2) for leak in _shared(fold, one, other)]


def check_labels(corpus: Corpus, folds: Iterable[Fold], dimensions: Sequence[str]) -> None:
    """Raise CorpusError if all labels of a part are equal, such as in a part of one utterance: no CCC is defined."""
    problems = [
        f"fold {fold.number}: {part} ({', '.join(fold.sessions[part])}): every {dimension} is {values.pop():g} "
        f"({plural(len(some), 'utterance')}); labels must differ, or there is no CCC"
        for fold in folds
        for part, some in fold.parts.items()
        for dimension in dimensions
        if len(values := {value for u in some if (value := u.label(dimension)) is not None}) == 1
    ]
    if problems:
        raise CorpusError(corpus.name, problems)


def check_leaks(folds: Iterable[Fold]) -> None:
    """Raise LeakError with all leaks, if there are any."""
    if leaks := find_leaks(folds):
        raise LeakError("train, validation and test must share nothing", leaks)


def _shared(fold: Fold, one: str, other: str) -> list[str]:
    first, second = fold.parts[one], fold.parts[other]
    leaks = []
    for what, word in (("speaker", "speaker"), ("dialogue", "dialogue"), ("id", "utterance")):
        shared = {getattr(u, what) for u in first} & {getattr(u, what) for u in second}
        leaks += [f"fold {fold.number}: {word} {name} is in {one} and in {other}" for name in sorted(shared)]
    # The same recording under two names would leak too; the same name was reported above.
    by_audio: dict[str, list[str]] = defaultdict(list)
    for u in first:
        by_audio[u.audio_digest].append(u.id)
    for u in second:
        leaks += [
            f"fold {fold.number}: {twin} ({one}) and {u.id} ({other}) are the same audio"
            for twin in by_audio[u.audio_digest]
            if twin != u.id
        ]
    return leaks
