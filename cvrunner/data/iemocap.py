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

from cvrunner.data.checks import Entry, Findings, Rules, utterances_of
from cvrunner.data.utterance import DIMENSIONS, Corpus, natural_order
from cvrunner.errors import CorpusError

LabelVariant = Literal["header", "observers", "all_raters"]
Rating = tuple[float | None, float | None, float | None]
"""Valence, arousal and dominance as written; None if missing."""
SYNTHETIC_MARK = "SYNTHETIC.json"
"""File in the root of a corpus that the demo wrote."""

_NUMBER = r"(\d+(?:\.\d+)?)"
_HEADER = re.compile(rf"\[\s*{_NUMBER}\s*-\s*{_NUMBER}\s*\]\s+(\S+)\s+\S+\s+\[([^\]]*)\]")
_RATING = re.compile(rf"A-([EFM]\w*):\s*val\s*{_NUMBER}?\s*;\s*act\s*{_NUMBER}?\s*;(?:\s*dom\s*{_NUMBER}?\s*;)?")
_DIALOGUE = re.compile(r"Ses(\d\d)[FM]_((impro|script)\d+(?:_\d+)?)[a-z]?")
_SPEAKER = re.compile(r"([FM])\w+")


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
) -> Corpus:
    """Return the corpus in `root`, the folder that holds `Session1` and its siblings.

    Labels: `header` is the mean printed next to the turn, `observers` the mean of the raters `E*`, `all_raters` that of
    `E*`, `F*` and `M*`; each dimension over the raters who gave it. Labels outside `scale` are kept and counted as a
    warning, and so are audio files without a label line. Raises CorpusError with every other problem, each with file
    and line.
    """
    findings = Findings()
    entries: list[Entry] = []
    for folder in session_folders(root):
        entries += _read_session(root, folder, labels, findings)
    rules = Rules(dimensions, scale, resample, outside_scale="warning", one_session_each=True)
    utterances = utterances_of(entries, rules, findings)
    findings.stop_if_any(str(root))
    synthetic = (root / SYNTHETIC_MARK).is_file()
    return Corpus(utterances, "demo" if synthetic else "IEMOCAP", labels, synthetic, findings.warnings)


def side(dialogue: str) -> str | None:
    """Return the letter of the side that wore motion capture (`Ses01F_impro01`: F); None for other corpora."""
    return dialogue[5] if _DIALOGUE.fullmatch(dialogue) else None


def session_folders(root: Path) -> list[Path]:
    """Return `Session1` and its siblings in the order of their numbers. Raises CorpusError if there are none."""
    folders = [path for path in root.glob("Session*") if re.fullmatch(r"Session\d+", path.name) and path.is_dir()]
    if not folders:
        inside = sorted(path.parent.name for path in root.glob("*/Session1"))
        hint = f"; did you mean {root / inside[0]}?" if inside else ""
        raise CorpusError(str(root), [f"corpus.root must be the folder that holds Session1, Session2, ...{hint}"])
    return sorted(folders, key=lambda path: natural_order(path.name))


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
        values = [float(value) if value.strip() else None for value in match[4].split(",")]
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
