"""Calibration of trust: what was checked while the run trained, and what the checks found, in plain words."""

from __future__ import annotations

from collections.abc import Iterable

from cvrunner.records.results import TrialResult
from cvrunner.report.report import Report
from cvrunner.report.tables import Table

LABELS = {
    "header": "the rating printed beside each utterance, the mean of the observers",
    "observers": "the mean of the single observers' lines",
    "all_raters": "the mean of all raters, the speakers' ratings of themselves among them",
}
SHOWN_DIGITS = 12


def checks_table(report: Report) -> Table:
    """One row a question; empty before the first result."""
    results = list(report.results.values())
    if not results:
        return Table("Calibration of trust", [], [])
    rows = [[f"did {condition} train what it should?", _moved(report, condition)] for condition in _conditions(report)]
    rows += [[f"does {condition} beat the floor?", _floor(report, condition)] for condition in report.summary.scores]
    rows += [
        ["collapsed predictions", _collapsed(report)],
        ["long enough?", _length(results)],
        ["attempts beyond the first", _attempts(report)],
        ["out of memory", _memory(report)],
        ["labels", f"{report.config.corpus.labels}: {LABELS[report.config.corpus.labels]}"],
        ["labels outside the scale", _outside(report, results)],
        ["encoder weights", _same("weights", {f"{r.encoder}, SHA-256 {_short(r.encoder_digest)}" for r in results})],
        ["split", _same("split", {f"digest {_short(digest)}" for digest in _splits(report, results)})],
        ["corpus", _same("corpus", {f"digest {_short(digest)}" for digest in _corpora(report, results)})],
    ]
    return Table(
        "Calibration of trust",
        ["question", "what was found"],
        rows,
        "Movement: relative change of the weights, ||w - w0|| / ||w0||, looked at after every epoch; a trial fails "
        "where a frozen group has moved or a trained one has not. Numbers of runs with another split, corpus or label "
        "variant are not comparable with these.",
    )


def _conditions(report: Report) -> list[str]:
    done = {result.condition for result in report.results.values()}
    return [condition for condition in report.run.conditions if condition in done]


def _moved(report: Report, condition: str) -> str:
    results = [r for r in report.results.values() if r.condition == condition]
    trained = [r.weight_change["encoder"] for r in results if "encoder" in r.weight_change]
    head = f"head moved by {_percent(r.weight_change['head'] for r in results if 'head' in r.weight_change)}"
    where = f"in {len(results)} of {len(results)} trials"
    if not trained:
        return f"yes: encoder frozen and unchanged after every epoch {where}; {head}"
    return f"yes: encoder moved by {_percent(trained)} by the last epoch {where}; {head}"


def _percent(values: Iterable[float]) -> str:
    """The range of shares, in percent."""
    shares = sorted(values)
    if not shares:
        return "an unrecorded amount"
    low, high = f"{100 * shares[0]:.2g}", f"{100 * shares[-1]:.2g}"
    return f"{low} %" if low == high else f"{low} to {high} %"


def _floor(report: Report, condition: str) -> str:
    """By dimension: the mean CCC against the best predictor without audio."""
    floors = report.floor.scores.values() if report.floor else ()
    found = []
    for dimension, label in report.label.items():
        score = report.summary.scores[condition][dimension].mean
        known = [s[dimension].mean for s in floors if dimension in s]
        best = max((value for value in known if value is not None), default=None)
        if score is not None and best is not None:
            found.append(f"{label} {'yes' if score > best else 'NO'} ({score:.4f}, no audio {best:.4f})")
    return "; ".join(found) or "there is no floor to compare with"


def _collapsed(report: Report) -> str:
    collapsed = {name: r.collapsed for name, r in report.results.items() if r.collapsed}
    listed = "; ".join(f"{name}: {', '.join(dimensions)}" for name, dimensions in collapsed.items())
    return f"CONSTANT, which scores CCC 0: {listed}" if listed else "none: every trial's test predictions vary"


def _length(results: list[TrialResult]) -> str:
    last = sum(r.best_epoch == r.epochs_run for r in results)
    if not last:
        return "yes: validation was best before the last epoch in every trial"
    return (
        f"perhaps not: in {last} of {len(results)} trials validation was best in the last epoch, so more epochs might "
        "have given more"
    )


def _attempts(report: Report) -> str:
    again = [
        f"{name}: {state.attempts - 1}{_kinds(state.failures)}"
        for name, state in report.run.trials.items()
        if state.attempts > 1
    ]
    return ", ".join(again) or "none"


def _kinds(failures: dict[str, int]) -> str:
    listed = ", ".join(f"{kind} {count}" for kind, count in failures.items())
    return f" ({listed})" if listed else ""


def _memory(report: Report) -> str:
    wanted = {c: report.config.for_condition(c).train.batch_size for c in report.run.conditions}
    smaller = {n: r.batch_size for n, r in report.results.items() if 0 < r.batch_size < wanted[r.condition]}
    if not smaller:
        return "never: every trial kept its batch_size"
    listed = ", ".join(f"{name}: {size}" for name, size in smaller.items())
    return f"batch_size was halved, at the same effective batch, to ({listed})"


def _outside(report: Report, results: list[TrialResult]) -> str:
    low, high = report.config.corpus.scale
    outside = max(r.labels_outside_scale for r in results)
    return (
        f"{outside} outside {low:g} to {high:g}; kept as they are" if outside else f"none outside {low:g} to {high:g}"
    )


def _splits(report: Report, results: list[TrialResult]) -> set[str]:
    return {report.run.split_digest, *(r.split_digest for r in results)}


def _corpora(report: Report, results: list[TrialResult]) -> set[str]:
    return {report.run.corpus_digest, *(r.corpus_digest for r in results)}


def _same(what: str, found: set[str]) -> str:
    if len(found) == 1:
        return f"{found.pop()}, the same in all trials"
    return f"NOT THE SAME {what} in all trials: {'; '.join(sorted(found))}"


def _short(digest: str) -> str:
    return digest[:SHOWN_DIGITS]
