"""The figures of a run: drawn from its files, saved as PNG and SVG, safe for colour-blind eyes and for print.

Conditions differ by colour (Okabe and Ito), marker and line style, so that no figure leans on colour alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cvrunner.files import write_atomically
from cvrunner.records.run_directory import RunDirectory
from cvrunner.report import figures_comparison, figures_training, panels
from cvrunner.report.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DPI = 150


def draw(report: Report) -> dict[str, tuple[Figure, str]]:
    """Figures by name, in the order of the report, each with a caption; what cannot be drawn yet is left out."""
    with style():
        figures = figures_comparison.draw(report) | figures_training.draw(report)
        for figure, _ in figures.values():
            # Laid out once, not each time that it is saved.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
    return figures


def save_figures(directory: RunDirectory, figures: dict[str, tuple[Figure, str]]) -> None:
    """Each as `figures/<name>.png` and `figures/<name>.svg`."""
    for name, (figure, _) in figures.items():
        write_atomically(directory.figures / f"{name}.png", to_png(figure))
        write_atomically(directory.figures / f"{name}.svg", to_svg(figure))


def to_png(figure: Figure) -> bytes:
    """On white."""
    file = io.BytesIO()
    with style():
        figure.savefig(file, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def to_svg(figure: Figure, transparent: bool = False) -> str:
    """The same text for the same figure: no date in it, and no random names."""
    file = io.StringIO()
    with style():
        figure.savefig(file, format="svg", transparent=transparent, metadata={"Date": None, "Creator": None})
    return file.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """Text stays text in an SVG, lines are light, and the user's own matplotlib settings do not matter."""
    import matplotlib

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "cvrunner",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "text.color": panels.INK,
        "axes.labelcolor": panels.INK,
        "axes.edgecolor": panels.INK,
        "axes.titlecolor": panels.INK,
        "xtick.color": panels.INK,
        "ytick.color": panels.INK,
        "grid.color": panels.INK,
    }
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", **settings}):
        yield
