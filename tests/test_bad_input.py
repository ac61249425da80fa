"""Bad input of any kind gives one clear message, exit code 2, no traceback and no files."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

from cvrunner import cli
from cvrunner.data import utterance
from cvrunner.data.utterance import AudioError, read_audio
from tests.bad_input import BAD_WAV, LABELS, Build, audio, command, config, manifest, row, rows, settings, tree
from tests.bad_input_cases import CASES
from tests.corpora import csv_text, json_lines, manifest_rows, sparse_wav, write_bytes, write_noise


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with a home in it; an import of the Ray executor would fail."""
    for name in ("HOME", "CVRUNNER_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "cvrunner.orchestration.ray_executor", ModuleType("no Ray here"))
    return tmp_path


def files(folder: Path) -> set[tuple[str, int]]:
    """Return everything below a folder with the time of its last change."""
    found = [Path(where) / name for where, *names in os.walk(folder) for some in names for name in some]
    return {(str(path), path.lstat().st_mtime_ns) for path in found}


def run(line: list[str]) -> int | str | None:
    """Run a command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main(line)
    return ended.value.code


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_clear_message_before_anything_is_written(
    case: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, message = CASES[case]
    line = build(place)
    before = files(place)
    capsys.readouterr()
    code = run(line)
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert re.search(message, err), err
    assert (code, out) == (2, "")
    assert files(place) == before


BY_PROCESS = ("config: a mistyped key", "run: fold 6 of the demo", "audio: a pipe", "encoder: pickled weights alone")


@pytest.mark.parametrize("case", BY_PROCESS)
def test_a_separate_process_refuses_it_too(case: str, place: Path) -> None:
    build, message = CASES[case]
    line = build(place)
    before = files(place)
    ended = subprocess.run(
        [sys.executable, "-m", "cvrunner", *line],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.match(f"error: (?s:.*){message}", ended.stderr), ended.stderr
    assert files(place) == before


def table(spell: Callable[[str], bytes]) -> Build:
    """Build a valid manifest in another spelling."""
    return lambda folder: manifest(spell(csv_text(manifest_rows(folder / "corpus"))))(folder)


def foreign(folder: Path) -> list[str]:
    """Build a valid manifest with spaces and non-ASCII letters in files, folders and names."""
    home = folder / "mein Körper"
    good = manifest_rows(home)
    for one in good:
        old = home / str(one["path"])
        one |= {"path": f"audio/ü {old.stem} 声.wav", "speaker": f"Zoë {one['speaker']} 張"}
        old.rename(home / str(one["path"]))
    write_bytes(home / "表 1.jsonl", json_lines(good).encode())
    return command(root="mein Körper/表 1.jsonl")


def link_to_audio(path: Path) -> None:
    target = path.parent / "elsewhere.wav"
    write_noise(target, 9)
    path.symlink_to(target)


def piped(path: Path) -> None:
    """Write a WAV file as ffmpeg and sox write it to a pipe: without a length in the header."""
    write_noise(path, 9)
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 4 + content[8:40] + b"\xff" * 4 + content[44:])


def flac(path: Path) -> None:
    soundfile.write(path, np.random.default_rng(9).normal(0, 0.1, 3200), 16_000, format="FLAC")


def loop_in_tree(root: Path) -> None:
    (root / "Session1" / "sentences" / "wav" / "loop").symlink_to(root)


FINE: dict[str, Build] = {
    "a byte order mark": table(lambda text: b"\xef\xbb\xbf" + text.encode()),
    "semicolons": table(lambda text: text.replace(",", ";").encode()),
    "line ends of Windows": table(lambda text: text.replace("\n", "\r\n").encode()),
    "JSON lines": rows(lambda _: None, name="a.jsonl"),
    "other languages and spaces": foreign,
    "an absolute path": lambda folder: row(path=str(folder / BAD_WAV))(folder),
    "a path with dots inside the folder": row(path="audio/../audio/./s2t0.wav"),
    "a link to a file": audio(link_to_audio),
    "ten minutes": audio(lambda path: write_noise(path, 9, 600)),
    "8 kHz, stereo, resampled": audio(lambda path: write_noise(path, 9, 1, 8000, 2), "corpus.resample=true"),
    "FLAC": audio(flac),
    "a WAV file without a length in its header": audio(piped),
    "exponents": settings("train.lr=1e-4", "train.encoder_lr=1E-05"),
    "IEMOCAP of four sessions": tree(lambda _: None, 4),
    "a link in a circle in IEMOCAP": tree(loop_in_tree),
}


@pytest.mark.parametrize("case", FINE)
def test_unusual_but_good_input_is_accepted(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = FINE[case](place)
    assert run(["audit", *line[1:]]) == 0
    assert "Leaks: none" in capsys.readouterr().out


def test_long_audio_is_refused_by_its_header_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the audio was read")

    monkeypatch.setattr(utterance.soundfile.SoundFile, "read", never)
    sparse_wav(place / "long.wav", 3600)
    with pytest.raises(AudioError, match="is 3600 s long, must be at most 600 s"):
        read_audio(place / "long.wav", resample=True)


@pytest.mark.parametrize("name", ["x.wav", "x.flac", "x.raw", "x"])
def test_the_name_of_an_audio_file_does_not_matter(place: Path, name: str) -> None:
    write_noise(place / "good.wav", 1)
    (place / "good.wav").rename(place / name)
    assert len(read_audio(place / name)) == 3200


@pytest.mark.parametrize("name", ["audio", "manifest", "labels", "config"])
def test_a_file_without_read_permission_is_reported(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The refusal is simulated, since root may read everything."""
    closed = {"audio": "s2t0.wav", "manifest": "table.csv", "labels": f"{LABELS}.txt", "config": "config.yaml"}[name]
    build = {"labels": tree(lambda _: None), "config": config("")}.get(name, settings())
    line = build(place)
    before, plain = files(place), Path.open

    def refuse(path: Path, *how: Any, **more: Any) -> Any:
        if path.name == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return plain(path, *how, **more)

    monkeypatch.setattr(Path, "open", refuse)
    assert run(line) == 2
    assert re.search(rf"error: (?s:.*){closed}: (?s:.*)cannot be read.*: Permission denied", capsys.readouterr().err)
    assert files(place) == before
