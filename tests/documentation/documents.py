"""The documents of the repository: their text, code blocks, code spans, links and anchors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown.extensions.toc import slugify

from docs.generated.hooks import PAGES

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md", *sorted(DOCS.glob("*.md"))]
"""Documents written by a person; the others are generated."""
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
HEREDOC = re.compile(r"<<(\w+)\n.*?^\1$", flags=re.MULTILINE | re.DOTALL)


class Link(NamedTuple):
    """Target of a link in a document."""

    target: Path
    anchor: str


def text_of(path: Path) -> str:
    """Return the text of a document, also if it is a generated page of docs/."""
    make = PAGES.get(path.name) if path.parent == DOCS else None
    return make() if make else path.read_text()


def blocks(text: str, *languages: str) -> list[str]:
    """The code blocks in these languages."""
    return [body for language, body in FENCE.findall(text) if language in languages]


def shell_lines(text: str) -> list[str]:
    """Lines of the blocks in shell or without a language; continued lines are joined, heredocs left out."""
    joined = [HEREDOC.sub("", body).replace("\\\n", " ") for body in blocks(text, "", "sh", "console")]
    return [line.strip().removeprefix("$ ") for body in joined for line in body.splitlines()]


def spans(text: str) -> list[str]:
    """The texts between single backquotes."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def links(path: Path) -> Iterator[Link]:
    """Links to files of the repository and to places in them."""
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(path))):
        if not link.startswith(("http:", "https:", "mailto:")):
            name, _, anchor = link.partition("#")
            yield Link((path.parent / name).resolve() if name else path, anchor)


def anchors(path: Path) -> set[str]:
    """The places in a document that a link can lead to."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(path)), flags=re.MULTILINE)
    return {slugify(heading.replace("`", ""), "-") for heading in headings}
