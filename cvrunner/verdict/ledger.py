"""The ledger of a results folder: every look at test scores, in the append-only file ledger.jsonl.

A look is an invocation that produced test scores which did not exist before. Reading scores again is none.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from cvrunner.errors import ResultsError
from cvrunner.records.results import Record, Result
from cvrunner.records.run_directory import append_event, read_events
from cvrunner.verdict.protocol import Protocol

LEDGER = "ledger.jsonl"
LOCK_TIMEOUT_S = 60
SHOWN_DIGITS = 16
"""Digits of a digest in the ledger."""


class Look(Record):
    """One line of the ledger."""

    time: str = ""
    """UTC; set when the line is written."""
    run: str
    command: list[str]
    corpus_digest: str
    split_digest: str
    conditions: dict[str, str]
    """Declared by the run's protocol: digest of the settings, per condition."""
    seeds: list[int]
    """Declared by the run's protocol."""
    scores: dict[str, str]
    """What was new: first digits of the SHA-256 of predictions.csv, per trial."""


def read_ledger(results_root: Path) -> list[Look]:
    """Return the looks of a results folder, oldest first; damaged lines are skipped."""
    looks = []
    for line in read_events(results_root / LEDGER, "look"):
        with contextlib.suppress(ResultsError):
            looks.append(Look.from_json(json.dumps(line), LEDGER))
    return looks


def record_look(results_root: Path, look: Look) -> int:
    """Append a look and return the number of earlier ones at the same corpus. Raises ResultsError after a minute."""
    file = results_root / LEDGER
    try:
        # Appending is atomic on a local disk only, and the count must belong to this line.
        with FileLock(results_root / f".{LEDGER}.lock", timeout=LOCK_TIMEOUT_S):
            before = looks_at(read_ledger(results_root), look.corpus_digest)
            append_event(file, "look", **look.model_dump(mode="json", exclude={"time"}))
    except Timeout:
        raise ResultsError(f"{file}: another process has held its lock for {LOCK_TIMEOUT_S} s") from None
    return before


def looks_at(looks: Sequence[Look], corpus_digest: str) -> int:
    """Return the number of looks at a corpus."""
    return sum(look.corpus_digest == corpus_digest for look in looks)


def new_scores(looks: Sequence[Look], run: str, results: Mapping[str, Result]) -> dict[str, str]:
    """Return the test scores of a run that no look has recorded: digest of the predictions per trial."""
    # Not from the trials of this invocation: one that was killed after a trial has left scores without a look.
    known = {item for look in looks if look.run == run for item in look.scores.items()}
    found = {name: result.predictions_sha256[:SHOWN_DIGITS] for name, result in results.items()}
    return {name: digest for name, digest in found.items() if (name, digest) not in known}


def added_after_look(protocol: Protocol, looks: Sequence[Look], declared: Sequence[Protocol] = ()) -> list[str]:
    """Return the seeds and conditions that a comparison did not have when its test scores were first seen.

    Earlier looks belong to the same comparison if corpus and split are the same, and a condition has the same settings,
    whatever its name. `declared`: earlier versions of the run's protocol. Returns names such as `seed 2` and `condition
    lora`.
    """
    own = {condition.digest for condition in protocol.conditions.values()}
    related = [
        look
        for look in looks
        if (look.corpus_digest, look.split_digest) == (protocol.corpus_digest, protocol.split_digest)
        and own & set(look.conditions.values())
    ]
    if not related:
        return []
    seeds = {seed for look in related for seed in look.seeds} | {seed for old in declared for seed in old.seeds}
    settings = {digest for look in related for digest in look.conditions.values()}
    settings |= {condition.digest for old in declared for condition in old.conditions.values()}
    added = [f"seed {seed}" for seed in protocol.seeds if seed not in seeds]
    return added + [f"condition {name}" for name, of in protocol.conditions.items() if of.digest not in settings]
