"""Figures of the outcome: folds side by side, differences with intervals, predictions, a dialogue, the floor."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cvrunner.records.results import FloorRecord, Score, ccc_label
from cvrunner.records.summary import Aggregate, Difference
from cvrunner.report.panels import INK, Look, legend_below, looks, row_of_panels, whole_numbers
from cvrunner.report.report import Report
from cvrunner.text import DASH
from cvrunner.verdict.ceiling import ATTAINABLE_STRETCHED
from cvrunner.verdict.predictions import OutOfFold

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# An SVG with a shape for each of thousands of points is slow to open; from this many on, they are drawn as one image.
RASTER_FROM_POINTS = 300
MAX_PANELS_IN_A_ROW = 4


def draw(report: Report) -> dict[str, tuple[Figure, str]]:
    """Return figures with captions, by name; none while trials are missing."""
    data = report.out_of_fold
    if data is None:
        return {}
    figures = {"folds": folds(report)}
    if report.summary.differences:
        figures["differences"] = differences(report)
    if report.summary.is_ladder:
        figures["ladder"] = ladder(report)
    floor = report.run.floor
    if floor and (floor.scores or floor.ceiling):
        figures["floor"] = floor_and_ceiling(report, floor)
    figures["predictions"] = predicted_against_true(report, data)
    figures["dialogue"] = dialogue_over_time(report, data)
    return figures


def folds(report: Report) -> tuple[Figure, str]:
    """Draw slopes: every fold's CCC in each condition, joined by lines, and the mean over folds."""
    scores, folds = report.summary.scores, report.run.folds
    figure, panels = row_of_panels(len(report.label), share_y=True)
    for axes, (dimension, label) in zip(panels, report.label.items(), strict=True):
        by_condition = {condition: by_dimension[dimension] for condition, by_dimension in scores.items()}
        _slopes(axes, by_condition, folds)
        axes.set_title(label)
        axes.margins(x=0.25)
    # The panels share their vertical axis, whose limits are known only when all of them are drawn.
    for axes, dimension in zip(panels, report.label, strict=True):
        last = list(scores.values())[-1][dimension].by_trial
        _name_folds(axes, len(scores) - 1, {fold: _fold_mean(last, fold) for fold in folds})
    panels[0].set_ylabel("test CCC")
    legend_below(figure, panels[0])
    seeds = ""
    if len(report.run.seeds) > 1:
        seeds = f" (mean over {len(report.run.seeds)} seeds)"
    return figure, f"Test CCC of each fold in each condition{seeds}. Numbers: folds; thick line: mean over folds."


def _slopes(axes: Axes, by_condition: dict[str, Aggregate], folds: list[int]) -> None:
    conditions = list(by_condition)
    for fold in folds:
        values = [_fold_mean(aggregate.by_trial, fold) for aggregate in by_condition.values()]
        axes.plot(conditions, values, color=INK, alpha=0.45, linewidth=1, marker=".", label="one fold")
    means = [_number(aggregate.mean) for aggregate in by_condition.values()]
    axes.plot(conditions, means, color=INK, linewidth=2.5, label="mean over folds", zorder=3)
    for (condition, look), value in zip(looks(conditions).items(), means, strict=True):
        axes.plot([condition], [value], look.marker, color=look.color, markersize=9, zorder=4)


def _name_folds(axes: Axes, x: float, values: dict[int, float]) -> None:
    """Write each fold's number to the right of its last point, moved up if two numbers would overlap."""
    low, high = axes.get_ylim()
    height = -np.inf
    for fold, value in sorted(values.items(), key=lambda item: item[1]):
        height = max(value, height + 0.04 * (high - low))
        # An undefined fold has no point to write its number next to.
        if np.isfinite(height):
            axes.annotate(str(fold), (x, height), xytext=(9, -3), textcoords="offset points", fontsize=7)


def differences(report: Report) -> tuple[Figure, str]:
    """Draw each paired difference with both intervals, its trials, and the margin of practical equality."""
    compared, margin = report.summary.differences, report.summary.margin
    # Narrower than the other figures: it must be legible on a phone.
    figure, (axes,) = row_of_panels(1, height_in=1.5 + 0.6 * len(report.label) * len(compared), width_in=5.6)
    names: list[str] = []
    unit = report.summary.cluster
    axes.axvspan(-margin, margin, color=INK, alpha=0.09, linewidth=0, label=f"within the margin of ±{margin:g}")
    for condition, by_dimension in compared.items():
        # The primary outcome first: it decides.
        for dimension in sorted(by_dimension, key=lambda outcome: outcome != report.summary.primary):
            look = looks(report.run.conditions)[condition]
            _draw_difference(axes, len(names), by_dimension[dimension], look, unit)
            primary = " (primary)" * (dimension == report.summary.primary)
            names.append(f"{ccc_label(dimension)}{primary}\n{condition} - {report.summary.baseline}")
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("difference in test CCC (right of 0: better than the baseline)")
    legend_below(figure, axes, columns=2)
    return figure, (
        f"Paired difference with its two 95 % intervals: on this corpus (other test {unit}s, another training) and "
        "for new speakers (corrected t over folds). Grey band: the margin of practical equality."
    )


