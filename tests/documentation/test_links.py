"""Every page is in the navigation, every link has a target, and the site loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.generated.hooks import PAGES
from tests.documentation.documents import DOCS, ROOT, WRITTEN, anchors, links, spans, text_of

MADE = [DOCS / name for name in PAGES]


def navigation(entry: Any) -> Iterator[str]:
    """Yield the files in a part of mkdocs.yml's `nav`."""
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from navigation(inner)


def test_every_page_is_in_the_navigation_once() -> None:
    named = list(navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    there = {*(path.name for path in DOCS.glob("*.md")), *PAGES}
    assert len(named) == len(set(named))
    assert set(named) == there


@pytest.mark.parametrize("path", [*WRITTEN, *MADE], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    for target, anchor in links(path):
        assert target.exists() or target in MADE, f"{path.name}: {target} is not there"
        if anchor:
            assert anchor in anchors(target), f"{path.name}: {target.name} has no #{anchor}"


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_that_is_named_is_there(path: Path) -> None:
    file = re.compile(r"(tests|jobs|configs|docs|cvrunner)/[\w./*-]*[\w*]$")
    assert [name for name in spans(text_of(path)) if file.match(name) and not list(ROOT.glob(name))] == []


class Loads(HTMLParser):
    """Collects what a page loads from elsewhere by itself, without the links that a reader may click."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        linked = values.get("href") if tag == "link" and values.get("rel") != "canonical" else None
        address = values.get("src") or linked
        if address and re.match(r"(https?:)?//", address):
            self.found.append(f"{tag} {address}")


def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (built.returncode, built.stdout + built.stderr) == (0, "")
    for page in tmp_path.rglob("*.html"):
        loads = Loads()
        loads.feed(page.read_text())
        assert loads.found == [], page.name
    for style in tmp_path.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import )['\"]?https?://[^)]*", style.read_text()) == [], style.name
