"""The models of a run on another corpus: who may score what, the floor there, and the comparison.

Each utterance is scored only by the models that met neither its speaker nor its audio in training or validation. If
the corpora share nothing, every fold scores all of it; within one corpus, or one group of speakers, only some folds
score an utterance. An evaluation is compared like a run, with two differences: clusters are drawn for all folds
together, because they share test utterances, and level 2 is taken over the sessions of the corpus, not over folds.

Shapes: `N` utterances in the parts of all folds together, `K` dimensions, `J` sessions.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

from cvrunner.config.schema import Config, digest
from cvrunner.data.checks import loose_name
from cvrunner.data.folds import Fold
from cvrunner.data.utterance import Corpus, Utterance
from cvrunner.errors import ResultsError
from cvrunner.records.results import Ccc, FloorRecord, TrialResult
from cvrunner.records.run_directory import RunDirectory
from cvrunner.records.summary import Evaluation, SpeakersLevel, Summary
from cvrunner.text import plural
from cvrunner.verdict.ccc import ccc_of_rows, mean_if_all
from cvrunner.verdict.comparison import compare_conditions, minus, mixed_precision
from cvrunner.verdict.floor import floor_predictions, floor_record, floor_references
from cvrunner.verdict.levels import speakers_level
from cvrunner.verdict.predictions import Floats, OutOfFold
from cvrunner.verdict.sentence import clause, confirmations, design

# --- who may score what -----------------------------------------------------------------------------------------------


class Known(NamedTuple):
    """An utterance of the run's corpus."""

    speaker: str
    audio: str
    """`Utterance.audio_digest`."""


class Overlap(NamedTuple):
    """What another corpus has in common with the run's."""

    speakers: dict[str, list[str]]
    """By speaker of the other corpus: who this is in the run's."""
    audio: dict[str, list[str]]
    """By utterance of the other corpus: those of the run's with the same audio."""


def find_overlap(own: Mapping[str, Known], others: Sequence[Utterance], speakers_differ: bool) -> Overlap:
    """Return the speakers and recordings that two corpora share; `own`: the run's utterances by name.

    Names are compared without case, leading zeros, and what cannot be seen; with `speakers_differ` equal names are
    different people. A recording that is in both corpora is of one person, whatever the names.
    """
    by_name: dict[str, set[str]] = defaultdict(set)
    by_audio: dict[str, list[str]] = defaultdict(list)
    for name, known in own.items():
        by_name[loose_name(known.speaker)].add(known.speaker)
        by_audio[known.audio].append(name)
    speakers: dict[str, set[str]] = {}
    audio: dict[str, list[str]] = {}
    for u in others:
        same = speakers.setdefault(u.speaker, set())
        if not speakers_differ:
            same |= by_name.get(loose_name(u.speaker), set())
        if twins := by_audio.get(u.audio_digest):
            audio[u.id] = sorted(twins)
            same |= {own[twin].speaker for twin in twins}
    return Overlap({name: sorted(same) for name, same in speakers.items() if same}, audio)


def may_score(
    others: Sequence[Utterance],
    overlap: Overlap,
    own: Mapping[str, Known],
    heard: Collection[str],
    whole_dialogues: bool,
) -> tuple[Utterance, ...]:
    """Return the utterances that may be scored by a model with the training and validation utterances `heard`.

    `whole_dialogues`: the model predicts a turn with the turns before it, so all speakers of a dialogue must be new.
    """
    met = {own[name].speaker for name in heard}

    def unit(u: Utterance) -> tuple[str, ...]:
        return (u.session, u.dialogue) if whole_dialogues else (u.id,)

    known = {
        unit(u)
        for u in others
        if not met.isdisjoint(overlap.speakers.get(u.speaker, ()))
        or any(x in heard for x in overlap.audio.get(u.id, ()))
    }
    return tuple(u for u in others if unit(u) not in known)


def read_heard(directory: RunDirectory, own: Collection[str]) -> dict[int, set[str]]:
    """Return the training and validation utterances of each fold, from split.json. Raises ResultsError."""
    try:
        folds = json.loads(directory.split.read_bytes())["folds"]
        heard = {int(f["fold"]): {*f["train"]["utterances"], *f["validation"]["utterances"]} for f in folds}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{directory.split}: cannot be read, copy it again: {type(error).__name__}") from None
    if unknown := sorted(set().union(*heard.values()) - set(own)):
        raise ResultsError(f"{directory.split}: {unknown[0]} is not in the run's corpus: altered, copy it again")
    return heard


# --- the floor --------------------------------------------------------------------------------------------------------


