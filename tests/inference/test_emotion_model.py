"""A model loaded from its folder is the one that was trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from cvrunner.api import Run, load_model
from cvrunner.data.utterance import AudioError, read_audio
from cvrunner.errors import EncoderError, ResultsError, UsageError
from cvrunner.records.model_folder import FORMAT, ModelFolder
from tests.corpora import write_noise
from tests.tiny_encoders import save_encoder
from tests.trials import pick, tiny_trials, train

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-4
"""On a scale of 1 to 7: the same features, to float16; only batches of other sizes add up in another order."""


@pytest.mark.parametrize("condition", ["frozen", "unfrozen"])
def test_it_repeats_the_predictions_of_the_test_set(run: Run, audio: dict[str, Path], condition: str) -> None:
    table = run.predictions.query("condition == @condition and fold == 2")
    model = run.model(condition, fold=2)
    for _, row in table.iterrows():
        again = model.predict(read_audio(audio[row["utterance"]]))
        for dimension in ("valence", "arousal"):
            assert again[dimension] == pytest.approx(row[f"{dimension}_predicted"], abs=TOLERANCE)
    assert len(table) == 12


def test_with_some_layers_unfrozen_it_repeats_them_to_the_rounding_of_the_cache(tmp_path: Path) -> None:
    """Training reads float16 where the layers that train begin; here all layers run in float32."""
    trial = pick(tiny_trials(tmp_path, model={"unfreeze_top_layers": 1}), "unfrozen")
    train(trial, tmp_path)
    folder = tmp_path / "run" / trial.name
    model = load_model(folder / "model", device="cpu")
    for _, row in pd.read_csv(folder / "predictions.csv").iterrows():
        again = model.predict(read_audio(tmp_path / "audio" / f"{row['utterance']}.wav"))
        for dimension in ("valence", "arousal"):
            assert again[dimension] == pytest.approx(row[f"{dimension}_predicted"], abs=20 * TOLERANCE)


def test_in_a_dialogue_it_repeats_them_turn_after_turn(tmp_path: Path) -> None:
    trial = pick(tiny_trials(tmp_path, model={"protocol": "dialogue"}), "frozen")
    train(trial, tmp_path)
    folder = tmp_path / "run" / trial.name
    model = load_model(folder / "model", device="cpu")
    table = pd.read_csv(folder / "predictions.csv").set_index("utterance")
    for dialogue, turns in table.groupby("dialogue"):
        names = sorted(turns.index, key=lambda name: name[-3:])
        again = model.predict_dialogue([read_audio(tmp_path / "audio" / f"{name}.wav") for name in names])
        values = [[turn["valence"], turn["arousal"]] for turn in again]
        expected = table.loc[names, ["valence_predicted", "arousal_predicted"]]
        np.testing.assert_allclose(values, expected, atol=TOLERANCE, err_msg=str(dialogue))
    alone = model.predict(read_audio(tmp_path / "audio" / f"{names[-1]}.wav"))
    assert alone["valence"] != pytest.approx(values[-1][0], abs=TOLERANCE)


def test_any_rate_and_number_of_channels_is_heard_as_the_file_would_be(run: Run, tmp_path: Path) -> None:
    write_noise(tmp_path / "stereo.wav", seed=1, rate_hz=44_100, channels=2)
    samples, rate_hz = soundfile.read(tmp_path / "stereo.wav", dtype="float32")
    model = run.model("frozen", fold=1)
    assert model.predict(samples, rate_hz) == model.predict(read_audio(tmp_path / "stereo.wav", resample=True))


def test_samples_that_cannot_be_rated_are_refused(run: Run) -> None:
    model = run.model("frozen", fold=1)
    for samples, rule in (
        (np.sin(np.arange(399)), "must have 400"),
        (np.zeros(9999), "silent"),
        ([np.nan] * 999, "NaN"),
    ):
        with pytest.raises(AudioError, match=rule):
            model.predict(samples)


def test_an_encoder_that_was_moved_has_to_be_named_and_another_one_is_refused(
    run: Run, home: Path, tmp_path: Path
) -> None:
    folder = copied(run, tmp_path)
    config = ModelFolder(folder).config
    config.write_text(config.read_text().replace(str(home / "wavlm"), "/nowhere/wavlm"))
    with pytest.raises(EncoderError, match=r"/nowhere/wavlm: no such folder; .*`encoder`"):
        load_model(folder)
    shutil.copytree(home / "wavlm", tmp_path / "moved")
    samples = np.random.default_rng(0).normal(0, 0.1, 8000)
    assert load_model(folder, encoder=tmp_path / "moved").predict(samples) == run.model("frozen", 1).predict(samples)
    with pytest.raises(EncoderError, match="the model was trained on"):
        load_model(folder, encoder=save_encoder(tmp_path / "other", stable=True))


def test_a_model_of_format_1_is_read_with_its_names_of_weights(run: Run, tmp_path: Path) -> None:
    folder = ModelFolder(shutil.copytree(run.directory.trial("unfrozen", 1, 0).model.path, tmp_path / "model"))
    waveform = np.random.default_rng(0).normal(size=8000)
    expected = load_model(folder.path).predict(waveform)
    weights = {n.replace("encoder.backbone.", "encoder.wavlm."): w for n, w in load_file(folder.weights).items()}
    assert any(name.startswith("encoder.wavlm.") for name in weights)
    save_file(weights, folder.weights)
    folder.config.write_text(folder.config.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    assert load_model(folder.path).predict(waveform) == expected


def test_a_folder_that_is_not_whole_is_one_sentence(run: Run, tmp_path: Path) -> None:
    folder = ModelFolder(copied(run, tmp_path))
    weights = load_file(folder.weights)
    save_file({name: w for name, w in weights.items() if name != "head.bias"}, folder.weights)
    with pytest.raises(ResultsError, match=r"config\.json describes: head\.bias does not fit"):
        load_model(folder.path)
    folder.weights.write_bytes(b"spoilt")
    with pytest.raises(ResultsError, match=r"model\.safetensors: cannot be read"):
        load_model(folder.path)
    folder.config.write_text(folder.config.read_text().replace(f'"format": {FORMAT}', '"format": 99'))
    with pytest.raises(ResultsError, match="format 99 is of a newer cvrunner"):
        load_model(folder.path)
    folder.weights.unlink()
    with pytest.raises(ResultsError, match=r"no trained model here \(model\.safetensors missing\)"):
        load_model(folder.path)


def test_a_device_that_is_not_there_is_refused(run: Run) -> None:
    with pytest.raises(UsageError, match="device cuda:99: this machine has cpu"):
        run.model("frozen", 1, device="cuda:99")


def test_hugging_faces_own_reader_finds_the_scores_in_the_card(run: Run) -> None:
    card = ModelCard.load(run.directory.trial("unfrozen", 1, 0).model.card)
    result = run.directory.trial("unfrozen", 1, 0).result()
    assert result is not None
    assert card.data.library_name == "cvrunner"
    scores = {found.metric_name: found.metric_value for found in card.data.eval_results}
    assert scores["test CCC valence"] == result.test_ccc["valence"]
    assert scores["validation CCC arousal"] == result.validation_ccc["arousal"]
    for text in (result.split_digest, result.corpus_digest, result.encoder_digest, "see the encoder's card", "Not for"):
        assert text in card.text


def copied(run: Run, to: Path) -> Path:
    return shutil.copytree(run.directory.trial("frozen", 1, 0).model.path, to / "model")
