"""Encoders from folders: every family loads, heads are left out, and what does not fit is one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import HubertForCTC, Wav2Vec2ForPreTraining, WhisperForConditionalGeneration

from cvrunner.config.adaptation import FROZEN, adaptation_of
from cvrunner.config.sections import ModelConfig
from cvrunner.encoders.files import check_encoder, encoder_settings, find_encoder
from cvrunner.encoders.loading import build_encoder, load_backbone
from cvrunner.encoders.whisper import PaddedWhisperEncoder, WhisperEncoder
from cvrunner.errors import EncoderError
from tests.tiny_encoders import WAVEFORM, save_encoder, tiny_backbone, tiny_whisper

WHISPER = {"sampling_rate": 16000, "feature_size": 10, "hop_length": 160, "n_fft": 400}


def saved(folder: Path, model: Any, preprocessing: dict[str, Any] | None = None) -> Path:
    model.save_pretrained(folder)
    settings = {"do_normalize": False, "sampling_rate": 16000} if preprocessing is None else preprocessing
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kind", WAVEFORM)
def test_every_waveform_family_loads_as_it_was_saved(tmp_path: Path, kind: str) -> None:
    model = tiny_backbone(kind)
    files = find_encoder(str(saved(tmp_path / "model", model)))
    loaded = load_backbone(files)
    assert type(loaded) is type(model)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    encoder = build_encoder(files, ModelConfig(encoder=files.name), FROZEN, torch.float32)
    settings = encoder_settings(files.name, None)
    assert (encoder.depth, encoder.width) == (settings.depth, settings.width) == (3, 16)
    # The receptive field is the shortest waveform that gives a frame.
    assert settings.shortest_samples == encoder.shortest_samples == 400
    assert encoder.conv_features(torch.randn(400)).shape == (1, settings.front_end_width)
    assert encoder.frames(399) == 0


@pytest.mark.parametrize("prefixed", [False, True])
def test_whisper_loads_without_its_decoder(tmp_path: Path, prefixed: bool) -> None:
    model = tiny_whisper()
    whole = model
    if prefixed:
        whole = WhisperForConditionalGeneration(model.config)
        whole.model.load_state_dict(model.state_dict())
    files = find_encoder(str(saved(tmp_path / "model", whole, WHISPER)))
    loaded = load_backbone(files).state_dict()
    expected = model.encoder.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in expected.items())
    for window, family in (("unpadded", WhisperEncoder), ("30s", PaddedWhisperEncoder)):
        config = ModelConfig(encoder=files.name, whisper_window=window)  # type: ignore[arg-type]
        encoder = build_encoder(files, config, FROZEN, torch.float32)
        assert type(encoder) is family
        assert (encoder.shortest_samples, encoder.longest_samples) == (400, 480_000)
        assert encoder.conv_features(torch.randn(480_000))[:, :16].shape == (1500, 16)
        assert encoder.averaged_frames(400) == 1


def test_dropout_is_that_of_the_configuration(tmp_path: Path) -> None:
    files = find_encoder(str(saved(tmp_path / "model", tiny_whisper(), WHISPER)))
    assert load_backbone(files).dropout == 0.1
    config = load_backbone(files, 0.25).config
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.25, 0.25, 0.25)


def test_a_weight_of_the_encoder_among_those_of_a_head_is_not_overlooked(tmp_path: Path) -> None:
    config = tiny_backbone("hubert, post-norm").config
    config.update({"vocab_size": 5})
    folder = saved(tmp_path / "model", HubertForCTC(config))
    change(folder, lambda weights: weights.update({"hubert.encoder.more": torch.ones(3)}))
    with pytest.raises(EncoderError, match=r"1 weights of its files would not be used, first .*encoder\.more"):
        load_backbone(find_encoder(str(folder)))


def test_weights_in_shards_load_and_those_in_another_precision_are_left_alone(tmp_path: Path) -> None:
    whole, sharded = save_encoder(tmp_path / "whole"), tmp_path / "sharded"
    digest = find_encoder(str(whole)).digest
    load_backbone(find_encoder(str(whole))).save_pretrained(sharded, max_shard_size="10KB")
    (sharded / "preprocessor_config.json").write_text((whole / "preprocessor_config.json").read_text())
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    expected = load_backbone(find_encoder(str(whole))).state_dict()
    loaded = load_backbone(find_encoder(str(sharded))).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    (whole / "model.fp32-00001-of-00002.safetensors").write_bytes(b"another precision")
    assert find_encoder(str(whole)).digest == digest


def test_heads_are_left_out_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number, family in enumerate((Wav2Vec2ForPreTraining, HubertForCTC)):
        config = tiny_backbone(("wav2vec2, pre-norm", "hubert, post-norm")[number]).config
        if family is Wav2Vec2ForPreTraining:
            config.update({"codevector_dim": 4, "proj_codevector_dim": 4, "num_codevectors_per_group": 4})
        else:
            config.update({"vocab_size": 5})
        folder = saved(tmp_path / str(number), family(config))
        capfd.readouterr()
        load_backbone(find_encoder(str(folder)))
        assert capfd.readouterr() == ("", "")


def change(folder: Path, changes: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    changes(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def no_number(weights: dict[str, torch.Tensor]) -> None:
    weights["encoder.layers.1.feed_forward.output_dense.bias"][3] = torch.nan


NORM = "encoder.layer_norm.weight"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (no_number, r"1 weights are not finite, first encoder\.layers\.1\.feed_forward\.output_dense\.bias"),
        (lambda w: w.pop(NORM), r"1 weights are missing in its files, first encoder\.layer_norm\.weight"),
        (lambda w: w.update({NORM: torch.ones(3)}), rf"1 weights have another shape in its files, first {NORM}"),
        (lambda w: w.update({"encoder.more": torch.ones(3)}), r"1 weights of its files would not be used, first enc"),
    ],
)
def test_weights_that_do_not_fit_are_one_sentence_and_no_table(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: Callable[[dict[str, torch.Tensor]], object], rule: str
) -> None:
    folder = save_encoder(tmp_path / "wavlm")
    change(folder, changes)
    capfd.readouterr()
    with pytest.raises(EncoderError, match=rf"model\.encoder .*wavlm: {rule}.*config\.json that belongs"):
        load_backbone(find_encoder(str(folder)))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("file", "values", "rule"),
    [
        ("preprocessor_config.json", {"hop_length": 80}, r"100 frames per second \(2 x hop_length .* is 160\), must"),
        ("preprocessor_config.json", {"feature_size": 80}, r"num_mel_bins is 10 in config\.json, must be feature_size"),
        ("preprocessor_config.json", {"n_fft": 0}, r"n_fft is 0 in preprocessor_config\.json, must be a whole number"),
        ("config.json", {"encoder_layers": 2}, r"weights that would not be used, first encoder\.layers\.2"),
        ("config.json", {"d_model": 8}, r"q_proj\.weight has shape \[16, 16\], must be \[8, 8\]"),
        ("config.json", {"model_type": "whisperx"}, r"is a 'whisperx', must be one of"),
    ],
)
def test_a_whisper_that_does_not_fit_is_refused(tmp_path: Path, file: str, values: dict[str, Any], rule: str) -> None:
    folder = saved(tmp_path / "model", tiny_whisper(), WHISPER)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(EncoderError, match=rule):
        find_encoder(str(folder))


def test_spec_augment_is_refused_for_a_whisper(tmp_path: Path) -> None:
    folder = str(saved(tmp_path / "model", tiny_whisper(), WHISPER))
    with pytest.raises(EncoderError, match=r"mask_time_prob .* is 0, must be above 0"):
        check_encoder(folder, None, (), masks_input=True)
    config = ModelConfig(encoder=folder, freeze_speech_encoder=False, spec_augment=True)
    with pytest.raises(EncoderError, match=r"mask_time_prob .* is 0, must be above 0"):
        build_encoder(find_encoder(folder), config, adaptation_of(config), torch.float32)


@pytest.mark.parametrize("name", ["wavlm-ser", "ser_2", "w2v-emotion-rec", "wavlm-msp-podcast", "superb-hubert-er"])
def test_an_encoder_tuned_on_emotion_can_be_allowed_and_then_says_so(tmp_path: Path, name: str) -> None:
    folder = str(save_encoder(tmp_path / name))
    for check in (find_encoder, lambda folder: check_encoder(folder, None, ())):
        with pytest.raises(EncoderError, match=r"heard the test speakers.*model\.allow_tuned_encoder"):
            check(folder)
    check_encoder(folder, None, (), allow_tuned=True)
    assert str(find_encoder(folder, allow_tuned=True).tuned).startswith("matches ")


@pytest.mark.parametrize("name", ["laser-wavlm", "wavlm-user", "wavlm-base-plus", "server", "whisper-tiny.en"])
def test_other_names_are_nothing_to_allow(tmp_path: Path, name: str) -> None:
    assert find_encoder(str(save_encoder(tmp_path / name))).tuned is None
