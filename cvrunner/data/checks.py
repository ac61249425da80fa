"""The rules for every corpus, whatever its format, and the one pass that reads its audio.

A loader turns label lines into `Entry`s; `utterances_of` checks them, reads the audio and returns `Utterance`s.
`Findings` collects everything that is wrong, so that one pass shows all of it: problems stop the program before any
training, warnings are counted and reported.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from cvrunner.data.utterance import (
    DIMENSIONS,
    SAMPLE_RATE_HZ,
    AudioError,
    Utterance,
    UtteranceInfo,
    audio_digest,
    check_length,
    natural_order,
    read_audio,
)
from cvrunner.errors import CorpusError

LONG_S = 40.0
"""Longer utterances are a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(UtteranceInfo):
    """One utterance as its label line describes it, before its audio is read."""

    where: str
    """File and line, for messages."""
    time: float
    """Sorts the turns of a dialogue: a start time or a turn number."""
    labels: Mapping[str, float | None]

    @property
    def name(self) -> str:
        """Place and id, with which a problem begins."""
        return f"{self.where}: {self.id}"


@dataclass(frozen=True)
class Rules:
    """The rules that differ between corpora and configurations."""

    dimensions: Sequence[str]
    """Labels that must exist and be within the scale. Valence and arousal must always exist."""
    scale: tuple[float, float]
    resample: bool
    outside_scale: Literal["problem", "warning"]
    one_session_each: bool
    """A speaker and a dialogue belong to one session."""


@dataclass
class Findings:
    """Problems and warnings of one pass over a corpus."""

    problems: list[str] = field(default_factory=list)
    counted: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Places of each kind of warning."""

    def problem(self, where: str, rule: str) -> None:
        self.problems.append(f"{where}: {rule}")

    def count(self, what: str, where: str) -> None:
        self.counted[what].append(where)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line per kind of warning, with the number and the first place."""
        return tuple(f"{what}: {len(places)} (first: {places[0]})" for what, places in self.counted.items())

    def stop_if_any(self, where: str) -> None:
        """Raise CorpusError with all problems, if there are any."""
        if self.problems:
            raise CorpusError(where, self.problems)


def utterances_of(entries: Sequence[Entry], rules: Rules, findings: Findings) -> tuple[Utterance, ...]:
    """Return the utterances sorted by session, dialogue and turn; an entry that breaks a rule adds a problem.

    A few threads read the audio, with one waveform at a time in the memory of each.
    """
    if not entries and not findings.problems:
        findings.problems.append("no utterances")
    _check_ids_and_genders(entries, findings)
    if rules.one_session_each:
        _check_one_session(entries, "speaker", findings)
        _check_one_session(entries, "dialogue", findings)
    for entry in entries:
        _check_labels(entry, rules, findings)
    turns = _turns(entries)
    audio = _read_all(entries, rules.resample, findings)
    made = [_utterance(entry, turns[index], *audio[index]) for index, entry in enumerate(entries) if index in audio]
    return tuple(sorted(made, key=lambda u: (natural_order(u.session), u.dialogue, u.turn)))


def labels_outside(utterances: Iterable[Utterance], dimension: str, scale: tuple[float, float]) -> int:
    """Return how many labels of a dimension are outside the rating scale; they are kept, never clipped."""
    values = (u.label(dimension) for u in utterances)
    return sum(value is not None and not scale[0] <= value <= scale[1] for value in values)


def _check_ids_and_genders(entries: Sequence[Entry], findings: Findings) -> None:
    first: dict[str, str] = {}
    for entry in entries:
        if entry.id in first:
            findings.problem(entry.name, f"duplicate utterance; the first is at {first[entry.id]}")
        first.setdefault(entry.id, entry.where)
    known: dict[str, Entry] = {}
    for entry in entries:
        if entry.gender is None:
            continue
        before = known.setdefault(entry.speaker, entry)
        if before.gender != entry.gender:
            rule = f"speaker {entry.speaker} is {entry.gender} here and {before.gender} at {before.where}"
            findings.problem(entry.name, rule)


