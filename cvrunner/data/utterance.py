"""One utterance of a corpus, and its audio.

Audio is 16 kHz mono throughout; `T` is the number of samples.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from cvrunner.files import is_transient, patiently
from cvrunner.text import plural

SAMPLE_RATE_HZ = 16_000
LONGEST_S = 600.0
"""Maximum duration. The longest turn of IEMOCAP has 34 s, and the memory of attention grows with its square."""
SHORTEST_SAMPLES = 400
"""The receptive field of one frame of all published encoders of these families."""
DIMENSIONS = ("valence", "arousal", "dominance")
PARTS = ("train", "validation", "test")
Rater = tuple[float, float, float | None]
"""Valence, arousal and dominance by one rater."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UtteranceInfo:
    """One turn of a dialogue as the corpus describes it, without labels and audio."""

    id: str
    path: Path
    speaker: str
    gender: str | None
    """`F`, `M`, or None if unknown."""
    session: str
    dialogue: str
    scenario: str | None
    """Scene that is acted or talked about, with the same name in every session; None if unknown."""
    improvised: bool | None
    """False: scripted; None: unknown."""
    raters: dict[str, Rater] = field(default_factory=dict)
    """Ratings by rater (`E1`, ...). Empty if the corpus has no individual ratings."""
    part: str | None = None
    """`train`, `validation` or `test` if the corpus defines a split, else None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Utterance(UtteranceInfo):
    """One turn of a dialogue, checked. Labels are on the corpus's rating scale."""

    turn: int
    """Position in the dialogue by time, from 0."""
    valence: float
    arousal: float
    dominance: float | None
    samples: int
    """Length at 16 kHz."""
    audio_digest: str
    """SHA-256 of the 16 kHz mono samples."""

    @property
    def duration_s(self) -> float:
        return self.samples / SAMPLE_RATE_HZ

    def label(self, dimension: str) -> float | None:
        """Return the label of a dimension."""
        value: float | None = getattr(self, dimension)
        return value


@dataclass(frozen=True)
class Corpus:
    """A loaded corpus: utterances sorted by session, dialogue and turn, and the warnings of the loader."""

    utterances: tuple[Utterance, ...]
    name: str
    labels: str
    """The label variant."""
    synthetic: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def sessions(self) -> tuple[str, ...]:
        """Names of the sessions in the order of their numbers: 2 before 10."""
        return tuple(sorted({u.session for u in self.utterances}, key=natural_order))

    @property
    def digest(self) -> str:
        """SHA-256 of everything that training sees of the utterances: names, labels, audio."""
        total = hashlib.sha256()
        for u in self.utterances:
            row = (u.id, u.speaker, u.session, u.dialogue, u.turn, u.valence, u.arousal, u.dominance, u.audio_digest)
            total.update(repr(row).encode())
        return total.hexdigest()

    def describe(self) -> str:
        """Return one line with name, sizes and label variant."""
        hours = sum(u.duration_s for u in self.utterances) / 3600
        speakers = len({u.speaker for u in self.utterances})
        dialogues = len({u.dialogue for u in self.utterances})
        made = "synthetic, " if self.synthetic else ""
        return (
            f"{self.name} ({made}{len(self.utterances)} utterances, {hours:.2f} h, {len(self.sessions)} sessions, "
            f"{speakers} speakers, {dialogues} dialogues, labels: {self.labels})"
        )


def natural_order(name: str) -> tuple[tuple[int, str], ...]:
    """Return a sort key that compares digits as numbers: `Session2` before `Session10`."""
    # The name itself comes last, so that `s1` and `s01` are ordered too.
    pieces = [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]
    return (*pieces, (-1, name))


class AudioError(Exception):
    """Audio breaks a rule; the message gives the rule and the remedy, without the name of the file."""


def read_audio(path: Path, resample: bool = False, longest_s: float = LONGEST_S) -> npt.NDArray[np.float32]:
    """Return the samples `[T]` of a 16 kHz mono WAV or FLAC file, in -1..1.

    With `resample`, any sample rate and number of channels is converted. Raises AudioError if the file is missing,
    unreadable, truncated, too long, empty, silent, not finite, or not 16 kHz mono.
    """
    return mono_16khz(*_decode(path, resample, longest_s))


