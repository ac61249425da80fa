"""The tables behind a comparison: claims, subsets, settings, trials, facts."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from cvrunner.config.schema import Config, flatten
from cvrunner.records.results import TrialResult
from cvrunner.report.checks import checks_table
from cvrunner.report.floor import attainable_table, floor_table
from cvrunner.report.protocol import protocol_table
from cvrunner.report.report import Report
from cvrunner.text import DASH, Table, format_score

QUANTITIES = {
    "ccc_valence": "CCC-V",
    "ccc_arousal": "CCC-A",
    "ccc_avg": "CCC-Avg",
    "memory_gb": "GPU memory, GB",
    "minutes_per_epoch": "minutes per epoch",
}


def evidence_tables(report: Report) -> list[Table]:
    """Return all tables behind a comparison that have rows."""
    tables = [
        floor_table(report),
        attainable_table(report),
        checks_table(report),
        claims_table(report),
        groups_table(report),
        settings_table(report),
        origin_table(report),
        trials_table(report),
        protocol_table(report),
    ]
    return [table for table in tables if table.rows]


# --- claims, subsets, settings, trials --------------------------------------------------------------------------------


def claims_table(report: Report) -> Table:
    """Return what others claim next to what was measured here."""
    rows = []
    for claim in report.config.reference.claims:
        claimed, upper = f"{claim.low:g}", claim.low
        if claim.high is not None:
            claimed, upper = f"{claim.low:g} to {claim.high:g}", claim.high
        measured, outcome = _measured(report, claim.condition, claim.quantity), "not testable here"
        if measured is not None:
            reached = measured <= upper
            if claim.quantity.startswith("ccc"):
                reached = measured >= claim.low
            outcome = "met" if reached else "missed"
        quantity = QUANTITIES[claim.quantity]
        rows.append([claim.name, claim.condition, quantity, claimed, format_score(measured), outcome])
    note = (
        "A CCC claim is met if the measured value reaches its lower end, a cost claim if it does not exceed its upper "
        "end. No claim can be tested on synthetic data, and a cost claim only on a GPU."
    )
    if report.config.reference.source:
        note = f"Source: {report.config.reference.source}. {note}"
    columns = ["claim", "condition", "quantity", "claimed", "measured", "outcome"]
    return Table("Claims of others and measured values", columns, rows, note)


def _measured(report: Report, condition: str, quantity: str) -> float | None:
    if report.run.synthetic or condition not in report.summary.scores:
        return None
    if quantity.startswith("ccc_"):
        dimension = quantity.removeprefix("ccc_")
        if dimension not in report.summary.scores[condition]:
            return None
        return report.summary.scores[condition][dimension].mean
    results = report.results_of(condition).values()
    # The memory of a process and the time on a CPU say nothing about a claim on a GPU.
    # A GPU is recorded by its name, such as "NVIDIA GeForce RTX 4090".
    if any(r.device == "cpu" for r in results):
        return None
    if quantity == "memory_gb":
        return max(r.peak_memory_mib for r in results) * 2**20 / 1e9
    return fmean(minutes_per_epoch(r) for r in results)


def minutes_per_epoch(result: TrialResult) -> float:
    """Return the time of training and validation per epoch, in minutes."""
    return result.train_s / 60 / max(1, result.epochs_run)


def groups_table(report: Report) -> Table:
    """Return the CCC within subsets of the test data, and the differences there on the primary outcome."""
    groups, label, summary = report.summary.groups, report.label, report.summary
    columns = ["subset", "utterances", *(f"{condition} {name}" for condition in groups for name in label.values())]
    for condition in summary.subsets:
        columns += [f"{condition} - {summary.baseline}, {label[summary.primary]}", "95 %, on this corpus"]
    rows = []
    for part in next(iter(groups.values()), {}):
        found = [of[part] for of in summary.subsets.values()]
        row = [part, str(found[0].utterances) if found else DASH]
        row += [format_score(of[part][d]) for of in groups.values() for d in label]
        for difference in found:
            interval = DASH
            if difference.interval is not None:
                interval = str(difference.interval)
            row += [format_score(difference.mean, signed=True), interval]
        rows.append(row)
    return Table(
        "Subsets of the test data",
        columns,
        rows,
        "Pooled CCC over the utterances of a subset, mean over seeds. A CCC depends on the spread of the ratings in "
        "its subset, so compare conditions within a subset, not subsets with each other. The intervals are not "
        "adjusted for the number of subsets, and need three seeds. A single speaker has few utterances.",
    )


def settings_table(report: Report) -> Table:
    """Return the configuration keys in which the conditions differ."""
    known = [c for c in report.run.conditions if c in report.config.conditions]
    flat = {condition: settings(report.config, condition) for condition in known}
    note = "All other settings are the same for all conditions."
    if any(report.config.folds_of(condition) for condition in known):
        note += " Settings per fold: the value without a fold's own, then `fold: value`."
    return Table("Settings that differ", ["key", *flat], differing(flat), note)


def settings(config: Config, condition: str) -> dict[str, object]:
    """Return the settings that a condition's numbers depend on, per key; values per fold as text."""
    chosen = config.for_condition(condition)
    flat = flatten(chosen.numerics)
    for fold in config.folds_of(condition):
        for key, value in flatten(config.for_condition(condition, fold).numerics).items():
            if value != flatten(chosen.numerics)[key]:
                flat[key] = f"{flat[key]}, {fold}: {value}"
    return flat | {"model.encoder": chosen.model.encoder, "model.revision": chosen.model.revision}


