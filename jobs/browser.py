"""MLflow's page, Ray's dashboard and report.html in a real browser, without a screen: for screenshots and tests.

Playwright drives the Chromium of the system; it brings none of its own here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cvrunner.records.results import RunRecord
from cvrunner.run.session import UI_ADDRESS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

START_LIMIT_S = 60
WAIT_LIMIT_MS = 30_000
ACTOR = "FoldActor"
# A test must not call home, and neither must a screenshot.
FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# By chart: the length of each curve. The lines that have no points belong to what the mouse shows.
CURVES = """() => [...document.querySelectorAll('.js-plotly-plot')].map(plot =>
    plot.data.filter(trace => trace.mode === 'lines+markers').map(trace => trace.x.length))"""


def chromium_path() -> str | None:
    """Where the system's Chromium is."""
    return shutil.which("chromium")


@contextlib.contextmanager
def browser(executable: str) -> Iterator[Browser]:
    """Chromium without a screen, with a profile of its own that is gone afterwards."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its sandbox needs rights that a container does not give, and it opens our own pages only.
        started = playwright.chromium.launch(executable_path=executable, args=list(FLAGS), chromium_sandbox=False)
        try:
            yield started
        finally:
            started.close()


@contextlib.contextmanager
def mlflow_page(store: str) -> Iterator[str]:
    """MLflow's page over a store, on a free port of this machine; gives its address. The store must be there."""
    address = f"http://127.0.0.1:{_free_port()}"
    arguments = ["--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--workers", "1"]
    command = [sys.executable, "-m", "mlflow", "ui", *arguments, "--backend-store-uri", store]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb+") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_until_healthy(process, address, Path(log.name))
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def links_at(run: RunRecord, address: str) -> dict[str, str]:
    """A run's addresses, where its store is served at another place than usual."""
    return {name: link.replace(UI_ADDRESS, address, 1) for name, link in run.links.items()}


def open_charts(page: Page, links: Mapping[str, str], search: str = "mean/validation") -> list[list[int]]:
    """The saved view with the charts that `search` finds, once they are drawn; by chart, the length of each curve."""
    page.goto(links["trials grouped by condition"])
    page.get_by_text("Group: ").first.wait_for(timeout=WAIT_LIMIT_MS)
    _close_assistant(page)
    page.get_by_placeholder("Search metric charts").fill(search)
    page.locator(".scatterlayer .trace path.js-line").first.wait_for(timeout=WAIT_LIMIT_MS)
    found: list[list[int]] = page.evaluate(CURVES)
    return found


def open_comparison(page: Page, links: Mapping[str, str]) -> str:
    """The page with the conditions side by side, once it is drawn; gives its text."""
    page.goto(links["conditions side by side"])
    page.get_by_text("Run details").wait_for(timeout=WAIT_LIMIT_MS)
    page.get_by_text("ccc_mean/avg").first.wait_for(timeout=WAIT_LIMIT_MS)
    _close_assistant(page)
    return page.inner_text("body")


def open_actors(page: Page, address: str) -> str:
    """The Actors page of Ray's dashboard with ours that are alive, once they are there; gives its text."""
    page.goto(f"{address}/#/actors")
    page.get_by_label("Class", exact=True).fill(ACTOR)
    page.get_by_label("State", exact=True).fill("ALIVE")
    page.get_by_role("option", name="ALIVE").click()
    page.locator("tbody").get_by_text(ACTOR).first.wait_for(timeout=WAIT_LIMIT_MS)
    return page.inner_text("body")


def open_actor(page: Page) -> str:
    """From there to the first actor: what it printed, and its tasks, which bear the trials' names; gives its text."""
    page.locator("tbody").get_by_role("link").first.click()
    page.get_by_text("STDOUT").click()
    page.get_by_text("/seed-").first.wait_for(timeout=WAIT_LIMIT_MS)
    page.get_by_text("Tasks History").click()
    page.get_by_text("RUNNING").first.wait_for(timeout=WAIT_LIMIT_MS)
    return page.inner_text("body")


def _close_assistant(page: Page) -> None:
    """MLflow's chat beside the page takes a quarter of its width; some versions have none."""
    button = page.locator('[data-component-id="mlflow.assistant.chat_panel.close"]')
    if button.count():
        button.click()
        button.wait_for(state="detached", timeout=WAIT_LIMIT_MS)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _wait_until_healthy(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Raises RuntimeError with what the server said where it does not answer in time."""
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
            return
        time.sleep(0.2)
    raise RuntimeError(f"`mlflow ui` did not answer at {address} within {START_LIMIT_S} s:\n{log.read_text()}")
