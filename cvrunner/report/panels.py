"""What the figures share: style, colours and marks of the conditions, rows of panels, a legend below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A colour that nothing else has, for text and axes: report.html replaces it by the page's, light or dark.
INK = "#1b2a3a"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))


@dataclass(frozen=True)
class Look:
    """How a condition is drawn in every figure."""

    color: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]


def looks(conditions: Sequence[str]) -> dict[str, Look]:
    """Return how each condition is drawn, in the run's order."""
    # Six looks suffice: more conditions than that are not readable in one figure anyway, and start over.
    return {name: Look(COLOURS[i % 6], MARKERS[i % 6], LINES[i % 6]) for i, name in enumerate(conditions)}


def row_of_panels(
    count: int, height_in: float = 3.0, width_in: float = 8.0, share_y: bool = False, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """Return a figure of the page's width with `count` panels side by side, or in rows of `columns` panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = columns or count
    rows = -(-count // columns)
    figure = Figure(figsize=(width_in, rows * height_in), layout="constrained")
    # Without pyplot, which keeps all figures in memory and may look for a display.
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharey=share_y).flat)


def legend_below(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """Put one legend for all panels under them, with each label once."""
    # Every fold draws its own line with the same label.
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(list(once.values()), list(once), loc="outside lower center", ncols=min(len(once), columns))


def whole_numbers(axes: Axes) -> None:
    """Show whole numbers only on the horizontal axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


@contextmanager
def style() -> Iterator[None]:
    """Draw with cvrunner's settings, whatever the user's matplotlib settings are; text stays text in an SVG."""
    # matplotlib takes half a second to import, here and below; commands that draw nothing must not pay for it.
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
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "axes.titlecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": INK,
    }
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", **settings}):
        yield
