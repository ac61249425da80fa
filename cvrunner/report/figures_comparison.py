"""Figures of the outcome: folds side by side, differences with intervals, predictions, a dialogue, the floor."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cvrunner.records.results import Aggregate, Difference, ccc_label
from cvrunner.report.panels import INK, Look, legend_below, looks, row_of_panels, whole_numbers
from cvrunner.report.report import Report
from cvrunner.verdict.out_of_fold import Floats, OutOfFold

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# An SVG with a shape for each of thousands of points is slow to open; from here on they become one image in it.
RASTER_FROM_POINTS = 300
MAX_PANELS_IN_A_ROW = 4


def draw(report: Report) -> dict[str, tuple[Figure, str]]:
    """Figures with captions, by name; none while trials are missing."""
    data = report.predictions()
    if data is None:
        return {}
    figures = {"folds": folds(report)}
    if report.summary.differences:
        figures["differences"] = differences(report)
    if report.floor and (report.floor.scores or report.floor.ceiling):
        figures["floor"] = floor_and_ceiling(report)
    figures["predictions"] = predicted_against_true(report, data)
    figures["dialogue"] = dialogue_over_time(report, data)
    return figures


def folds(report: Report) -> tuple[Figure, str]:
    """Slopes: every fold's CCC in each condition, joined; the mean over folds on top."""
    scores = report.summary.scores
    figure, panels = row_of_panels(len(report.label), share_y=True)
    for axes, (dimension, label) in zip(panels, report.label.items(), strict=True):
        by_condition = {condition: by_dimension[dimension] for condition, by_dimension in scores.items()}
        _slopes(axes, by_condition, report.run.folds)
        axes.set_title(label)
        axes.margins(x=0.25)
    for axes, dimension in zip(panels, report.label, strict=True):
        last = list(scores.values())[-1][dimension].by_trial
        _name_folds(axes, len(scores) - 1, {fold: _fold_mean(last, fold) for fold in report.run.folds})
    panels[0].set_ylabel("test CCC")
    legend_below(figure, panels[0])
    seeds = f", mean over {len(report.run.seeds)} seeds" if len(report.run.seeds) > 1 else ""
    caption = f"Test CCC of each fold{seeds} in each condition; numbers are folds, the thick line is the mean."
    return figure, caption


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
    """The fold's number right of its last point, moved up where two would lie on each other."""
    low, high = axes.get_ylim()
    height = -np.inf
    for fold, value in sorted(values.items(), key=lambda item: item[1]):
        height = max(value, height + 0.04 * (high - low))
        if np.isfinite(height):
            axes.annotate(str(fold), (x, height), xytext=(9, -3), textcoords="offset points", fontsize=7)


def differences(report: Report) -> tuple[Figure, str]:
    """The paired difference of each dimension with its interval, the folds, and what could have been seen."""
    compared = report.summary.differences
    figure, (axes,) = row_of_panels(1, height_in=1.1 + 0.55 * len(report.label) * len(compared))
    names: list[str] = []
    for condition, by_dimension in compared.items():
        for dimension, difference in by_dimension.items():
            _draw_difference(axes, len(names), difference, looks(report.run.conditions)[condition])
            names.append(f"{ccc_label(dimension)}\n{condition} - {report.summary.baseline}")
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("difference of test CCC (right of 0: better than the baseline)")
    legend_below(figure, axes)
    return figure, (
        "Paired difference with its 95 % bootstrap interval over dialogues. The grey band holds true differences that "
        "this design finds with less than 80 % power."
    )


def _draw_difference(axes: Axes, y: int, difference: Difference, look: Look) -> None:
    """One row: each trial above, the interval and the mean on the line, the band behind."""
    each = [_number(value) for value in difference.by_trial.values()]
    axes.plot(each, [y + 0.22] * len(each), "|", color=INK, alpha=0.7, markersize=7, label="one fold and seed")
    if interval := difference.interval:
        rows, edge = [y - 0.35, y + 0.35], interval.detectable
        label = "too small to be seen reliably"
        axes.fill_betweenx(rows, -edge, edge, color=INK, alpha=0.09, linewidth=0, label=label)
        axes.plot([interval.low, interval.high], [y, y], color=look.color, linewidth=3, label="95 % interval")
    mean = [_number(difference.mean)]
    axes.plot(mean, [y], look.marker, color=look.color, markersize=8, label="mean over folds")


