"""One utterance of a corpus, and reading its audio.

Audio is 16 kHz mono throughout; `T` stands for samples.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile

from cvrunner.files import is_transient, patiently

SAMPLE_RATE_HZ = 16_000
LONGEST_S = 600.0
"""Longer audio is refused unread: the longest turn of IEMOCAP has 34 s, and memory grows with the square of it."""
SHORTEST_SAMPLES = 400
"""The receptive field of one WavLM frame."""
DIMENSIONS = ("valence", "arousal", "dominance")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One turn of a dialogue. Labels are on the corpus's rating scale; `dominance` may be None."""

    id: str
    path: Path
    speaker: str
    gender: str | None
    """`F`, `M`, or None where the corpus does not say."""
    session: str
    dialogue: str
    turn: int
    """Position in the dialogue, from 0, by time."""
    scenario: str | None
    """What is acted or talked about, the same name in every session; None where the corpus has none."""
    improvised: bool | None
    """False: scripted. None where the corpus does not say."""
    valence: float
    arousal: float
    dominance: float | None
    samples: int
    """Length at 16 kHz."""
    audio_digest: str
    """SHA-256 of the 16 kHz mono samples."""
    raters: dict[str, tuple[float, float, float | None]] = field(default_factory=dict)
    """By rater (`E1`, ...): valence, arousal, dominance. Empty where the corpus has no single ratings."""
    part: str | None = None
    """`train`, `validation` or `test` where the corpus has a split of its own."""

    @property
    def duration_s(self) -> float:
        return self.samples / SAMPLE_RATE_HZ

    def label(self, dimension: str) -> float | None:
        """The label of a dimension by name."""
        value: float | None = getattr(self, dimension)
        return value


@dataclass(frozen=True)
class Corpus:
    """What a loader returns: utterances by session, dialogue and turn, and what it had to say about them."""

    utterances: tuple[Utterance, ...]
    name: str
    labels: str
    """The label variant."""
    synthetic: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def sessions(self) -> tuple[str, ...]:
        """In order of their numbers: 2 before 10."""
        return tuple(sorted({u.session for u in self.utterances}, key=natural_order))

    @property
    def digest(self) -> str:
        """SHA-256 over what training sees of every utterance: names, labels, audio."""
        total = hashlib.sha256()
        for u in self.utterances:
            row = (u.id, u.speaker, u.session, u.dialogue, u.turn, u.valence, u.arousal, u.dominance, u.audio_digest)
            total.update(repr(row).encode())
        return total.hexdigest()

    def describe(self) -> str:
        """One line: name, sizes, label variant."""
        hours = sum(u.duration_s for u in self.utterances) / 3600
        speakers = len({u.speaker for u in self.utterances})
        dialogues = len({u.dialogue for u in self.utterances})
        made = "synthetic, " if self.synthetic else ""
        return (
            f"{self.name} ({made}{len(self.utterances)} utterances, {hours:.2f} h, {len(self.sessions)} sessions, "
            f"{speakers} speakers, {dialogues} dialogues, labels: {self.labels})"
        )


