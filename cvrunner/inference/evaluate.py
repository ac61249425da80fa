"""The command `evaluate`: rate another corpus with the models of a run, and compare the conditions there.

A trial's predictions are written at once when its model has rated the corpus, so a kill costs one model, or the frozen
models, which share their pass through the encoder. `verdict/transfer.py` decides who may score what, and compares.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cvrunner import paths
from cvrunner.config.reading import load_config
from cvrunner.config.schema import Config, digest
from cvrunner.data.batches import dialogues
from cvrunner.data.corpus import load_corpus
from cvrunner.data.folds import Fold, split_digest
from cvrunner.data.utterance import AudioError, Corpus, Utterance, check_length, read_audio
from cvrunner.errors import CorpusError, CvrunnerError, ResultsError, UsageError
from cvrunner.files import write_atomically
from cvrunner.inference.ensemble import Floats, load_groups
from cvrunner.records.model_folder import ModelFolder
from cvrunner.records.results import Result, RunRecord, TrialResult, TrialState
from cvrunner.records.run_directory import RunDirectory, TrialDirectory, trial_name
from cvrunner.records.summary import Evaluation
from cvrunner.report.report import read_report
from cvrunner.report.tables import evaluation_table
from cvrunner.report.write import write_report
from cvrunner.run.prepare import find_run_directory
from cvrunner.run.store import lock
from cvrunner.text import line_printer, plural, tables_as_text, timed
from cvrunner.tracking.mirror import sync_run
from cvrunner.tracking.names import UI_ADDRESS
from cvrunner.tracking.tracker import tracking_uri
from cvrunner.verdict.comparison import missing_trials
from cvrunner.verdict.floor import floor_csv
from cvrunner.verdict.ledger import Look, new_scores, read_ledger, record_look
from cvrunner.verdict.predictions import write_predictions
from cvrunner.verdict.protocol import read_protocol
from cvrunner.verdict.transfer import Known, find_overlap, floor_elsewhere, may_score, read_heard, score_key

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from cvrunner.inference.emotion_model import EmotionModel

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}")


@dataclass(frozen=True)
class Target:
    """Another corpus, and what each fold's models may score of it."""

    corpus: Corpus
    resample: bool
    dimensions: tuple[str, ...]
    parts: tuple[Fold, ...]
    """The test part of each fold is what its models may score; folds that may score nothing are left out."""
    floor: Mapping[str, Floats]
    """By predictor without audio, `[N, K]` in the rows of the parts."""


def evaluate_run(
    run: Path,
    config_path: Path,
    overrides: Sequence[str],
    name: str | None,
    speakers_differ: bool,
    device: torch.device,
    encoder: str | None,
    as_json: bool,
    console: Console,
) -> int:
    """Apply all models of a run to another corpus, compare the conditions there, and add it to the run's report."""
    name = name or config_path.stem
    if not NAME.fullmatch(name):
        raise UsageError(f"--name {name!r}: must be letters, digits, `_`, `.` and `-`, at most 60")
    directory, other = find_run_directory(run), load_config(config_path, overrides)
    with lock(directory.path):
        record, config = directory.read_run(), directory.read_config()
        trained = directory.results(record)
        _check_run(directory, record, trained)
        folder = directory.evaluation(name)
        evaluation, target = _prepare(directory, record, config, trained, other, name, speakers_differ)
        before = None
        if folder.evaluation_file.is_file():
            before = Evaluation.from_json(folder.evaluation_file.read_bytes(), str(folder.evaluation_file))
        if before is not None and before.key != evaluation.key:
            raise UsageError(
                f"{folder.path}: holds an evaluation with other inputs (corpus, scale, dimensions or speakers); choose "
                "another --name, or delete that folder"
            )
        pending = [n for n, state in evaluation.trials.items() if _scored(folder, n, state) is None]
        if before is None or pending or before.status != "COMPLETE":
            if before is not None:
                evaluation = evaluation.model_copy(update={"started_at": before.started_at})
            write_atomically(folder.evaluation_file, evaluation.to_json())
            if target.floor:
                write_atomically(folder.floor, floor_csv(target.parts, target.dimensions, target.floor))
            _rate(directory, folder, evaluation, target, pending, device, encoder)
            _finish(directory, folder, evaluation)
            write_report(directory)
            if config.tracking.enabled:
                try:
                    sync_run(directory, tracking_uri(config, directory.path.parent), UI_ADDRESS)
                except CvrunnerError as error:
                    later = f"`cvrunner sync {directory.path}` uploads it later"
                    print(f"warning: {error}; {later}", file=sys.stderr, flush=True)
        report = read_report(directory)
    (found,) = (one for one in report.evaluations if one.record.run == name)
    if as_json:
        line_printer(console)(found.summary.to_json().rstrip())
        return 0
    table = evaluation_table(found.record, found.summary, report.summary.scores)
    print_line = line_printer(console)
    print_line(tables_as_text([table], console.width, found.summary.verdict).rstrip())
    if left_out := found.record.left_out:
        some = ", ".join(left_out[:5]) + " and more" * (len(left_out) > 5)
        print_line(f"not scored: {plural(len(left_out), 'utterance')}, known to all models that could: {some}")
    print_line(f"results  {folder.path}\nreport   {directory.report}")
    return 0


