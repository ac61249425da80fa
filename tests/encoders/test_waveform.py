"""The written-out WavLM equals transformers', features do not depend on the batch, and frozen means frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cvrunner.encoders.encoder import Boundary
from cvrunner.encoders.files import find_encoder
from cvrunner.encoders.loading import load_backbone
from cvrunner.encoders.waveform import WaveformEncoder
from cvrunner.errors import EncoderError
from tests.tiny_encoders import FULL, MASKED, TOP_LAYER, layers_of, save_encoder, tiny_encoder, tiny_wavlm


@pytest.mark.parametrize("stable", [False, True])
def test_hidden_states_equal_those_of_transformers(stable: bool) -> None:
    torch.manual_seed(1)
    wavlm = tiny_wavlm(stable, layers=3).double().eval()
    waveform = torch.randn(9000, dtype=torch.float64)
    expected = wavlm(waveform[None], output_hidden_states=True)
    encoder = WaveformEncoder(wavlm, frame_rate_hz=50.0)
    conv = encoder.conv_features(waveform)
    states, lengths, _ = encoder(conv, torch.tensor([len(conv)]))
    assert lengths.tolist() == [len(conv)] == [encoder.frames(9000)]
    for layer in range(3):
        torch.testing.assert_close(states[:, layer], expected.hidden_states[layer][0])
    torch.testing.assert_close(states[:, 3], expected.last_hidden_state[0])


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("rate_hz", [50.0, 25.0, 12.5])
def test_an_utterance_has_the_same_states_alone_and_with_longer_batch_mates(stable: bool, rate_hz: float) -> None:
    encoder = tiny_encoder(stable, frame_rate_hz=rate_hz).eval()
    convs = [encoder.conv_features(torch.randn(samples)) for samples in (16000, 5000, 11111)]
    lengths = torch.tensor([len(c) for c in convs])
    together, n, _ = encoder(torch.cat(convs), lengths)
    for row, (conv, states) in enumerate(zip(convs, together.split(n.tolist()), strict=True)):
        alone, m, _ = encoder(conv, lengths[row : row + 1])
        assert n[row] == m[0] == encoder.averaged_frames([16000, 5000, 11111][row])
        torch.testing.assert_close(states, alone, atol=1e-5, rtol=1e-5)


def test_padded_waveforms_would_not_do_that() -> None:
    """The trap that conv features computed unpadded avoid: group norm sees the padding."""
    encoder = tiny_encoder().eval()
    short = torch.randn(5000)
    padded = torch.cat([short, torch.zeros(11000)])
    alone = encoder.conv_features(short)
    assert (encoder.conv_features(padded)[: len(alone)] - alone).abs().max() > 0.01


@pytest.mark.parametrize("samples", [400, 719, 720, 16000, 16001, 123457])
def test_the_length_formula_agrees_with_the_front_end(samples: int) -> None:
    encoder = tiny_encoder()
    assert encoder.frames(samples) == len(encoder.conv_features(torch.randn(samples)))


def test_frozen_stays_in_evaluation_mode_and_repeats_itself_bit_for_bit() -> None:
    encoder = WaveformEncoder(tiny_wavlm(hidden_dropout=0.5, attention_dropout=0.5)).train()
    assert not any(module.training for module in encoder.modules())
    conv = encoder.conv_features(torch.randn(8000))
    lengths = torch.tensor([len(conv)])
    first = encoder(conv, lengths).states
    assert torch.equal(first, encoder(conv, lengths)[0])
    assert not first.requires_grad


def test_unfrozen_trains_all_but_the_front_end() -> None:
    encoder = WaveformEncoder(tiny_wavlm(hidden_dropout=0.5), adaptation=FULL).train()
    assert encoder.backbone.encoder.training
    assert not encoder.backbone.feature_extractor.training
    conv = encoder.conv_features(torch.randn(8000))
    states = encoder(conv, torch.tensor([len(conv)])).states
    states.sum().backward()
    without = {n for n, p in encoder.named_parameters() if p.grad is None}
    assert {n for n in without if "feature_extractor" not in n} <= {"backbone.masked_spec_embed"}


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("layers", [None, (2, 0), (2,)])
def test_from_the_boundary_on_states_and_gradients_are_the_same(stable: bool, layers: tuple[int, ...] | None) -> None:
    encoder = tiny_encoder(stable, adaptation=TOP_LAYER, layers=layers)
    conv = [encoder.conv_features(torch.randn(samples)) for samples in (16000, 5000)]
    packed, lengths = torch.cat(conv), torch.tensor([len(one) for one in conv])
    found = []
    for from_boundary in (False, True):
        torch.manual_seed(1)  # no layer below the boundary draws anything for dropout
        encoder.eval()
        boundary = Boundary(encoder.to_boundary(packed, lengths), None)
        if encoder.layers_below:
            boundary = boundary._replace(mixed=layers_of(encoder(packed, lengths), encoder.layers_below))
        encoder.train().zero_grad()
        encoded = encoder.from_boundary(boundary, lengths) if from_boundary else encoder(packed, lengths)
        ((encoded.states**2).sum() + encoded.statistics.sum()).backward()
        found.append(
            [*(part.detach() for part in encoded), *(p.grad for p in encoder.backbone.encoder.layers[1].parameters())]
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_spec_augment_leaves_short_utterances_alone_and_masks_long_ones() -> None:
    wavlm = tiny_wavlm(mask_time_prob=0.9, mask_time_length=10, hidden_dropout=0.0, attention_dropout=0.0,
                       activation_dropout=0.0, feat_proj_dropout=0.0)  # fmt: skip
    encoder = WaveformEncoder(wavlm, adaptation=MASKED)
    for samples, changed in ((2000, False), (32000, True)):
        conv = encoder.conv_features(torch.randn(samples))
        lengths = torch.tensor([len(conv)])
        plain = encoder.eval()(conv, lengths).states
        torch.manual_seed(0)
        masked = encoder.train()(conv, lengths).states
        assert torch.equal(plain, masked) != changed


def test_normalisation_makes_the_volume_irrelevant() -> None:
    encoder = tiny_encoder(stable=True, normalize=True)
    waveform = torch.randn(4000)
    torch.testing.assert_close(
        encoder.conv_features(waveform), encoder.conv_features(7 * waveform), atol=1e-5, rtol=1e-4
    )


def test_layers_of_which_none_trains_are_refused() -> None:
    with pytest.raises(
        EncoderError, match=r"model\.layers 1: none up to there trains with model\.unfreeze_top_layers 1"
    ):
        tiny_encoder(adaptation=TOP_LAYER, layers=(0, 1))
    tiny_encoder(layers=(0, 1))


def test_layers_beyond_the_encoder_are_refused() -> None:
    with pytest.raises(EncoderError, match=r"model\.layers 5: the encoder has hidden states 0\.\.2"):
        tiny_encoder(layers=(0, 5))


class TestFiles:
    def test_a_saved_encoder_is_found_and_loads_equal(self, tmp_path: Path) -> None:
        files = find_encoder(str(save_encoder(tmp_path / "wavlm", normalize=True)))
        assert files.settings.normalize
        assert files == find_encoder(str(tmp_path / "wavlm"))
        torch.manual_seed(0)
        expected = tiny_wavlm().state_dict()
        loaded = load_backbone(files).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())

    def test_other_weights_have_another_digest(self, tmp_path: Path) -> None:
        files = find_encoder(str(save_encoder(tmp_path / "wavlm")))
        torch.manual_seed(1)
        tiny_wavlm().save_pretrained(tmp_path / "wavlm")
        assert find_encoder(str(tmp_path / "wavlm")).digest != files.digest

    @pytest.mark.parametrize(
        "name", ["superb/wavlm-base-plus-er", "someone/wavlm-large-IEMOCAP", "3loi/x", "audeering/wav2vec2"]
    )
    def test_encoders_tuned_on_emotion_are_refused(self, name: str) -> None:
        with pytest.raises(EncoderError, match="heard the test speakers"):
            find_encoder(name)

    def test_of_a_local_folder_the_name_counts_and_not_where_it_lies(self, tmp_path: Path) -> None:
        assert find_encoder(str(save_encoder(tmp_path / "iemocap" / "wavlm")))
        with pytest.raises(EncoderError, match="heard the test speakers"):
            find_encoder(str(save_encoder(tmp_path / "wavlm-iemocap")))

    def test_another_architecture_is_refused(self, tmp_path: Path) -> None:
        folder = save_encoder(tmp_path / "wavlm")
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"model_type": "wavlm"', '"model_type": "sew"'))
        with pytest.raises(EncoderError, match=r"is a 'sew', must be one of WavLM, wav2vec 2\.0"):
            find_encoder(str(folder))

    def test_a_missing_folder_and_pickled_weights_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(EncoderError, match="no such folder"):
            find_encoder(str(tmp_path / "nothing"))
        folder = save_encoder(tmp_path / "wavlm")
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(EncoderError, match="pickled weights are not loaded"):
            find_encoder(str(folder))

    def test_weights_that_are_not_finite_are_named(self, tmp_path: Path) -> None:
        folder = save_encoder(tmp_path / "wavlm")
        weights = load_file(folder / "model.safetensors")
        weights["encoder.layers.1.attention.q_proj.weight"][0, 0] = torch.inf
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(
            EncoderError, match=r"1 weights are not finite, first encoder\.layers\.1\.attention\.q_proj\.weight"
        ):
            load_backbone(find_encoder(str(folder)))

    def test_weights_that_are_not_all_there_are_refused(self, tmp_path: Path) -> None:
        folder = save_encoder(tmp_path / "wavlm")
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
        with pytest.raises(EncoderError, match=r"weights are missing in its files, first encoder\.layers\.2"):
            load_backbone(find_encoder(str(folder)))
