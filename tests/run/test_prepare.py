"""Checks before training that need both the corpus and the encoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cvrunner.config.schema import Config, validate
from cvrunner.data.utterance import Corpus
from cvrunner.errors import CorpusError, EncoderError
from cvrunner.run.prepare import check_durations
from tests.corpora import corpus
from tests.tiny_encoders import save_encoder, tiny_whisper


def config_with(encoder: object) -> Config:
    return validate({"model": {"encoder": str(encoder)}}, "test")


def with_lengths(*samples: int) -> Corpus:
    some = corpus()
    changed = [replace(u, samples=n) for u, n in zip(some.utterances, samples, strict=False)]
    return replace(some, utterances=(*changed, *some.utterances[len(changed) :]))


@pytest.mark.parametrize("for_training", [True, False])
def test_all_utterances_beyond_a_whispers_window_are_named(tmp_path: Path, for_training: bool) -> None:
    tiny_whisper().save_pretrained(tmp_path / "whisper")
    (tmp_path / "whisper" / "preprocessor_config.json").write_text(json.dumps({"feature_size": 10}))
    config = config_with(tmp_path / "whisper")
    check_durations(config, with_lengths(480_000, 400), for_training)
    with pytest.raises(CorpusError) as raised:
        check_durations(config, with_lengths(480_001, 16_000, 640_000, 399), for_training)
    first, second, third = raised.value.problems
    assert "is 30.0 s long, must be at most 30 s for the encoder" in first
    assert "is 40.0 s long" in second
    assert "has 399 samples at 16 kHz, must have 400 or more (one frame of the encoder" in third


def test_the_shortest_utterance_is_the_receptive_field_of_the_encoder(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "wavlm")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"conv_kernel": [20, 3, 3, 3, 3, 2, 2]}))
    check_durations(config_with(folder), with_lengths(410), for_training=True)
    with pytest.raises(CorpusError, match="has 409 samples at 16 kHz, must have 410 or more"):
        check_durations(config_with(folder), with_lengths(409), for_training=True)


def test_an_audit_needs_no_encoder_and_no_hub(tmp_path: Path) -> None:
    for encoder in (tmp_path / "gone", "nobody/nothing"):
        check_durations(config_with(encoder), corpus(), for_training=False)
    with pytest.raises(EncoderError, match="no such folder"):
        check_durations(config_with(tmp_path / "gone"), corpus(), for_training=True)
