"""Hook of MkDocs: adds the pages that are generated from the code, and the changelog, to the written ones."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from docs.generated.commands_page import commands_page  # noqa: E402
from docs.generated.configuration_page import configuration_page  # noqa: E402

PAGES = {
    "configuration.md": configuration_page,
    "commands.md": commands_page,
    "changelog.md": (ROOT / "CHANGELOG.md").read_text,
}
SOURCES = {"../cvrunner/config/sections.py": "configuration.md", "../cvrunner/cli.py": "commands.md"}
"""What written pages link to in place of a generated page, which the repository does not have: the code behind it."""


def on_page_markdown(markdown: str, **_: object) -> str:
    """Make links to code lead to the page that is generated from it."""
    for source, page in SOURCES.items():
        markdown = markdown.replace(f"]({source})", f"]({page})")
    return markdown


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    return files
