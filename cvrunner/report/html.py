"""report.html: one file that loads nothing from the network; for phone, wide screen and paper, light and dark."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from cvrunner.report.evidence import evidence_tables, facts
from cvrunner.report.figures import to_svg
from cvrunner.report.panels import INK
from cvrunner.report.report import Report
from cvrunner.report.tables import comparison_tables, evaluation_tables
from cvrunner.text import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "report.html.j2"
# The figure below the sentence, and those below a table; all others are in one section.
ANSWER = "differences"
PLACES = {
    "Test CCC by fold": ("folds",),
    "What each step buys": ("ladder",),
    "Floor and ceiling": ("floor",),
    "Trials": ("cost",),
}


def render_html(report: Report, figures: dict[str, tuple[Figure, str]]) -> str:
    """Return the page, with the figures of `figures.draw` inside."""
    # jinja2 is needed only here, and a finished run that is shown again makes no page.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = {name: (inline_svg(name, figure, caption), caption) for name, (figure, caption) in figures.items()}
    placed = {ANSWER, *(name for names in PLACES.values() for name in names)}
    return environment.get_template(TEMPLATE).render(
        run=report.run,
        summary=report.summary,
        decision=_decision(report),
        answer=[drawn[ANSWER]] if ANSWER in drawn else [],
        sections=[
            _section(table, drawn)
            for table in (*comparison_tables(report.run, report.summary), *evaluation_tables(report))
        ],
        figures=[figure for name, figure in drawn.items() if name not in placed],
        evidence=[_section(table, drawn) for table in evidence_tables(report)],
        facts=facts(report),
        # A link of another scheme, such as javascript:, could run code when it is clicked.
        links={name: link for name, link in report.run.links.items() if re.match(r"https?://", link)},
    )


def inline_svg(name: str, figure: Figure, caption: str) -> Markup:
    """Return a figure for use in a page: text in the page's colour, unique names, its caption for screen readers."""
    svg = to_svg(figure, transparent=True)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Several figures in one page must not share names, or one's clip paths would cut the other.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'url\(#|href="#', lambda match: f"{match[0]}{name}-", svg)
    svg = svg.replace(INK, "currentColor")
    # Without a fixed size, the figure takes the width of its column.
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1))  # noqa: S704 (our own)


def _section(table: Table, drawn: dict[str, tuple[Markup, str]]) -> dict[str, object]:
    names = PLACES.get(table.title, ())
    return {"table": table, "figures": [drawn[name] for name in names if name in drawn]}


def _decision(report: Report) -> str:
    """Return the CSS class that colours the verdict; neutral unless there is exactly one comparison."""
    decisions = list(report.summary.decisions.values())
    if report.summary.missing:
        return "incomplete"
    if len(decisions) != 1:
        return "neutral"
    # A difference below the margin is not coloured as a success or a failure.
    return {"better": "better", "worse": "worse"}.get(decisions[0], "neutral")