def _draw_difference(axes: Axes, y: int, difference: Difference, look: Look, unit: str) -> None:
    """Draw one row: each trial above, level 1 and the mean on the line, level 2 below."""
    each = [_number(value) for value in difference.by_trial.values()]
    axes.plot(each, [y - 0.25] * len(each), "|", color=INK, alpha=0.7, markersize=7, label="one fold and seed")
    if level := difference.on_corpus:
        ends = [level.interval.low, level.interval.high]
        axes.plot(ends, [y, y], color=look.color, linewidth=3.5, label="95 %, on this corpus")
    elif trained := difference.as_trained:
        ends, label = [trained.low, trained.high], f"95 %, test {unit}s only (models as trained)"
        axes.plot(ends, [y, y], color=look.color, linewidth=1.5, linestyle=":", label=label)
    if speakers := difference.new_speakers:
        ends = [speakers.interval.low, speakers.interval.high]
        axes.plot(ends, [y + 0.25] * 2, color=look.color, linewidth=1.2, alpha=0.8, label="95 %, for new speakers")
    mean = [_number(difference.mean)]
    axes.plot(mean, [y], look.marker, color=look.color, markersize=8, label="mean over folds and seeds")


def ladder(report: Report) -> tuple[Figure, str]:
    """Draw the CCC of each condition against what it trains and against the hours that this takes."""
    summary, primary = report.summary, report.summary.primary
    baseline = _number(summary.scores[summary.baseline][primary].mean)
    figure, panels = row_of_panels(2, share_y=True)
    for condition, look in looks(report.run.conditions).items():
        cost, value = summary.costs[condition], _number(summary.scores[condition][primary].mean)
        difference = summary.differences.get(condition, {}).get(primary)
        for axes, place in zip(panels, (cost.parameters, cost.hours), strict=True):
            axes.plot([place], [value], look.marker, color=look.color, markersize=8, label=condition)
            if difference and (level := difference.on_corpus):
                ends = [baseline + level.interval.low, baseline + level.interval.high]
                axes.plot([place, place], ends, color=look.color, linewidth=2, alpha=0.7)
    for axes, what in zip(panels, ("trained parameters", "hours, all folds and seeds"), strict=True):
        axes.axhline(baseline, color=INK, linewidth=0.8, alpha=0.6)
        axes.set_xlabel(what)
    panels[0].set_xscale("log")
    panels[1].set_xlim(left=0)
    panels[0].set_ylabel(f"test {ccc_label(primary)}")
    legend_below(figure, panels[0])
    return figure, (
        f"What each step buys: mean test {ccc_label(primary)} against trained parameters and measured hours. Bars: "
        f"95 % interval, on this corpus, of the difference from {summary.baseline} (thin line)."
    )


def floor_and_ceiling(report: Report, floor: FloorRecord) -> tuple[Figure, str]:
    """Draw the mean CCC of the conditions next to predictions without audio, one human rater and a perfect model."""
    figure, panels = row_of_panels(len(report.label), height_in=2.6, share_y=True)
    look = looks(report.run.conditions)
    for axes, (dimension, label) in zip(panels, report.label.items(), strict=True):
        bars = [(f"no audio:\n{name}", _mean(of, dimension), INK, 0.35) for name, of in floor.scores.items()]
        bars += [(c, _number(of[dimension].mean), look[c].color, 1.0) for c, of in report.summary.scores.items()]
        if floor.ceiling:
            bars.append(("one human rater", _mean(floor.ceiling, dimension), INK, 0.6))
        if floor.panel:
            best = floor.panel.scores[ATTAINABLE_STRETCHED][dimension]
            bars.append(("perfect model,\nstretched", _number(best.mean), INK, 0.6))
            if best.low is not None and best.high is not None:
                axes.plot([best.low, best.high], [len(bars) - 1] * 2, color=INK, linewidth=2)
        for y, (_, value, color, alpha) in enumerate(bars):
            axes.barh(y, value, color=color, alpha=alpha)
            shown = f"{value:.4f}" if np.isfinite(value) else DASH
            place = (max(np.nan_to_num(value), 0), y)
            axes.annotate(shown, place, xytext=(3, -3), textcoords="offset points", fontsize=7)
        axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
        axes.set(title=label, xlabel="test CCC, mean over folds")
        axes.margins(x=0.2)
        axes.grid(axis="y", visible=False)
    panels[0].invert_yaxis()
    return figure, (
        "Mean CCC on the same folds: without any audio, of each condition, of a single human rater, and of a perfect "
        "model given the noise of the labels (line: 95 % interval over raters)."
    )


def _mean(scores: Mapping[str, Score], dimension: str) -> float:
    if dimension not in scores:
        return float("nan")
    return _number(scores[dimension].mean)


