"""Whether an audio file is complete and can hold speech: the checks that libsndfile leaves out.

libsndfile reads what is left of a truncated file without complaint, and a constant signal is a valid one. A problem is
returned as text that follows the name of the file; None means that there is none. `T` samples, `C` channels.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Order = Literal["little", "big"]
Note = tuple[str, str]
"""A kind of warning, and what was found in this file."""

LSB = 2.0**-15
"""One step of 16 bits, the least that counts as a step whatever the file's own resolution."""
LEAST_STEPS = 2.0
"""Smallest standard deviation of a signal, in quantisation steps."""
QUIET_DBFS = -60.0
ANTIPHASE_DB = 30.0
FLAT_SAMPLES = 4
"""Consecutive samples at the extreme value that make a clipped peak. Speech turns within one or two."""
FLAT_LEVEL, FLAT_LEVEL_COARSE = 0.25, 0.97
"""Peak below which a flat top is a matter of resolution, not of clipping: of 16 bits and more, and of 8 bits."""

# --- containers -------------------------------------------------------------------------------------------------------

WIDTHS = {"PCM_S8": 1, "PCM_U8": 1, "ULAW": 1, "ALAW": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4} | {
    "FLOAT": 4,
    "DOUBLE": 8,
}
"""Bytes per sample of the encodings in which every sample has the same number of bytes."""
UNCHECKED = ("AVR", "IRCAM", "MAT4", "MAT5", "MP3", "MPC2K", "PAF", "PVF", "RAW", "SD2", "VOC", "WVE", "XI")
"""Formats without a length that could be compared with the file."""
PIPE_SIZES = (
    range(1),
    range(0x7EFFFF00, 0x7F000100),  # sox, AIFF
    range(0x7FFF0000, 0x80000100),  # sox, espeak-ng, GStreamer, LAME, arecord
    range(0xFFFFFF00, 0x100000000),  # FFmpeg, mpg123
)
"""Sizes that programs write into a header when they cannot return to fill in the right one."""


@dataclass(frozen=True)
class Container:
    """What the headers of a file state about its audio; None: not stated."""

    problem: str | None = None
    data_bytes: int | None = None
    frame_bytes: int | None = None
    """Bytes per sample of all channels."""
    patches: tuple[tuple[int, bytes], ...] = ()
    """Position and bytes that make libsndfile read all of a file whose size was written to a pipe."""
    end: int | None = None
    """Where the audio ends, if libsndfile would read what follows as audio, too (Wave64)."""
    flac: tuple[int, bytes] | None = None
    """Bits per sample of a FLAC stream, and the MD5 of its samples."""


@dataclass(frozen=True)
class _Layout:
    """How a container divides a file into chunks."""

    first: int
    """Position of the first chunk."""
    id_bytes: int
    size_bytes: int
    order: Order
    align: int
    size_counts_header: bool = False


@dataclass(frozen=True)
class _Field:
    """Where a header states the number of bytes of audio."""

    at: int
    size_bytes: int
    order: Order
    more: int = 0
    """Bytes that it counts in addition."""


SOUND = (b"data", b"SSND", b"BODY")
"""Names of the chunk with the samples."""
_RIFF = _Layout(12, 4, 4, "little", 2)
_LAYOUTS = {
    b"RIFF": _RIFF,
    b"RF64": _RIFF,
    b"BW64": _RIFF,
    b"RIFX": replace(_RIFF, order="big"),
    b"FORM": replace(_RIFF, order="big"),
    b"caff": _Layout(8, 4, 8, "big", 1),
    b"riff": _Layout(40, 16, 8, "little", 8, size_counts_header=True),  # Wave64
}
_SUN_ORDERS: dict[bytes, Order] = {b".snd": "big", b"dns.": "little"}