def origin_table(report: Report) -> Table:
    """Return who chose the settings of each condition, and with which budget."""
    origin = report.config.settings_from
    rows = [
        [condition, origin.source, str(origin.samples(condition)), "yes" if origin.nested else "no"]
        for condition in report.run.conditions
    ]
    notes = [f"Sweep: {origin.sweep}."] if origin.sweep else []
    if origin.objective:
        notes.append(f"Chosen by: {origin.objective}.")
    if origin.note:
        notes.append(origin.note)
    columns = ["condition", "settings chosen by", "settings tried", "per fold"]
    return Table("Origin of the settings", columns, rows, " ".join(notes) or "No search is recorded.")


def differing(flat: Mapping[str, Mapping[str, object]]) -> list[list[str]]:
    """Return rows of key and values, sorted by key, for the keys whose values are not all the same."""
    keys = sorted({key for values in flat.values() for key in values})
    shown = [[key, *(str(values.get(key, DASH)) for values in flat.values())] for key in keys]
    return [row for row in shown if len(set(row[1:])) > 1]


def trials_table(report: Report) -> Table:
    """Return every trial with its status, attempts, scores and cost."""
    measured = ["best epoch", "validation CCC-Avg", "test CCC-Avg", "encoder weight change", "minutes per epoch"]
    measured += ["peak memory, MiB", "device", "collapsed"]
    rows = []
    for name, state in report.run.trials.items():
        cells = [DASH] * len(measured)
        if name in report.results:
            cells = _result_cells(report.results[name])
        rows.append([name, state.status, str(state.attempts), *cells, state.error or ""])
    return Table(
        "Trials",
        ["trial", "status", "attempts", *measured, "error"],
        rows,
        "Encoder weight change: relative to the start; a trial fails if a frozen encoder changes or a trained one does "
        "not. Collapsed: dimensions whose test predictions hardly vary. Peak memory: of the GPU, or of the process "
        "on a CPU.",
    )


def _result_cells(result: TrialResult) -> list[str]:
    encoder = "not trained"
    if changes := [value for group, value in result.weight_change.items() if group != "head"]:
        encoder = f"{max(changes):.2e}"
    return [
        f"{result.best_epoch} of {result.epochs_run}",
        format_score(result.validation_ccc.get("avg")),
        format_score(result.test_ccc.get("avg")),
        encoder,
        f"{minutes_per_epoch(result):.2f}",
        f"{result.peak_memory_mib:.0f}",
        result.device,
        ", ".join(result.collapsed),
    ]


def facts(report: Report) -> list[tuple[str, str]]:
    """Return what was run: data, labels, split and encoder, with complete digests."""
    results, corpus = list(report.results.values()), report.run.corpus
    if report.run.synthetic:
        corpus += " - SYNTHETIC"
    return [
        ("run", f"{report.run.run} ({report.run.status}, started {report.run.started_at})"),
        ("corpus", corpus),
        ("label variant", report.config.label_variant),
        ("protocol", report.run.protocol),
        ("corpus digest", report.run.corpus_digest),
        ("split digest", report.run.split_digest),
        ("encoder", ", ".join(sorted({f"{r.encoder} ({r.encoder_digest})" for r in results})) or DASH),
        ("precision", ", ".join(sorted({f"{r.precision} on {r.device}" for r in results})) or DASH),
        ("cvrunner", report.run.cvrunner_version),
    ]
