"""Speech from text by espeak-ng, through ctypes: only for demo material, never for a result about people.

The library comes with the `espeakng-loader` wheel (extra `demo`) and is loaded at first use. English text in the same
voice gives the same samples, in any process and after any other sentence. espeak's own voices do not: their flutter
and roughness carry over from one sentence to the next, and their breath is unseeded noise. So a voice here is a
language plus a `Timbre`, written as a voice variant without any of these into a private copy of the data folder. In
languages with a trilled r a little of the previous sentence remains; there, the same sequence of sentences gives the
same samples.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr

from cvrunner.data.utterance import SAMPLE_RATE_HZ
from cvrunner.errors import ConfigError

VOICES = "cvrunner-voices-"
# Constants of espeak-ng's speak_lib.h.
_SYNCHRONOUS = 2
_DO_NOT_EXIT = 0x8000
_UTF8 = 1
_RATE, _VOLUME, _PITCH, _PITCH_RANGE = 1, 2, 3, 4
_QUIET = 2e-3
"""Amplitude of silence."""
_MARGIN_S = 0.05
"""Silence kept at both ends."""


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True, slots=True)
class Timbre:
    """The sound of a speaker, apart from the way a sentence is spoken."""

    low_hz: int
    """Lowest pitch at the default setting."""
    high_hz: int
    """Highest pitch at the default setting."""
    formants_percent: tuple[int, int, int] = (100, 100, 100)
    """Frequencies of the first three formants, relative to espeak's. Above 100: a shorter vocal tract."""

    @property
    def name(self) -> str:
        """Name of espeak's voice variant and of its file."""
        # A leading digit would mean a built-in variant.
        return "-".join(map(str, ("voice", self.low_hz, self.high_hz, *self.formants_percent)))

    def variant(self) -> str:
        """Return the content of espeak's voice variant file."""
        formants = [f"formant {n} {percent} 100 100" for n, percent in enumerate(self.formants_percent, start=1)]
        head = ["language variant", f"name {self.name}", f"pitch {self.low_hz} {self.high_hz}"]
        # Both would carry over from one sentence to the next.
        head += ["flutter 0", "roughness 0"]
        return "\n".join([*head, *formants]) + "\n"


@dataclass(frozen=True, slots=True)
class Voice:
    """A speaker and a way of speaking."""

    language: str
    """Language as espeak names it, such as `en-us`."""
    timbre: Timbre
    rate_wpm: int = 175
    """Words per minute, 80..450."""
    pitch: int = 50
    """Pitch on espeak's scale, 0..99; 50 is the pitch of the timbre."""
    pitch_range: int = 50
    """Pitch range on espeak's scale, 0 (monotone)..99."""
    volume: int = 100
    """Amplitude in percent, 0..200. Above 100, loud vowels are compressed."""


def remove_stale_voices() -> None:
    """Remove the folders of voices that killed processes have left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{VOICES}*"):
        with contextlib.suppress(OSError):
            opened = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(opened)


class Synthesizer:
    """espeak-ng in this process. It has one global state: get it from `synthesizer()`, use it from one thread."""

    def __init__(self) -> None:
        try:
            # Optional: the wheel is GPL, and only the demo needs it.
            import espeakng_loader
        except ImportError:
            raise ConfigError(
                "speech synthesis: the synthetic corpus needs the package espeakng-loader, which is not installed: "
                "pip install 'cvrunner[demo]'"
            ) from None
        remove_stale_voices()
        data = Path(tempfile.mkdtemp(prefix=VOICES))
        atexit.register(shutil.rmtree, data, ignore_errors=True)
        # The system frees the lock when the process ends, also after a kill, which leaves the folder.
        self._lock = os.open(data, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # espeak's own data by links, next to a writable folder for voice variants.
        for entry in Path(espeakng_loader.get_data_path()).iterdir():
            if entry.name != "voices":
                (data / entry.name).symlink_to(entry)
        self._variants = data / "voices" / "!v"
        self._variants.mkdir(parents=True)
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._rate_hz = int(self._library.espeak_Initialize(_SYNCHRONOUS, 0, str(data).encode(), _DO_NOT_EXIT))
        if self._rate_hz <= 0:
            raise ConfigError(
                f"speech synthesis: espeak-ng does not start (code {self._rate_hz}): "
                "pip install --force-reinstall espeakng-loader"
            )
        self._pieces: list[npt.NDArray[np.int16]] = []
        # Kept as an attribute: ctypes frees an unreferenced callback, and the library would call freed memory.
        self._callback = _Callback(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, text: str, voice: Voice) -> npt.NDArray[np.float32]:
        """Return the audio of `text`, `[T]` in -1..1 at 16 kHz, with at most 50 ms of silence at both ends.

        Raises ConfigError for an unknown language and for text without sound.
        """
        variant = self._variants / voice.timbre.name
        if not variant.exists():
            variant.write_text(voice.timbre.variant())
        if self._library.espeak_SetVoiceByName(f"{voice.language}+{voice.timbre.name}".encode()):
            raise ConfigError(f"speech synthesis: espeak-ng has no language {voice.language!r} (one is en-us)")
        levels = {
            _RATE: voice.rate_wpm,
            _PITCH: voice.pitch,
            _PITCH_RANGE: voice.pitch_range,
            _VOLUME: voice.volume,
        }
        for parameter, level in levels.items():
            self._library.espeak_SetParameter(parameter, level, 0)
        self._pieces.clear()
        encoded = text.encode()
        code = self._library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, _UTF8, None, None)
        # Synchronous: all pieces have arrived when espeak_Synth returns.
        if code or not self._pieces:
            raise ConfigError(f"speech synthesis: espeak-ng gives no audio (code {code}) for {text!r} in {voice}")
        spoken = np.concatenate(self._pieces).astype(np.float32) / 32768
        return _trimmed(soxr.resample(spoken, self._rate_hz, SAMPLE_RATE_HZ))

    def _collect(self, samples: Any, count: int, _events: int | None) -> int:
        """Append the samples that espeak-ng hands over; called from C."""
        if samples and count > 0:
            # A copy: the library reuses its buffer.
            self._pieces.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0


@cache
def synthesizer() -> Synthesizer:
    """Return the synthesizer of this process. Raises ConfigError if the extra `demo` is not installed."""
    return Synthesizer()


def _trimmed(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Cut silence at both ends down to 50 ms."""
    loud = np.flatnonzero(np.abs(samples) > _QUIET)
    if not len(loud):
        return np.ascontiguousarray(samples)
    margin = int(_MARGIN_S * SAMPLE_RATE_HZ)
    first = max(0, int(loud[0]) - margin)
    return np.ascontiguousarray(samples[first : int(loud[-1]) + margin])
