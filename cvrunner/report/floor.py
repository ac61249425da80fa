"""Tables of what is reached without audio, by human raters, and by a perfect model given the noise of the labels."""

from __future__ import annotations

from collections.abc import Mapping

from cvrunner.records.results import FloorRecord, Panel, RaterScore, Score
from cvrunner.report.report import Report
from cvrunner.text import DASH, Table, format_score
from cvrunner.verdict.ceiling import ATTAINABLE, ATTAINABLE_STRETCHED, SECOND_PANEL


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
    if floor.controlled_constant:
        named["a constant, controlled for scenario"] = floor.controlled_constant
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


def attainable_table(report: Report) -> Table:
    """Return `raters_table` with each condition's share of what is attainable; no rows without a panel of raters."""
    if report.run.floor is None or report.run.floor.panel is None:
        return Table("Raters", [], [])
    panel, label = report.run.floor.panel, report.label
    table, best = raters_table(panel, label), panel.scores[ATTAINABLE_STRETCHED]
    for condition, of in report.summary.scores.items():
        shares = [_share(of[d].mean, best[d].mean) for d in label]
        table.rows.append([f"{condition} / perfect model, stretched", *shares])
    return table


def raters_table(panel: Panel, label: Mapping[str, str]) -> Table:
    """Return what the noise of raters leaves for a model to reach, with intervals. `label`: heading by dimension."""
    names = {
        ATTAINABLE: "perfect model",
        ATTAINABLE_STRETCHED: "perfect model, stretched",
        SECOND_PANEL: f"second panel of {panel.raters:.1f} raters",
    }
    rows = []
    for kind, name in names.items():
        cells = [panel.scores[kind][dimension] for dimension in label]
        rows.append([name, *(format_score(cell.mean) for cell in cells)])
        if panel.interval_reason is None:
            rows.append(["  95 % interval over raters", *(_between(cell) for cell in cells)])
    rows.append(["label noise (standard error)", *(format_score(panel.label_noise.get(d)) for d in label)])
    notes = [
        "Mean CCC over folds with the mean rating, from its reliability R (one-way, ICC(1,k)): R for a second panel, "
        "2R/(1+R) for a perfect model, sqrt(R) if its predictions are stretched to the spread of the labels. Label "
        "noise is on the rating scale."
    ]
    if panel.interval_reason is None:
        notes.append("Intervals: jackknife over raters, for these utterances.")
    else:
        notes.append(f"No intervals: {panel.interval_reason}.")
    return Table("Raters", ["CCC with the labels", *label.values()], rows, " ".join(notes))


def _between(score: RaterScore) -> str:
    if score.low is None or score.high is None:
        return DASH
    return f"{score.low:.3f} to {score.high:.3f}"


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
            "the same folds; stretched: around the mean rating, by a factor fitted for CCC on the training sessions. A "
            "model that does not beat the stretched one has not shown that it uses the audio."
        )
    if floor.controlled:
        notes.append(
            "Controlled for scenario: prediction and truth of each test set minus their own scenario means. Whatever "
            "is constant within a scenario scores 0 by this definition."
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