def _check_run(directory: RunDirectory, run: RunRecord, trained: Mapping[str, TrialResult]) -> None:
    if missing := missing_trials(run, trained):
        raise ResultsError(
            f"{directory.path}: {plural(len(missing), 'trial')} of {len(run.trials)} without a result "
            f"({', '.join(missing)}), so nothing can be compared; the command that made the run trains what is missing"
        )
    for name in run.trials:
        ModelFolder(directory.path / name / "model").read()


# --- what is evaluated ------------------------------------------------------------------------------------------------


def _prepare(
    directory: RunDirectory,
    run: RunRecord,
    config: Config,
    trained: Mapping[str, TrialResult],
    other: Config,
    name: str,
    speakers_differ: bool,
) -> tuple[Evaluation, Target]:
    """Read the other corpus and find out which fold may score what. Raises UsageError if that is nothing."""
    dimensions = [d for d in run.dimensions if d in other.corpus.dimensions]
    if config.verdict.primary not in ("avg", *dimensions) or not dimensions:
        raise UsageError(
            f"corpus.dimensions {', '.join(other.corpus.dimensions)}: the run predicts {', '.join(run.dimensions)} and "
            f"decides by {config.verdict.primary}, which the other corpus must have, too"
        )
    settings = other.corpus.model_copy(update={"dimensions": tuple(dimensions)})
    corpus = load_corpus(settings, paths.corpus_root(settings.root), other.folds.scheme)
    own = _own_utterances(directory, run, config)
    heard = read_heard(directory, own)
    overlap = find_overlap(own, corpus.utterances, speakers_differ)
    whole = run.protocol == "dialogue"
    scored = {fold: may_score(corpus.utterances, overlap, own, heard[fold], whole) for fold in run.folds}
    parts = tuple(Fold(fold, train=(), validation=(), test=some) for fold, some in scored.items() if some)
    if not parts:
        raise UsageError(
            f"{corpus.name}: every speaker or recording was used to train or validate each of the run's folds, so no "
            "model may score anything; if equal names are different people, add --speakers-differ"
        )
    some = {u.id for part in parts for u in part.test}
    floor, predicted = floor_elsewhere(corpus, parts, dimensions)
    scales = (config.corpus.scale, settings.scale)
    inputs = [run.key, run.split_digest, corpus.digest, scales, dimensions, speakers_differ, other.verdict.cluster]
    evaluation = Evaluation(
        run=name,
        key=digest(inputs),
        status="RUNNING",
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=sys.argv,
        host=run.host,
        # What folds share in training depends on the version that trained them.
        cvrunner_version=run.cvrunner_version,
        corpus=corpus.describe(),
        split_digest=split_digest(parts),
        corpus_digest=corpus.digest,
        synthetic=run.synthetic or corpus.synthetic,
        dimensions=dimensions,
        protocol=run.protocol,
        corpus_warnings=list(corpus.warnings),
        conditions=run.conditions,
        folds=[part.number for part in parts],
        seeds=run.seeds,
        trials={},
        floor=floor,
        scale=settings.scale,
        run_scale=config.corpus.scale,
        cluster=other.verdict.cluster,
        utterances=len(corpus.utterances),
        left_out=[u.id for u in corpus.utterances if u.id not in some],
        same_speakers=overlap.speakers,
        same_audio=overlap.audio,
        speakers_differ=speakers_differ,
    )
    trials = {}
    for condition in run.conditions:
        for fold in evaluation.folds:
            for seed in run.seeds:
                trial = trial_name(condition, fold, seed)
                key = score_key(evaluation, trained[trial])
                trials[trial] = TrialState(key=key, condition=condition, fold=fold, seed=seed)
    resample = settings.resample
    target = Target(corpus, resample, tuple(dimensions), parts, predicted)
    return evaluation.model_copy(update={"trials": trials}), target


