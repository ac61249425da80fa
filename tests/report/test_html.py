"""report.html stands alone; figures are whole and repeatable."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from cvrunner.report.figures import draw, save_figures, to_svg
from cvrunner.report.html import render_html
from cvrunner.report.report import read_report
from tests.runs import make_run

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects addresses that would be loaded, ids, and whether every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name in {"src", "href", "xlink:href", "data"} and tag != "a":
                self.loads.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return read_report(make_run(tmp_path_factory.mktemp("results")), links={"view": "http://127.0.0.1:5000/#/x"})


@pytest.fixture(scope="module")
def page(report):
    return render_html(report, draw(report))


def test_the_page_is_whole_and_loads_nothing(page):
    parser = Page()
    parser.feed(page)
    assert parser.open == []
    assert [load for load in parser.loads if not load.startswith(("#", "data:"))] == []
    assert not re.search(r"@import|url\((?!#)", page)
    assert "<script" not in page


def test_ids_are_unique_and_references_point_at_them(page):
    parser = Page()
    parser.feed(page)
    assert len(parser.ids) == len(set(parser.ids))
    assert set(re.findall(r'(?:url\(|href=")#([\w.-]+)', page)) <= set(parser.ids)


def test_the_page_links_to_mlflow_but_not_to_other_schemes(report, page):
    assert '<a href="http://127.0.0.1:5000/#/x">view</a>' in page
    sly = replace(report, run=report.run.model_copy(update={"links": {"sly": "javascript:alert(1)"}}))
    assert "javascript:" not in render_html(sly, {})


def test_text_of_a_run_cannot_become_markup(report):
    sly = report.summary.model_copy(update={"verdict": "<script>alert(1)</script>"})
    text = render_html(replace(report, summary=sly), {})
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_figures_are_saved_as_png_and_svg(report):
    figures = draw(report)
    assert set(figures) == {
        "folds", "differences", "predictions", "dialogue", "learning_curves", "layer_weights", "cost",
    }  # fmt: skip
    save_figures(report.directory, figures)
    files = {file.name for file in report.directory.figures.iterdir()}
    assert files == {f"{name}.{kind}" for name in figures for kind in ("png", "svg")}


def test_every_prediction_is_in_sight_and_those_off_the_scale_are_counted(tmp_path):
    report = read_report(make_run(tmp_path, conditions=("frozen", "unfrozen", "top"), gain=0.1))
    figure, caption = draw(report)["predictions"]
    predicted = np.stack([values[0] for values in report.out_of_fold.predicted.values()])
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert low < predicted.min()
        assert predicted.max() < high
    assert f"{((predicted < 1) | (predicted > 5)).sum()} of {predicted.size} predictions are outside" in caption
    # Six panels side by side would be too narrow to read: a row for each dimension.
    assert {axes.get_subplotspec().get_gridspec().nrows for axes in figure.axes} == {2}


def test_the_dialogue_is_shown_by_turn_and_in_the_plane(report):
    turns, arousal, plane = draw(report)["dialogue"][0].axes
    assert turns.get_ylim() == arousal.get_ylim()
    assert (plane.get_xlabel(), plane.get_ylabel()) == ("valence", "arousal")


def test_columns_of_words_stand_left_and_numbers_right(page):
    assert '<td data-label="outcome" class="text">CCC-V</td>' in page
    assert '<th scope="col">CCC-V</th>' in page


def test_the_same_run_gives_the_same_figures(report):
    one, other = (to_svg(draw(report)["folds"][0]) for _ in range(2))
    assert one == other


def test_a_run_without_any_result_still_has_a_page(tmp_path):
    names = [f"{c}/fold-{k}/seed-0" for c in ("frozen", "unfrozen") for k in (1, 2)]
    report = read_report(make_run(tmp_path, folds=2, epochs=0, missing=names))
    assert "INCOMPLETE" in render_html(report, draw(report))
