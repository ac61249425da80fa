"""The rules for every corpus, whatever its format, and the one pass that reads its audio.

A loader turns label lines into `Entry`s; `utterances_of` checks them, reads the audio and returns `Utterance`s.
`Findings` collects everything that is wrong, so that one pass shows all of it: problems stop the program before any
training, warnings are counted and reported.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from cvrunner.data.audio import Note
from cvrunner.data.utterance import (
    DIMENSIONS,
    SAMPLE_RATE_HZ,
    SHORTEST_SAMPLES,
    AudioError,
    Utterance,
    UtteranceInfo,
    audio_digest,
    check_length,
    natural_order,
    read_with_notes,
)
from cvrunner.errors import CorpusError

LONG_S = 40.0
"""Longer utterances are a warning."""
SMALL_PART = 0.25
"""Labels that cover less of the rating scale are a warning: the scale is probably that of another corpus."""
NAMES = ("utterance", "speaker", "session", "dialogue", "scenario")
INVISIBLE = {*"\u034f\u115f\u1160\u180b\u180c\u180d\u2800\u3164\uffa0", *map(chr, range(0xFE00, 0xFE10))}
"""Letters without a shape that are not format characters (Cf): joiners, fillers, variation selectors."""
_NUMBER = re.compile(r"[-+]?((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|nan|inf|infinity)", re.ASCII | re.IGNORECASE)


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
    shortest: int = SHORTEST_SAMPLES
    """Minimum number of samples at 16 kHz."""


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
    for what in NAMES:
        check_spellings(entries, what, findings)
    for entry in entries:
        _check_labels(entry, rules, findings)
    _check_coverage(entries, rules, findings)
    turns = _turns(entries)
    audio = _read_all(entries, rules, findings)
    _check_twins(entries, audio, rules, findings)
    made = [_utterance(entry, turns[index], *audio[index]) for index, entry in enumerate(entries) if index in audio]
    return tuple(sorted(made, key=lambda u: (natural_order(u.session), u.dialogue, u.turn)))


def labels_outside(utterances: Iterable[Utterance], dimension: str, scale: tuple[float, float]) -> int:
    """Return how many labels of a dimension are outside the rating scale; they are kept, never clipped."""
    values = (u.label(dimension) for u in utterances)
    return sum(value is not None and not scale[0] <= value <= scale[1] for value in values)


def parse_number(text: str) -> float:
    """Return a number written in plain decimal notation. Raises ValueError for anything else.

    Python's own `float` would read `1_10` as 110, and digits of other scripts.
    """
    if not _NUMBER.fullmatch(text.strip()):
        raise ValueError(f"{text!r} is not a number")
    return float(text)


def same_name(name: str) -> str:
    """Return a name as people see it; two names with the same result look the same.

    Composed letters, spaces and dashes have one form, invisible characters are left out, and `7.0` becomes `7`.
    """
    # Compatibility forms include full-width letters and no-break spaces.
    plain = unicodedata.normalize("NFKC", name)
    if not plain.isascii():
        seen = (c for c in plain if unicodedata.category(c) != "Cf" and c not in INVISIBLE)
        plain = "".join("-" if unicodedata.category(c) == "Pd" else c for c in seen)
    # pandas writes the whole numbers of a column with gaps as 7.0.
    return re.sub(r"^([-+]?\d+)\.0*$", r"\1", " ".join(plain.split()))


def loose_name(name: str) -> str:
    """Return `same_name` without case and leading zeros, as two files may spell one name: `Spk01` and `spk1`."""
    return re.sub(r"(?<!\d)0+(?=\d)", "", same_name(name).casefold())


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


def check_spellings(entries: Sequence[Entry], what: str, findings: Findings) -> None:
    """Add a problem per pair of names that look the same, a warning if only case or leading zeros differ."""
    first: dict[str, tuple[str, Entry]] = {}
    loosely: dict[str, tuple[str, Entry]] = {}
    seen: set[str] = set()
    for entry in entries:
        name = getattr(entry, "id" if what == "utterance" else what)
        if name is None or str(name) in seen:
            continue
        name = str(name)
        seen.add(name)
        plain = same_name(name)
        known, before = first.setdefault(plain, (name, entry))
        if known != name:
            rule = f"{what} {name!a} looks like {known!a} at {before.where}; write one name in one way"
            findings.problem(entry.name, rule)
        if known != name or what == "path":
            continue
        loose, before = loosely.setdefault(loose_name(name), (name, entry))
        if loose != name:
            kind = f"{what} names that differ only in case or leading zeros, taken for different ones"
            findings.count(kind, f"{name} at {entry.where} and {loose} at {before.where}")


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


def _check_coverage(entries: Sequence[Entry], rules: Rules, findings: Findings) -> None:
    low, high = rules.scale
    for dimension in rules.dimensions:
        given = (entry.labels.get(dimension) for entry in entries)
        values = [value for value in given if value is not None and math.isfinite(value)]
        least, most = min(values, default=low), max(values, default=low)
        # Equal labels are a problem of the folds; labels outside the scale have a message of their own.
        if low <= least < most <= high and most - least < SMALL_PART * (high - low):
            what = f"{dimension} labels that cover a small part of corpus.scale {low:g}..{high:g} (is it right?)"
            findings.counted[what] += [f"all within {least:g}..{most:g}"] * len(values)


def _check_twins(
    entries: Sequence[Entry], audio: Mapping[int, tuple[int, str]], rules: Rules, findings: Findings
) -> None:
    """Count recordings that several rows share. In two parts of a fold they are a leak, too."""
    rows: dict[str, list[Entry]] = defaultdict(list)
    for index, (_, digest) in audio.items():
        rows[digest].append(entries[index])
    for same in rows.values():
        if len(same) > 1:
            labels = {tuple(entry.labels.get(dimension) for dimension in rules.dimensions) for entry in same}
            kind = "equal" if len(labels) == 1 else "different"
            names = " and ".join(entry.name for entry in same[:5])
            findings.count(f"recordings in several rows, with {kind} labels", names + " and more" * (len(same) > 5))


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


def _read_all(entries: Sequence[Entry], rules: Rules, findings: Findings) -> dict[int, tuple[int, str]]:
    """Return the number of samples and the digest by index of the entry, where the audio keeps the rules."""
    # Decoding runs outside the GIL, and on a network file system most of the time is waiting.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(lambda entry: _read(entry.path, rules), entries))
    audio: dict[int, tuple[int, str]] = {}
    for index, (entry, outcome) in enumerate(zip(entries, outcomes, strict=True)):
        if isinstance(outcome, AudioError):
            findings.problem(entry.name, f"{entry.path}: {outcome}")
            continue
        samples, digest, notes = outcome
        audio[index] = samples, digest
        for kind, text in notes:
            findings.count(kind, f"{entry.name}, {text}")
        if samples > LONG_S * SAMPLE_RATE_HZ:
            seconds = samples / SAMPLE_RATE_HZ
            findings.count(f"utterances longer than {LONG_S:g} s", f"{entry.name}, {seconds:.1f} s")
    return audio


def _read(path: Path, rules: Rules) -> tuple[int, str, list[Note]] | AudioError:
    """Return length, digest and warnings of a file; the waveform is freed at once."""
    try:
        samples, notes = read_with_notes(path, rules.resample)
        check_length(samples, rules.shortest)
    except AudioError as error:
        return error
    return len(samples), audio_digest(samples), notes


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