def _own_utterances(directory: RunDirectory, run: RunRecord, config: Config) -> dict[str, Known]:
    """Return speaker and audio of each utterance of the run's corpus, which is read once and then remembered.

    Raises ResultsError if the corpus is not the one that the run was trained on any more.
    """
    file = directory.evaluations / "corpus.json"
    if file.is_file():
        try:
            stored = json.loads(file.read_bytes())
            if stored["corpus_digest"] == run.corpus_digest:
                return {name: Known(*about) for name, about in stored["utterances"].items()}
        except (ValueError, KeyError, TypeError):
            # A damaged file is written again.
            pass
    corpus = load_corpus(config.corpus, paths.corpus_root(config.corpus.root), config.folds.scheme)
    if corpus.digest != run.corpus_digest:
        raise ResultsError(
            f"{config.corpus.root}: is not the corpus of the run any more (digest {corpus.digest[:12]}, then "
            f"{run.corpus_digest[:12]}), so nobody can tell whom its models know; put the corpus of that time there"
        )
    own = {u.id: Known(u.speaker, u.audio_digest) for u in corpus.utterances}
    write_atomically(file, json.dumps({"corpus_digest": corpus.digest, "utterances": own}))
    return own


def _scored(folder: RunDirectory, name: str, state: TrialState) -> Result | None:
    """Return the result of a trial in an evaluation; None if there is none with its key."""
    return TrialDirectory(folder.path / name).read_result(Result, state.key)


# --- predictions ------------------------------------------------------------------------------------------------------


def _rate(
    directory: RunDirectory,
    folder: RunDirectory,
    evaluation: Evaluation,
    target: Target,
    pending: Sequence[str],
    device: torch.device,
    encoder: str | None,
) -> None:
    """Write the predictions of the pending trials."""
    parts = {part.number: part.test for part in target.parts}
    folders: dict[str, list[ModelFolder]] = {}
    for name in pending:
        # Models of one condition share a frozen encoder.
        condition = evaluation.trials[name].condition
        folders.setdefault(condition, []).append(ModelFolder(directory.path / name / "model"))
    done = 0
    for condition, of_condition in folders.items():
        for group in load_groups(of_condition, device, encoder):
            # Not to stdout, which may be read as JSON.
            work = f"{plural(len(group), 'model')} on {plural(len(target.corpus.utterances), 'utterance')}"
            line = timed(f"{condition}: {work}  | {done} of {len(pending)} models done")
            print(line, file=sys.stderr, flush=True)
            for model, scaled in _predictions(group, target, parts):
                about = model.description
                trial = TrialDirectory(folder.path / trial_name(about.condition, about.fold, about.seed))
                key = evaluation.trials[trial_name(about.condition, about.fold, about.seed)].key
                _write(trial, key, model, parts[about.fold], evaluation, scaled)
                done += 1


