"""Small corpora for tests: utterances without audio, and trees and manifests on disk with short noise."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from cvrunner.data.checks import Findings
from cvrunner.data.manifest import LabelTable, load_table
from cvrunner.data.rows import read_rows
from cvrunner.data.utterance import Corpus, Utterance, audio_digest, read_audio

DIMENSIONS = ("valence", "arousal")
SCALE = (1.0, 5.0)
DIALOGUES = ("F_impro01", "M_script01_1")


def utterance(name: str, **changes: object) -> Utterance:
    """Return an utterance named like `Ses01F_impro01_M003`; digest and labels are derived from the name."""
    dialogue, _, last = name.rpartition("_")
    digest = hashlib.sha256(name.encode()).hexdigest()
    scenario = dialogue[7:]
    values: dict[str, object] = {
        "id": name,
        "path": Path(f"{name}.wav"),
        "speaker": name[3:5] + last[0],
        "gender": last[0],
        "session": name[:5],
        "dialogue": dialogue,
        "turn": int(last[1:]),
        "scenario": scenario,
        "improvised": scenario.startswith("impro"),
        "valence": 1 + int(digest[:4], 16) % 9 / 2,
        "arousal": 1 + int(digest[4:8], 16) % 9 / 2,
        "dominance": None,
        "samples": 16_000,
        "audio_digest": digest,
    }
    return Utterance(**{**values, **changes})  # type: ignore[arg-type]


def corpus(
    sessions: int = 5,
    dialogues: Sequence[str] = DIALOGUES,
    turns: int = 4,
    name: str = "tiny",
    **changes: object,
) -> Corpus:
    """Return `sessions` x `dialogues` x `turns` utterances of alternating speakers; `changes` apply to each."""
    names = [
        f"Ses{session:02}{dialogue}_{'FM'[turn % 2]}{turn:03}"
        for session in range(1, sessions + 1)
        for dialogue in dialogues
        for turn in range(turns)
    ]
    return Corpus(tuple(utterance(name, **changes) for name in names), name, "header")


def write_noise(path: Path, seed: int, duration_s: float = 0.2, rate_hz: int = 16_000, channels: int = 1) -> None:
    """Write a WAV file of noise; each seed gives different noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (round(duration_s * rate_hz), channels)
    soundfile.write(path, np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32), rate_hz)


@dataclass(frozen=True)
class Turn:
    """A turn of a label file; `labels` and `raters` are written unchanged."""

    last: str
    start_s: float
    labels: str = "2.5000, 3.0000, 3.5000"
    raters: tuple[str, ...] = ()


TURNS = (Turn("F000", 1.0), Turn("M000", 2.5, "4.0000, 2.0000, 3.0000"))


def write_iemocap(
    root: Path, sessions: int = 3, dialogues: Mapping[str, Sequence[Turn]] | None = None, line_end: str = "\n"
) -> Path:
    """Write a tree like IEMOCAP's and return `root`. `dialogues`: turns by name without `Ses01` (`F_impro01`)."""
    seed = 0
    for number in range(1, sessions + 1):
        for name, turns in (dialogues or dict.fromkeys(DIALOGUES, TURNS)).items():
            dialogue = f"Ses{number:02}{name}"
            text = label_text(dialogue, turns).replace("\n", line_end)
            write_bytes(label_file(root, dialogue), text.encode())
            for turn in turns:
                seed += 1
                write_noise(wav_file(root, f"{dialogue}_{turn.last}"), seed)
    return root


def label_text(dialogue: str, turns: Sequence[Turn]) -> str:
    """Return the content of a label file."""
    lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
    for turn in turns:
        times = f"[{turn.start_s:.4f} - {turn.start_s + 0.2:.4f}]"
        lines += [f"{times}\t{dialogue}_{turn.last}\tneu\t[{turn.labels}]", "C-E2:\tNeutral;\t()"]
        lines += [*turn.raters, ""]
    return "\n".join(lines)


def label_file(root: Path, dialogue: str) -> Path:
    return root / f"Session{int(dialogue[3:5])}" / "dialog" / "EmoEvaluation" / f"{dialogue}.txt"


def wav_file(root: Path, name: str) -> Path:
    return root / f"Session{int(name[3:5])}" / "sentences" / "wav" / name.rpartition("_")[0] / f"{name}.wav"


def write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


Row = dict[str, object]


def manifest_rows(folder: Path, sessions: int = 3, turns: int = 2) -> list[Row]:
    """Return the rows of a valid manifest, after writing its audio into `folder`."""
    rows: list[Row] = []
    for session in range(1, sessions + 1):
        for turn in range(turns):
            name = f"s{session}t{turn}"
            write_noise(folder / "audio" / f"{name}.wav", 100 * session + turn)
            rows.append(
                {
                    "path": f"audio/{name}.wav",
                    "utterance": name,
                    "speaker": f"s{session}{'ab'[turn % 2]}",
                    "session": str(session),
                    "dialogue": f"d{session}",
                    "turn": turn,
                    "valence": 1.5 + turn,
                    "arousal": 2.5 + (session + turn) % 2,
                }
            )
    return rows


def csv_text(rows: Sequence[Row], delimiter: str = ",", columns: Sequence[str] | None = None) -> str:
    """Return rows as CSV; missing cells are empty."""
    names = list(columns or dict.fromkeys(name for row in rows for name in row))
    table = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    return "".join(delimiter.join(cells) + "\n" for cells in table)


def json_lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_manifest(path: Path, rows: Sequence[Row]) -> Path:
    """Write a manifest in the format of its suffix."""
    write_bytes(path, (json_lines(rows) if path.suffix == ".jsonl" else csv_text(rows)).encode())
    return path


def load_manifest(path: Path, *rules: Any) -> Corpus:
    """Return the corpus that a manifest lists; `rules`: further arguments of `load_table`, from `scale` on."""
    findings = Findings()
    table = LabelTable(read_rows(path, findings), path, path.parent, path.stem, "manifest")
    return load_table(table, findings, *rules)


def read_noise_corpus(folder: Path, like: Corpus) -> Corpus:
    """Return `like` with audio: 0.3 to 0.8 s of noise per utterance, louder with higher arousal."""
    folder.mkdir(parents=True, exist_ok=True)
    utterances = []
    for u in like.utterances:
        path = folder / f"{u.id}.wav"
        if not path.exists():
            random = np.random.default_rng(int(u.audio_digest[:8], 16))
            noise = random.normal(0, 0.02 * u.arousal, round(random.uniform(0.3, 0.8) * 16_000))
            soundfile.write(path, noise.astype(np.float32), 16_000)
        samples = read_audio(path)
        utterances.append(replace(u, path=path, samples=len(samples), audio_digest=audio_digest(samples)))
    return replace(like, utterances=tuple(utterances))


def sparse_wav(path: Path, duration_s: float, rate_hz: int = 16_000) -> None:
    """Write a long silent WAV file that takes no space on the disk."""
    size = round(duration_s * rate_hz) * 2
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate_hz, rate_hz * 2, 2, 16)
    head = struct.pack("<4sI4s", b"RIFF", size + 36, b"WAVE") + form + struct.pack("<4sI", b"data", size)
    path.write_bytes(head)
    os.truncate(path, len(head) + size)
