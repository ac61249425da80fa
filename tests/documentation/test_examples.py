"""Commands, options, make targets, keys and messages in the documents exist, and recipes work."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from cvrunner.config.reading import load_config
from cvrunner.config.schema import Config, valid_keys
from cvrunner.paths import default_config
from docs.generated.commands_page import command_line
from tests.documentation.documents import DOCS, ROOT, WRITTEN, blocks, shell_lines, spans, text_of

PROGRAM = re.compile(r"^(?:\w+=\$\()?(?:python -m )?cvrunner (?!\.\.\.)(.*)$")
MAKE = re.compile(r"^make ([a-z-]+)")
KEY = re.compile(r"^((?:" + "|".join(Config.model_fields) + r")(?:\.[a-z_]+)+)(?:: (.+))?$")
FILES = (".json", ".safetensors", ".md", ".yaml", ".py", ".html", ".csv")


def typed(path: Path) -> list[str]:
    """Lines of shell blocks, and code spans, which may be commands too."""
    text = text_of(path)
    return [*shell_lines(text), *spans(text)]


def check_words(words: Sequence[str]) -> None:
    """Parse the words after `cvrunner` without running them; raises what the program would raise."""
    group, context = command_line()
    name = next((word for word in words if not word.startswith("-")), None)
    if name is None:
        return
    command = group.get_command(context, name)
    assert command is not None, f"there is no command {name}"
    rest = list(words[list(words).index(name) + 1 :])
    if not rest or "--help" in rest:
        return
    parsed = command.make_context(name, rest, parent=context)
    if name == "submit" and parsed.params["arguments"]:
        check_words(parsed.params["arguments"])
    if parsed.params.get("set_"):
        given = ROOT / str(parsed.params["config"])
        load_config(given if given.is_file() else default_config(), parsed.params["set_"])


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_with_its_options_and_keys_exists(path: Path) -> None:
    for line in typed(path):
        if found := PROGRAM.match(line):
            # A pattern of files stands for two files, and a pipe leads to another program.
            words = shlex.split(found[1].partition(" | ")[0].replace("*", "1 results/2"), comments=True)
            try:
                check_words([word for word in words if word != "..."])
            except Exception as error:
                raise AssertionError(f"{path.name}: {line}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_make_target_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {found[1] for line in typed(path) if (found := MAKE.match(line))} <= targets


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_key_that_is_named_exists_and_takes_its_value(path: Path) -> None:
    for span in spans(text_of(path)):
        if (found := KEY.match(span)) and not found[1].endswith(FILES):
            assert found[1] in valid_keys(), f"{path.name}: {span}"
            if found[2]:
                load_config(default_config(), ["corpus.format=manifest", f"{found[1]}={found[2]}"])


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_piece_of_configuration_is_read(path: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(text_of(path), "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block.replace("base: configs/", f"base: {ROOT}/configs/"))
        load_config(file)


def test_every_message_in_troubleshooting_is_one_that_we_have() -> None:
    """Each message in the first column, split at the parts that vary."""
    rows = [line.split("|")[1] for line in text_of(DOCS / "troubleshooting.md").splitlines() if line.startswith("| ")]
    messages = [span for row in rows for span in spans(row)]
    assert len(messages) > 30
    known = said()
    parts = [part.strip(" ,;:()") for message in messages for part in re.split(r"\.\.\.|\b\d+\b", message)]
    assert [part for part in parts if len(part) > 3 and part not in known] == []


def said() -> str:
    """Every string in the program, and the names of its keys."""
    texts = list(valid_keys())
    for file in (ROOT / "cvrunner").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))  # type: ignore[misc]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)
