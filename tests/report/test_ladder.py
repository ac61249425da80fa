"""What each step of adaptation buys: the same numbers in every place, and none where there is no ladder."""

from __future__ import annotations

from pathlib import Path

import pytest

from cvrunner.records.results import ParameterCount
from cvrunner.records.run_directory import RunDirectory
from cvrunner.records.summary import Summary
from cvrunner.report.figures import draw
from cvrunner.report.report import read_report
from cvrunner.report.tables import format_interval, render_text
from cvrunner.report.write import write_report
from cvrunner.tracking.names import score_metrics
from tests.blank_figures import blank_figures
from tests.runs import make_run

STEPS = {
    "frozen": {"front_end": 400, "encoder": 10_000, "head": 1000},
    "lora": {"front_end": 400, "encoder": 10_000, "lora": 234, "head": 1000},
    "top": {"front_end": 400, "encoder_below": 6000, "encoder": 4000, "head": 1000},
    "full": {"front_end": 400, "encoder": 10_000, "head": 1000},
}
TRAINED = {"frozen": 1000, "lora": 1234, "top": 5000, "full": 11_000}
TITLE = "What each step buys"


def run(root: Path, *conditions: str, seeds: tuple[int, ...] = (0, 1)) -> RunDirectory:
    """A run whose trials trained what `STEPS` says, fold after fold for longer."""
    directory = make_run(root, conditions=conditions, seeds=seeds, gain=0.1)
    for name, result in directory.results(directory.read_run()).items():
        groups = STEPS[result.condition]
        trained = TRAINED[result.condition]
        count = ParameterCount(total=sum(groups.values()), trainable=trained, groups=groups)
        changed = result.model_copy(update={"parameters": count, "train_s": 100.0 * result.fold})
        (directory.path / name / "result.json").write_text(changed.to_json())
    return directory


def test_the_steps_stand_in_every_place_with_the_same_numbers(tmp_path: Path) -> None:
    directory = run(tmp_path, *STEPS)
    with blank_figures():
        report = write_report(directory)
    summary = Summary.from_json(directory.summary_file.read_bytes(), "summary.json")
    assert {name: cost.parameters for name, cost in summary.costs.items()} == TRAINED
    # Folds 1 to 5, two seeds each.
    assert {round(cost.hours * 3600) for cost in summary.costs.values()} == {2 * 100 * 15}
    expected = [TITLE, "1,000", "1,234", "5,000", "11,000", "0.833"]
    for difference in summary.differences.values():
        assert difference["avg"].mean is not None
        assert difference["avg"].on_corpus is not None
        expected += [f"{difference['avg'].mean:+.4f}", format_interval(difference["avg"].on_corpus.interval)]
    places = {
        "terminal": render_text(report.run, report.summary, width=200),
        "comparison.md": directory.comparison.read_text(),
        "report.html": directory.report.read_text(),
        "paper": (directory.path / "paper" / "tables.md").read_text(),
    }
    for place, text in places.items():
        words = " ".join(text.split())
        assert [one for one in expected if one not in words] == [], place
    for condition, cost in summary.costs.items():
        metrics = score_metrics(summary, condition)
        assert metrics["cost/trained_parameters"] == TRAINED[condition]
        assert metrics["cost/hours"] == cost.hours


def test_the_figure_shows_each_condition_with_the_interval_of_its_difference(tmp_path: Path) -> None:
    report = read_report(run(tmp_path, "frozen", "lora", "full"))
    figure, caption = draw(report)["ladder"]
    assert "difference from frozen" in caption
    scores, summary = report.summary.scores, report.summary
    for axes, places in zip(
        figure.axes,
        (TRAINED, {name: cost.hours for name, cost in summary.costs.items()}),
        strict=True,
    ):
        points = {str(line.get_label()): line for line in axes.lines if str(line.get_label()) in scores}
        for condition in summary.scores:
            (x,), (y,) = points[condition].get_data()
            assert (x, y) == (places[condition], scores[condition]["avg"].mean)
        bars = [sorted(line.get_ydata()) for line in axes.lines if str(line.get_label()) not in scores][:2]
        for bar, condition in zip(bars, ("lora", "full"), strict=True):
            level = summary.differences[condition]["avg"].on_corpus
            assert level is not None
            baseline = scores["frozen"]["avg"].mean
            assert bar == pytest.approx([baseline + level.interval.low, baseline + level.interval.high])


@pytest.mark.parametrize(
    ("conditions", "ladder"),
    [(("frozen", "full"), False), (("frozen", "lora"), True), (("frozen", "top", "full"), True)],
)
def test_two_conditions_are_a_ladder_only_with_adapters(
    tmp_path: Path, conditions: tuple[str, ...], ladder: bool
) -> None:
    report = read_report(run(tmp_path, *conditions))
    assert (TITLE in render_text(report.run, report.summary)) == ladder
    assert report.summary.is_ladder == ladder


def test_without_intervals_the_steps_are_still_shown(tmp_path: Path) -> None:
    report = read_report(run(tmp_path, "frozen", "lora", seeds=(0,)))
    row = next(line for line in render_text(report.run, report.summary, width=200).splitlines() if "1,234" in line)
    assert row.rstrip().endswith("-") or row.rstrip().endswith("–")
    assert "ladder" in draw(report)