def floor_and_ceiling(report: Report) -> tuple[Figure, str]:
    """Mean CCC of the conditions beside predictions without audio and a human rater."""
    floor = report.floor
    assert floor is not None
    figure, panels = row_of_panels(len(report.label), height_in=2.6, share_y=True)
    look = looks(report.run.conditions)
    for axes, (dimension, label) in zip(panels, report.label.items(), strict=True):
        bars = [(f"no audio:\n{n}", s.get(dimension), INK, 0.35) for n, s in floor.scores.items()]
        bars += [(c, s[dimension], look[c].color, 1.0) for c, s in report.summary.scores.items()]  # type: ignore[misc]
        bars += [("one human rater", floor.ceiling.get(dimension), INK, 0.6)] if floor.ceiling else []
        for y, (_, score, color, alpha) in enumerate(bars):
            value = _number(score.mean if score else None)
            axes.barh(y, value, color=color, alpha=alpha)
            axes.annotate(
                f"{value:.3f}" if np.isfinite(value) else "undefined",
                (max(np.nan_to_num(value), 0), y),
                xytext=(3, -3),
                textcoords="offset points",
                fontsize=7,
            )
        axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
        axes.set(title=label, xlabel="test CCC, mean over folds")
        axes.margins(x=0.2)
        axes.grid(axis="y", visible=False)
    panels[0].invert_yaxis()
    return (
        figure,
        "What the same folds give without any audio, with each condition, and to a single human rater.",
    )


def predicted_against_true(report: Report, data: OutOfFold) -> tuple[Figure, str]:
    """All out-of-fold predictions of the first seed, one panel for each condition and dimension."""
    shown = [(d, k, c) for k, d in enumerate(report.run.dimensions) for c in data.predicted]
    columns = len(shown) if len(shown) <= MAX_PANELS_IN_A_ROW else len(data.predicted)
    figure, panels = row_of_panels(len(shown), share_y=True, height_in=2.8, columns=columns)
    low, high = report.config.corpus.scale
    points = np.stack([values[0] for values in data.predicted.values()])
    # All of them are shown: a linear output may leave the scale, and so may a label.
    bottom, top = min(low, points.min(), np.nanmin(data.truth)), max(high, points.max(), np.nanmax(data.truth))
    for i, (axes, (dimension, k, condition)) in enumerate(zip(panels, shown, strict=True)):
        _scatter(
            axes, data.truth[:, k], data.predicted[condition][0, :, k], looks(list(data.predicted))[condition].color
        )
        axes.plot([low, high], [low, high], color=INK, linewidth=1)
        axes.set(title=f"{dimension}\n{condition}", xlabel="true rating")
        axes.set_xlim(low - 0.2, high + 0.2)
        axes.set_ylim(bottom - 0.2, top + 0.2)
        if i % columns == 0:
            axes.set_ylabel(f"predicted rating (scale {low:g} to {high:g})")
    outside = int(((points < low) | (points > high)).sum())
    seed = f" (seed {report.run.seeds[0]})" if len(report.run.seeds) > 1 else ""
    return figure, (
        f"Predicted against true rating of every test utterance{seed}; on the line a prediction is right. "
        f"{outside} of {points.size} predictions lie outside the scale; they are scored as they are."
    )


def dialogue_over_time(report: Report, data: OutOfFold) -> tuple[Figure, str]:
    """The longest dialogue of the first fold: true ratings and each condition's predictions, by turn and as a path."""
    about = data.about[data.about["fold"] == report.run.folds[0]]
    name = str(about["dialogue"].value_counts(sort=False).idxmax())
    rows = about.index[about["dialogue"] == name].to_numpy()
    dimensions = report.run.dimensions
    plane = {"valence", "arousal"} <= set(dimensions)
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
    legend_below(figure, panels[0])
    return figure, (
        f"Dialogue {name}, the longest of fold {report.run.folds[0]}'s test set: true and predicted ratings by turn"
        f"{', and as a path through the plane of valence and arousal' if plane else ''}. Chosen by length, not by fit."
    )


def _paths(axes: Axes, data: OutOfFold, rows: npt.NDArray[np.int64], x: int | npt.NDArray[np.int64], y: int) -> None:
    """Truth and every condition of one dialogue: dimension `y` over turns `x`, or over dimension `x`."""
    series = {"true": data.truth} | {condition: values[0] for condition, values in data.predicted.items()}
    look = looks(list(data.predicted))
    for name, values in series.items():
        color, line = (look[name].color, look[name].line) if name in look else (INK, "-")
        across = values[rows, x] if isinstance(x, int) else x
        axes.plot(
            across, values[rows, y], color=color, linestyle=line, linewidth=1.2 if name in look else 1.8, label=name
        )
        if isinstance(x, int):
            axes.plot(across[:1], values[rows[:1], y], "o", color=color, markersize=5)


def _scatter(axes: Axes, x: Floats, y: Floats, color: str) -> None:
    alpha = float(np.clip(1000 / len(x), 0.12, 0.8))
    axes.plot(
        x,
        y,
        ".",
        color=color,
        markersize=3,
        alpha=alpha,
        markeredgewidth=0,
        rasterized=len(x) >= RASTER_FROM_POINTS,
    )


def _fold_mean(by_trial: dict[str, float | None], fold: int) -> float:
    return fmean(_number(value) for name, value in by_trial.items() if name.startswith(f"fold-{fold}/"))


def _number(value: float | None) -> float:
    """NaN, which is not drawn, for an undefined value."""
    return float("nan") if value is None else value