def floor_elsewhere(
    corpus: Corpus, parts: Sequence[Fold], dimensions: Sequence[str]
) -> tuple[FloorRecord, dict[str, Floats]]:
    """Return floor and ceiling on the test parts of the folds, and what each predictor without audio predicts `[N, K]`.

    The floor of a session comes from the labels of the other sessions of the same corpus, as in a run.
    """
    sessions = corpus.sessions
    own = [
        Fold(
            number,
            train=tuple(u for u in corpus.utterances if u.session != session),
            validation=(),
            test=tuple(u for u in corpus.utterances if u.session == session),
        )
        for number, session in enumerate(sessions, 1)
    ]
    predicted = floor_predictions(own, dimensions) if len(sessions) > 1 else {}
    row = {u.id: i for i, u in enumerate(u for fold in own for u in fold.test)}
    rows = [row[u.id] for part in parts for u in part.test]
    predicted = {name: values[rows] for name, values in predicted.items()}
    record = floor_record(parts, dimensions, predicted)
    if len(sessions) == 1 and any(u.scenario is not None for u in corpus.utterances):
        reason = "the corpus has one session, and the floor of a session comes from the others"
        record = record.model_copy(update={"reason": reason})
    return record, predicted


# --- the comparison ---------------------------------------------------------------------------------------------------


def score_key(evaluation: Evaluation, trained: TrialResult) -> str:
    """Return the key of a trial's predictions in an evaluation: of its inputs and of the model."""
    return digest([evaluation.key, trained.key, trained.predictions_sha256])


def compare_elsewhere(
    folder: RunDirectory,
    evaluation: Evaluation,
    config: Config,
    results: dict[str, TrialResult],
    data: OutOfFold,
) -> Summary:
    """Return the comparison of an evaluation. `results`: of its trials, with the CCC of their predictions there."""
    settings = config.verdict.model_copy(update={"cluster": evaluation.cluster})
    references = floor_references(folder, evaluation, data)
    mixed = mixed_precision(config, results.values())
    summary = compare_conditions(evaluation, results, data, settings, references, mixed=mixed)
    if not summary.differences:
        return summary
    sessions = {other: _over_sessions(evaluation, results, data, summary, other) for other in summary.differences}
    differences = {
        other: {
            outcome: difference.model_copy(update={"new_speakers": sessions[other].get(outcome)})
            for outcome, difference in by_outcome.items()
        }
        for other, by_outcome in summary.differences.items()
    }
    summary = summary.model_copy(
        update={
            "differences": differences,
            "for_new_speakers": confirmations(summary.decisions, differences, summary.primary),
        }
    )
    return summary.model_copy(update={"verdict": _sentence(evaluation, summary)})


def _sentence(evaluation: Evaluation, summary: Summary) -> str:
    """Return what the evaluation shows, by the rule of a run's verdict (verdict/sentence.py)."""
    clauses = [
        clause(
            name,
            summary.baseline,
            summary.primary,
            by_outcome[summary.primary],
            summary.decisions[name],
            summary.margin,
            place="",
            groups="sessions, two or more, with a known variance of training",
        )
        for name, by_outcome in summary.differences.items()
    ]
    scored = plural(evaluation.utterances - len(evaluation.left_out), "utterance")
    of = design(evaluation.folds, evaluation.seeds, evaluation.synthetic)
    return f"On {evaluation.run} ({scored}), {'; '.join(clauses)}; {of}."


def _over_sessions(
    evaluation: Evaluation, results: Mapping[str, TrialResult], data: OutOfFold, summary: Summary, condition: str
) -> dict[str, SpeakersLevel | None]:
    """Return level 2 by outcome: t over the differences within each session of the corpus, averaged over models.

    Sessions that are scored by the same models share the luck of their training, which their spread cannot show: its
    variance is added. If they are scored by different folds, these folds share training utterances, and the spread is
    enlarged as in a run. None for one session, and if the variance of training is not known.
    """
    fold, session = (data.about[column].to_numpy() for column in ("fold", "session"))
    cells = sorted(set(zip(session, fold, strict=True)))
    within: dict[str, list[Ccc]] = {}
    for name, number in cells:
        rows = (session == name) & (fold == number)
        pairs = zip(data.predicted[condition], data.predicted[summary.baseline], strict=True)
        for one, other in pairs:
            above, below = (ccc_of_rows(p, data.truth, evaluation.dimensions, rows) for p in (one, other))
            within.setdefault(name, []).append({d: minus(above[d], below[d]) for d in above})
    ratio = 0.0
    if len(cells) < len(within) * len(evaluation.folds):
        ratio = fmean(r.test_utterances / r.train_utterances for r in results.values())
    df_training = len(evaluation.folds) * (len(evaluation.seeds) - 1)
    levels: dict[str, SpeakersLevel | None] = {}
    for outcome, difference in summary.differences[condition].items():
        by_session = [mean_if_all(of[outcome] for of in values) for values in within.values()]
        known = np.array([value for value in by_session if value is not None])
        levels[outcome] = None
        if difference.on_corpus is not None and len(known) == len(by_session):
            shared = (difference.on_corpus.training_sd**2, df_training)
            levels[outcome] = speakers_level(known, ratio, summary.margin, len(summary.differences), shared)
    return levels
