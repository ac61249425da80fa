"""The figures of a run, as PNG and SVG: all of them, and those of the training.

Conditions differ by colour (Okabe and Ito), marker and line style, so that no figure depends on colour alone.
"""

from __future__ import annotations

import io
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from cvrunner.files import write_atomically
from cvrunner.records.results import EpochRecord
from cvrunner.records.run_directory import RunDirectory
from cvrunner.report import figures_comparison
from cvrunner.report.evidence import minutes_per_epoch
from cvrunner.report.panels import INK, legend_below, looks, row_of_panels, style, whole_numbers
from cvrunner.report.report import Report
from cvrunner.verdict.ccc import mean_if_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DPI = 150


def draw(report: Report) -> dict[str, tuple[Figure, str]]:
    """Return all figures with captions, by name, in the order of the report; incomplete ones are left out."""
    with style():
        figures = figures_comparison.draw(report)
        if any(report.epochs.values()):
            figures["learning_curves"] = learning_curves(report)
        # Both show means over trials, which would mislead while trials are missing.
        if not report.summary.missing:
            figures["layer_weights"] = layer_weights(report)
            figures["cost"] = cost(report)
        for figure, _ in figures.values():
            # The layout is computed once, instead of each time that the figure is saved. None removes its engine;
            # "none" would put a placeholder there, with which each saving draws the figure twice.
            figure.draw_without_rendering()
            figure.set_layout_engine(None)
    return figures


def save_figures(directory: RunDirectory, figures: dict[str, tuple[Figure, str]]) -> None:
    """Save each figure as `figures/<name>.png`, on white, and `figures/<name>.svg`."""
    for name, (figure, _) in figures.items():
        png = io.BytesIO()
        with style():
            figure.savefig(png, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
        write_atomically(directory.figures / f"{name}.png", png.getvalue())
        write_atomically(directory.figures / f"{name}.svg", to_svg(figure))


def to_svg(figure: Figure, transparent: bool = False) -> str:
    """Return an SVG, always the same text for the same figure: without date and random names."""
    file = io.StringIO()
    with style():
        figure.savefig(file, format="svg", transparent=transparent, metadata={"Date": None, "Creator": None})
    return file.getvalue()


def learning_curves(report: Report) -> tuple[Figure, str]:
    """Draw validation CCC by epoch: thin, each trial; thick, the mean over the epochs that all trials have."""
    figure, panels = row_of_panels(len(report.label), share_y=True)
    for axes, (dimension, label) in zip(panels, report.label.items(), strict=True):
        for condition, look in looks(report.run.conditions).items():
            trials = [report.epochs[name] for name, t in report.run.trials.items() if t.condition == condition]
            for epochs in trials:
                curve = {e.epoch: value for e in epochs if (value := e.validation_ccc.get(dimension)) is not None}
                axes.plot(list(curve), list(curve.values()), color=look.color, alpha=0.3, linewidth=0.8)
            means = mean_by_epoch(trials, dimension)
            steps, values = list(means), list(means.values())
            axes.plot(steps, values, color=look.color, linestyle=look.line, linewidth=2.2, label=condition)
        axes.set(title=label, xlabel="epoch")
        whole_numbers(axes)
    panels[0].set_ylabel("validation CCC")
    legend_below(figure, panels[0])
    return (
        figure,
        "Validation CCC by epoch. Thin: one fold and seed; thick: mean over the epochs that all of them have.",
    )


def layer_weights(report: Report) -> tuple[Figure, str]:
    """Draw the softmax weights of the encoder's layers at the best epoch: mean over trials, and their range."""
    figure, panels = row_of_panels(len(report.run.dimensions), share_y=True, height_in=2.8)
    for axes, dimension in zip(panels, report.run.dimensions, strict=True):
        for condition, look in looks(report.run.conditions).items():
            weights = [
                r.layer_weights[dimension]
                for r in report.results_of(condition).values()
                if dimension in r.layer_weights
            ]
            # Trials that mix different numbers of layers have no common mean.
            if len({len(w) for w in weights}) != 1:
                continue
            layers, array = np.arange(len(weights[0])), np.array(weights)
            axes.fill_between(layers, array.min(0), array.max(0), color=look.color, alpha=0.15, linewidth=0)
            axes.plot(layers, array.mean(0), color=look.color, marker=look.marker, linestyle=look.line, label=condition)
            axes.axhline(1 / len(layers), color=INK, linewidth=0.8, alpha=0.6)
        axes.set(title=dimension, xlabel="position among the mixed layers (0: the lowest)")
        whole_numbers(axes)
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    panels[0].set_ylabel("weight (sums to 1)")
    legend_below(figure, panels[0])
    return figure, "Weights of the encoder's layers: mean and range over trials. Thin line: equal weights."


def cost(report: Report) -> tuple[Figure, str]:
    """Draw minutes per epoch and peak memory of each trial, with the mean of each condition."""
    figure, panels = row_of_panels(2, height_in=0.9 + 0.5 * len(report.run.conditions), share_y=True)
    devices, measured = {result.device for result in report.results.values()}, "process"
    if "cpu" not in devices:
        measured = "GPU"
    for y, (condition, look) in enumerate(looks(report.run.conditions).items()):
        results = report.results_of(condition).values()
        minutes = [minutes_per_epoch(result) for result in results]
        memory = [result.peak_memory_mib / 1024 for result in results]
        for axes, values in zip(panels, (minutes, memory), strict=True):
            axes.barh(y, fmean(values), color=look.color, alpha=0.35, height=0.6)
            axes.plot(values, [y] * len(values), look.marker, color=look.color, markersize=5)
    panels[0].set_yticks(range(len(report.run.conditions)), report.run.conditions)
    panels[0].invert_yaxis()
    panels[0].set_xlabel("training and validation, minutes per epoch")
    panels[1].set_xlabel(f"peak memory of the {measured}, GiB")
    for axes in panels:
        axes.grid(axis="y", visible=False)
        axes.set_xlim(left=0)
    return figure, f"Time and memory of each trial (points) and their mean (bars), on {', '.join(sorted(devices))}."


def mean_by_epoch(trials: list[list[EpochRecord]], dimension: str) -> dict[int, float]:
    """Return the mean validation CCC per epoch, for the epochs that every trial has."""
    scores = [{e.epoch: e.validation_ccc.get(dimension) for e in epochs} for epochs in trials]
    means = {}
    # The mean over the trials that are still training would jump when one of them stops early.
    for epoch in sorted(set.intersection(*map(set, scores))):
        value = mean_if_all(by_epoch[epoch] for by_epoch in scores)
        if value is not None:
            means[epoch] = value
    return means
