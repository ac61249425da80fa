"""paper/: what it says is what the run did, and LaTeX can read it."""

from __future__ import annotations

import re

import pytest

from cvrunner.report.figures import draw
from cvrunner.report.paper import REFERENCES, as_latex, escape, methods, write_paper
from cvrunner.report.report import read_report
from tests.runs import make_run


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """The report of a run and its paper folder."""
    directory = make_run(tmp_path_factory.mktemp("results"), seeds=(0, 1), conditions=("frozen", "unfrozen", "top"))
    report = read_report(directory)
    write_paper(report, draw(report))
    return report, directory.path / "paper"


def test_the_methods_name_what_was_run(paper):
    report, folder = paper
    text = (folder / "methods.md").read_text()
    assert report.summary.verdict in text
    for part in ("5 folds", "2 seeds", "CCC-Avg", "margin of practical equality of 0.02", report.run.split_digest[:12]):
        assert part in text
    assert "The corpus is synthetic." in text
    # Three conditions: the adjustment is described.
    assert "[@dunnett1955]" in text


def test_every_citation_has_an_entry_and_no_entry_is_left_over(paper):
    _, folder = paper
    cited = set(re.findall(r"\[@(\w+)\]", (folder / "methods.md").read_text()))
    entries = set(re.findall(r"^@\w+{(\w+),", (folder / "references.bib").read_text(), re.MULTILINE))
    assert cited == entries
    assert set(re.findall(r"\\cite{(\w+)}", (folder / "methods.tex").read_text())) == cited
    assert cited < set(re.findall(r"^@\w+{(\w+),", REFERENCES.read_text(), re.MULTILINE))


def test_the_tables_have_the_numbers_of_the_summary(paper):
    report, folder = paper
    markdown, latex = ((folder / f"tables.{end}").read_text() for end in ("md", "tex"))
    for by_outcome in report.summary.differences.values():
        for difference in by_outcome.values():
            interval = difference.on_corpus.interval
            for text in (markdown, latex):
                assert f"{difference.mean:+.4f}" in text
                assert f"{interval.low:+.4f} to {interval.high:+.4f}" in text


def test_latex_is_balanced_and_escaped(paper):
    _, folder = paper
    for name in ("methods.tex", "tables.tex"):
        text = (folder / name).read_text()
        assert text.count("{") == text.count("}")
        assert not re.search(r"(?<!\\)[%#_]", re.sub(r"\\(?:cite|begin|end){[^}]*}", "", text))
    assert escape("50 % of a_b & {c}") == r"50 \% of a\_b \& \{c\}"
    assert as_latex("CCC [@lin1989], 5 %") == r"CCC \cite{lin1989}, 5 \%"


def test_figures_are_pdf(paper):
    _, folder = paper
    for name in ("differences", "folds", "learning_curves"):
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_an_incomplete_run_has_no_paper(tmp_path):
    directory = make_run(tmp_path, missing=["frozen/fold-1/seed-0"])
    write_paper(read_report(directory), {})
    assert not (directory.path / "paper").exists()


def test_a_single_comparison_is_not_called_simultaneous(tmp_path):
    assert "dunnett1955" not in methods(read_report(make_run(tmp_path, seeds=(0, 1))))
