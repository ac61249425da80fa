"""`make test-all` continues where it ended, and a pass counts for one commit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.release import LARGE, PARTS, ROOT, missing_parts, run_parts


def test_parts_that_passed_are_not_run_again_at_the_same_commit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(part: str) -> int:
        ran.append(part)
        return int(part == "walk" and ran.count("walk") == 1)

    assert run_parts(missing_parts("abc", tmp_path), "abc", tmp_path, run) == 1
    assert ran == list(PARTS)
    assert "not passed yet: walk;" in capsys.readouterr().out
    assert missing_parts("abc", tmp_path) == ["walk"]
    assert run_parts(missing_parts("abc", tmp_path), "abc", tmp_path, run) == 0
    assert ran[len(PARTS) :] == ["walk"]
    assert missing_parts("another", tmp_path) == list(PARTS)


def test_a_part_that_fails_later_has_not_passed_any_more(tmp_path: Path) -> None:
    assert run_parts(list(PARTS), "abc", tmp_path, lambda _: 0) == 0
    assert run_parts(["fuzz"], "abc", tmp_path, lambda _: 1) == 1
    assert missing_parts("abc", tmp_path) == ["fuzz"]


def test_the_files_of_all_parts_exist() -> None:
    assert [file for files in LARGE.values() for file in files.split() if not (ROOT / file).is_file()] == []
