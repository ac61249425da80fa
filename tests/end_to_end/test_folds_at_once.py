"""Five `fold` commands started at once, as background processes of a shell: one run, one database, nothing twice."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from cvrunner.records.run_directory import RunDirectory
from tests.end_to_end.programs import command, cvrunner, environment, started, tiny_config
from tests.runs import numbers

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(600), pytest.mark.suites("ci", "all")]


def test_fold_commands_started_at_once_form_one_run_with_the_numbers_of_one_after_the_other(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, epochs=1)
    logs = [tmp_path / f"fold-{fold}.log" for fold in range(1, 6)]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                started(command("fold", "--fold", str(fold), "--config", config), tmp_path, environment(tmp_path), log)
            )
            for fold, log in enumerate(logs, start=1)
        ]
        codes = [process.wait(500) for process in processes]
    said = "\n".join(log.read_text() for log in logs)
    assert codes == [0] * 5, said
    assert "MLflow (" not in said

    (record_file,) = (tmp_path / "results").glob("*/run.json")
    run = RunDirectory(record_file.parent)
    record = run.read_run()
    assert record.status == "COMPLETE"
    assert {state.status for state in record.trials.values()} == {"DONE"}
    assert {state.attempts for state in record.trials.values()} == {1}
    assert len(numbers(run)) == 10
    assert "COMPLETE" in (tmp_path / "results" / "experiment_comparison.md").read_text()
    checked = cvrunner("report", run.name, "--check", folder=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr

    with contextlib.closing(sqlite3.connect(tmp_path / "results" / "mlflow.db")) as database:
        statuses = database.execute("SELECT status, count(*) FROM runs GROUP BY status").fetchall()
        assert statuses == [("FINISHED", 13)]  # ten trials, two conditions and the comparison
        doubled = "SELECT run_uuid, key, step, count(*) FROM metrics GROUP BY 1, 2, 3 HAVING count(*) > 1"
        assert database.execute(doubled).fetchall() == []
        means = "SELECT count(*) FROM metrics WHERE key = 'mean/train_loss'"
        assert database.execute(means).fetchone() == (2,)

    alone = tmp_path / "alone"
    again = cvrunner("fold", "--fold", "2", "--config", config, "--set", f"results.root={alone}", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    (other,) = alone.glob("*/run.json")
    of_one = numbers(RunDirectory(other.parent))
    assert len(of_one) == 2
    assert of_one == {name: values for name, values in numbers(run).items() if name in of_one}
