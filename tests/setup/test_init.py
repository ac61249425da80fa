"""`init` writes a configuration that loads, with and without a terminal, and refuses what is no corpus."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cvrunner.cli import main
from cvrunner.config.reading import load_config
from cvrunner.data.corpus import load_corpus
from cvrunner.data.manifest import REQUIRED


def init(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["init", *map(str, arguments)])
    return int(ended.value.code or 0)


def make_table(folder: Path, low: float = 1, high: float = 6.5, rate: int = 16_000, split: bool = False) -> Path:
    """Write a manifest of two sessions with audio."""
    folder.mkdir(parents=True, exist_ok=True)
    columns, noise = [*REQUIRED, *(["split"] if split else [])], np.random.default_rng(0)
    rows = [",".join(columns)]
    for k in range(8):
        soundfile.write(folder / f"{k}.wav", noise.normal(0, 0.1, rate), rate)
        row = [f"{k}.wav", f"u{k}", f"s{k % 2}", f"{k % 2}", f"d{k % 2}", k, low if k < 4 else high, high - k * 0.1]
        rows.append(",".join(map(str, [*row, *(["train"] if split else [])])))
    table = folder / "mine.csv"
    table.write_text("\n".join(rows) + "\n")
    return table


def test_without_a_terminal_a_table_gets_a_configuration_that_reads_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table = make_table(tmp_path / "my corpus", rate=8000)
    assert init(table.parent, "--encoder", "microsoft/wavlm-base") == 0
    config = load_config(tmp_path / "mine.yaml", [])
    assert (config.corpus.format, config.corpus.root, config.corpus.scale) == ("manifest", str(table), (1, 7))
    assert config.corpus.resample
    assert config.model.encoder == "microsoft/wavlm-base"
    assert list(config.conditions) == ["frozen", "unfrozen"]
    assert config.reference.claims == ()
    assert len(load_corpus(config.corpus, table).utterances) == 8
    last = capsys.readouterr().out.splitlines()[-2:]
    assert [line.partition("   #")[0] for line in last] == [
        "python -m cvrunner audit --config mine.yaml",
        "python -m cvrunner all-folds --config mine.yaml",
    ]


def test_flags_answer_every_question(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("cvrunner.setup.command.prompt", lambda *_, **__: pytest.fail("asked"))
    table = make_table(tmp_path, split=True)
    flags = ["--output", tmp_path / "c.yaml", "--scale", "0", "10", "--sessions", "--encoder", "demo"]
    assert init(table, *flags) == 0
    config = load_config(tmp_path / "c.yaml", [])
    assert (config.corpus.scale, config.folds.scheme) == ((0, 10), "leave_one_session_out")
    assert not config.corpus.resample


def test_a_terminal_is_asked_at_most_five_questions_and_again_after_a_wrong_answer(tmp_path, monkeypatch):
    table = make_table(tmp_path, split=True)
    answers = iter([str(table), "7 1", "1, 9", "split", "my/encoder", str(tmp_path / "asked.yaml")])
    asked: list[str] = []

    def answer(question: str, default: str) -> str:
        asked.append(question)
        return next(answers)

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("cvrunner.setup.command.prompt", answer)
    assert init() == 0
    assert len(set(asked)) == 5
    assert len(asked) == 6
    config = load_config(tmp_path / "asked.yaml", [])
    assert (config.corpus.scale, config.folds.scheme) == ((1, 9), "manifest_split")


def test_iemocaps_tree_is_recognised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IEMOCAP" / "Session1").mkdir(parents=True)
    assert init("IEMOCAP", "--labels", "observers", "--output", "mine.yaml") == 0
    config = load_config(tmp_path / "mine.yaml", [])
    assert (config.corpus.format, config.corpus.labels) == ("iemocap", "observers")
    assert config.verify.target


def test_what_is_no_corpus_or_would_overwrite_a_file_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audio").mkdir()
    (tmp_path / "wrong.csv").write_text("path,arousal\na.wav,1\n")
    (tmp_path / "kept.yaml").write_text("mine")
    table = make_table(tmp_path / "good")
    for arguments, message in (
        ((), "name the corpus"),
        (("nowhere",), "does not exist"),
        (("audio",), "has no table"),
        (("wrong.csv",), "column 'valence' is missing"),
        ((table, "--output", "kept.yaml"), "exists already"),
    ):
        assert init(*arguments) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "kept.yaml").read_text() == "mine"
