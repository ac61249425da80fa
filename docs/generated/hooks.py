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


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    return files
