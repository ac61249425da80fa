"""`make test-all`: all suites in named parts, run by hand before a release; without a time limit, and resumable.

    python -m tests.release                # the parts that have not passed at this commit
    python -m tests.release kills walk     # these parts, whether they passed or not

A part that passes leaves build/test-all/<part>.json with commit and date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
STAMPS = ROOT / "build" / "test-all"
LARGE = {
    "kills": "tests/end_to_end/test_kills.py",
    "walk": "tests/end_to_end/test_walk.py",
    "jobs": "tests/end_to_end/test_ray_job.py tests/end_to_end/test_submit.py",
    "slurm": "tests/end_to_end/test_slurm.py",
    "nodes": "tests/orchestration/test_node_loss.py tests/orchestration/test_resources.py",
    "crash-points": "tests/training/test_crash_points.py",
    "fuzz": "tests/test_fuzz.py",
}
"""Files that are a part by themselves; the part `others` has the rest of the suite `all`."""
PARTS: dict[str, list[str]] = {
    "test": [],
    **{name: ["--suite=all", "--timeout=36000", *files.split()] for name, files in LARGE.items()},
    "others": ["--suite=all", *(f"--ignore={file}" for files in LARGE.values() for file in files.split())],
}
"""Arguments of pytest by part."""


def main() -> int:
    """Run the parts named on the command line, or those that have not passed at this commit."""
    parser = argparse.ArgumentParser(prog="python -m tests.release", description="Run the parts of `make test-all`.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    named = parser.parse_args().parts
    if unknown := [name for name in named if name not in PARTS]:
        parser.error(f"{', '.join(unknown)}: no such part; choose from {', '.join(PARTS)}")
    commit = clean_commit()
    if commit is None:
        print("there are uncommitted changes: commit them first, since a part passes for a commit", file=sys.stderr)
        return 2
    return run_parts(named or missing_parts(commit, STAMPS), commit, STAMPS, run_pytest)


def run_parts(parts: Sequence[str], commit: str, stamps: Path, run: Callable[[str], int]) -> int:
    """Run each part and stamp those that pass; return 0 if every part has then passed at `commit`."""
    stamps.mkdir(parents=True, exist_ok=True)
    for part in parts:
        stamp = stamps / f"{part}.json"
        stamp.unlink(missing_ok=True)
        print(f"--- test-all: {part}", flush=True)
        start = time.monotonic()
        if run(part) == 0:
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            facts = {"part": part, "commit": commit, "date": date, "seconds": round(time.monotonic() - start)}
            stamp.write_text(json.dumps(facts) + "\n")
    missing = missing_parts(commit, stamps)
    if missing:
        print(f"test-all at {commit[:12]}: not passed yet: {', '.join(missing)}; `make test-all` continues with them")
        return 1
    print(f"test-all at {commit[:12]}: all {len(PARTS)} parts have passed; write the date into docs/reliability.md")
    return 0


def missing_parts(commit: str, stamps: Path) -> list[str]:
    """The parts without a stamp of `commit`."""
    facts = [json.loads(path.read_text()) for path in stamps.glob("*.json")]
    passed = {fact["part"] for fact in facts if fact["commit"] == commit}
    return [part for part in PARTS if part not in passed]


def clean_commit() -> str | None:
    """The commit that is checked out, or None if files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return None if git("status", "--porcelain") else git("rev-parse", "HEAD")


def run_pytest(part: str) -> int:
    """Exit code of the part's tests; a missing browser is a failure."""
    command = [sys.executable, "-m", "pytest", *PARTS[part]]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "CVRUNNER_BROWSER": "required"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