def inspect_container(descriptor: int, size: int) -> Container:
    """Compare the headers of an open audio file of `size` bytes with its content. Unknown containers pass."""
    head = os.pread(descriptor, 1024, 0)
    magic = head[:4]
    if magic in _LAYOUTS:
        return _inspect_chunks(descriptor, size, magic, _LAYOUTS[magic])
    if magic in _SUN_ORDERS:
        order = _SUN_ORDERS[magic]
        start, declared = (int.from_bytes(head[at : at + 4], order) for at in (4, 8))
        return _compare(declared, size - start, _is_pipe_size(declared, 4), _Field(8, 4, order))
    if head.startswith(b"NIST_1A\n"):
        found = {name: int(value) for name, value in re.findall(rb"(\w+) -i (\d{1,9})\b", head)}
        width = found.get(b"channel_count", 1) * found.get(b"sample_n_bytes", 1)
        # The header's own length is its second line, nearly always 1024.
        start = int(head[8:16]) if head[8:16].strip().isdigit() else 1024
        return _compare(found.get(b"sample_count", 0) * width, size - start, b"sample_count" not in found)
    if magic == b"OggS":
        return Container(_ogg_problem(descriptor, size))
    # STREAMINFO: 20 bits rate, 3 bits channels - 1, 5 bits depth - 1, 36 bits samples; MD5 of zeros is none.
    if magic == b"fLaC" and len(head) >= 42 and any(head[26:42]):
        depth = 1 + (int.from_bytes(head[18:26], "big") >> 36 & 31)
        return Container(flac=(depth, head[26:42]))
    return Container()


def _inspect_chunks(descriptor: int, size: int, magic: bytes, layout: _Layout) -> Container:
    promised = int.from_bytes(os.pread(descriptor, 4, 4), layout.order) + 8
    # Some programs count the first 8 bytes or a padding byte, hence the margin.
    if magic == b"RIFF" and size + 16 < promised and not _is_pipe_size(promised - 8, 4):
        return Container(f"is truncated: it has {size} of {promised} bytes; copy it again")
    starts: dict[bytes, int] = {}
    try:
        chunks = _chunks(descriptor, size, layout, layout.first)
        name, start, length = next(chunks)
        while name not in SOUND:
            starts[name] = start
            name, start, length = next(chunks)
    except (ValueError, StopIteration):
        return Container("is truncated or damaged: no chunk with audio in it; copy it again")
    frame_bytes = None
    if b"fmt " in starts:
        frame_bytes = int.from_bytes(os.pread(descriptor, 2, starts[b"fmt "] + 12), layout.order)
    # The chunk begins with an offset and a block size (AIFF), or with a number of edits (CAF).
    before = {b"FORMSSND": 8, b"caffdata": 4}.get(magic + name, 0)
    more = before + layout.size_counts_header * (layout.id_bytes + layout.size_bytes)
    field = _Field(start - layout.size_bytes, layout.size_bytes, layout.order, more)
    if magic in (b"RF64", b"BW64") and b"ds64" in starts and length == 0xFFFFFFFF:
        field = _Field(starts[b"ds64"] + 8, 8, "little")
        length = int.from_bytes(os.pread(descriptor, 8, field.at), "little", signed=True)
    unknown = _is_pipe_size(length - before, field.size_bytes)
    end = start + max(length, 0)
    if unknown and length == before and end < size and _is_tidy(descriptor, size, layout, end):
        unknown = False  # Really empty: other chunks follow.
    found = _compare(length - before, size - start - before, unknown, field, ends_file=False)
    if found.problem is None and not unknown:
        end += -length % layout.align
        if not (_is_tidy(descriptor, size, layout, end) or _is_tidy(descriptor, size, layout, start + length)):
            found = Container(_leftover(length - before, size - start - length))
    cut: int | None = None
    patches = found.patches
    # libsndfile knows BW64 only by its older name.
    if magic == b"BW64":
        patches += ((0, b"RF64"),)
    if magic == b"riff" and end < size and not unknown:
        cut = end
    return replace(found, frame_bytes=frame_bytes, patches=patches, end=cut)


