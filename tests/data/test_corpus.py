"""The loader of each format, and a root that does not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from cvrunner.config.sections import CorpusConfig
from cvrunner.data import corpus
from cvrunner.data.corpus import load_corpus
from cvrunner.errors import CorpusError
from tests.corpora import manifest_rows, write_bytes, write_iemocap, write_manifest


def test_each_format_has_its_loader(tmp_path: Path) -> None:
    tree = write_iemocap(tmp_path / "tree")
    table = write_manifest(tmp_path / "table.csv", manifest_rows(tmp_path))
    assert load_corpus(CorpusConfig(format="iemocap", partial=True), tree).name == "IEMOCAP"
    assert load_corpus(CorpusConfig(format="manifest"), table).name == "table"


def test_settings_reach_the_loader(tmp_path: Path) -> None:
    table = write_manifest(tmp_path / "table.csv", manifest_rows(tmp_path))
    with pytest.raises(CorpusError, match=r"outside corpus.scale 0..1"):
        load_corpus(CorpusConfig(format="manifest", scale=(0.0, 1.0)), table)
    with pytest.raises(CorpusError, match="dominance is missing"):
        load_corpus(CorpusConfig(format="manifest", dimensions=("dominance",)), table)


@pytest.mark.parametrize(
    ("form", "needed"), [("iemocap", "the folder that holds Session1"), ("manifest", "CSV or JSONL")]
)
def test_a_missing_root_names_the_key(tmp_path: Path, form: str, needed: str) -> None:
    config = CorpusConfig.model_validate({"format": form, "root": "nowhere"})
    with pytest.raises(CorpusError, match=rf"does not exist; set corpus.root, now 'nowhere', to .*{needed}"):
        load_corpus(config, tmp_path / "nowhere")


def test_demo_is_written_with_its_settings_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def write_demo_corpus(root: Path, *, seed: int, utterances: int) -> None:
        asked.append((seed, utterances))
        write_iemocap(root)

    monkeypatch.setattr(corpus, "write_demo_corpus", write_demo_corpus)
    config = CorpusConfig.model_validate({"demo": {"seed": 7, "utterances": 64}})
    loaded = load_corpus(config, tmp_path / "demo")
    assert asked == [(7, 64)]
    assert loaded.synthetic


def test_a_demo_tree_read_as_iemocap_is_still_synthetic(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path)
    write_bytes(root / "SYNTHETIC.json", b"{}")
    assert load_corpus(CorpusConfig(format="iemocap"), root).synthetic