def _predictions(
    group: Sequence[EmotionModel], target: Target, parts: Mapping[int, Sequence[Utterance]]
) -> Iterator[tuple[EmotionModel, dict[str, Floats]]]:
    """Yield each model with its ratings `[K]` by utterance, on the run's scale. The group shares an encoder."""
    network = group[0].network
    allowed = [{u.id for u in parts[model.description.fold]} for model in group]
    vectors: list[dict[str, torch.Tensor]] = [{} for _ in group]
    for u in target.corpus.utterances:
        if not any(u.id in ids for ids in allowed):
            continue
        try:
            waveform = read_audio(u.path, target.resample)
            check_length(waveform, network.encoder.shortest_samples, network.encoder.longest_samples)
        except AudioError as error:
            raise CorpusError(target.corpus.name, [f"{u.id}: {u.path}: {error}"]) from None
        features = group[0].features(waveform)
        for model, ids, found in zip(group, allowed, vectors, strict=True):
            if u.id in ids:
                found[u.id] = model.encode(features)
    for model, found in zip(group, vectors, strict=True):
        rated: dict[str, Floats] = {}
        for turns in dialogues(parts[model.description.fold]):
            rated |= zip((u.id for u in turns), model.rate([found[u.id] for u in turns]), strict=True)
        yield model, rated


def _write(
    trial: TrialDirectory,
    key: str,
    model: EmotionModel,
    utterances: Sequence[Utterance],
    evaluation: Evaluation,
    rated: Mapping[str, Floats],
) -> None:
    """Write predictions.csv on the scale of the corpus, and then result.json."""
    about, columns = model.description, {d: model.dimensions.index(d) for d in evaluation.dimensions}
    values = match_scales(np.stack([rated[u.id] for u in utterances]), evaluation.run_scale, evaluation.scale)
    if not np.isfinite(values).all():
        raise ResultsError(f"{about.condition}/{about.name}: a prediction is not a number")
    true = {d: np.array([u.label(d) for u in utterances], dtype=np.float64) for d in columns}
    predicted = {d: values[:, column] for d, column in columns.items()}
    trial_id = (about.condition, about.fold, about.seed)
    sha256 = write_predictions(trial.predictions, utterances, trial_id, true, predicted)
    write_atomically(trial.result_file, Result(key=key, predictions_sha256=sha256).to_json())


def match_scales(values: Floats, from_scale: tuple[float, float], to_scale: tuple[float, float]) -> Floats:
    """Map ratings linearly from one scale to another: lowest to lowest, highest to highest."""
    (low, high), (to_low, to_high) = from_scale, to_scale
    if from_scale == to_scale:
        # Not even a rounding error, so that within one corpus the scores are exactly those of the run.
        return values
    return to_low + (values - low) * ((to_high - to_low) / (high - low))


# --- afterwards -------------------------------------------------------------------------------------------------------


def _finish(directory: RunDirectory, folder: RunDirectory, evaluation: Evaluation) -> None:
    """Count the look, and mark the evaluation as complete."""
    root, name = directory.path.parent, f"{directory.name}/evaluations/{evaluation.run}"
    done = {n: result for n, state in evaluation.trials.items() if (result := _scored(folder, n, state))}
    looks_before = evaluation.looks_before
    if scores := new_scores(read_ledger(root), name, done):
        declared = read_protocol(directory)
        conditions = {n: of.digest for n, of in declared.current.conditions.items()} if declared else {}
        look = Look(
            run=name,
            command=evaluation.command,
            corpus_digest=evaluation.corpus_digest,
            split_digest=evaluation.split_digest,
            conditions=conditions,
            seeds=evaluation.seeds,
            scores=scores,
        )
        looks_before = record_look(root, look)
    changes = {
        "status": "COMPLETE",
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "looks_before": looks_before,
        "trials": {n: state.model_copy(update={"status": "DONE"}) for n, state in evaluation.trials.items()},
    }
    write_atomically(folder.evaluation_file, evaluation.model_copy(update=changes).to_json())
