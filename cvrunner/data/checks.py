"""The rules every corpus must keep, whatever its format, and reading its audio once.

A loader turns label lines into `Entry`s; `utterances_of` checks them, reads the audio and makes `Utterance`s.
What is wrong is collected in `Findings`, so that one pass shows all of it: problems stop the program before
any training, warnings are counted and reported.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cvrunner.data.utterance import (
    SAMPLE_RATE_HZ,
    AudioError,
    Utterance,
    audio_digest,
    check_length,
    natural_order,
    read_audio,
)
from cvrunner.errors import CorpusError

LONG_S = 40.0
Rater = tuple[float, float, float | None]


@dataclass(frozen=True, slots=True)
class Entry:
    """One utterance as its label line has it, before its audio was read."""

    where: str
    """File and line, for messages."""
    id: str
    path: Path
    speaker: str
    gender: str | None
    session: str
    dialogue: str
    time: float
    """Sorts the turns of a dialogue: a start time or a turn number."""
    scenario: str | None
    improvised: bool | None
    labels: Mapping[str, float | None]
    raters: dict[str, Rater] = field(default_factory=dict)
    part: str | None = None

    @property
    def named(self) -> str:
        """Place and utterance, as a problem begins."""
        return f"{self.where}: {self.id}"


@dataclass(frozen=True)
class Rules:
    """What differs between corpora and configurations."""

    dimensions: Sequence[str]
    """Labels that must be there and in the scale; valence and arousal must be there always."""
    scale: tuple[float, float]
    resample: bool
    outside_scale: Literal["problem", "warning"]
    one_session_each: bool
    """A speaker and a dialogue belong to one session."""


@dataclass
class Findings:
    """What one pass over a corpus found."""

    problems: list[str] = field(default_factory=list)
    counted: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Places by what was found there."""

    def problem(self, where: str, rule: str) -> None:
        self.problems.append(f"{where}: {rule}")

    def count(self, what: str, where: str) -> None:
        self.counted[what].append(where)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line for each kind: what, how many, and the first."""
        return tuple(f"{what}: {len(places)} (first: {places[0]})" for what, places in self.counted.items())

    def stop_if_any(self, where: str) -> None:
        """Raise CorpusError with all problems, if there are any."""
        if self.problems:
            raise CorpusError(where, self.problems)


def utterances_of(entries: Sequence[Entry], rules: Rules, findings: Findings) -> tuple[Utterance, ...]:
    """Checked utterances by session, dialogue and turn; an entry that breaks a rule adds a problem.

    The audio is read by a few threads, one waveform each at a time.
    """
    if not entries and not findings.problems:
        findings.problems.append("no utterances")
    _check_ids(entries, findings)
    _check_genders(entries, findings)
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
    """How many labels of a dimension lie outside the rating scale; they are kept and never clipped."""
    values = (u.label(dimension) for u in utterances)
    return sum(value is not None and not scale[0] <= value <= scale[1] for value in values)


def _check_ids(entries: Sequence[Entry], findings: Findings) -> None:
    first: dict[str, str] = {}
    for entry in entries:
        if entry.id in first:
            findings.problem(entry.named, f"this utterance stands already at {first[entry.id]}")
        first.setdefault(entry.id, entry.where)


def _check_genders(entries: Sequence[Entry], findings: Findings) -> None:
    first: dict[str, Entry] = {}
    for entry in entries:
        if entry.gender is None:
            continue
        before = first.setdefault(entry.speaker, entry)
        if before.gender != entry.gender:
            rule = f"speaker {entry.speaker} is {entry.gender} here and {before.gender} at {before.where}"
            findings.problem(entry.named, rule)


def _check_one_session(entries: Sequence[Entry], what: Literal["speaker", "dialogue"], findings: Findings) -> None:
    first: dict[str, dict[str, Entry]] = defaultdict(dict)
    for entry in entries:
        first[getattr(entry, what)].setdefault(entry.session, entry)
    for name, by_session in first.items():
        if len(by_session) > 1:
            places = ", ".join(f"{session} ({entry.where})" for session, entry in by_session.items())
            entry = list(by_session.values())[1]
            findings.problem(
                entry.named,
                f"{what} {name} is in more than one session: {places}; sessions must share no {what}",
            )


def _check_labels(entry: Entry, rules: Rules, findings: Findings) -> None:
    low, high = rules.scale
    for dimension in dict.fromkeys(("valence", "arousal", *rules.dimensions)):
        value = entry.labels.get(dimension)
        if value is None:
            findings.problem(entry.named, f"{dimension} is missing")
        elif not math.isfinite(value):
            findings.problem(entry.named, f"{dimension} is {value}, must be a finite number")
        elif dimension in rules.dimensions and not low <= value <= high:
            if rules.outside_scale == "problem":
                findings.problem(entry.named, f"{dimension} is {value:g}, outside corpus.scale {low:g}..{high:g}")
            else:
                what = f"{dimension} labels outside corpus.scale {low:g}..{high:g}, kept as they are"
                findings.count(what, f"{entry.named} {value:g}")


def _turns(entries: Sequence[Entry]) -> list[int]:
    """The rank of every entry in its dialogue, from 0."""
    by_dialogue: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, entry in enumerate(entries):
        by_dialogue[entry.session, entry.dialogue].append(index)
    turns = [0] * len(entries)
    for indices in by_dialogue.values():
        indices.sort(key=lambda index: (entries[index].time, entries[index].id))
        for turn, index in enumerate(indices):
            turns[index] = turn
    return turns


def _read_all(entries: Sequence[Entry], resample: bool, findings: Findings) -> dict[int, tuple[int, str]]:
    """Samples and digest by index of the entry, of those whose audio keeps the rules."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(lambda entry: _read(entry.path, resample), entries))
    audio: dict[int, tuple[int, str]] = {}
    for index, (entry, outcome) in enumerate(zip(entries, outcomes, strict=True)):
        if isinstance(outcome, AudioError):
            findings.problem(entry.named, f"{entry.path}: {outcome}")
            continue
        audio[index] = outcome
        if outcome[0] > LONG_S * SAMPLE_RATE_HZ:
            findings.count(
                f"utterances longer than {LONG_S:g} s", f"{entry.named}, {outcome[0] / SAMPLE_RATE_HZ:.1f} s"
            )
    return audio


def _read(path: Path, resample: bool) -> tuple[int, str] | AudioError:
    """Length and digest; the waveform itself is let go at once."""
    try:
        samples = read_audio(path, resample)
        check_length(samples)
    except AudioError as error:
        return error
    return len(samples), audio_digest(samples)


def _utterance(entry: Entry, turn: int, samples: int, digest: str) -> Utterance:
    # A missing label is a problem by now, and the corpus will not be used.
    valence, arousal, dominance = (entry.labels.get(d) for d in ("valence", "arousal", "dominance"))
    return Utterance(
        id=entry.id,
        path=entry.path,
        speaker=entry.speaker,
        gender=entry.gender,
        session=entry.session,
        dialogue=entry.dialogue,
        turn=turn,
        scenario=entry.scenario,
        improvised=entry.improvised,
        valence=math.nan if valence is None else valence,
        arousal=math.nan if arousal is None else arousal,
        dominance=None if dominance is None or not math.isfinite(dominance) else dominance,
        samples=samples,
        audio_digest=digest,
        raters=entry.raters,
        part=entry.part,
    )