def natural_order(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key that takes digits as numbers: `Session2` before `Session10`."""
    # The name comes last, so that `s1` and `s01` have an order too.
    pieces = [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]
    return (*pieces, (-1, name))


class AudioError(Exception):
    """Audio breaks a rule; the message is the rule and what to do, without the file's name."""


def read_audio(path: Path, resample: bool = False, longest_s: float = LONGEST_S) -> npt.NDArray[np.float32]:
    """The samples of a 16 kHz mono WAV or FLAC file, `[T]` in -1..1; with `resample`, of any rate and channels.

    Raises AudioError for a file that is missing, cannot be read, is cut off, too long, empty, silent, not finite, or
    not 16 kHz mono.
    """
    return mono_16khz(*_decoded(path, resample, longest_s))


def mono_16khz(samples: npt.NDArray[np.float32], rate_hz: int) -> npt.NDArray[np.float32]:
    """All channels `[T, channels]` at any rate to `[T]` at 16 kHz. Raises AudioError: empty, silent, not finite."""
    mono = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
    if not len(mono):
        raise AudioError("holds no audio")
    if not np.isfinite(mono).all():
        raise AudioError("holds NaN or infinite samples")
    if rate_hz != SAMPLE_RATE_HZ:
        import soxr

        mono = soxr.resample(mono, rate_hz, SAMPLE_RATE_HZ)
    if not np.any(np.abs(mono) > 1e-5):
        raise AudioError("is silent (no sample above 1e-5)")
    return np.ascontiguousarray(mono, dtype=np.float32)


@patiently
def _decoded(path: Path, resample: bool, longest_s: float) -> tuple[npt.NDArray[np.float32], int]:
    """All channels `[T, channels]` of a file and its rate; what its header tells is checked before the rest is read."""
    # Opening a pipe would wait for ever.
    if not os.path.isfile(path):
        raise AudioError(_why_no_file(path))
    try:
        with path.open("rb", buffering=0) as file:
            _refuse_cut_off(file)
            with soundfile.SoundFile(file.fileno(), closefd=False) as sound:
                _check_header(sound.samplerate, sound.channels, sound.frames, resample, longest_s)
                samples = sound.read(dtype="float32", always_2d=True)
                frames = sound.frames
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip(" .")
        raise AudioError(f"cannot be read as audio: {reason}; must be a WAV or FLAC file") from None
    except (soundfile.SoundFileError, ValueError) as error:
        raise AudioError(f"cannot be read as audio: {error}; must be a WAV or FLAC file") from None
    except OSError as error:
        if is_transient(error):
            raise
        raise AudioError(f"cannot be read: {error.strerror}") from None
    if len(samples) < frames:
        raise AudioError(f"is cut off: {len(samples)} of {frames} samples are there; copy it again")
    return samples, sound.samplerate


def _why_no_file(path: Path) -> str:
    if os.path.exists(path):
        return "is no file but a folder, a pipe or a device"
    if os.path.islink(path):
        return "is a symbolic link that leads nowhere"
    return "is missing: there is no such audio file"


def _refuse_cut_off(file: BinaryIO) -> None:
    """Raise AudioError where a WAV file is shorter than its header says; libsndfile reads what is there in silence."""
    head = file.read(8)
    file.seek(0)
    promised, there = int.from_bytes(head[4:], "little") + 8, os.fstat(file.fileno()).st_size
    # Programs that write to a pipe put a number near 2 or 4 GiB; some count the 8 bytes before it, or a padding byte.
    if head.startswith(b"RIFF") and there + 16 < promised < 0x7FFF0000:
        raise AudioError(f"is cut off: {there} of {promised} bytes are there; copy it again")


def _check_header(rate_hz: int, channels: int, frames: int, resample: bool, longest_s: float) -> None:
    if (rate_hz, channels) != (SAMPLE_RATE_HZ, 1) and not resample:
        raise AudioError(
            f"{rate_hz} Hz with {channels} channel{'s' if channels > 1 else ''}, must be 16000 Hz mono: convert with "
            "`sox IN -r 16000 -c 1 OUT`, or set corpus.resample: true"
        )
    if frames > longest_s * rate_hz:
        raise AudioError(
            f"is {frames / rate_hz:.0f} s long, must be at most {longest_s:g} s: cut it into one file an utterance"
        )


def check_length(samples: npt.NDArray[np.float32]) -> None:
    """Raise AudioError where `[T]` at 16 kHz is too short for a model."""
    if len(samples) < SHORTEST_SAMPLES:
        raise AudioError(
            f"has {len(samples)} samples at 16 kHz, must have {SHORTEST_SAMPLES} or more (one WavLM frame)"
        )


def audio_digest(samples: npt.NDArray[np.float32]) -> str:
    """SHA-256 of samples `[T]`."""
    return hashlib.sha256(samples.tobytes()).hexdigest()