def _check_one_session(entries: Sequence[Entry], what: Literal["speaker", "dialogue"], findings: Findings) -> None:
    first: dict[str, dict[str, Entry]] = defaultdict(dict)
    for entry in entries:
        first[getattr(entry, what)].setdefault(entry.session, entry)
    for name, by_session in first.items():
        if len(by_session) > 1:
            places = ", ".join(f"{session} ({entry.where})" for session, entry in by_session.items())
            second = list(by_session.values())[1]
            findings.problem(
                second.name,
                f"{what} {name} is in more than one session: {places}; sessions must share no {what}",
            )


def _check_labels(entry: Entry, rules: Rules, findings: Findings) -> None:
    low, high = rules.scale
    for dimension in dict.fromkeys(("valence", "arousal", *rules.dimensions)):
        value = entry.labels.get(dimension)
        if value is None:
            findings.problem(entry.name, f"{dimension} is missing")
        elif not math.isfinite(value):
            findings.problem(entry.name, f"{dimension} is {value}, must be a finite number")
        elif dimension in rules.dimensions and not low <= value <= high:
            if rules.outside_scale == "problem":
                findings.problem(entry.name, f"{dimension} is {value:g}, outside corpus.scale {low:g}..{high:g}")
            else:
                what = f"{dimension} labels outside corpus.scale {low:g}..{high:g}, kept as they are"
                findings.count(what, f"{entry.name} {value:g}")


def _turns(entries: Sequence[Entry]) -> list[int]:
    """Return the rank of every entry in its dialogue, from 0."""
    by_dialogue: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, entry in enumerate(entries):
        by_dialogue[entry.session, entry.dialogue].append(index)
    turns = [0] * len(entries)
    for indices in by_dialogue.values():
        # The id breaks ties, so that the order never depends on the order of files on the disk.
        indices.sort(key=lambda index: (entries[index].time, entries[index].id))
        for turn, index in enumerate(indices):
            turns[index] = turn
    return turns


def _read_all(entries: Sequence[Entry], resample: bool, findings: Findings) -> dict[int, tuple[int, str]]:
    """Return the number of samples and the digest by index of the entry, where the audio keeps the rules."""
    # Decoding runs outside the GIL, and on a network file system most of the time is waiting.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(lambda entry: _read(entry.path, resample), entries))
    audio: dict[int, tuple[int, str]] = {}
    for index, (entry, outcome) in enumerate(zip(entries, outcomes, strict=True)):
        if isinstance(outcome, AudioError):
            findings.problem(entry.name, f"{entry.path}: {outcome}")
            continue
        audio[index] = outcome
        if outcome[0] > LONG_S * SAMPLE_RATE_HZ:
            seconds = outcome[0] / SAMPLE_RATE_HZ
            findings.count(f"utterances longer than {LONG_S:g} s", f"{entry.name}, {seconds:.1f} s")
    return audio


def _read(path: Path, resample: bool) -> tuple[int, str] | AudioError:
    """Return length and digest of a file; the waveform is freed at once."""
    try:
        samples = read_audio(path, resample)
        check_length(samples)
    except AudioError as error:
        return error
    return len(samples), audio_digest(samples)


def _utterance(entry: Entry, turn: int, samples: int, digest: str) -> Utterance:
    # A missing label is already a problem, so the corpus will be refused; NaN only completes the type.
    valence, arousal, dominance = (entry.labels.get(dimension) for dimension in DIMENSIONS)
    if dominance is not None and not math.isfinite(dominance):
        dominance = None
    return Utterance(
        **{info.name: getattr(entry, info.name) for info in fields(UtteranceInfo)},
        turn=turn,
        valence=math.nan if valence is None else valence,
        arousal=math.nan if arousal is None else arousal,
        dominance=dominance,
        samples=samples,
        audio_digest=digest,
    )
