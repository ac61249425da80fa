"""`audit`: what a corpus contains and whether its folds are sound, before any training; as data and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cvrunner.config.schema import Config
from cvrunner.data.checks import labels_outside
from cvrunner.data.folds import Fold, find_leaks, split_digest
from cvrunner.data.utterance import Corpus
from cvrunner.records.results import Panel, ccc_label
from cvrunner.report.floor import raters_table
from cvrunner.text import Table, format_score, tables_as_text
from cvrunner.verdict.ceiling import ATTAINABLE, NO_RATERS, panel_of_raters
from cvrunner.verdict.floor import NO_SCENARIOS, FloorScore, floor_predictions, no_audio_floor
from cvrunner.verdict.protocol import cluster_unit

SHORT_S, LONG_S = 1.0, 15.0
MIN_CLUSTERS = 5
"""Clusters per session below which `audit` warns."""


@dataclass(frozen=True)
class SessionSizes:
    """Amount of data in one session."""

    session: str
    utterances: int
    minutes: float
    speakers: Mapping[str, int]
    """Per gender: F, M, or ? if the corpus does not name it."""
    dialogues: int
    improvised: int
    scripted: int


@dataclass(frozen=True)
class LabelSpread:
    """Labels of one dimension, on the rating scale."""

    dimension: str
    mean: float
    std: float
    """Divided by n - 1."""
    outside_scale: int


@dataclass(frozen=True)
class Durations:
    """Durations of the utterances, in seconds."""

    shortest_s: float
    median_s: float
    longest_s: float
    below_1_s: int
    above_15_s: int


@dataclass(frozen=True)
class FoldSizes:
    """Sessions and utterances of one fold."""

    fold: int
    sessions: Mapping[str, tuple[str, ...]]
    """Per part: train, validation, test."""
    utterances: Mapping[str, int]
    """Per part: train, validation, test."""


@dataclass(frozen=True)
class AuditReport:
    """Everything that `audit` found."""

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
    """By predictor without audio; empty if the corpus names no scenarios."""
    raters: Panel | None
    """None if no utterance has two raters."""


def audit(corpus: Corpus, folds: Sequence[Fold], config: Config) -> AuditReport:
    """Return sizes, labels, durations, folds, leaks, floor and raters. A leak is reported here, not raised."""
    settings = config.corpus
    seconds = np.array([u.duration_s for u in corpus.utterances])
    labels = []
    for dimension in settings.dimensions:
        values = [value for u in corpus.utterances if (value := u.label(dimension)) is not None]
        # One value has no sd, and NaN is no JSON.
        std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        outside = labels_outside(corpus.utterances, dimension, settings.scale)
        labels.append(LabelSpread(dimension, float(np.mean(values)), std, outside))
    return AuditReport(
        corpus=corpus.describe(),
        sessions=tuple(_session_sizes(corpus, session) for session in corpus.sessions),
        scale=settings.scale,
        labels=tuple(labels),
        durations=Durations(
            shortest_s=float(seconds.min()),
            median_s=float(np.median(seconds)),
            longest_s=float(seconds.max()),
            below_1_s=int((seconds < SHORT_S).sum()),
            above_15_s=int((seconds > LONG_S).sum()),
        ),
        warnings=(*corpus.warnings, *_few_clusters(corpus, config)),
        folds=tuple(
            FoldSizes(
                fold.number,
                fold.sessions,
                {part: len(utterances) for part, utterances in fold.parts.items()},
            )
            for fold in folds
        ),
        split_digest=split_digest(folds),
        leaks=tuple(find_leaks(folds)),
        floor=no_audio_floor(folds, settings.dimensions, floor_predictions(folds, settings.dimensions)),
        raters=panel_of_raters(folds, settings.dimensions),
    )


def _few_clusters(corpus: Corpus, config: Config) -> list[str]:
    """Warn of sessions with so few clusters that resampling them shows little of how much they vary."""
    unit = cluster_unit(config.verdict, ((u.session, u.speaker) for u in corpus.utterances))
    clusters: dict[str, set[str]] = {}
    for u in corpus.utterances:
        clusters.setdefault(u.session, set()).add(u.dialogue if unit == "dialogue" else u.speaker)
    few = [f"{session} {len(of)}" for session, of in clusters.items() if len(of) < MIN_CLUSTERS]
    if not few:
        return []
    rule = f"the interval on this corpus resamples {unit}s within sessions and is rough below {MIN_CLUSTERS}"
    return [f"sessions with fewer than {MIN_CLUSTERS} {unit}s: {', '.join(few)}; {rule}"]


def _session_sizes(corpus: Corpus, session: str) -> SessionSizes:
    some = [u for u in corpus.utterances if u.session == session]
    # A set, because a speaker counts once, however many utterances the session has of each.
    genders = [gender or "?" for _, gender in {(u.speaker, u.gender) for u in some}]
    return SessionSizes(
        session=session,
        utterances=len(some),
        minutes=sum(u.duration_s for u in some) / 60,
        speakers={gender: genders.count(gender) for gender in sorted(set(genders))},
        dialogues=len({u.dialogue for u in some}),
        # `is`: where a corpus does not name it, `improvised` is None and counts as neither.
        improvised=sum(u.improvised is True for u in some),
        scripted=sum(u.improvised is False for u in some),
    )


# --- as text ----------------------------------------------------------------------------------------------------------


def render(report: AuditReport, width: int = 120) -> str:
    """Return the report for a terminal of `width` columns, with a newline at the end."""
    low, high = report.scale
    session_rows = []
    columns = ["session", "utterances", "minutes", "speakers", "dialogues"]
    # Only of a corpus that names them.
    if has_kinds := any(sizes.improvised or sizes.scripted for sizes in report.sessions):
        columns += ["improvised", "scripted"]
    for sizes in report.sessions:
        if set(sizes.speakers) <= {"?"}:
            speakers = str(sum(sizes.speakers.values()))
        else:
            speakers = " ".join(f"{count}{gender}" for gender, count in sizes.speakers.items())
        cells = [sizes.session, str(sizes.utterances), f"{sizes.minutes:.1f}", speakers, str(sizes.dialogues)]
        if has_kinds:
            cells += [str(sizes.improvised), str(sizes.scripted)]
        session_rows.append(cells)
    labels = Table(
        "Labels",
        ["label", "mean", "sd", f"outside {low:g}..{high:g}"],
        [[s.dimension, f"{s.mean:.3f}", f"{s.std:.3f}", str(s.outside_scale)] for s in report.labels],
    )
    fold_rows = []
    for fold in report.folds:
        parts = [f"{fold.utterances[part]} ({' '.join(sessions)})" for part, sessions in fold.sessions.items()]
        fold_rows.append([str(fold.fold), *parts])
    folds = Table("Folds", ["fold", "train", "validation", "test"], fold_rows)
    durations = report.durations
    leaks = ["Leaks: none (no speaker, dialogue, utterance or identical audio in two parts of a fold)"]
    if report.leaks:
        leaks = [f"LEAKS: {len(report.leaks)}", *(f"  {leak}" for leak in report.leaks)]
    warnings = ["Warnings: none"]
    if report.warnings:
        warnings = ["Warnings:", *(f"  {line}" for line in report.warnings)]
    raters = f"Raters: {NO_RATERS}\n"
    if report.raters is not None:
        label = {name: ccc_label(name) for name in report.raters.scores[ATTAINABLE]}
        raters = tables_as_text([raters_table(report.raters, label)], width)
    return "\n".join(
        [
            report.corpus,
            "",
            tables_as_text([Table("Sessions", columns, session_rows), labels], width).rstrip(),
            "",
            f"Durations: shortest {durations.shortest_s:.2f} s, median {durations.median_s:.2f} s, longest "
            f"{durations.longest_s:.2f} s; {durations.below_1_s} below {SHORT_S:g} s, "
            f"{durations.above_15_s} above {LONG_S:g} s",
            "",
            *warnings,
            "",
            tables_as_text([folds], width).rstrip(),
            "",
            f"Split digest: {report.split_digest}",
            "",
            *leaks,
            "",
            _floor_text(report.floor, width),
            raters,
        ]
    )


def _floor_text(floors: Mapping[str, FloorScore], width: int) -> str:
    if not floors:
        return f"No-audio floor: none, {NO_SCENARIOS}\n"
    tables = []
    for name, floor in floors.items():
        named = {f"fold {fold}": scores for fold, scores in floor.by_fold.items()}
        named |= {"mean": floor.mean, "pooled": floor.pooled}
        rows = [[name, *(format_score(scores[d]) for d in floor.mean)] for name, scores in named.items()]
        tables.append(Table(f"No-audio floor by {name} (CCC)", ["", *floor.mean], rows))
    return tables_as_text(tables, width)
