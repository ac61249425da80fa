"""The tables that say how far to trust a comparison: claims, floor, parts of the data, settings, trials, facts."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from cvrunner.config.schema import Config
from cvrunner.records.results import FloorRecord, Score, TrialResult
from cvrunner.report.checks import checks_table
from cvrunner.report.report import Report
from cvrunner.report.tables import NONE, Table, number, scores_table

QUANTITIES = {
    "ccc_valence": "CCC-V",
    "ccc_arousal": "CCC-A",
    "ccc_avg": "CCC-Avg",
    "memory_gb": "GPU memory, GB",
    "minutes_per_epoch": "minutes per epoch",
}


def evidence_tables(report: Report) -> list[Table]:
    """All of them that have something to say."""
    tables = [
        floor_table(report),
        checks_table(report),
        claims_table(report),
        groups_table(report),
        settings_table(report),
        trials_table(report),
    ]
    return [table for table in tables if table.rows]


def claims_table(report: Report) -> Table:
    """What others stated beside what was measured here."""
    rows = []
    for claim in report.config.reference.claims:
        stated = f"{claim.low:g}" + ("" if claim.high is None else f" to {claim.high:g}")
        measured = _measured(report, claim.condition, claim.quantity)
        upper = claim.low if claim.high is None else claim.high
        reached = measured is not None and (
            measured >= claim.low if claim.quantity.startswith("ccc") else measured <= upper
        )
        outcome = "not testable here" if measured is None else "met" if reached else "missed"
        shown = NONE if measured is None else f"{measured:.4f}"
        rows.append([claim.name, claim.condition, QUANTITIES[claim.quantity], stated, shown, outcome])
    source = report.config.reference.source
    return Table(
        "Claims of others beside what was measured",
        ["claim", "condition", "quantity", "stated", "measured", "outcome"],
        rows,
        f"{'Source: ' + source + '. ' if source else ''}A CCC claim is met from its lower end on, a cost claim up "
        "to its upper end. On synthetic data no claim can be tested, and without a GPU no cost.",
    )


def _measured(report: Report, condition: str, quantity: str) -> float | None:
    if report.run.synthetic or report.summary.missing or condition not in report.summary.scores:
        return None
    if quantity.startswith("ccc_"):
        aggregate = report.summary.scores[condition].get(quantity.removeprefix("ccc_"))
        return aggregate.mean if aggregate else None
    results = [r for r in report.results.values() if r.condition == condition]
    if any(not r.device.startswith("cuda") for r in results):
        return None
    if quantity == "memory_gb":
        return max(r.peak_memory_mib for r in results) * 2**20 / 1e9
    return fmean(minutes_per_epoch(r) for r in results)


def minutes_per_epoch(result: TrialResult) -> float:
    """Training and validation, minutes."""
    return result.train_s / 60 / max(1, result.epochs_run)


def floor_table(report: Report) -> Table:
    """How far one gets without listening, and how far human raters get, beside the conditions."""
    labels = report.label
    columns = ["predictor", *labels.values(), *(f"{label} pooled" for label in labels.values())]
    floor = report.floor
    if floor is None:
        return Table("Floor and ceiling", columns, [])
    rows = [[f"no audio: {name}", *_score_cells(scores, labels)] for name, scores in floor.scores.items()]
    rows += [["no audio", *_score_cells({}, labels)]] if floor.reason else []
    rows += [] if report.summary.missing else [[_plain(cell) for cell in row] for row in scores_table(report).rows]
    rows += [
        [f"{name}, scenario taken out", *_score_cells(scores, labels)] for name, scores in floor.controlled.items()
    ]
    rows += [["one human rater", *_score_cells(floor.ceiling, labels)]] if floor.ceiling else []
    rows += [] if report.summary.missing or not floor.ceiling else _ratio_rows(report, floor.ceiling)
    reasons = [f"No floor: {floor.reason}." if floor.reason else ""]
    reasons += [f"No ceiling: {floor.ceiling_reason}." if floor.ceiling_reason else ""]
    return Table("Floor and ceiling", columns, rows, " ".join([*_floor_notes(floor), *filter(None, reasons)]))


def _floor_notes(floor: FloorRecord) -> list[str]:
    notes = ["Mean over folds; pooled over all out-of-fold predictions."]
    if floor.scores:
        notes.append(
            "No audio: the training mean of the utterance's scenario (and of speaker's gender and side), on the same "
            "folds; a model below it has not shown that it listens."
        )
    if floor.controlled:
        notes.append("Scenario taken out: prediction and truth less the training mean of their scenario.")
    if floor.ceiling:
        notes.append(
            "One human rater: each observer against the mean of the others. A model is held against the mean of all, "
            "which is steadier, so this is a mark and not a bound."
        )
    return notes


def _ratio_rows(report: Report, ceiling: dict[str, Score]) -> list[list[str]]:
    """Each condition's CCC as a share of a human rater's."""
    rows = []
    for condition, scores in report.summary.scores.items():
        mean = [_share(scores[d].mean, ceiling[d].mean if d in ceiling else None) for d in report.label]
        pooled = [_share(scores[d].pooled, ceiling[d].pooled if d in ceiling else None) for d in report.label]
        rows.append([f"{condition} / one human rater", *mean, *pooled])
    return rows


def _share(score: float | None, of: float | None) -> str:
    """A ratio with two decimals; a dash where a human rater reaches nothing to compare with."""
    return NONE if score is None or of is None or of <= 0 else f"{score / of:.2f}"


def _plain(cell: str) -> str:
    """A mean without its standard deviation."""
    return cell.split(" ± ")[0]


def _score_cells(scores: dict[str, Score], labels: dict[str, str]) -> list[str]:
    known = [scores.get(dimension) for dimension in labels]
    return [number(s.mean if s else None) for s in known] + [number(s.pooled if s else None) for s in known]


def groups_table(report: Report) -> Table:
    """CCC within parts of the test data."""
    conditions, labels = list(report.summary.groups), report.label
    if not conditions:
        return Table("Parts of the test data", [], [])
    columns = ["part", *(f"{condition} {label}" for condition in conditions for label in labels.values())]
    rows = [
        [part, *(number(report.summary.groups[c][part][d]) for c in conditions for d in labels)]
        for part in report.summary.groups[conditions[0]]
    ]
    return Table(
        "Parts of the test data",
        columns,
        rows,
        "Pooled CCC over the utterances of the part, mean over seeds. A CCC depends on how far the ratings of its part "
        "spread, so compare conditions within a part, not parts with each other; a single speaker's is of few "
        "utterances.",
    )


def settings_table(report: Report) -> Table:
    """The configuration keys in which the conditions differ."""
    conditions = report.run.conditions
    flat = {c: settings(report.config, c) for c in conditions if c in report.config.conditions}
    rows = differing(flat)
    return Table("Settings that differ", ["key", *flat], rows, "All other settings are the same for all conditions.")


def settings(config: Config, condition: str) -> dict[str, object]:
    """What a condition's numbers depend on, by key."""
    chosen = config.for_condition(condition)
    return flatten(chosen.numerics) | {"model.encoder": chosen.model.encoder, "model.revision": chosen.model.revision}


