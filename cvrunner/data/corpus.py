"""The corpus that a configuration names, whatever its format."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from cvrunner.config.schema import Config
from cvrunner.config.sections import CorpusConfig
from cvrunner.data.demo import SESSIONS, write_demo_corpus
from cvrunner.data.folds import Scheme
from cvrunner.data.iemocap import is_synthetic, load_iemocap, session_folders
from cvrunner.data.manifest import load_manifest
from cvrunner.data.utterance import SHORTEST_SAMPLES, Corpus
from cvrunner.errors import CorpusError


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
        needed = "the folder that holds Session1, Session2, ..."
        if config.format == "manifest":
            needed = "the manifest, a CSV or JSONL file"
        raise CorpusError(str(root), [f"does not exist; set corpus.root, now {config.root!r}, to {needed}"])
    if config.format == "manifest":
        return load_manifest(root, config.scale, config.dimensions, config.resample, scheme, shortest)
    partial = config.partial if config.format == "iemocap" else None
    how = (config.scale, config.dimensions, config.resample, partial, shortest)
    corpus = load_iemocap(root, config.labels, *how)
    if config.format == "demo":
        corpus = replace(corpus, synthetic=True)
    return corpus


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
