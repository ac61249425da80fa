"""One measurement: an encoder, a corpus, a condition, batches and threads; the same for all rivals.

Everything that all of them need (corpus, encoder, feature cache) is made once in a folder and not timed, unless a
measurement says that it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cvrunner.config.reading import load_config
from cvrunner.config.schema import Config, digest
from cvrunner.data.utterance import Utterance
from cvrunner.paths import default_config

Encoder = Literal["demo", "base", "whisper"]
"""`demo`: the one that comes with cvrunner; `base`: WavLM-base's shape (94 M parameters), random weights, both on the
synthetic corpus; `whisper`: Whisper tiny on EmoTale."""
Condition = Literal["frozen", "unfrozen"]
BASE_LAYERS, BASE_WIDTH, BASE_HEADS, BASE_INNER = 12, 768, 12, 3072


@dataclass(frozen=True)
class Workload:
    """One thing to measure. Plain values, so that it can be handed to a fresh process as JSON."""

    folder: str
    """Shared material; made where absent."""
    encoder: Encoder = "demo"
    utterances: int = 480
    """Of the synthetic corpus, about."""
    condition: Condition = "unfrozen"
    fold: int = 1
    epochs: int = 2
    """How many are run; where single epochs are timed, the first is to warm up and does not count."""
    batch_size: int = 8
    accumulation_steps: int = 1
    accumulation: str = "exact"
    threads: int = 2
    """Of every process that trains."""
    cpu_clock: bool = False
    """Count seconds of CPU of the process instead of those on the wall."""
    fast_head: bool = False
    """Give a rival cvrunner's fast form of its Mamba-2 too, instead of transformers' own."""
    cache: str = "cache"
    """Name of the feature cache in the folder."""
    part: int = 0
    parts: int = 1
    """Of one encoder pass: every `parts`-th utterance from `part` on."""
    emotale: str = ""
    """Manifest of EmoTale, for the encoder `whisper`."""
    whisper: str = ""
    """Folder of the encoder `whisper`."""
    padded: bool = False
    """`whisper`: pad to windows of 30 s."""
    trained: int = 0
    """Number of training utterances, of all lengths; a quarter as many validate and test; 0: all."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Workload:
        return cls(**json.loads(text))

    def but(self, **changes: Any) -> Workload:
        """The same with some fields changed."""
        return replace(self, **changes)

    @property
    def corpus(self) -> Path:
        return Path(self.emotale) if self.encoder == "whisper" else Path(self.folder) / f"corpus-{self.utterances}"

    @property
    def cache_dir(self) -> Path:
        return Path(self.folder) / self.cache

    def settings(self, **sections: dict[str, Any]) -> dict[str, Any]:
        """The configuration file: the demo's or EmoTale's, with this workload's settings. `sections` override both."""
        base, corpus, model = "demo.yaml", {"demo": {"utterances": self.utterances}}, {"encoder": "demo"}
        if self.encoder == "base":
            model = {"encoder": str(base_shaped_encoder(Path(self.folder) / "wavlm-base-shaped"))}
        elif self.encoder == "whisper":
            base, corpus = "emotale.yaml", {}
            model = {"encoder": self.whisper, "whisper_window": "30s" if self.padded else "unpadded"}
        data: dict[str, Any] = {
            "base": str(default_config(base)),
            "corpus": {"root": str(self.corpus), **corpus},
            "model": model,
            "train": {
                "batch_size": self.batch_size,
                "accumulation_steps": self.accumulation_steps,
                "accumulation": self.accumulation,
                "epochs": self.epochs,
                "early_stopping_patience": None,
                "seeds": [0],
            },
            "conditions": {self.condition: {"model": {"freeze_speech_encoder": self.condition == "frozen"}}},
            "cluster": {"cpus_per_trial": self.threads, "cache_dir": str(self.cache_dir)},
            "tracking": {"enabled": True},
        }
        for section, values in sections.items():
            data[section] = {**data.get(section, {}), **values} if section != "conditions" else values
        return data

    def write_config(self, path: Path, **sections: dict[str, Any]) -> Path:
        """`settings` as a file, JSON being YAML."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.settings(**sections), indent=1))
        return path

    def config(self) -> Config:
        return load_config(self.write_config(Path(self.folder) / "configs" / f"{digest(asdict(self))[:16]}.json"))

    def trials(self) -> list[Any]:
        """cvrunner's own trials of this workload, of all folds."""
        from cvrunner.data.corpus import load_corpus
        from cvrunner.data.folds import make_folds
        from cvrunner.orchestration.trials import plan_trials

        config = self.config()
        corpus = load_corpus(config.corpus, self.corpus)
        return plan_trials(config, corpus, make_folds(corpus, "leave_one_session_out"))

    def trial(self) -> Any:
        """The trial of this workload's fold."""
        trial = next(t for t in self.trials() if t.fold.number == self.fold)
        if self.trained:
            counts = {"train": self.trained, "validation": self.trained // 4, "test": self.trained // 4}
            parts = {name: of_all_lengths(trial.fold.parts[name], count) for name, count in counts.items()}
            trial = replace(trial, fold=replace(trial.fold, **parts))
        return trial


def of_all_lengths(utterances: Sequence[Utterance], count: int) -> tuple[Utterance, ...]:
    """Return `count` utterances, from the shortest to the longest at even steps, in the order of the corpus."""
    ordered = sorted(utterances, key=lambda u: (u.samples, u.id))
    chosen = {ordered[round(place)].id for place in np.linspace(0, len(ordered) - 1, min(count, len(ordered)))}
    return tuple(u for u in utterances if u.id in chosen)


def base_shaped_encoder(folder: Path) -> Path:
    """WavLM-base's shape with random weights of seed 0, dropout as the checkpoint's; made once."""
    if (folder / "preprocessor_config.json").is_file():
        return folder
    import torch
    from transformers import WavLMConfig, WavLMModel

    torch.manual_seed(0)
    shape = WavLMConfig(
        hidden_size=BASE_WIDTH,
        num_hidden_layers=BASE_LAYERS,
        num_attention_heads=BASE_HEADS,
        intermediate_size=BASE_INNER,
        layerdrop=0.0,
        apply_spec_augment=False,
    )
    unfinished = folder.with_name(f"{folder.name}-unfinished")
    WavLMModel(shape).save_pretrained(unfinished)
    (unfinished / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "sampling_rate": 16000}))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder


def prepare(workload: Workload) -> None:
    """Make the corpus and the encoder, in this process."""
    workload.trial()