def _chunks(descriptor: int, size: int, layout: _Layout, at: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name, the start and the declared length of each chunk. Raises ValueError at what is not a chunk."""
    header = layout.id_bytes + layout.size_bytes
    while at < size:
        head = os.pread(descriptor, header, at)
        # The names of Wave64 are 16 arbitrary bytes.
        if len(head) < header or (layout.id_bytes == 4 and not all(0x20 <= byte < 0x7F for byte in head[:4])):
            raise ValueError
        length = int.from_bytes(head[layout.id_bytes :], layout.order, signed=layout.size_bytes == 8)
        if layout.size_counts_header:
            length -= header
        yield head[:4], at + header, length
        if not 0 <= length <= size - at - header:
            raise ValueError
        end = at + header + length
        at = end + -length % layout.align
        # Some programs leave out the padding byte.
        if at == end + 1 and at < size and not os.pread(descriptor, 4, at).isascii():
            at = end


def _is_tidy(descriptor: int, size: int, layout: _Layout, at: int) -> bool:
    """Return whether nothing but complete chunks lies between `at` and the end of the file."""
    try:
        return all(_chunks(descriptor, size, layout, at))
    except ValueError:
        return False


def _is_pipe_size(declared: int, size_bytes: int) -> bool:
    if size_bytes == 8:
        return declared <= 0 or declared >= 2**62
    return declared <= 0 or any(declared in sizes for sizes in PIPE_SIZES)


def _compare(
    declared: int, there: int, unknown: bool, field: _Field | None = None, ends_file: bool = True
) -> Container:
    """Compare a declared number of bytes with those that are there; an unknown one is patched into its `field`."""
    if unknown and there > 0:
        if field is None:
            return Container(data_bytes=there)
        stated = there + field.more
        if stated >= 1 << 8 * field.size_bytes:
            return Container("has no length in its header and is too long for its format; write it again as FLAC")
        return Container(data_bytes=there, patches=((field.at, stated.to_bytes(field.size_bytes, field.order)),))
    if declared > there:
        text = f"is truncated: it has {max(there, 0)} of {declared} bytes of audio; copy it again"
        return Container(text)
    if ends_file and declared < there:
        return Container(_leftover(declared, there - declared))
    return Container(data_bytes=declared)


def _leftover(declared: int, more: int) -> str:
    return (
        f"has {declared} bytes of audio by its header, but {more} more bytes follow that are not chunks of its format: "
        "either the length in the header or the file is wrong; write it again"
    )


def _ogg_problem(descriptor: int, size: int) -> str | None:
    """Return what is wrong with the pages of an Ogg file: each has a CRC and a number, and the last ends the stream."""
    damaged = "is damaged: page {} of its Ogg stream {}; copy it again"
    at, number, serial, last = 0, 0, b"", False
    while at < size:
        head = os.pread(descriptor, 27 + 255, at)
        if len(head) < 27 or head[:4] != b"OggS":
            return damaged.format(number, "is incomplete or is not a page")
        page = os.pread(descriptor, 27 + head[26] + sum(head[27 : 27 + head[26]]), at)
        if len(page) < 27 or len(page) < 27 + head[26] + sum(head[27 : 27 + head[26]]):
            return damaged.format(number, "is incomplete")
        if _ogg_crc(page[:22] + bytes(4) + page[26:]) != int.from_bytes(page[22:26], "little"):
            return damaged.format(number, "does not match its checksum")
        if number and page[14:18] != serial:
            return "holds several Ogg streams, must hold one: write it again"
        if int.from_bytes(page[18:22], "little") != number:
            return damaged.format(number, "is missing")
        serial, last = page[14:18], bool(page[5] & 4)
        at, number = at + len(page), number + 1
    if not last:
        return "is truncated: its Ogg stream has no last page; copy it again"
    return None


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_crc(page: bytes) -> int:
    """Return the CRC-32 of Ogg. It is zlib's with the bits of all bytes and of the result in reverse, and without its
    two inversions."""
    return int(f"{zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF:032b}"[::-1], 2)


def decoded_problem(container: Container, samples: Floats, subtype: str) -> str | None:
    """Return how the decoded samples `[T, C]` differ from what the headers state."""
    frames, channels = samples.shape
    if container.data_bytes is not None and subtype in WIDTHS:
        stated = container.data_bytes // (container.frame_bytes or WIDTHS[subtype] * channels)
        if frames != stated:
            return f"is damaged: its header states {stated} samples, {frames} were decoded; copy it again"
    if container.flac is not None and container.flac[0] in (8, 16, 24):
        depth, digest = container.flac
        integers = np.rint(samples * np.float32(2 ** (depth - 1))).astype("<i4")
        low_bytes = integers.view(np.uint8).reshape(-1, 4)[:, : depth // 8]
        if hashlib.md5(low_bytes.tobytes(), usedforsecurity=False).digest() != digest:
            return "is damaged: its samples do not match the checksum in its header; copy it again"
    return None


# --- signals ----------------------------------------------------------------------------------------------------------


def examine_signal(samples: Floats, subtype: str = "") -> tuple[str | None, list[Note]]:
    """Return the problem of `[T, C]` before its channels are averaged, and its warnings.

    The level is the root mean square of the deviation from the mean, so that a constant offset does not count.
    """
    step = 2.0**-7 if subtype in ("PCM_S8", "PCM_U8") else LSB
    channels = [np.ascontiguousarray(samples[:, channel]) for channel in range(samples.shape[1])]
    levels = [_deviation(channel) for channel in channels]
    if not all(map(math.isfinite, levels)) and not np.isfinite(samples).all():
        return "holds NaN or infinite samples", []
    texts = [f"channel {number} {_decibels(level)}" for number, level in enumerate(levels, start=1)]
    silent = [text for text, level in zip(texts, levels, strict=True) if level < LEAST_STEPS * step]
    if len(silent) == len(channels):
        rule = f"must be {LEAST_STEPS:g} quantisation steps or more"
        return f"is silent or constant: the deviation from the mean is {', '.join(silent)} RMS, {rule}", []
    notes = [("audio with a silent channel", text) for text in silent]
    if len(channels) > 1:
        middle = np.mean(channels, axis=0)
        mid = _deviation(middle)
        side = math.sqrt(sum(_deviation(channel - middle) ** 2 for channel in channels) / len(channels))
        if side > mid * 10 ** (ANTIPHASE_DB / 20):
            text = f"{_decibels(side)} of differences between them, {_decibels(mid)} in common"
            return f"has channels in antiphase, which cancel when averaged: {text}; invert one, or use one alone", []
    least_peak = FLAT_LEVEL_COARSE if WIDTHS.get(subtype) == 1 else FLAT_LEVEL
    for number, (text, level, channel) in enumerate(zip(texts, levels, channels, strict=True), start=1):
        if LEAST_STEPS * step <= level < 10 ** (QUIET_DBFS / 20):
            notes.append((f"audio below {QUIET_DBFS:g} dBFS", text))
        if flat := _clipped(channel, least_peak):
            notes.append(("clipped audio", f"channel {number}, {flat} samples in flat peaks"))
    return None, notes


def _deviation(channel: Floats) -> float:
    """Return the root mean square of `[T]` around its mean."""
    # Absurd values of a float file overflow; infinity then counts as loud.
    with np.errstate(over="ignore", invalid="ignore"):
        centred = channel - np.float32(channel.mean(dtype=np.float64))
        return math.sqrt(float(np.dot(centred, centred)) / max(1, len(centred)))


def _decibels(level: float) -> str:
    return f"{20 * math.log10(level):.1f} dBFS" if level > 0 else "-inf dBFS"


def _clipped(channel: Floats, least_peak: float) -> int:
    """Return the number of samples of `[T]` in runs at its highest or lowest value, as clipping leaves them."""
    found = 0
    for extreme in (channel.max(), channel.min()):
        if abs(extreme) < least_peak:
            continue
        # What is beyond full scale was clipped, or will be in other programs.
        limit = min(abs(float(extreme)), 1 - LSB)
        at = np.flatnonzero(channel * np.sign(extreme) >= limit)
        if len(at) >= FLAT_SAMPLES:
            runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
            found += sum(len(run) for run in runs if len(run) >= FLAT_SAMPLES)
    return found
