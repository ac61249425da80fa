"""`predict` as a command: means over the models, clean output, and what cannot be read is named."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cvrunner.api import Run
from cvrunner.errors import UsageError
from cvrunner.inference import command as predict_commands
from cvrunner.inference.emotion_model import EmotionModel
from tests.corpora import write_noise
from tests.end_to_end.programs import cvrunner

pytestmark = pytest.mark.filterwarnings("ignore")


def predict(run: Path, *files: Path, as_json: bool = False, by_window: bool = False, **options: Any) -> int:
    given: dict[str, Any] = {"condition": "frozen", "output": None, "window_s": None, "hop_s": None}
    given |= {"device": "cpu", "encoder": None, **options}
    return predict_commands.predict(run, files, as_json=as_json, by_window=by_window, **given)


@pytest.mark.end_to_end
def test_a_user_gets_a_table_and_nothing_else_on_standard_output(run: Run, home: Path, tmp_path: Path) -> None:
    write_noise(tmp_path / "audio" / "b.flac", 2, rate_hz=44_100, channels=2)
    write_noise(tmp_path / "audio" / "deeper" / "a.wav", 1, duration_s=16)
    (tmp_path / "notes.wav").write_text("no audio")
    typed = ("predict", run.path.name, tmp_path / "notes.wav", tmp_path / "audio")
    done = cvrunner(*typed, folder=home)
    assert done.returncode == 1
    table = pd.read_csv(io.StringIO(done.stdout))
    assert list(table.columns) == [
        "path", "duration_s", "valence", "valence_sd", "arousal", "arousal_sd", "windows", "models",
    ]  # fmt: skip
    assert [Path(path).name for path in table["path"]] == ["b.flac", "a.wav"]
    assert list(table["windows"]) == [1, 2]
    assert set(table["models"]) == {5}
    lines = done.stderr.splitlines()
    assert f"{run.path.name}: 5 models of" in lines[0]
    assert "mean validation CCC-Avg" in lines[0]
    assert lines[1].startswith("trained on synthetic speech: ")
    assert lines[2].startswith("longer than 15 s: the mean over windows")
    assert lines[3].startswith(f"error: {tmp_path / 'notes.wav'}: cannot be read as audio")
    assert len(lines) == 4


@pytest.mark.parametrize("condition", ["frozen", "unfrozen"])
def test_the_rating_is_the_mean_of_the_models_and_the_spread_their_sd(
    run: Run, audio: dict[str, Path], capsys: pytest.CaptureFixture[str], condition: str
) -> None:
    paths = [path for name, path in audio.items() if name.startswith("Ses02")][:6]
    assert predict(run.path, *paths, as_json=True, condition=condition) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["condition"] == condition
    assert [file["path"] for file in found["files"]] == [str(path) for path in paths]
    own = run.predictions.query("condition == @condition and fold == 2").set_index("utterance")
    for path, file in zip(paths, found["files"], strict=True):
        for dimension in ("valence", "arousal"):
            models = file[dimension]["models"]
            assert list(models) == [f"fold-{fold}/seed-0" for fold in (1, 2, 3, 4, 5)]
            assert models["fold-2/seed-0"] == pytest.approx(own.loc[path.stem, f"{dimension}_predicted"], abs=1e-4)
            assert file[dimension]["mean"] == pytest.approx(np.mean(list(models.values())))
            assert file[dimension]["sd"] == pytest.approx(np.std(list(models.values()), ddof=1))


def test_a_long_file_is_the_mean_of_its_windows_which_can_be_seen(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_noise(tmp_path / "long.wav", 3, duration_s=2.5)
    predict(run.path, tmp_path / "long.wav", window_s=1.0, hop_s=1.0)
    (row,) = pd.read_csv(io.StringIO(capsys.readouterr().out)).to_dict("records")
    assert (row["duration_s"], row["windows"]) == (2.5, 3)
    predict(run.path, tmp_path / "long.wav", window_s=1.0, hop_s=1.0, by_window=True)
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert [tuple(span) for span in table[["start_s", "end_s"]].to_numpy()] == [(0, 1), (1, 2), (1.5, 2.5)]
    assert table["valence"].mean() == pytest.approx(row["valence"], abs=2e-4)


def test_without_a_fold_the_others_speak_and_it_is_said(
    run: Run, audio: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = shutil.copytree(run.path, tmp_path / run.path.name)
    shutil.rmtree(part / "frozen" / "fold-2" / "seed-0" / "model")
    assert predict(part, next(iter(audio.values())), output=tmp_path / "out.csv") == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert "warning: without the models of frozen/fold-2/seed-0, which are missing in the run" in told.err
    assert list(pd.read_csv(tmp_path / "out.csv")["models"]) == [4]


def test_a_folder_without_audio_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no audio files in this folder"):
        predict_commands.audio_files([tmp_path])


def test_files_that_are_not_audio_are_counted_and_hidden_folders_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (
        "a.wav",
        "b.OPUS",
        "c.oga",
        "d.sph",
        "deeper/e.aif",
        ".hidden/f.wav",
        "notes.txt",
        "more.txt",
        "README",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = predict_commands.audio_files([tmp_path])
    assert [path.name for path in found] == ["a.wav", "b.OPUS", "c.oga", "d.sph", "e.aif"]
    assert "skipped, as their extension is none of audio: 2 .txt, 1 no extension" in capsys.readouterr().err


def test_a_file_that_is_too_short_or_cannot_be_rated_does_not_cost_the_others(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, short, odd = tmp_path / "good.wav", tmp_path / "short.wav", tmp_path / "odd.wav"
    write_noise(good, 1)
    write_noise(short, 1, duration_s=0.01)
    write_noise(odd, 2, duration_s=1.5)
    features = EmotionModel.features

    def fail(self: EmotionModel, waveform: Any) -> Any:
        if len(waveform) == 24_000:
            raise RuntimeError("no memory for this one")
        return features(self, waveform)

    monkeypatch.setattr(EmotionModel, "features", fail)
    assert predict(run.path, short, odd, good) == 1
    out, err = capsys.readouterr()
    assert [Path(path).name for path in pd.read_csv(io.StringIO(out))["path"]] == ["good.wav"]
    assert f"error: {short}: " in err
    assert f"error: {odd}: RuntimeError: no memory for this one" in err
