"""Commands, options, make targets, keys and messages in the documents exist, and recipes work."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cvrunner.config.reading import load_config
from cvrunner.config.schema import Config, valid_keys
from cvrunner.data.corpus import load_corpus
from cvrunner.data.folds import check_labels, check_leaks, make_folds
from cvrunner.paths import default_config
from docs.generated.commands_page import command_line
from tests.documentation.documents import DOCS, ROOT, WRITTEN, blocks, shell_lines, spans, text_of

PROGRAM = re.compile(r"^(?:\w+=\$\()?(?:python -m )?cvrunner (?!\.\.\.)(.*)$")
MAKE = re.compile(r"^make ([a-z-]+)")
KEY = re.compile(r"^((?:" + "|".join(Config.model_fields) + r")(?:\.[a-z_]+)+)(?:: (.+))?$")
FILES = (".json", ".safetensors", ".md", ".yaml", ".py", ".html", ".csv")
MADE_LABELS = """FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set
MSP-PODCAST_0001_0008.wav,N,2.6,4.4,3.2,127,Female,Test1
MSP-PODCAST_0001_0019.wav,H,5.0,6.2,4.6,127,Female,Test1
MSP-PODCAST_0002_0033.wav,S,3.2,1.8,4.0,128,Male,Test1
MSP-PODCAST_0003_0007.wav,A,5.8,2.2,6.0,25,Male,Development
MSP-PODCAST_0003_0040.wav,X,4.0,4.0,4.2,25,Male,Development
MSP-PODCAST_0004_0001.wav,N,3.6,4.6,3.8,30,Female,Development
MSP-PODCAST_0005_0011.wav,O,4.4,3.0,4.6,41,Unknown,Train
MSP-PODCAST_0005_0012.wav,N,2.8,4.2,3.0,Unknown,Female,Train
MSP-PODCAST_0006_0021_0003.wav,U,5.4,5.0,5.2,42,Male,Train
MSP-PODCAST_0003_0050.wav,N,3.0,4.8,3.4,44,Female,Train
MSP-PODCAST_0009_0002.wav,N,4.2,3.8,4.0,127,Female,Train
MSP-PODCAST_0008_0002.wav,N,4.2,3.8,4.0,50,Male,Test2
"""


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


def test_the_recipe_for_msp_podcast_gives_a_corpus_without_leaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Labels").mkdir()
    (tmp_path / "Audios").mkdir()
    (tmp_path / "Labels" / "labels_consensus.csv").write_text(MADE_LABELS)
    random = np.random.default_rng(0)
    for line in MADE_LABELS.splitlines()[1:]:
        soundfile.write(tmp_path / "Audios" / line.split(",")[0], random.normal(0, 0.1, 16_000), 16_000)
    text = text_of(DOCS / "corpora.md")
    (recipe,) = (block for block in blocks(text, "python") if "labels_consensus" in block)
    (settings,) = (block for block in blocks(text, "yaml") if "MSP-Podcast" in block)
    exec(recipe, {})
    (tmp_path / "msp.yaml").write_text(
        settings.replace("/data/MSP-Podcast/", "").replace("configs/", f"{ROOT}/configs/")
    )
    config = load_config(tmp_path / "msp.yaml")
    corpus = load_corpus(config.corpus, tmp_path / config.corpus.root)
    (fold,) = folds = make_folds(corpus, config.folds.scheme)
    check_leaks(folds)
    check_labels(corpus, folds, config.corpus.dimensions)
    # Left out: an unknown speaker, a podcast of the validation set, a speaker of the test set, another test set.
    assert [len(part) for part in fold.parts.values()] == [2, 3, 3]
    (first, *_) = fold.test
    assert (first.valence, first.arousal, first.dominance, first.gender) == (4.4, 2.6, 3.2, "F")
