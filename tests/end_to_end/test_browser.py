"""MLflow's page and report.html as a person sees them, in a real browser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cvrunner.records.run_directory import RunDirectory
from cvrunner.records.summary import Summary
from cvrunner.report.report import read_report
from cvrunner.report.write import write_report
from cvrunner.tracking.mirror import sync_run
from cvrunner.tracking.names import UI_ADDRESS
from jobs.browser import browser, chromium_path, links_at, mlflow_page, open_charts, open_comparison
from tests.runs import make_run

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]
BARS = """() => [...document.querySelectorAll('.js-plotly-plot')].map(plot => plot.data.filter(t => t.type === 'bar')
    .flatMap(t => [t.marker.color].flat())).filter(found => found.length)"""
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1440, "height": 900}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The system's Chromium. With CVRUNNER_BROWSER=required, as in CI, its absence fails instead of skipping."""
    executable = chromium_path()
    if executable is None:
        missing = "there is no `chromium` on the PATH (Debian: apt-get install chromium)"
        if os.environ.get("CVRUNNER_BROWSER") == "required":
            pytest.fail(f"CVRUNNER_BROWSER=required, but {missing}")
        pytest.skip(missing)
    with browser(executable) as started:
        yield started


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of made-up numbers with its report and an MLflow store next to it."""
    directory = make_run(tmp_path_factory.mktemp("results"))
    links = sync_run(directory, store(directory), UI_ADDRESS)
    directory.write_run(directory.read_run().model_copy(update={"links": links}))
    write_report(directory)
    return directory


def store(directory: RunDirectory) -> str:
    return f"sqlite:///{directory.path.parent}/mlflow.db"


def test_mlflow_shows_every_fold_in_the_colour_of_its_condition_and_both_parents_side_by_side(
    chromium: Any, directory: RunDirectory
) -> None:
    run = directory.read_run()
    with mlflow_page(store(directory)) as address:
        links = links_at(run, address)
        page = chromium.new_page(viewport=DESK)
        open_charts(page, links)
        # On the first screen: valence, arousal and their average, with a bar per fold in the colour of its condition.
        for dimension in ("valence", "arousal", "avg"):
            assert page.get_by_text(f"test/ccc_{dimension}", exact=True).is_visible()
        colours = page.evaluate(BARS)
        assert [sorted(chart) for chart in colours] == [sorted(["#0072b2"] * 5 + ["#d55e00"] * 5)] * 3
        page.close()
        page = chromium.new_page(viewport=DESK)
        # Each with a curve of six epochs for each condition.
        curves = open_charts(page, links, "val_mean")
        assert [chart for chart in curves if chart] == [[6, 6]] * 3
        text = open_comparison(page, links)
        page.close()
    assert "Comparing 2 Runs" in text
    # The metric that the page selects when it opens.
    assert text.index("val_mean/ccc_avg") < text.index("Run details")
    for condition in run.conditions:
        assert f"{condition} {run.run}" in text
    scores = read_report(directory).summary.scores
    assert all(f"{by_dimension['avg'].mean:.3f}" in text for by_dimension in scores.values())
    assert "model.freeze_speech_encoder\tTrue\tFalse" in text


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_shows_the_sentence_and_the_figures_and_asks_for_nothing(
    chromium: Any, directory: RunDirectory, size: dict[str, int], scheme: str
) -> None:
    summary = Summary.from_json(directory.summary_file.read_bytes(), "summary.json")
    asked: list[str] = []
    said: list[str] = []
    page = chromium.new_page(viewport=size, color_scheme=scheme)
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(directory.report.as_uri())
    assert page.inner_text("h1") == summary.verdict
    figures = page.locator("figure svg")
    assert figures.count() == len(list(Path(directory.figures).glob("*.svg")))
    for figure in figures.all():
        box = figure.bounding_box()
        assert box["width"] > 300
        assert box["height"] > 100
    # Wide tables and figures scroll by themselves; the page does not.
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert asked == [directory.report.as_uri()]
    assert said == []
    page.close()