def predicted_against_true(report: Report, data: OutOfFold) -> tuple[Figure, str]:
    """Draw all out-of-fold predictions of the first seed, one panel per condition and dimension."""
    # With all seeds, an utterance would have several points in one panel.
    shown = [(d, k, c) for k, d in enumerate(report.run.dimensions) for c in data.predicted]
    columns = len(shown)
    if columns > MAX_PANELS_IN_A_ROW:
        columns = len(data.predicted)
    figure, panels = row_of_panels(len(shown), share_y=True, height_in=2.8, columns=columns)
    low, high = report.config.corpus.scale
    points = np.stack([values[0] for values in data.predicted.values()])
    # All points are shown: a linear output may be outside the scale, and so may a label.
    bottom, top = min(low, points.min(), np.nanmin(data.truth)), max(high, points.max(), np.nanmax(data.truth))
    look = looks(list(data.predicted))
    alpha = float(np.clip(1000 / len(data.truth), 0.12, 0.8))
    for i, (axes, (dimension, k, condition)) in enumerate(zip(panels, shown, strict=True)):
        axes.plot(
            data.truth[:, k],
            data.predicted[condition][0, :, k],
            ".",
            color=look[condition].color,
            markersize=3,
            alpha=alpha,
            markeredgewidth=0,
            rasterized=len(data.truth) >= RASTER_FROM_POINTS,
        )
        axes.plot([low, high], [low, high], color=INK, linewidth=1)
        axes.set(title=f"{dimension}\n{condition}", xlabel="true rating")
        axes.set_xlim(low - 0.2, high + 0.2)
        axes.set_ylim(bottom - 0.2, top + 0.2)
        if i % columns == 0:
            axes.set_ylabel(f"predicted rating (scale {low:g} to {high:g})")
    outside = int(((points < low) | (points > high)).sum())
    seed = ""
    if len(report.run.seeds) > 1:
        seed = f" (seed {report.run.seeds[0]})"
    return figure, (
        f"Predicted and true rating of every test utterance{seed}; predictions on the line are exact. "
        f"{outside} of {points.size} predictions are outside the scale; they are scored as they are."
    )


def dialogue_over_time(report: Report, data: OutOfFold) -> tuple[Figure, str]:
    """Draw the longest dialogue of the first fold: true and predicted ratings, by turn and as a path."""
    # One dialogue is an illustration; the longest one is a choice that no result can influence.
    about = data.about[data.about["fold"] == report.run.folds[0]]
    name = str(about["dialogue"].value_counts(sort=False).idxmax())
    rows = about.index[about["dialogue"] == name].to_numpy()
    dimensions = report.run.dimensions
    plane, path = {"valence", "arousal"} <= set(dimensions), ""
    figure, panels = row_of_panels(len(dimensions) + plane, height_in=2.8)
    turns = np.arange(1, len(rows) + 1)
    for k, (axes, dimension) in enumerate(zip(panels, dimensions, strict=False)):
        _paths(axes, data, rows, turns, k)
        axes.set(title=dimension, xlabel="turn", ylabel="rating")
        axes.sharey(panels[0])
        whole_numbers(axes)
    if plane:
        _paths(panels[-1], data, rows, dimensions.index("valence"), dimensions.index("arousal"))
        panels[-1].set(title="plane (dot: first turn)", xlabel="valence", ylabel="arousal")
        path = ", and as a path through the plane of valence and arousal"
    legend_below(figure, panels[0])
    return figure, (
        f"Dialogue {name}, the longest of fold {report.run.folds[0]}'s test set: true and predicted ratings by turn"
        f"{path}. Chosen by length, not by fit."
    )


def _paths(axes: Axes, data: OutOfFold, rows: npt.NDArray[np.int64], x: int | npt.NDArray[np.int64], y: int) -> None:
    """Draw truth and every condition of one dialogue: dimension `y` over turns `x`, or over dimension `x`."""
    truth = Look(INK, "", "-")
    series = {"true": (data.truth, truth, 1.8)}
    for condition, look in looks(list(data.predicted)).items():
        series[condition] = (data.predicted[condition][0], look, 1.2)
    for name, (values, look, width) in series.items():
        style: Any = {"color": look.color, "linestyle": look.line, "linewidth": width, "label": name}
        if not isinstance(x, int):
            axes.plot(x, values[rows, y], **style)
            continue
        axes.plot(values[rows, x], values[rows, y], **style)
        axes.plot(values[rows[:1], x], values[rows[:1], y], "o", color=look.color, markersize=5)


def _fold_mean(by_trial: dict[str, float | None], fold: int) -> float:
    return fmean(_number(value) for name, value in by_trial.items() if name.startswith(f"fold-{fold}/"))


def _number(value: float | None) -> float:
    """Return NaN, which is not drawn, for an undefined value."""
    if value is None:
        return float("nan")
    return value
