"""The tables behind a comparison: floor and ceiling, run checks, claims, subsets, settings, trials, facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean

from cvrunner.config.schema import Config, flatten
from cvrunner.records.results import FloorRecord, Score, TrialResult
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
LABELS = {
    "header": "the rating printed next to each utterance, the mean of the observers",
    "observers": "the mean of the individual observers' ratings",
    "all_raters": "the mean of all ratings, including the speakers' ratings of themselves",
}
SHOWN_DIGITS = 12
"""Leading digits of a digest in the run checks; `facts` shows complete digests."""


def evidence_tables(report: Report) -> list[Table]:
    """Return all tables of this module that have rows."""
    tables = [
        floor_table(report),
        checks_table(report),
        claims_table(report),
        groups_table(report),
        settings_table(report),
        trials_table(report),
        protocol_table(report),
    ]
    return [table for table in tables if table.rows]


# --- floor and ceiling ------------------------------------------------------------------------------------------------


def floor_table(report: Report) -> Table:
    """Return what is reached without audio and by a human rater, next to the conditions."""
    label, floor, scores = report.label, report.run.floor, report.summary.scores
    columns = ["predictor", *label.values(), *(f"{name} pooled" for name in label.values())]
    if floor is None:
        return Table("Floor and ceiling", columns, [])
    named: dict[str, Mapping[str, Score]] = {f"no audio: {name}": of for name, of in floor.scores.items()}
    if floor.reason:
        named["no audio"] = {}
    for condition, aggregates in scores.items():
        named[condition] = {d: Score(mean=a.mean, pooled=a.pooled) for d, a in aggregates.items()}
    named |= {f"{condition}, controlled for scenario": of for condition, of in floor.controlled.items()}
    if floor.ceiling:
        named["one human rater"] = floor.ceiling
    unknown = Score(mean=None, pooled=None)
    rows = []
    for name, by_dimension in named.items():
        cells = [by_dimension.get(dimension, unknown) for dimension in label]
        rows.append([name, *(format_score(s.mean) for s in cells), *(format_score(s.pooled) for s in cells)])
    if floor.ceiling:
        # A CCC is easier to judge as a share of what one person reaches on the same utterances.
        human = [floor.ceiling.get(dimension, unknown) for dimension in label]
        for condition, aggregates in scores.items():
            of = [aggregates[dimension] for dimension in label]
            means = [_share(a.mean, h.mean) for a, h in zip(of, human, strict=True)]
            pooled = [_share(a.pooled, h.pooled) for a, h in zip(of, human, strict=True)]
            rows.append([f"{condition} / one human rater", *means, *pooled])
    return Table("Floor and ceiling", columns, rows, _floor_note(floor))


def _share(score: float | None, human: float | None) -> str:
    """Return a ratio with two decimals; a dash if a human rater does not reach a positive CCC."""
    if score is None or human is None or human <= 0:
        return DASH
    return f"{score / human:.2f}"


def _floor_note(floor: FloorRecord) -> str:
    notes = ["Mean over folds; pooled over all out-of-fold predictions."]
    if floor.scores:
        notes.append(
            "No audio: predicts the training mean of the utterance's scenario (or of its scenario, gender and side) on "
            "the same folds; a model that does not beat it has not shown that it uses the audio."
        )
    if floor.controlled:
        notes.append(
            "Controlled for scenario: the training mean of the scenario is subtracted from prediction and truth."
        )
    if floor.ceiling:
        notes.append(
            "One human rater: each observer compared with the mean of the others. A model is compared with the mean of "
            "all observers, which is steadier, so this is a reference point and not an upper bound."
        )
    if floor.reason:
        notes.append(f"No floor: {floor.reason}.")
    if floor.ceiling_reason:
        notes.append(f"No ceiling: {floor.ceiling_reason}.")
    return " ".join(notes)


# --- run checks -------------------------------------------------------------------------------------------------------


def checks_table(report: Report) -> Table:
    """Return what was checked while the run trained and what the checks found; empty before the first result."""
    results = list(report.results.values())
    if not results:
        return Table("Run checks", [], [])
    done = {result.condition for result in results}
    conditions = [condition for condition in report.run.conditions if condition in done]
    splits = {report.run.split_digest, *(r.split_digest for r in results)}
    corpora = {report.run.corpus_digest, *(r.corpus_digest for r in results)}
    variant = report.config.corpus.labels
    rows = [[f"did {condition} train the right weights?", _trained(report, condition)] for condition in conditions]
    rows += [
        [f"does {condition} beat the floor?", _beats_floor(report, condition)] for condition in report.summary.scores
    ]
    rows += [
        ["collapsed predictions", _collapsed(report)],
        ["trained long enough?", _long_enough(results)],
        ["attempts after the first", _retries(report)],
        ["out of memory", _out_of_memory(report)],
        ["labels", f"{variant}: {LABELS[variant]}"],
        ["labels outside the scale", _outside_scale(report)],
        [
            "encoder weights",
            _same("weights", {f"{r.encoder}, SHA-256 {r.encoder_digest[:SHOWN_DIGITS]}" for r in results}),
        ],
        ["split", _same("split", {f"digest {digest[:SHOWN_DIGITS]}" for digest in splits})],
        ["corpus", _same("corpus", {f"digest {digest[:SHOWN_DIGITS]}" for digest in corpora})],
    ]
    return Table(
        "Run checks",
        ["check", "result"],
        rows,
        "Weight change: ||w - w0|| / ||w0||, checked after every epoch; a trial fails if a frozen group changes or a "
        "trained group does not. The numbers are not comparable with those of a run that has another split, corpus or "
        "label variant.",
    )


def _trained(report: Report, condition: str) -> str:
    results = [r for r in report.results.values() if r.condition == condition]
    encoder = [r.weight_change["encoder"] for r in results if "encoder" in r.weight_change]
    head = [r.weight_change["head"] for r in results if "head" in r.weight_change]
    # A trial that fails this check has no result, so all results have passed it.
    trials = f"in {len(results)} of {len(results)} trials"
    if encoder:
        found = f"encoder weights changed by {_percent(encoder)} by the last epoch {trials}"
    else:
        found = f"encoder frozen and unchanged after every epoch {trials}"
    return f"yes: {found}; head weights changed by {_percent(head)}"


def _percent(shares: Iterable[float]) -> str:
    """Return the range of shares, in percent."""
    values = sorted(shares)
    if not values:
        return "an unrecorded amount"
    low, high = f"{100 * values[0]:.2g}", f"{100 * values[-1]:.2g}"
    if low == high:
        return f"{low} %"
    return f"{low} to {high} %"


def _beats_floor(report: Report, condition: str) -> str:
    """Compare the mean CCC of each dimension with the best predictor without audio."""
    floors: list[dict[str, Score]] = []
    if report.run.floor is not None:
        floors = list(report.run.floor.scores.values())
    found = []
    for dimension, label in report.label.items():
        score = report.summary.scores[condition][dimension].mean
        known = [scores[dimension].mean for scores in floors if dimension in scores]
        best = max((value for value in known if value is not None), default=None)
        if score is not None and best is not None:
            answer = "yes" if score > best else "NO"
            found.append(f"{label} {answer} ({score:.4f}, no audio {best:.4f})")
    return "; ".join(found) or "there is no floor to compare with"


def _collapsed(report: Report) -> str:
    found = [f"{name}: {', '.join(r.collapsed)}" for name, r in report.results.items() if r.collapsed]
    if not found:
        return "none: every trial's test predictions vary"
    return f"CONSTANT predictions, which score a CCC of 0: {'; '.join(found)}"


def _long_enough(results: list[TrialResult]) -> str:
    last = sum(r.best_epoch == r.epochs_run for r in results)
    if not last:
        return "yes: in every trial, the best validation epoch came before the last epoch"
    return (
        f"perhaps not: in {last} of {len(results)} trials, the last epoch was the best on validation, so more epochs "
        "might score higher"
    )


def _retries(report: Report) -> str:
    found = []
    for name, state in report.run.trials.items():
        if state.attempts > 1:
            kinds = ", ".join(f"{kind} {count}" for kind, count in state.failures.items())
            found.append(f"{name}: {state.attempts - 1}" + f" ({kinds})" * bool(kinds))
    return ", ".join(found) or "none"


def _out_of_memory(report: Report) -> str:
    configured = {c: report.config.for_condition(c).train.batch_size for c in report.run.conditions}
    # Results of earlier versions do not record it and have 0.
    smaller = {n: r.batch_size for n, r in report.results.items() if 0 < r.batch_size < configured[r.condition]}
    if not smaller:
        return "never: every trial kept its batch_size"
    listed = ", ".join(f"{name}: {size}" for name, size in smaller.items())
    return f"batch_size was reduced, with the same effective batch size ({listed})"


def _outside_scale(report: Report) -> str:
    low, high = report.config.corpus.scale
    outside = max(r.labels_outside_scale for r in report.results.values())
    if not outside:
        return f"none outside {low:g} to {high:g}"
    return f"{outside} outside {low:g} to {high:g}; kept as they are"


def _same(what: str, found: set[str]) -> str:
    if len(found) == 1:
        return f"{found.pop()}, the same in all trials"
    return f"NOT THE SAME {what} in all trials: {'; '.join(sorted(found))}"


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
    results = [r for r in report.results.values() if r.condition == condition]
    # The memory of a process and the time on a CPU say nothing about a claim on a GPU.
    if any(not r.device.startswith("cuda") for r in results):
        return None
    if quantity == "memory_gb":
        return max(r.peak_memory_mib for r in results) * 2**20 / 1e9
    return fmean(minutes_per_epoch(r) for r in results)


def minutes_per_epoch(result: TrialResult) -> float:
    """Return the time of training and validation per epoch, in minutes."""
    return result.train_s / 60 / max(1, result.epochs_run)


def groups_table(report: Report) -> Table:
    """Return the CCC within subsets of the test data."""
    groups, label = report.summary.groups, report.label
    columns = ["subset", *(f"{condition} {name}" for condition in groups for name in label.values())]
    first = next(iter(groups.values()), {})
    rows = [[part, *(format_score(of[part][d]) for of in groups.values() for d in label)] for part in first]
    return Table(
        "Subsets of the test data",
        columns,
        rows,
        "Pooled CCC over the utterances of a subset, mean over seeds. A CCC depends on the spread of the ratings in "
        "its subset, so compare conditions within a subset, not subsets with each other. The CCC of a single speaker "
        "is based on few utterances.",
    )


def settings_table(report: Report) -> Table:
    """Return the configuration keys in which the conditions differ."""
    known = [c for c in report.run.conditions if c in report.config.conditions]
    flat = {condition: settings(report.config, condition) for condition in known}
    note = "All other settings are the same for all conditions."
    return Table("Settings that differ", ["key", *flat], differing(flat), note)


def settings(config: Config, condition: str) -> dict[str, object]:
    """Return the settings that a condition's numbers depend on, per key."""
    chosen = config.for_condition(condition)
    return flatten(chosen.numerics) | {"model.encoder": chosen.model.encoder, "model.revision": chosen.model.revision}


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
        "not. Collapsed: dimensions with constant test predictions. Peak memory: of the GPU, or of the process on a "
        "CPU.",
    )


def _result_cells(result: TrialResult) -> list[str]:
    encoder = "not trained"
    if changes := [value for group, value in result.weight_change.items() if "encoder" in group]:
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
        ("label variant", report.config.corpus.labels),
        ("protocol", report.run.protocol),
        ("corpus digest", report.run.corpus_digest),
        ("split digest", report.run.split_digest),
        ("encoder", ", ".join(sorted({f"{r.encoder} ({r.encoder_digest})" for r in results})) or DASH),
        ("precision", ", ".join(sorted({f"{r.precision} on {r.device}" for r in results})) or DASH),
        ("cvrunner", report.run.cvrunner_version),
    ]
