"""docs/walk.md from its first command to its last, taken from the page and typed into one shell.

The page is for the reader's own machine, so here it gets a separate home, a copy of the repository, and separate ports:
`ray start` and `ray stop` start and end this test's Ray alone, and `make ui` finds its port in PORT.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from cvrunner.records.run_directory import RunDirectory
from tests.documentation.documents import DOCS, blocks
from tests.end_to_end.programs import REPOSITORY, environment, free_ports, head_options, wait_until

pytestmark = [pytest.mark.suites("all"), pytest.mark.end_to_end, pytest.mark.cluster, pytest.mark.timeout(900)]
PAGE = (DOCS / "walk.md").read_text()
STEPS = {part.partition("\n")[0]: "".join(blocks(part, "sh")) for part in PAGE.split("\n## ")[1:]}
RAY = """
ray() {{
    case $1 in
    start)
        command ray "$@" {options} >ray.log 2>&1 &
        HEAD=$!
        export RAY_ADDRESS={address}
        until command ray job submit -- true >submit.log 2>&1; do kill -0 $HEAD && sleep 0.3 || return 1; done
        ;;
    stop) kill $HEAD; wait $HEAD || true ;;
    *) command ray "$@" ;;
    esac
}}
"""
END, FAILED = "the step has ended", "a command has failed"


class Shell:
    """One bash for all steps, as a person has one terminal; it and all it started are ended afterwards."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            ["bash"], cwd=folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip

    def types(self, commands: str) -> str:
        """Return what the commands print; fail if one of them fails."""
        assert self.process.stdin
        assert self.process.stdout
        # No command may read what is typed next.
        self.process.stdin.write(f"trap 'echo {FAILED}' ERR\n{{\n{commands}\n}} </dev/null\necho; echo {END}\n")
        self.process.stdin.flush()
        lines = list(iter(lambda: self.process.stdout.readline() or END, f"{END}\n"))  # type: ignore[union-attr]
        output = "".join(lines)
        assert FAILED not in output, output[-4000:]
        return output

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def checkout(folder: Path) -> Path:
    """A copy of the repository as after `make install`, which finds nothing left to install."""
    folder.mkdir()
    for name in ("cvrunner", "configs", "jobs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md", ".gitignore"):
        shutil.copy2(REPOSITORY / name, folder)
    (folder / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if not entry.name.startswith("."):
            (folder / ".venv" / entry.name).symlink_to(entry)
    (folder / ".venv" / ".demo").touch()
    return folder


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    folder = checkout(tmp_path / "cvrunner")
    temporary, options, address = head_options()
    (tmp_path / "home").mkdir()
    env = {**environment(tmp_path / "home"), "PYTHONPATH": str(folder), "RAY_TMPDIR": str(temporary)}
    opened = Shell(folder, {**env, "PORT": str(free_ports(1)[0])})
    opened.types(RAY.format(options=shlex.join(options), address=address))
    try:
        yield opened
    finally:
        opened.close()
        shutil.rmtree(temporary, ignore_errors=True)


def status_of_runs(folder: Path) -> list[str]:
    """Status of each run in the results of `folder`, the oldest first."""
    runs = [RunDirectory(path.parent).read_run() for path in folder.glob("results/walk-*/run.json")]
    return [run.status for run in sorted(runs, key=lambda run: run.started_at)]


def compared_in_mlflow(link: str, port: str) -> list[dict[str, object]]:
    """The runs that a printed link compares, as the MLflow server at `port` has them."""
    found = []
    for run in re.findall(r"[0-9a-f]{32}", unquote(link)):
        address = f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/get?run_id={run}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            found.append(json.load(answer)["run"])
    return found


def test_the_whole_way_goes_as_the_page_says(shell: Shell, tmp_path: Path) -> None:
    folder, port = tmp_path / "cvrunner", ""
    left = dict(STEPS)
    shell.types(left.pop("Install"))
    assert "40 utterances" in shell.types(left.pop("A configuration of your own"))

    demo = shell.types(left.pop("The demo, on this machine"))
    assert "on synthetic data" in demo
    assert status_of_runs(folder) == ["COMPLETE"]

    shell.types(left.pop("A cluster with a token"))
    token = tmp_path / "home" / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert "submitted on http://127.0.0.1:" in shell.types(left.pop("Submit"))
    watch = left.pop("Watch")
    assert "all-folds" in shell.types(watch)
    wait_until(lambda: "epoch 1/20" in shell.types(watch.splitlines()[-1]), "the first epoch of the job")
    assert "stopped" in shell.types(left.pop("Stop"))
    assert status_of_runs(folder) == ["COMPLETE", "STOPPED"]
    resumed = shell.types(left.pop("Resume"))
    assert "complete, after" in resumed
    assert token.read_text().strip() not in resumed
    assert status_of_runs(folder) == ["COMPLETE", "COMPLETE"]

    compare, ui = left.pop("Compare").strip().rsplit("\n", 1)
    assert re.search(r"frozen.*\bCCC-Avg\b", shell.types(compare))
    shell.types(f"{ui} >ui.log 2>&1 &")
    port = shell.types("echo $PORT").split()[0]
    wait_until(lambda: _answers(port), "MLflow's page")
    for output in (demo, resumed):
        (link,) = re.findall(r"http\S+compare-runs\S+", output)
        assert [run["info"]["status"] for run in compared_in_mlflow(link, port)] == ["FINISHED"] * 2  # type: ignore[index]

    assert "on synthetic data" in shell.types(left.pop("Tune two settings"))
    assert "_F000.wav" in shell.types(left.pop("Predict a file"))

    shell.types(left.pop("Clean up"))
    assert status_of_runs(folder) == []
    assert left == {}


def _answers(port: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
    except OSError:
        return False
