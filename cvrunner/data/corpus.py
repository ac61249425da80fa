"""The corpus that a configuration names, whatever its format."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from cvrunner import paths
from cvrunner.config.schema import Config
from cvrunner.config.sections import TABLES, CorpusConfig
from cvrunner.data.checks import Findings
from cvrunner.data.demo import SESSIONS, write_demo_corpus
from cvrunner.data.folds import Scheme
from cvrunner.data.iemocap import is_synthetic, load_iemocap, session_folders
from cvrunner.data.label_files import audformat_rows, msp_podcast_rows, read_ratings, with_ratings
from cvrunner.data.manifest import LabelTable, load_table
from cvrunner.data.rows import Row, read_rows
from cvrunner.data.utterance import SHORTEST_SAMPLES, Corpus
from cvrunner.errors import CorpusError

ROOTS = {
    "iemocap": "the folder that holds Session1, Session2, ...",
    "manifest": "the manifest, a CSV or JSONL file",
    "msp_podcast": "the folder that holds Labels and Audios",
    "audformat": "the folder that holds db.yaml",
}


def load_corpus(
    config: CorpusConfig, root: Path, scheme: Scheme | None = "manifest_split", shortest: int = SHORTEST_SAMPLES
) -> Corpus:
    """Return the checked corpus at `root`, to which the caller resolves `config.root`.

    `scheme`: that of the folds, None if the configuration does not choose one. `shortest`: minimum number of samples.
    With `format: demo` the synthetic corpus is written first if it does not exist. Raises CorpusError, and ConfigError
    if the synthetic corpus cannot be made.
    """
    if config.format == "demo":
        write_demo_corpus(root, seed=config.demo.seed, utterances=config.demo.utterances)
    if not os.path.exists(root):
        needed = ROOTS[config.format]
        raise CorpusError(str(root), [f"does not exist; set corpus.root, now {config.root!r}, to {needed}"])
    if config.format in TABLES:
        findings = Findings()
        table = _label_table(config, root, findings)
        return load_table(table, findings, config.scale, config.dimensions, config.resample, scheme, shortest)
    partial = config.partial if config.format == "iemocap" else None
    how = (config.scale, config.dimensions, config.resample, partial, shortest)
    corpus = load_iemocap(root, config.labels, *how)
    if config.format == "demo":
        corpus = replace(corpus, synthetic=True)
    return corpus


def _label_table(config: CorpusConfig, root: Path, findings: Findings) -> LabelTable:
    """Return the rows of a corpus that is one table, with its individual ratings."""
    ratings: list[Row] = []
    name, folder = root.name, root
    if config.format == "msp_podcast":
        rows, ratings = msp_podcast_rows(root, findings)
    elif config.format == "audformat":
        rows = audformat_rows(root, config.audformat, findings)
    else:
        rows = read_rows(root, findings)
        name, folder = root.stem, root.parent
    if config.ratings is not None:
        ratings += read_ratings(paths.corpus_root(config.ratings, "corpus.ratings"), findings)
    if ratings:
        rows = with_ratings(rows, ratings, config.scale, findings)
    return LabelTable(rows, root, folder, name, config.format)


def has_synthetic_speech(config: CorpusConfig, root: Path) -> bool:
    """Return whether the corpus is one that cvrunner made, without reading it."""
    return config.format == "demo" or (config.format == "iemocap" and is_synthetic(root))


def fold_count(config: Config, root: Path) -> int | None:
    """Return the number of folds, or None if it takes reading the corpus to know."""
    if config.folds.scheme == "manifest_split":
        return 1
    if config.corpus.format == "demo":
        return SESSIONS
    if config.corpus.format == "iemocap" and root.is_dir():
        return len(session_folders(root))
    return None
