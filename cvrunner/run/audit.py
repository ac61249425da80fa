"""What a corpus holds and whether its folds are sound, before any training; as data and as plain text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from cvrunner.config.schema import Config
from cvrunner.data.checks import labels_outside
from cvrunner.data.folds import Fold, find_leaks, split_digest
from cvrunner.data.utterance import Corpus, Utterance
from cvrunner.verdict.ccc import Ccc
from cvrunner.verdict.floor import FloorScore, no_audio_floor

SHORT_S, LONG_S = 1.0, 15.0


@dataclass(frozen=True)
class SessionSizes:
    session: str
    utterances: int
    minutes: float
    speakers: Mapping[str, int]
    """By gender: F, M, or ? where the corpus does not say."""
    dialogues: int
    improvised: int
    scripted: int


@dataclass(frozen=True)
class LabelSpread:
    """One dimension, on the rating scale."""

    dimension: str
    mean: float
    std: float
    """Divided by n - 1."""
    outside_scale: int


@dataclass(frozen=True)
class Durations:
    shortest_s: float
    median_s: float
    longest_s: float
    below_1_s: int
    above_15_s: int


@dataclass(frozen=True)
class FoldSizes:
    fold: int
    sessions: Mapping[str, tuple[str, ...]]
    """By part."""
    utterances: Mapping[str, int]
    """By part."""


@dataclass(frozen=True)
class AuditReport:
    corpus: str
    """One line."""
    sessions: tuple[SessionSizes, ...]
    scale: tuple[float, float]
    labels: tuple[LabelSpread, ...]
    durations: Durations
    warnings: tuple[str, ...]
    folds: tuple[FoldSizes, ...]
    split_digest: str
    leaks: tuple[str, ...]
    floor: Mapping[str, FloorScore]


def audit(corpus: Corpus, folds: Sequence[Fold], config: Config) -> AuditReport:
    """Sizes, labels, durations, folds, leaks and the no-audio floor. A leak is reported here, not raised."""
    settings = config.corpus
    return AuditReport(
        corpus=corpus.describe(),
        sessions=tuple(_session_sizes(corpus, session) for session in corpus.sessions),
        scale=settings.scale,
        labels=tuple(_label_spread(corpus, dimension, settings.scale) for dimension in settings.dimensions),
        durations=_durations(corpus.utterances),
        warnings=corpus.warnings,
        folds=tuple(_fold_sizes(fold) for fold in folds),
        split_digest=split_digest(folds),
        leaks=tuple(find_leaks(folds)),
        floor=no_audio_floor(folds, settings.dimensions),
    )


def as_json(report: AuditReport) -> str:
    """All fields; what is undefined is null."""
    return json.dumps(asdict(report), indent=1)


def _session_sizes(corpus: Corpus, session: str) -> SessionSizes:
    some = [u for u in corpus.utterances if u.session == session]
    genders = [gender or "?" for _, gender in {(u.speaker, u.gender) for u in some}]
    return SessionSizes(
        session=session,
        utterances=len(some),
        minutes=sum(u.duration_s for u in some) / 60,
        speakers={gender: genders.count(gender) for gender in sorted(set(genders))},
        dialogues=len({u.dialogue for u in some}),
        improvised=sum(u.improvised is True for u in some),
        scripted=sum(u.improvised is False for u in some),
    )


def _label_spread(corpus: Corpus, dimension: str, scale: tuple[float, float]) -> LabelSpread:
    values = [value for u in corpus.utterances if (value := u.label(dimension)) is not None]
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return LabelSpread(dimension, float(np.mean(values)), std, labels_outside(corpus.utterances, dimension, scale))


def _durations(utterances: Sequence[Utterance]) -> Durations:
    seconds = np.array([u.duration_s for u in utterances])
    return Durations(
        shortest_s=float(seconds.min()),
        median_s=float(np.median(seconds)),
        longest_s=float(seconds.max()),
        below_1_s=int((seconds < SHORT_S).sum()),
        above_15_s=int((seconds > LONG_S).sum()),
    )


def _fold_sizes(fold: Fold) -> FoldSizes:
    sessions = {
        "train": fold.train_sessions,
        "validation": fold.validation_sessions,
        "test": fold.test_sessions,
    }
    return FoldSizes(fold.number, sessions, {part: len(some) for part, some in fold.parts.items()})


# --- as text --------------------------------------------------------------------------------------


def render(report: AuditReport) -> str:
    """The report as plain text, with a newline at the end."""
    sections = [
        [report.corpus],
        _table(
            ["session", "utterances", "minutes", "speakers", "dialogues", "improvised", "scripted"],
            [_session_cells(sizes) for sizes in report.sessions],
        ),
        _table(
            ["label", "mean", "sd", f"outside {report.scale[0]:g}..{report.scale[1]:g}"],
            [[s.dimension, f"{s.mean:.3f}", f"{s.std:.3f}", str(s.outside_scale)] for s in report.labels],
        ),
        [_duration_line(report.durations)],
        ["Warnings: none"] if not report.warnings else ["Warnings:", *(f"  {line}" for line in report.warnings)],
        _table(["fold", "train", "validation", "test"], [_fold_cells(sizes) for sizes in report.folds]),
        [f"Split digest: {report.split_digest}"],
        _leak_lines(report.leaks),
        *(_floor_lines(floor) for floor in report.floor.values()),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _session_cells(sizes: SessionSizes) -> list[str]:
    speakers = " ".join(f"{count}{gender}" for gender, count in sizes.speakers.items())
    counts = [sizes.dialogues, sizes.improvised, sizes.scripted]
    return [sizes.session, str(sizes.utterances), f"{sizes.minutes:.1f}", speakers, *map(str, counts)]


def _duration_line(durations: Durations) -> str:
    return (
        f"Durations: shortest {durations.shortest_s:.2f} s, median {durations.median_s:.2f} s, longest "
        f"{durations.longest_s:.2f} s; {durations.below_1_s} below {SHORT_S:g} s, "
        f"{durations.above_15_s} above {LONG_S:g} s"
    )


def _fold_cells(sizes: FoldSizes) -> list[str]:
    return [str(sizes.fold)] + [
        f"{sizes.utterances[part]} ({' '.join(sessions)})" for part, sessions in sizes.sessions.items()
    ]


def _leak_lines(leaks: Sequence[str]) -> list[str]:
    if not leaks:
        return ["Leaks: none (no speaker, dialogue, utterance or identical audio in two parts of a fold)"]
    return [f"LEAKS: {len(leaks)}", *(f"  {leak}" for leak in leaks)]


def _floor_lines(floor: FloorScore) -> list[str]:
    title = f"No-audio floor by {' + '.join(floor.by)}"
    if floor.reason:
        return [f"{title}: none, {floor.reason}"]
    names = list(floor.mean)
    rows = [[f"fold {fold}", *_scores(scores, names)] for fold, scores in floor.by_fold.items()]
    rows += [["mean", *_scores(floor.mean, names)], ["pooled", *_scores(floor.pooled, names)]]
    return [f"{title} (CCC):", *_table(["", *names], rows)]


def _scores(scores: Ccc, names: Iterable[str]) -> list[str]:
    return ["undefined" if (score := scores[name]) is None else f"{score:.3f}" for name in names]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns two spaces apart, the first to the left, the others to the right."""
    widths = [max(len(row[index]) for row in [head, *rows]) for index in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
