"""The corpus a configuration asks for, whatever its format."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from cvrunner.config.schema import Config
from cvrunner.config.sections import CorpusConfig
from cvrunner.data.iemocap import load_iemocap, session_folders
from cvrunner.data.manifest import load_manifest
from cvrunner.data.utterance import Corpus
from cvrunner.errors import CorpusError


def load_corpus(config: CorpusConfig, root: Path) -> Corpus:
    """The checked corpus at `root`, which is where `config.root` leads the caller.

    With `format: demo` the synthetic corpus is written first, if it is not there. Raises CorpusError, and
    ConfigError where the synthetic corpus cannot be made.
    """
    if config.format == "demo":
        # Late: the other formats need no speech synthesis.
        from cvrunner.data.demo import write_demo_corpus

        write_demo_corpus(root, seed=config.demo.seed, utterances=config.demo.utterances)
    if not os.path.exists(root):
        rule = f"does not exist; set corpus.root, now {config.root!r}, to {_wanted(config)}"
        raise CorpusError(str(root), [rule])
    if config.format == "manifest":
        return load_manifest(root, config.scale, config.dimensions, config.resample)
    corpus = load_iemocap(root, config.labels, config.scale, config.dimensions, config.resample)
    return replace(corpus, synthetic=True) if config.format == "demo" else corpus


def fold_count(config: Config, root: Path) -> int | None:
    """How many folds there are going to be, where that can be known without reading or making the corpus."""
    if config.folds.scheme == "manifest_split":
        return 1
    if config.corpus.format == "demo":
        from cvrunner.data.demo import SESSIONS

        return SESSIONS
    if config.corpus.format == "iemocap" and root.is_dir():
        return len(session_folders(root))
    return None


def _wanted(config: CorpusConfig) -> str:
    if config.format == "manifest":
        return "the manifest, a CSV or JSONL file"
    return "the folder that holds Session1, Session2, ..."
