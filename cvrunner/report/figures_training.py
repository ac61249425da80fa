"""Figures of the training: learning curves, what the layers weigh, time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from cvrunner.records.results import EpochRecord, TrialResult
from cvrunner.report.evidence import minutes_per_epoch
from cvrunner.report.panels import INK, legend_below, looks, row_of_panels, whole_numbers
from cvrunner.report.report import Report
from cvrunner.verdict.ccc import mean_if_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(report: Report) -> dict[str, tuple[Figure, str]]:
    """Figures with captions, by name; while trials are missing, the learning curves alone."""
    figures = {}
    if any(report.epochs.values()):
        figures["learning_curves"] = learning_curves(report)
    # Both show means over trials, and a mean over the trials that happen to be there would mislead.
    if not report.summary.missing:
        figures["layer_weights"] = layer_weights(report)
        figures["cost"] = cost(report)
    return figures


def learning_curves(report: Report) -> tuple[Figure, str]:
    """Validation CCC by epoch: thin, each trial; thick, the mean where all trials of a condition have the epoch."""
    figure, panels = row_of_panels(len(report.label), share_y=True)
    for axes, (dimension, label) in zip(panels, report.label.items(), strict=True):
        for condition, look in looks(report.run.conditions).items():
            trials = _trials(report, condition)
            for epochs in trials:
                x, y = _curve(epochs, dimension)
                axes.plot(x, y, color=look.color, alpha=0.3, linewidth=0.8)
            steps, means = _mean_curve(trials, dimension)
            axes.plot(steps, means, color=look.color, linestyle=look.line, linewidth=2.2, label=condition)
        axes.set(title=label, xlabel="epoch")
        whole_numbers(axes)
    panels[0].set_ylabel("validation CCC")
    legend_below(figure, panels[0])
    return (
        figure,
        "Validation CCC by epoch. Thin: one fold and seed; thick: the mean while all of them are training.",
    )


def layer_weights(report: Report) -> tuple[Figure, str]:
    """Softmax weights of the encoder's layers at the best epoch: mean over trials, and their range."""
    figure, panels = row_of_panels(len(report.run.dimensions), share_y=True, height_in=2.8)
    for axes, dimension in zip(panels, report.run.dimensions, strict=True):
        for condition, look in looks(report.run.conditions).items():
            weights = [r.layer_weights[dimension] for r in _results(report, condition) if dimension in r.layer_weights]
            if not weights or len({len(w) for w in weights}) > 1:
                continue
            layers, array = np.arange(len(weights[0])), np.array(weights)
            axes.fill_between(layers, array.min(0), array.max(0), color=look.color, alpha=0.15, linewidth=0)
            axes.plot(
                layers,
                array.mean(0),
                color=look.color,
                marker=look.marker,
                linestyle=look.line,
                label=condition,
            )
            axes.axhline(1 / len(layers), color=INK, linewidth=0.8, alpha=0.6)
        axes.set(title=dimension, xlabel="position among the mixed layers (0: the lowest)")
        whole_numbers(axes)
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    panels[0].set_ylabel("weight (sums to 1)")
    legend_below(figure, panels[0])
    return (
        figure,
        "Weights of the encoder's layers: mean over trials and their range. Thin line: equal weights.",
    )


def cost(report: Report) -> tuple[Figure, str]:
    """Minutes per epoch and peak memory of each trial, with the mean of each condition."""
    figure, panels = row_of_panels(2, height_in=0.9 + 0.5 * len(report.run.conditions), share_y=True)
    on_gpu = all(result.device.startswith("cuda") for result in report.results.values())
    of = "GPU" if on_gpu else "process"
    for y, (condition, look) in enumerate(looks(report.run.conditions).items()):
        results = _results(report, condition)
        minutes = [minutes_per_epoch(result) for result in results]
        memory = [result.peak_memory_mib / 1024 for result in results]
        for axes, values in zip(panels, (minutes, memory), strict=True):
            axes.barh(y, fmean(values) if values else 0, color=look.color, alpha=0.35, height=0.6)
            axes.plot(values, [y] * len(values), look.marker, color=look.color, markersize=5)
    panels[0].set_yticks(range(len(report.run.conditions)), report.run.conditions)
    panels[0].invert_yaxis()
    panels[0].set_xlabel("training and validation, minutes per epoch")
    panels[1].set_xlabel(f"peak memory of the {of}, GiB")
    for axes in panels:
        axes.grid(axis="y", visible=False)
        axes.set_xlim(left=0)
    return (
        figure,
        f"Time and memory of each trial (points) and their mean (bars), measured on {_devices(report)}.",
    )


def _devices(report: Report) -> str:
    return ", ".join(sorted({result.device for result in report.results.values()}))


def _trials(report: Report, condition: str) -> list[list[EpochRecord]]:
    return [report.epochs[name] for name, state in report.run.trials.items() if state.condition == condition]


def _results(report: Report, condition: str) -> list[TrialResult]:
    return [result for result in report.results.values() if result.condition == condition]


def _curve(epochs: list[EpochRecord], dimension: str) -> tuple[list[int], list[float]]:
    known = [(e.epoch, value) for e in epochs if (value := e.validation_ccc.get(dimension)) is not None]
    return [epoch for epoch, _ in known], [value for _, value in known]


def _mean_curve(trials: list[list[EpochRecord]], dimension: str) -> tuple[list[int], list[float]]:
    points = list(mean_by_epoch(trials, dimension))
    return [epoch for epoch, _ in points], [value for _, value in points]


def mean_by_epoch(trials: list[list[EpochRecord]], dimension: str) -> Iterator[tuple[int, float]]:
    """Epoch and mean validation CCC, for the epochs that every trial has."""
    scores = [{e.epoch: e.validation_ccc.get(dimension) for e in epochs} for epochs in trials]
    shared = set.intersection(*map(set, scores)) if scores else set()
    for epoch in sorted(shared):
        value = mean_if_all(by_epoch[epoch] for by_epoch in scores)
        if value is not None:
            yield epoch, value
