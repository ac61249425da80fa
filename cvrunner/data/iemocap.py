"""IEMOCAP as published: `dialog/EmoEvaluation/<dialogue>.txt` and `sentences/wav/` in each `Session<n>`.

A label file has, for every turn, a header line and one line per rater:

    [6.2901 - 8.2357]<TAB>Ses01F_impro01_F000<TAB>neu<TAB>[2.5000, 2.5000, 2.5000]   V, A, D
    A-E3:<TAB>val 3; act 2; dom  2;<TAB>()     E: observer; F, M: the actors about themselves

The last field of a turn's name identifies the speaker (`F000`: the woman of the session). The letter after the session
number is the side that wore motion capture, which is the other speaker in half of the turns.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cvrunner.data.checks import Entry, Findings, Rules, parse_number, utterances_of
from cvrunner.data.utterance import DIMENSIONS, SHORTEST_SAMPLES, Corpus, natural_order
from cvrunner.errors import CorpusError

LabelVariant = Literal["header", "observers", "all_raters"]
Rating = tuple[float | None, float | None, float | None]
"""Valence, arousal and dominance as written; None if missing."""
SYNTHETIC_MARK = "SYNTHETIC.json"
"""File in the root of a corpus that the demo wrote."""

PUBLISHED_TURNS = {"Session1": 1819, "Session2": 1811, "Session3": 2136, "Session4": 2103, "Session5": 2170}
"""Labelled turns per session as published, 10,039 in total; in 151 dialogues (`published_dialogues`)."""

_NUMBER = r"(\d+(?:\.\d+)?)"
_HEADER = re.compile(rf"\[\s*{_NUMBER}\s*-\s*{_NUMBER}\s*\]\s+(\S+)\s+\S+\s+\[([^\]]*)\]", re.ASCII)
_RATING = re.compile(
    rf"A-([EFM]\w*):\s*val\s*{_NUMBER}?\s*;\s*act\s*{_NUMBER}?\s*;(?:\s*dom\s*{_NUMBER}?\s*;)?", re.ASCII
)
_SESSION = re.compile(r"Session\d+", re.ASCII)
_DIALOGUE = re.compile(r"Ses(\d\d)[FM]_((impro|script)\d+(?:_\d+)?)[a-z]?", re.ASCII)
_SPEAKER = re.compile(r"([FM])\w+", re.ASCII)


@dataclass
class _Turn:
    where: str
    id: str
    start_s: float
    header: Rating
    raters: dict[str, Rating] = field(default_factory=dict)


def load_iemocap(
    root: Path,
    labels: LabelVariant,
    scale: tuple[float, float],
    dimensions: Sequence[str],
    resample: bool,
    partial: bool | None = None,
    shortest: int = SHORTEST_SAMPLES,
) -> Corpus:
    """Return the corpus in `root`, the folder that holds `Session1` and its siblings.

    Labels: `header` is the mean printed next to the turn, `observers` the mean of the raters `E*`, `all_raters` that of
    `E*`, `F*` and `M*`; each dimension over the raters who gave it. Labels outside `scale` are kept and counted as a
    warning, and so are audio files without a label line, and what the published corpus has in addition. A missing
    session is a problem unless the corpus is `partial`; None compares with nothing, synthetic trees have any size.
    `shortest`: minimum number of samples. Raises CorpusError with every problem, each with file and line.
    """
    findings = Findings()
    entries: list[Entry] = []
    for folder in session_folders(root):
        entries += _read_session(root, folder, labels, findings)
    synthetic = is_synthetic(root)
    if not synthetic and partial is not None:
        _compare_with_published(root, entries, partial, findings)
    utterances = utterances_of(entries, Rules(dimensions, scale, resample, "warning", True, shortest), findings)
    findings.stop_if_any(str(root))
    return Corpus(utterances, "demo" if synthetic else "IEMOCAP", labels, synthetic, findings.warnings)


def side(dialogue: str) -> str | None:
    """Return the letter of the side that wore motion capture (`Ses01F_impro01`: F); None for other corpora."""
    return dialogue[5] if _DIALOGUE.fullmatch(dialogue) else None


def session_folders(root: Path) -> list[Path]:
    """Return `Session1` and its siblings in the order of their numbers. Raises CorpusError if there are none."""
    folders = [path for path in root.glob("Session*") if _SESSION.fullmatch(path.name) and path.is_dir()]
    if not folders:
        inside = sorted(path.parent.name for path in root.glob("*/Session1"))
        hint = f"; did you mean {root / inside[0]}?" if inside else ""
        raise CorpusError(str(root), [f"corpus.root must be the folder that holds Session1, Session2, ...{hint}"])
    return sorted(folders, key=lambda path: natural_order(path.name))


def is_synthetic(root: Path) -> bool:
    """Return whether a tree is one that the demo wrote."""
    return (root / SYNTHETIC_MARK).is_file()


def published_dialogues(session: int) -> list[str]:
    """Return the names of the published dialogues of a session: 28, 30, 32, 30 and 31."""
    scripted = ["script01_1", "script01_2", "script01_3", "script02_1", "script02_2", "script03_1", "script03_2"]
    improvised = [f"impro{number:02}" for number in range(1, 8 if session == 1 else 9)]
    names = {f"Ses{session:02}{side}_{name}" for side in "FM" for name in improvised + scripted}
    # Recorded in two parts.
    if session == 3:
        names -= {"Ses03M_impro05", "Ses03M_impro08"}
        names |= {f"Ses03M_impro{name}" for name in ("05a", "05b", "08a", "08b")}
    if session == 5:
        names.add("Ses05M_script01_1b")
    return sorted(names)


def _compare_with_published(root: Path, entries: Sequence[Entry], partial: bool, findings: Findings) -> None:
    """Name the sessions, dialogues and turns that the published corpus has and this tree lacks."""
    known = {int(folder.name.removeprefix("Session")) for folder in session_folders(root)}
    alike = {path.name for path in root.iterdir() if re.fullmatch(r"ses(sion)?[\W_]*\d+", path.name, re.I | re.A)}
    for name in sorted(name for name in alike if not _SESSION.fullmatch(name)):
        findings.problem(name, "looks like a session but is not read; sessions must be named Session1 ... Session5")
    turns: dict[str, int] = {}
    for entry in entries:
        turns[entry.session] = turns.get(entry.session, 0) + 1
    dialogues = {entry.dialogue for entry in entries}
    for number, (session, published) in enumerate(PUBLISHED_TURNS.items(), start=1):
        if number not in known:
            rule = f"is missing, with {published} of the 10,039 published turns"
            if partial:
                findings.count("sessions that are missing", session)
            else:
                findings.problem(session, f"{rule}; complete the copy, or set corpus.partial: true to train without it")
            continue
        absent = [name for name in published_dialogues(number) if name not in dialogues]
        for name in absent:
            findings.count(
                "dialogues of the published corpus that are missing", f"{session}/dialog/EmoEvaluation/{name}.txt"
            )
        found = turns.get(f"Ses{number:02}", 0)
        if found != published:
            findings.count("sessions with another number of turns than published", f"{session} {found} of {published}")


def _read_session(root: Path, folder: Path, labels: LabelVariant, findings: Findings) -> list[Entry]:
    label_files = _visible((folder / "dialog" / "EmoEvaluation").glob("*.txt"))
    if not label_files:
        findings.problem(f"{folder.name}/dialog/EmoEvaluation", "there is no label file (*.txt)")
    entries: list[Entry] = []
    for path in label_files:
        for turn in _read_turns(path, str(path.relative_to(root)), findings):
            try:
                entries.append(_entry(folder, path.stem, turn, labels))
            except ValueError as error:
                findings.problem(f"{turn.where}: {turn.id}", str(error))
    labelled = {entry.path for entry in entries}
    for wav in _visible((folder / "sentences" / "wav").glob("*/*.wav")):
        if wav not in labelled:
            findings.count("wav files without a label line, ignored", str(wav.relative_to(root)))
    return entries


def _visible(paths: Iterable[Path]) -> list[Path]:
    """Return the paths sorted, without hidden files."""
    # macOS leaves `._*` files behind, in published copies of this corpus too.
    return sorted(path for path in paths if not path.name.startswith(".") and not path.parent.name.startswith("."))


def _read_turns(path: Path, name: str, findings: Findings) -> list[_Turn]:
    turns: list[_Turn] = []
    current: _Turn | None = None
    for number, line in enumerate(_read_text(path, name, findings).split("\n"), start=1):
        where = f"{name} line {number}"
        line = line.lstrip()
        if line.startswith("["):
            current = _parse_header(line, where, findings)
            if current:
                turns.append(current)
        elif line.startswith("A-") and current:
            _parse_rating(line, where, current, findings)
    return turns


def _read_text(path: Path, name: str, findings: Findings) -> str:
    """Return the text of a label file; if it cannot be read, nothing, and add a problem."""
    # Reading a pipe would wait for ever.
    if not os.path.isfile(path):
        findings.problem(name, "must be a label file, but is a folder, a pipe, a device or a broken link")
        return ""
    try:
        # Comments of raters may have any encoding; what is parsed here is ASCII.
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        findings.problem(name, f"cannot be read: {error.strerror}")
        return ""


def _parse_header(line: str, where: str, findings: Findings) -> _Turn | None:
    match = _HEADER.match(line)
    try:
        if not match:
            raise ValueError
        values = [parse_number(value) if value.strip() else None for value in match[4].split(",")]
        # Some headers of the corpus have no dominance.
        valence, arousal, dominance = values if len(values) == 3 else (*values, None)
    except ValueError:
        rule = "a turn must look like `[start - end] name emotion [valence, arousal, dominance]`"
        findings.problem(where, f"{rule}, not {line[:80]!r}")
        return None
    return _Turn(where, match[3], float(match[1]), (valence, arousal, dominance))


def _parse_rating(line: str, where: str, turn: _Turn, findings: Findings) -> None:
    match = _RATING.match(line)
    if not match:
        findings.problem(where, f"a rating must look like `A-E1: val 3; act 2; dom 2;`, not {line[:80]!r}")
        return
    rater = match[1]
    if rater in turn.raters:
        findings.count("second ratings of a turn by the same rater, ignored", f"{where}: {turn.id} {rater}")
        return
    valence, arousal, dominance = (float(value) if value else None for value in match.group(2, 3, 4))
    turn.raters[rater] = (valence, arousal, dominance)


def _entry(folder: Path, dialogue: str, turn: _Turn, labels: LabelVariant) -> Entry:
    """Return the entry of a turn. Raises ValueError if the names of session folder, label file and turn disagree."""
    of_dialogue = _DIALOGUE.fullmatch(dialogue)
    if not of_dialogue:
        raise ValueError(f"the dialogue {dialogue} must be named like Ses01F_impro01 or Ses01F_script01_1")
    session = of_dialogue[1]
    if int(session) != int(folder.name.removeprefix("Session")):
        raise ValueError(f"the dialogue {dialogue} is not of {folder.name}")
    before, _, last = turn.id.rpartition("_")
    of_speaker = _SPEAKER.fullmatch(last)
    if before != dialogue or not of_speaker:
        raise ValueError(f"the turn must be named {dialogue}_F000 or {dialogue}_M000, with its own number")
    return Entry(
        where=turn.where,
        id=turn.id,
        path=folder / "sentences" / "wav" / dialogue / f"{turn.id}.wav",
        speaker=session + of_speaker[1],
        gender=of_speaker[1],
        session=f"Ses{session}",
        dialogue=dialogue,
        time=turn.start_s,
        scenario=of_dialogue[2],
        improvised=of_dialogue[3] == "impro",
        labels=_labels(turn, labels),
        # Only raters who gave both valence and arousal; dominance may be missing.
        raters={
            rater: (valence, arousal, dominance)
            for rater, (valence, arousal, dominance) in turn.raters.items()
            if valence is not None and arousal is not None
        },
    )


def _labels(turn: _Turn, variant: LabelVariant) -> dict[str, float | None]:
    if variant == "header":
        return dict(zip(DIMENSIONS, turn.header, strict=True))
    ratings = [rating for rater, rating in turn.raters.items() if variant == "all_raters" or rater.startswith("E")]
    means: dict[str, float | None] = {}
    for index, dimension in enumerate(DIMENSIONS):
        given = [value for rating in ratings if (value := rating[index]) is not None]
        means[dimension] = sum(given) / len(given) if given else None
    return means