def differing(flat: Mapping[str, Mapping[str, object]]) -> list[list[str]]:
    """Rows of key and values, by name, for the keys whose values are not all the same."""
    keys = sorted({key for values in flat.values() for key in values})
    shown = [[key, *(str(values.get(key, NONE)) for values in flat.values())] for key in keys]
    return [row for row in shown if len(set(row[1:])) > 1]


def flatten(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def trials_table(report: Report) -> Table:
    """Every trial with its status, attempts, scores and cost."""
    columns = [
        "trial",
        "status",
        "attempts",
        "best epoch",
        "validation CCC-Avg",
        "test CCC-Avg",
        "encoder moved",
    ]
    columns += ["minutes per epoch", "peak memory, MiB", "device", "collapsed", "error"]
    rows = []
    for name, state in report.run.trials.items():
        result = report.results.get(name)
        cells = [NONE] * 8 if result is None else _result_cells(result)
        rows.append([name, state.status, str(state.attempts), *cells, state.error or ""])
    return Table(
        "Trials",
        columns,
        rows,
        "Encoder moved: relative change of its weights; a trial fails if a frozen encoder moves or an unfrozen one "
        "does not. Collapsed: dimensions with constant test predictions. Peak memory: of the GPU, on a CPU of the "
        "process.",
    )


def _result_cells(result: TrialResult) -> list[str]:
    moved = [value for group, value in result.weight_change.items() if "encoder" in group]
    return [
        f"{result.best_epoch} of {result.epochs_run}",
        number(result.validation_ccc.get("avg")),
        number(result.test_ccc.get("avg")),
        f"{max(moved):.2e}" if moved else "not trained",
        f"{minutes_per_epoch(result):.2f}",
        f"{result.peak_memory_mib:.0f}",
        result.device,
        ", ".join(result.collapsed),
    ]


def facts(report: Report) -> list[tuple[str, str]]:
    """What was run: data, labels, split, encoder, each with its digest in full."""
    results = list(report.results.values())
    return [
        ("run", f"{report.run.run} ({report.run.status}, started {report.run.started_at})"),
        ("corpus", report.run.corpus + (" - SYNTHETIC" if report.run.synthetic else "")),
        ("label variant", report.config.corpus.labels),
        ("protocol", report.run.protocol),
        ("corpus digest", report.run.corpus_digest),
        ("split digest", report.run.split_digest),
        ("encoder", ", ".join(sorted({f"{r.encoder} ({r.encoder_digest})" for r in results})) or NONE),
        ("precision", ", ".join(sorted({f"{r.precision} on {r.device}" for r in results})) or NONE),
        ("cvrunner", report.run.cvrunner_version),
    ]
