"""Open MLflow, Ray's dashboard and report.html in a headless browser, for screenshots and tests.

Playwright drives the Chromium that is installed on the system; no browser is downloaded.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from cvrunner.records.results import RunRecord
from cvrunner.run.ui import served
from cvrunner.tracking.names import UI_ADDRESS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WAIT_LIMIT_MS = 30_000
ACTOR = "FoldActor"
# Neither a test nor a screenshot may contact outside servers.
FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Per chart, the number of points of each curve. Lines without markers belong to the hover display.
CURVES = """() => [...document.querySelectorAll('.js-plotly-plot')].map(plot =>
    plot.data.filter(trace => trace.mode === 'lines+markers').map(trace => trace.x.length))"""


def chromium_path() -> str | None:
    """Return the path of the system's Chromium, or None."""
    return shutil.which("chromium")


@contextlib.contextmanager
def browser(executable: str) -> Iterator[Browser]:
    """Start headless Chromium with a temporary profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's sandbox needs rights that a container does not grant, and only our own pages are opened.
        started = playwright.chromium.launch(executable_path=executable, args=list(FLAGS), chromium_sandbox=False)
        try:
            yield started
        finally:
            started.close()


@contextlib.contextmanager
def mlflow_page(store: str) -> Iterator[str]:
    """Serve MLflow for an existing store on a free port of this machine; yields the address."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    with served(store, port) as (_, address):
        yield address


def links_at(run: RunRecord, address: str) -> dict[str, str]:
    """Return the links of a run for a store that is served at `address` instead of the default one."""
    return {name: link.replace(UI_ADDRESS, address, 1) for name, link in run.links.items()}


def open_charts(page: Page, links: Mapping[str, str], search: str = "") -> list[list[int]]:
    """Open the saved view, with the charts that match `search`, and wait until they are drawn.

    Returns, per chart of curves, the number of points of each curve.
    """
    page.goto(links["scores and curves of all folds"])
    page.locator(".barlayer .trace .point").first.wait_for(timeout=WAIT_LIMIT_MS)
    _close_assistant(page)
    if search:
        page.get_by_placeholder("Search metric charts").fill(search)
        page.locator(".scatterlayer .trace path.js-line").first.wait_for(timeout=WAIT_LIMIT_MS)
    found: list[list[int]] = page.evaluate(CURVES)
    return found


def open_comparison(page: Page, links: Mapping[str, str]) -> str:
    """Open the page with the conditions side by side, wait until it is drawn, and return its text."""
    page.goto(links["conditions side by side"])
    page.get_by_text("Run details").wait_for(timeout=WAIT_LIMIT_MS)
    page.get_by_text("ccc_mean/avg").first.wait_for(timeout=WAIT_LIMIT_MS)
    _close_assistant(page)
    return page.inner_text("body")


def open_actors(page: Page, address: str) -> str:
    """Open the Actors page of Ray's dashboard, wait for live fold actors, and return the text of the page."""
    page.goto(f"{address}/#/actors")
    page.get_by_label("Class", exact=True).fill(ACTOR)
    page.get_by_label("State", exact=True).fill("ALIVE")
    page.get_by_role("option", name="ALIVE").click()
    page.locator("tbody").get_by_text(ACTOR).first.wait_for(timeout=WAIT_LIMIT_MS)
    return page.inner_text("body")


def open_actor(page: Page) -> str:
    """Go from the Actors page to the first actor, with its output and its tasks, and return the text of the page."""
    page.locator("tbody").get_by_role("link").first.click()
    page.get_by_text("STDOUT").click()
    page.get_by_text("/seed-").first.wait_for(timeout=WAIT_LIMIT_MS)
    page.get_by_text("Tasks History").click()
    page.get_by_text("RUNNING").first.wait_for(timeout=WAIT_LIMIT_MS)
    return page.inner_text("body")


def _close_assistant(page: Page) -> None:
    """Close MLflow's chat panel, which takes a quarter of the width; some versions have none."""
    button = page.locator('[data-component-id="mlflow.assistant.chat_panel.close"]')
    if button.count():
        button.click()
        button.wait_for(state="detached", timeout=WAIT_LIMIT_MS)
