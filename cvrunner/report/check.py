"""`report --check`: recompute every number of a run from its files, and report what differs. Writes nothing.

The test CCCs are derived from predictions.csv alone, and from them everything else. Not recomputed, because it takes
the corpus or the models: the no-audio floor in run.json, journals, and the drawings of figures.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from cvrunner import __version__
from cvrunner.config.schema import digest, flatten
from cvrunner.errors import ConfigError, CvrunnerError, ResultsError
from cvrunner.files import sha256_of
from cvrunner.records.results import RunRecord, TrialResult, TrialState
from cvrunner.records.run_directory import RunDirectory, TrialDirectory, trial_name
from cvrunner.report.html import render_html
from cvrunner.report.report import Report, read_epochs, read_report
from cvrunner.report.tables import render_markdown
from cvrunner.text import plural
from cvrunner.verdict.ccc import is_collapsed
from cvrunner.verdict.ledger import SHOWN_DIGITS, read_ledger
from cvrunner.verdict.predictions import read_predictions, recomputed_ccc
from cvrunner.verdict.protocol import read_protocol

TOLERANCE = 1e-9
"""Largest difference of two numbers that count as equal: machines differ in the last digits of a sum."""
SHOWN = 5
"""Differences listed per file."""
CELLS = re.compile(r"<(h1|th|td)\b[^>]*>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True)
class Check:
    """What a check of a run found."""

    run: str
    trials: int
    """Number of trials whose files were checked."""
    problems: tuple[str, ...]
    """One line each, beginning with the file."""
    written_by: str
    """Version of cvrunner that began the run."""


def check_run(directory: RunDirectory) -> Check:
    """Recompute a run and compare. Raises ResultsError if run.json cannot be read."""
    run = directory.read_run()
    problems = [*_protocol(directory, run), *_split(directory, run)]
    # A trial that is not done claims nothing.
    done = [n for n, s in run.trials.items() if s.status == "DONE" or (directory.path / n / "result.json").exists()]
    for name in done:
        problems += [f"{name}/{problem}" for problem in _trial(directory, run, run.trials[name])]
    problems += _ledger(directory, run)
    projections = "summary.json, comparison.md, report.html"
    named = {trial_name(c, fold, seed) for c in run.conditions for fold in run.folds for seed in run.seeds}
    if absent := sorted(named - set(run.trials)):
        problems.append(f"run.json: conditions, folds and seeds name {', '.join(absent)}, but trials does not: altered")
    elif damaged := set(done) - set(directory.results(run)):
        problems.append(f"{projections}: not recomputed, since they need {plural(len(damaged), 'damaged trial')}")
    else:
        try:
            report = read_report(directory, rescore=True)
            problems += [*_projections(report), *_evaluations(report)]
        except CvrunnerError as error:
            problems.append(f"{projections}: cannot be recomputed: {error}")
    return Check(run.run, len(done), tuple(problems), run.cvrunner_version)


def check_text(check: Check) -> str:
    """Return the outcome of a check as text."""
    if not check.problems:
        return f"{check.run}: every number of {plural(check.trials, 'trial')} and of the report agrees with the files"
    lines = [f"{check.run}: {plural(len(check.problems), 'difference')}", *(f"  {line}" for line in check.problems)]
    if check.written_by != __version__:
        lines.append(f"the run was begun by cvrunner {check.written_by}, and this is {__version__}")
    return "\n".join(lines)


# --- what was declared ------------------------------------------------------------------------------------------------


def _protocol(directory: RunDirectory, run: RunRecord) -> Iterator[str]:
    """Compare protocol.json with its hashes, run.json and config.yaml."""
    try:
        file, config = read_protocol(directory), directory.read_config()
    except (ResultsError, ConfigError) as error:
        yield f"protocol.json, config.yaml: {error}"
        return
    if file is None:
        if run.protocol_sha256:
            yield f"protocol.json: is missing; run.json has the SHA-256 {run.protocol_sha256}"
        return
    # As stored, not as parsed: a later version of cvrunner may know more fields.
    stored = json.loads(directory.protocol_file.read_bytes())["versions"]
    for number, version in enumerate(stored, 1):
        if digest(version["protocol"]) != version["sha256"]:
            yield f"protocol.json: version {number} does not have the SHA-256 next to it: altered"
    if not stored or stored[0]["sha256"] != run.protocol_sha256:
        yield f"protocol.json: the first version is not the one in run.json ({run.protocol_sha256}): altered"
        return
    declared = file.current
    settings = flatten(config.numerics)
    of_config: list[tuple[str, object, object]] = [
        # The declared keys: a later version of cvrunner may have more.
        *((key, settings.get(key), value) for key, value in flatten(declared.settings).items()),
        (
            "conditions",
            json.loads(json.dumps(config.conditions)),
            {name: of.overrides for name, of in declared.conditions.items()},
        ),
        ("train.seeds", list(config.train.seeds), declared.seeds),
        ("verdict.primary", config.verdict.primary, declared.primary),
        ("verdict.margin", config.verdict.margin, declared.margin),
        ("verdict.cluster", config.verdict.cluster or declared.cluster, declared.cluster),
    ]
    of_run: list[tuple[str, object, object]] = [
        ("conditions", sorted(run.conditions), sorted(declared.conditions)),
        ("seeds", run.seeds, declared.seeds),
        ("folds", run.folds, declared.folds),
        ("corpus_digest", run.corpus_digest, declared.corpus_digest),
        ("split_digest", run.split_digest, declared.split_digest),
    ]
    for name, values in (("config.yaml", of_config), ("run.json", of_run)):
        for what, one, other in values:
            if one != other:
                yield f"{name}: {what} is {one!r:.100}, but protocol.json has {other!r:.100}"


def _split(directory: RunDirectory, run: RunRecord) -> Iterator[str]:
    try:
        folds = json.loads(directory.split.read_bytes())["folds"]
        parts = ("train", "validation", "test")
        rows = sorted([f["fold"], part, name] for f in folds for part in parts for name in f[part]["utterances"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"split.json: cannot be read (missing, truncated or altered): {type(error).__name__}"
        return
    if digest(rows) != run.split_digest:
        yield "split.json: its utterances do not give the split digest in run.json: altered"


def _ledger(directory: RunDirectory, run: RunRecord) -> Iterator[str]:
    """Compare with the ledger of the results folder, which a copy of the run alone does not have."""
    looks = [look for look in read_ledger(directory.path.parent) if look.corpus_digest == run.corpus_digest]
    own = [number for number, look in enumerate(looks) if look.run == run.run]
    if not own:
        return
    if run.looks_before != own[-1]:
        yield f"run.json: looks_before is {run.looks_before}, but the ledger has {own[-1]}"
    recorded = {name: value for number in own for name, value in looks[number].scores.items()}
    for trial in _other_than_recorded(directory.path, recorded):
        yield f"{trial}/predictions.csv: is not the file that the ledger recorded: altered"


def _other_than_recorded(folder: Path, recorded: Mapping[str, str]) -> Iterator[str]:
    """Yield the trials whose predictions.csv does not have the SHA-256 in the ledger; a missing file is skipped.

    `recorded`: first digits of the SHA-256, by trial.
    """
    for trial, digits in recorded.items():
        predictions = folder / trial / "predictions.csv"
        if predictions.is_file() and not sha256_of(predictions).startswith(digits[:SHOWN_DIGITS]):
            yield trial


# --- trials -----------------------------------------------------------------------------------------------------------


def _trial(directory: RunDirectory, run: RunRecord, state: TrialState) -> Iterator[str]:
    """Compare the result of a trial with its predictions and its journal."""
    trial = directory.trial(state.condition, state.fold, state.seed)
    try:
        result = TrialResult.from_json(trial.result_file.read_bytes(), "result.json")
    except OSError as error:
        yield f"result.json: cannot be read: {error.strerror}"
        return
    except ResultsError as error:
        yield f"{error} (truncated or altered)"
        return
    if result.key != state.key:
        yield f"result.json: has the trial key {result.key}, but run.json has {state.key}: from another trial"
    expected = (state.condition, state.fold, state.seed, run.split_digest, run.corpus_digest)
    if (result.condition, result.fold, result.seed, result.split_digest, result.corpus_digest) != expected:
        yield "result.json: condition, fold, seed or digests are not those in run.json"
    epochs = {epoch.epoch: epoch for epoch in read_epochs(directory, state.condition, state.fold, state.seed)}
    if result.best_epoch not in epochs:
        yield f"journal.jsonl: epoch {result.best_epoch}, the best one, is missing (truncated or altered)"
    elif epochs[result.best_epoch].validation_ccc != result.validation_ccc:
        yield "result.json: validation_ccc is not that of the best epoch in journal.jsonl"
    yield from _predictions(trial, run, result)


def _predictions(trial: TrialDirectory, run: RunRecord, result: TrialResult) -> Iterator[str]:
    try:
        table = read_predictions(trial.predictions)
        scores = recomputed_ccc(table, run.dimensions)
        collapsed = [d for d in run.dimensions if is_collapsed(table[f"{d}_predicted"], table[f"{d}_true"])]
        trials = set(zip(table["condition"], table["fold"], table["seed"], strict=True))
    except (ResultsError, ValueError, KeyError) as error:
        yield f"predictions.csv: cannot be scored (truncated or altered): {error}"
        return
    if result.predictions_sha256 not in ("", sha256_of(trial.predictions)):
        yield "predictions.csv: does not have the SHA-256 in result.json: altered"
    if len(table) != result.test_utterances:
        yield f"predictions.csv: has {len(table)} of {result.test_utterances} utterances: truncated or altered"
    if trials != {(result.condition, result.fold, result.seed)}:
        yield "predictions.csv: condition, fold or seed is not that of the trial"
    differences = list(_differences(result.test_ccc, scores, "test_ccc"))
    if collapsed != result.collapsed:
        differences.append(f"collapsed is {result.collapsed}, recomputed {collapsed}")
    yield from _few("result.json", differences)


# --- what is made of them ---------------------------------------------------------------------------------------------


def _projections(report: Report) -> Iterator[str]:
    """Compare summary.json, comparison.md and the tables of report.html with what the predictions give."""
    directory = report.directory
    stored = {}
    for path in (directory.summary_file, directory.comparison, directory.report):
        try:
            stored[path] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            yield f"{path.name}: cannot be read: {error}"
    if (text := stored.get(directory.summary_file)) is not None:
        try:
            summary = json.loads(text)
        except ValueError as error:
            yield f"summary.json: is not JSON (truncated or altered): {error}"
        else:
            yield from _few("summary.json", _differences(summary, report.summary.model_dump(mode="json")))
    if (text := stored.get(directory.comparison)) is not None:
        yield from _few("comparison.md", _other_lines(text.splitlines(), render_markdown(report).splitlines()))
    if (text := stored.get(directory.report)) is not None:
        yield from _few("report.html", _other_lines(_cells(text), _cells(render_html(report, {}))))


def _evaluations(report: Report) -> Iterator[str]:
    """Compare the files of each evaluation with what its predictions give, and with the ledger."""
    looks = read_ledger(report.directory.path.parent)
    for evaluated in report.evaluations:
        folder, name = evaluated.folder, f"evaluations/{evaluated.folder.name}"
        for trial in evaluated.summary.missing:
            yield f"{name}/{trial}: predictions.csv or result.json is missing, altered or of another model"
        recorded = {
            n: value for look in looks if look.run == f"{report.run.run}/{name}" for n, value in look.scores.items()
        }
        for trial in _other_than_recorded(folder.path, recorded):
            yield f"{name}/{trial}/predictions.csv: is not the file that the ledger recorded: altered"
        try:
            stored = json.loads(folder.summary_file.read_bytes())
        except (OSError, ValueError) as error:
            yield f"{name}/summary.json: cannot be read: {error}"
        else:
            recomputed = evaluated.summary.model_dump(mode="json")
            yield from _few(f"{name}/summary.json", _differences(stored, recomputed))


def _cells(page: str) -> list[str]:
    """Return the verdict and the table cells of a page as text."""
    return [html.unescape(re.sub(r"<[^>]+>", "", cell)).strip() for _, cell in CELLS.findall(page)]


def _other_lines(stored: list[str], recomputed: list[str]) -> Iterator[str]:
    for number, (one, other) in enumerate(zip_longest(stored, recomputed), 1):
        if one != other:
            yield f"line or cell {number} is {one!r:.200}, recomputed {other!r:.200}"
            if len(stored) != len(recomputed):
                # What follows is only shifted.
                yield f"has {len(stored)} lines or cells, recomputed {len(recomputed)}"
                return


def _differences(stored: Any, recomputed: Any, place: str = "") -> Iterator[str]:
    """Yield where two JSON values differ; numbers may differ by TOLERANCE."""
    if isinstance(stored, dict) and isinstance(recomputed, dict):
        for key in {**stored, **recomputed}:
            inner = f"{place}.{key}" if place else key
            yield from _differences(stored.get(key), recomputed.get(key), inner)
    elif isinstance(stored, list) and isinstance(recomputed, list) and len(stored) == len(recomputed):
        for number, pair in enumerate(zip(stored, recomputed, strict=True)):
            yield from _differences(*pair, f"{place}[{number}]")
    elif isinstance(stored, float | int) and isinstance(recomputed, float | int):
        if not math.isclose(stored, recomputed, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            yield f"{place} is {stored}, recomputed {recomputed}"
    elif stored != recomputed:
        yield f"{place} is {stored!r:.200}, recomputed {recomputed!r:.200}"


def _few(file: str, differences: Iterator[str] | list[str]) -> Iterator[str]:
    found = list(differences)
    yield from (f"{file}: {difference}" for difference in found[:SHOWN])
    if len(found) > SHOWN:
        yield f"{file}: ... and {len(found) - SHOWN} more"
