"""MkDocs calls this: pages that are made from the code, and the changelog, stand among those that are written."""

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


AWAITED = {"tuning.md", "predict.md", "api.md", "watching.md"}
"""Pages that are being written: without them the navigation is as it is."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out of the navigation what is not there yet."""
    absent = {name for name in AWAITED if not (ROOT / "docs" / name).is_file()}
    for part in config.nav or []:
        for title, pages in part.items():
            if isinstance(pages, list):
                part[title] = [page for page in pages if not absent & set(page.values())]
    config.nav = [part for part in config.nav or [] if all(part.values())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no one writes."""
    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    return files
