"""One utterance of a corpus, and its audio.

Audio is 16 kHz mono throughout; `T` is the number of samples.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import soxr

from cvrunner.data.audio import (
    UNCHECKED,
    Floats,
    Note,
    decoded_problem,
    examine_signal,
    inspect_container,
)
from cvrunner.files import is_transient, patiently
from cvrunner.text import plural

SAMPLE_RATE_HZ = 16_000
LONGEST_S = 600.0
"""Maximum duration. The longest turn of IEMOCAP has 34 s, and the memory of attention grows with its square."""
SHORTEST_SAMPLES = 400
"""The receptive field of one frame of all published encoders of these families."""
UNKNOWN_FRAMES = 2**62
"""libsndfile's length of a stream that does not state one is above this."""
DIMENSIONS = ("valence", "arousal", "dominance")
PARTS = ("train", "validation", "test")
Rater = tuple[float | None, float | None, float | None]
"""Valence, arousal and dominance by one rater; None if not given."""


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


def read_audio(path: Path, resample: bool = False, longest_s: float = LONGEST_S) -> Floats:
    """Return the samples `[T]` of a 16 kHz mono audio file, in -1..1.

    With `resample`, any sample rate and number of channels is converted. Raises AudioError if the file is missing,
    unreadable, incomplete, too long, empty, without speech, not finite, or not 16 kHz mono.
    """
    return read_with_notes(path, resample, longest_s)[0]


def read_with_notes(path: Path, resample: bool = False, longest_s: float = LONGEST_S) -> tuple[Floats, list[Note]]:
    """As `read_audio`, and the warnings about the file: its kind of container, silent channels, low level, clipping."""
    samples, rate_hz, subtype, notes = _decode(path, resample, longest_s)
    mono, more = _converted(samples, rate_hz, subtype)
    return mono, notes + more


def mono_16khz(samples: Floats, rate_hz: int) -> Floats:
    """Convert `[T, channels]` at any rate to `[T]` at 16 kHz.

    Raises AudioError if the samples are none, hold no speech or are not finite.
    """
    return _converted(samples, rate_hz, "")[0]


def _converted(samples: Floats, rate_hz: int, subtype: str) -> tuple[Floats, list[Note]]:
    if not len(samples):
        raise AudioError("holds no audio")
    # Before channels are averaged: what is wrong with one of them shows there alone.
    problem, notes = examine_signal(samples, subtype)
    if problem:
        raise AudioError(problem)
    # Channels as rows: along an axis of two values, numpy takes 13 times as long.
    mono = np.ascontiguousarray(samples.T).mean(axis=0) if samples.shape[1] > 1 else samples[:, 0]
    if rate_hz != SAMPLE_RATE_HZ:
        mono = soxr.resample(mono, rate_hz, SAMPLE_RATE_HZ)
        # Sound above 8 kHz alone is gone now.
        if len(mono) and (problem := examine_signal(mono[:, None])[0]):
            raise AudioError(f"{problem}, after conversion to 16 kHz")
    return np.ascontiguousarray(mono, dtype=np.float32), notes


def check_length(samples: Floats, shortest: int = SHORTEST_SAMPLES, longest: int | None = None) -> None:
    """Raise AudioError if `[T]` at 16 kHz has less or more samples than an encoder can take."""
    if len(samples) < shortest:
        raise AudioError(
            f"has {len(samples)} samples at 16 kHz, must have {shortest} or more (one frame of the encoder)"
        )
    if longest is not None and len(samples) > longest:
        seconds, limit = len(samples) / SAMPLE_RATE_HZ, longest / SAMPLE_RATE_HZ
        raise AudioError(f"is {seconds:.1f} s long, must be at most {limit:g} s for this encoder: split it")


def audio_digest(samples: Floats) -> str:
    """Return the SHA-256 of samples `[T]`."""
    return hashlib.sha256(samples.tobytes()).hexdigest()


@patiently
def _decode(path: Path, resample: bool, longest_s: float) -> tuple[Floats, int, str, list[Note]]:
    """Return all channels `[T, channels]` of a file, its sample rate in Hz, its encoding, and warnings."""
    # Opening a pipe would wait for ever.
    if not os.path.isfile(path):
        raise AudioError(_why_no_file(path))
    try:
        with path.open("rb", buffering=0) as file:
            container = inspect_container(file.fileno(), os.fstat(file.fileno()).st_size)
            if container.problem:
                raise AudioError(container.problem)
            source: int | io.BytesIO = file.fileno()
            if container.patches or container.end:
                content = bytearray(file.read()[: container.end])
                for at, patch in container.patches:
                    content[at : at + len(patch)] = patch
                source = io.BytesIO(content)
            with soundfile.SoundFile(source, closefd=False) as sound:
                known = sound.frames < UNKNOWN_FRAMES
                frames = sound.frames * known
                # Before reading the samples: hours of audio must not fill the memory.
                _check_header(sound.samplerate, sound.channels, frames, resample, longest_s)
                if known and sound.seekable():
                    samples = sound.read(dtype="float32", always_2d=True)
                else:
                    samples = _read_blocks(sound, longest_s)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip(" .") or "the decoder stopped within the file, which is damaged or truncated"
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
    if problem := decoded_problem(container, samples, sound.subtype):
        raise AudioError(problem)
    notes = []
    if sound.format in UNCHECKED:
        notes.append(("audio files in a format that does not show whether they are complete", sound.format))
    return samples, sound.samplerate, sound.subtype, notes


def _read_blocks(sound: soundfile.SoundFile, longest_s: float) -> Floats:
    """Return `[T, channels]` of a file whose length is not known before its end."""
    # soundfile would seek after each block, which fails at the unknown end; it has no public way to stop it.
    sound._info.seekable = 0
    blocks = [np.zeros((0, sound.channels), dtype=np.float32)]
    while len(block := sound.read(sound.samplerate, dtype="float32", always_2d=True)):
        blocks.append(block)
        # Blocks of a second each, after the empty one.
        if len(blocks) > longest_s + 2:
            break
    samples = np.concatenate(blocks)
    _check_header(sound.samplerate, sound.channels, len(samples), True, longest_s)
    return samples


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
