"""One comparison, six places: terminal, comparison.md, report.html, summary.json, paper/ and MLflow."""

from __future__ import annotations

from pathlib import Path

from cvrunner.records.summary import Summary
from cvrunner.report.tables import format_interval, render_text
from cvrunner.report.write import write_report
from cvrunner.tracking.mirror import sync_run
from cvrunner.tracking.tracker import tracking_uri
from tests.runs import make_run


def test_the_same_numbers_are_in_every_place(tmp_path: Path) -> None:
    directory = make_run(tmp_path, seeds=(0, 1), epochs=3, gain=0.3)
    report = write_report(directory)
    summary = Summary.from_json(directory.summary_file.read_bytes(), "summary.json")
    assert summary == report.summary
    uri = tracking_uri(report.config, tmp_path)
    sync_run(directory, uri)

    expected, metrics = [summary.verdict], {}
    for outcome, difference in summary.differences["unfrozen"].items():
        assert difference.mean is not None
        assert difference.on_corpus is not None
        assert difference.new_speakers is not None
        expected.append(f"{difference.mean:+.4f}")
        name = f"delta/unfrozen_{outcome}"
        metrics[name] = difference.mean
        for level, end in ((difference.on_corpus, ""), (difference.new_speakers, "_speakers")):
            expected.append(format_interval(level.interval))
            metrics |= {f"{name}{end}_low": level.interval.low, f"{name}{end}_high": level.interval.high}
            metrics[f"{name}{end}_detectable"] = level.detectable
    paper = directory.path / "paper"
    places = {
        "terminal": render_text(report.run, report.summary),
        "comparison.md": directory.comparison.read_text(),
        "report.html": directory.report.read_text(),
        "paper": (paper / "methods.md").read_text() + (paper / "tables.md").read_text(),
        "latex": (paper / "methods.tex").read_text().replace("\\%", "%") + (paper / "tables.tex").read_text(),
    }
    for place, text in places.items():
        words = " ".join(text.split())
        assert [number for number in expected if number not in words] == [], place

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("cvrunner-utterance")
    assert experiment is not None
    (comparison,) = client.search_runs([experiment.experiment_id], "tags.`cvrunner.role` = 'comparison'")
    assert {name: comparison.data.metrics.get(name) for name in metrics} == metrics
    assert comparison.data.tags["mlflow.note.content"] == summary.verdict