def mono_16khz(samples: npt.NDArray[np.float32], rate_hz: int) -> npt.NDArray[np.float32]:
    """Convert `[T, channels]` at any rate to `[T]` at 16 kHz. Raises AudioError if empty, silent or not finite."""
    mono = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
    if not len(mono):
        raise AudioError("holds no audio")
    if not np.isfinite(mono).all():
        raise AudioError("holds NaN or infinite samples")
    if rate_hz != SAMPLE_RATE_HZ:
        mono = soxr.resample(mono, rate_hz, SAMPLE_RATE_HZ)
    # A silent recording is a broken one; no turn of a dialogue is.
    if not np.any(np.abs(mono) > 1e-5):
        raise AudioError("is silent (no sample above 1e-5)")
    return np.ascontiguousarray(mono, dtype=np.float32)


def check_length(
    samples: npt.NDArray[np.float32], shortest: int = SHORTEST_SAMPLES, longest: int | None = None
) -> None:
    """Raise AudioError if `[T]` at 16 kHz has less or more samples than an encoder can take."""
    if len(samples) < shortest:
        raise AudioError(
            f"has {len(samples)} samples at 16 kHz, must have {shortest} or more (one frame of the encoder)"
        )
    if longest is not None and len(samples) > longest:
        seconds, limit = len(samples) / SAMPLE_RATE_HZ, longest / SAMPLE_RATE_HZ
        raise AudioError(f"is {seconds:.1f} s long, must be at most {limit:g} s for this encoder: split it")


def audio_digest(samples: npt.NDArray[np.float32]) -> str:
    """Return the SHA-256 of samples `[T]`."""
    return hashlib.sha256(samples.tobytes()).hexdigest()


@patiently
def _decode(path: Path, resample: bool, longest_s: float) -> tuple[npt.NDArray[np.float32], int]:
    """Return all channels `[T, channels]` of a file, and its sample rate in Hz."""
    # Opening a pipe would wait for ever.
    if not os.path.isfile(path):
        raise AudioError(_why_no_file(path))
    try:
        with path.open("rb", buffering=0) as file:
            head, size = file.read(8), os.fstat(file.fileno()).st_size
            file.seek(0)
            # libsndfile reads a truncated WAV file without complaint. Programs that write to a pipe put a number near
            # 2 or 4 GiB into the header, and some count the first 8 bytes or a padding byte, hence the margins.
            promised = int.from_bytes(head[4:], "little") + 8
            if head.startswith(b"RIFF") and size + 16 < promised < 0x7FFF0000:
                raise AudioError(f"is truncated: it has {size} of {promised} bytes; copy it again")
            with soundfile.SoundFile(file.fileno(), closefd=False) as sound:
                # Before reading the samples: hours of audio must not fill the memory.
                _check_header(sound.samplerate, sound.channels, sound.frames, resample, longest_s)
                samples = sound.read(dtype="float32", always_2d=True)
                frames = sound.frames
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip(" .")
        raise AudioError(f"cannot be read as audio: {reason}; must be a WAV or FLAC file") from None
    except (soundfile.SoundFileError, ValueError) as error:
        raise AudioError(f"cannot be read as audio: {error}; must be a WAV or FLAC file") from None
    except OSError as error:
        # `patiently` tries again.
        if is_transient(error):
            raise
        raise AudioError(f"cannot be read: {error.strerror}") from None
    if len(samples) < frames:
        raise AudioError(f"is truncated: it has {len(samples)} of {frames} samples; copy it again")
    return samples, sound.samplerate


def _why_no_file(path: Path) -> str:
    if os.path.exists(path):
        return "is not a file but a folder, a pipe or a device"
    if os.path.islink(path):
        return "is a symbolic link that leads nowhere"
    return "is missing: there is no such audio file"


def _check_header(rate_hz: int, channels: int, frames: int, resample: bool, longest_s: float) -> None:
    if (rate_hz, channels) != (SAMPLE_RATE_HZ, 1) and not resample:
        raise AudioError(
            f"{rate_hz} Hz with {plural(channels, 'channel')}, must be 16000 Hz mono: convert with "
            "`sox IN -r 16000 -c 1 OUT`, or set corpus.resample: true"
        )
    if frames > longest_s * rate_hz:
        raise AudioError(
            f"is {frames / rate_hz:.0f} s long, must be at most {longest_s:g} s: split it into one file per utterance"
        )
