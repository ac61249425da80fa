"""The benchmarks run and print their table; the times in it are not judged here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.end_to_end.programs import REPOSITORY

pytestmark = pytest.mark.end_to_end


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_simulated_makespan_comes_out_as_a_table() -> None:
    finished = benchmarks("makespan", "--quick")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("`python -m tests.benchmarks makespan --quick`")
    rows = [line.split("|")[1:-1] for line in finished.stdout.splitlines() if line.startswith("| makespan")]
    assert len(rows) == 4
    assert {len(cells) for cells in rows} == {6}
    # No schedule beats the lower bound.
    assert all(float(cells[2].split()[0]) >= 1 for cells in rows)


@pytest.mark.suites("all")
def test_rivals_compute_the_loss_of_cvrunner_before_they_are_timed() -> None:
    finished = benchmarks("unfrozen-demo", "--quick", "--threads", "1")
    assert finished.returncode == 0, finished.stderr
    assert "first losses: {'cvrunner': " in finished.stderr
    rows = [line for line in finished.stdout.splitlines() if line.startswith("| unfrozen epoch")]
    assert len(rows) == 4


def test_an_unknown_measurement_is_refused_with_the_choices() -> None:
    finished = benchmarks("nonsense")
    assert finished.returncode == 2
    assert "unfrozen-demo" in finished.stderr


def test_a_measurement_on_a_corpus_that_is_not_given_is_refused_with_one_sentence() -> None:
    finished = benchmarks("frozen-emotale", "--emotale", "absent.csv")
    assert finished.returncode == 2
    assert "need --emotale and --whisper with a path that exists" in finished.stderr.splitlines()[-1]
