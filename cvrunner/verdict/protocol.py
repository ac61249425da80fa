"""The protocol of a run: what is compared and how it is decided, written and hashed before the first test score exists.

protocol.json holds the first version for good; each later change is appended, with what was known by then.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from cvrunner.config.schema import digest, flatten
from cvrunner.config.sections import VerdictConfig
from cvrunner.records.results import Record, ccc_label
from cvrunner.records.run_directory import RunDirectory
from cvrunner.text import plural

WIDTH = 96
"""Columns of the protocol as text."""
SELECTION = "the epoch with the highest validation CCC-Avg; the test set is scored once, with the weights of that epoch"
DECISION = (
    "On this corpus: 95 % interval of the difference, from test dialogues (or speakers) and training variance. Better "
    "or worse if it excludes 0; practically equal, or different by less than the margin, if the 90 % interval is "
    "within the margin on both sides; otherwise not distinguishable.",
    "For new speakers: corrected t interval over the folds; shown if it excludes 0 in the same direction.",
    "One seed, or one fold with fewer than three seeds: no claim beyond the trained models.",
    "Several conditions: simultaneous intervals on this corpus, Bonferroni for new speakers. Secondary outcomes never "
    "decide; their p values are adjusted (Holm).",
)


class ConditionProtocol(Record):
    """One condition as declared."""

    overrides: dict[str, Any]
    """As in the configuration."""
    seeds: list[int]
    encoder: str
    encoder_digest: str
    digest: str
    """Of all settings that the condition's numbers depend on, with the encoder's weights and without the seeds."""


class Protocol(Record):
    """What a run compares and how it decides."""

    question: str
    primary: str
    """Primary outcome: a dimension or `avg`."""
    secondary: list[str]
    margin: float
    """Largest difference in CCC that counts as practically equal."""
    cluster: Literal["dialogue", "speaker"]
    """Unit that is resampled within sessions."""
    baseline: str
    conditions: dict[str, ConditionProtocol]
    seeds: list[int]
    folds: list[int]
    scheme: str
    selection: str
    """How the tested model is chosen."""
    decision: list[str]
    """Rules of the sentence."""
    settings: dict[str, Any]
    """Settings that all conditions share unless they override them."""
    settings_from: dict[str, Any] | None = None
    """Who chose the settings, and with which budget, if recorded."""
    corpus: str
    corpus_digest: str
    split_digest: str
    code_digest: str
    """Of the code that decides a trial's numbers."""
    cvrunner_version: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the protocol as canonical JSON."""
        return digest(self.model_dump(mode="json"))


class ProtocolVersion(Record):
    """A protocol and what was known when it was written."""

    time: str
    sha256: str
    test_scores: int
    """Number of trials of the run that had test scores."""
    looks: int
    """Number of earlier looks at test scores of this corpus in the results folder."""
    added_after_look: list[str]
    """Seeds and conditions that were added to a comparison after its test scores had been seen, such as `seed 2`."""
    changes: list[str]
    """Changes since the version before."""
    protocol: Protocol


class ProtocolFile(Record):
    """protocol.json."""

    versions: list[ProtocolVersion]
    """Oldest first; the last one is in force."""

    @property
    def current(self) -> Protocol:
        return self.versions[-1].protocol

    @property
    def added_after_look(self) -> list[str]:
        """Seeds and conditions that were added after a look, such as `seed 2` and `condition lora`, each once."""
        return list(dict.fromkeys(name for version in self.versions for name in version.added_after_look))


def read_protocol(directory: RunDirectory) -> ProtocolFile | None:
    """Read protocol.json; None if there is none, as in runs of earlier versions. Raises ResultsError."""
    file = directory.protocol_file
    if not file.is_file():
        return None
    return ProtocolFile.from_json(file.read_bytes(), str(file))


def cluster_unit(declared: VerdictConfig, speakers: Iterable[tuple[str, str]]) -> Literal["dialogue", "speaker"]:
    """Return the declared cluster unit, or the default for a corpus whose pairs of session and speaker are given."""
    if declared.cluster is not None:
        return declared.cluster
    by_session: dict[str, set[str]] = {}
    for session, speaker in speakers:
        by_session.setdefault(session, set()).add(speaker)
    return "speaker" if max(map(len, by_session.values()), default=0) > 2 else "dialogue"


def question(baseline: str, others: Sequence[str], primary: str) -> str:
    """Return the question that a run answers."""
    outcome = f"test {ccc_label(primary)}"
    if not others:
        return f"Which {outcome} does {baseline} reach?"
    verb = "Does" if len(others) == 1 else "Do"
    return f"{verb} {', '.join(others)} differ from {baseline} in {outcome}, on this corpus and for new speakers?"


def changes(old: Protocol, new: Protocol) -> list[str]:
    """Return one line per value that differs, such as `margin: 0.02 -> 0.05`."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key, 'none')} -> {after.get(key, 'none')}" for key in keys]


def protocol_text(protocol: Protocol) -> str:
    """Return the protocol for people, in lines of less than 100 columns."""
    secondary = ", ".join(map(ccc_label, protocol.secondary)) or "none"
    facts: list[tuple[str, str]] = [
        ("question", protocol.question),
        ("primary outcome", ccc_label(protocol.primary)),
        ("secondary outcomes", secondary),
        ("margin", f"{protocol.margin:g} CCC"),
        ("resampled unit", f"{protocol.cluster}, within sessions"),
    ]
    for name, condition in protocol.conditions.items():
        overrides = ", ".join(f"{key} = {value}" for key, value in flatten(condition.overrides).items())
        text = overrides or "the settings as they are"
        if name == protocol.baseline:
            text += " (baseline)"
        if condition.seeds != protocol.seeds:
            text += f"; seeds {_listed(condition.seeds)}"
        facts.append((f"condition {name}", f"{text}; settings {condition.digest[:12]}"))
    origin = "not recorded"
    if protocol.settings_from is not None:
        settings = flatten(protocol.settings_from).items()
        origin = ", ".join(f"{key} {value}" for key, value in settings if value not in ("", None, {}))
    facts += [
        ("seeds", _listed(protocol.seeds)),
        ("folds", f"{_listed(protocol.folds)} ({protocol.scheme.replace('_', ' ')})"),
        ("model selection", protocol.selection),
        *(("decision", rule) for rule in protocol.decision),
        ("settings from", origin),
        ("corpus", protocol.corpus),
        ("corpus digest", protocol.corpus_digest),
        ("split digest", protocol.split_digest),
    ]
    for encoder in sorted({f"{c.encoder}, digest {c.encoder_digest}" for c in protocol.conditions.values()}):
        facts.append(("encoder", encoder))
    facts += [
        ("code digest", protocol.code_digest),
        ("cvrunner", protocol.cvrunner_version),
        ("protocol", protocol.sha256),
    ]
    width = max(len(name) for name, _ in facts) + 2
    lines, before = [], ""
    for name, value in facts:
        shown = name if name != before else ""
        lines.append(textwrap.fill(value, WIDTH, initial_indent=shown.ljust(width), subsequent_indent=" " * width))
        before = name
    return "\n".join(lines)


def written_text(version: ProtocolVersion) -> str:
    """Return when a version was written, and what was known by then."""
    known = "before the first test score of the run"
    if version.test_scores:
        known = f"after {plural(version.test_scores, 'trial')} of the run had test scores"
    return f"{version.time}, {known}"


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
