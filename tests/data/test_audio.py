"""Audio files that are incomplete or hold no speech, in every container and encoding, and good files that look odd."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from cvrunner.data.audio import Note
from cvrunner.data.utterance import AudioError, check_length, mono_16khz, read_audio, read_with_notes

SAMPLES = np.random.default_rng(3).normal(0, 0.1, 16_000).clip(-0.9, 0.9).astype(np.float32)
PCM = [(name, "PCM_16") for name in ("WAV", "WAVEX", "RF64", "W64", "AIFF", "CAF", "AU", "NIST", "SVX")]
OTHERS = [("WAV", "FLOAT"), ("WAV", "ULAW"), ("AIFF", "PCM_24"), ("W64", "GSM610"), ("WAV", "GSM610")]
COMPRESSED = [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS")]


def encoded(container: str, subtype: str = "PCM_16", samples: npt.NDArray[np.floating] = SAMPLES) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format=container, subtype=subtype)
    return file.getvalue()


def read(path: Path, content: bytes) -> npt.NDArray[np.float32]:
    path.write_bytes(content)
    return read_audio(path, resample=True)


def replaced(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def le(value: int, width: int = 4) -> bytes:
    return value.to_bytes(width, "little", signed=value < 0)


def be(value: int, width: int = 4) -> bytes:
    return value.to_bytes(width, "big", signed=value < 0)


# --- complete and incomplete files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("container", "subtype"), PCM + OTHERS + COMPRESSED)
def test_every_container_is_read_whole(tmp_path: Path, container: str, subtype: str) -> None:
    assert len(read(tmp_path / "x", encoded(container, subtype))) == 16_000


@pytest.mark.parametrize("cut", [1, 2, 1001, 2500])
@pytest.mark.parametrize(("container", "subtype"), PCM + OTHERS + COMPRESSED)
def test_a_truncated_file_is_refused_whatever_its_container(
    tmp_path: Path, container: str, subtype: str, cut: int
) -> None:
    content = encoded(container, subtype)
    with pytest.raises(AudioError, match=r"truncated|damaged|cannot be read"):
        read(tmp_path / "x", content[:-cut])


def test_one_missing_sample_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="is truncated: it has 31998 of 32000 bytes of audio; copy it again"):
        read(tmp_path / "x", encoded("WAV")[:-2])


@pytest.mark.parametrize(("container", "subtype"), PCM + OTHERS)
def test_bytes_after_the_audio_that_are_not_chunks_are_refused(tmp_path: Path, container: str, subtype: str) -> None:
    content = encoded(container, subtype)
    with pytest.raises(AudioError, match="more bytes follow that are not chunks"):
        read(tmp_path / "x", content + bytes(range(200)) * 5)


CHUNKS = [
    (PCM[0][0], b"LIST" + le(26) + b"INFOISFT" + le(14) + b"Lavf61.7.100\0\0"),
    ("WAV", b"bext" + le(602) + bytes(602)),
    ("WAV", b"id3 " + le(11) + bytes(12)),
    ("WAV", b"id3 " + le(11) + bytes(11)),
    ("WAVEX", b"cue " + le(4) + bytes(4) + b"LIST" + le(4) + b"adtl"),
    ("RF64", b"axml" + le(8) + bytes(8)),
    ("AIFF", b"ANNO" + be(5) + b"hello\0"),
    ("CAF", b"info" + be(9, 8) + be(0) + b"x\0y\0z"),
    ("W64", b"list" + bytes.fromhex("f3acd3118cd100c04f8edb8a") + le(32, 8) + bytes(8)),
]


@pytest.mark.parametrize(("container", "chunk"), CHUNKS)
def test_chunks_after_the_audio_are_fine(tmp_path: Path, container: str, chunk: bytes) -> None:
    assert len(read(tmp_path / "x", encoded(container) + chunk)) == 16_000


def test_an_odd_number_of_bytes_has_a_padding_byte_or_not(tmp_path: Path) -> None:
    content = encoded("WAV", "PCM_U8", SAMPLES[:9999])
    assert len(content) % 2 == 0, "libsndfile pads"
    chunk = b"LIST" + le(4) + b"INFO"
    for whole in (content, content[:-1], content + chunk, content[:-1] + chunk):
        assert len(read(tmp_path / "x", whole)) == 9999


def data_size(container: str, value: int) -> bytes:
    """A file whose data chunk states `value`."""
    content = encoded(container)
    if container == "RF64":
        return replaced(content, 28, le(value, 8))
    if container == "AU":
        return replaced(content, 8, be(value))
    name, width, order = {
        "WAV": (b"data", 4, le), "AIFF": (b"SSND", 4, be), "CAF": (b"data", 8, be), "W64": (b"data", 8, le)
    }[container]  # fmt: skip
    return replaced(content, content.index(name) + (16 if container == "W64" else 4), order(value, width))


PIPES = [
    *[("WAV", size) for size in (0, 0x7FFFF000, 0xFFFFFFFF, 0x7FFF0000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE)],
    *[("AIFF", size) for size in (0, 8, 0x7F000008, 0x7FFFF000, 0xFFFFFFFF)],
    *[("AU", size) for size in (0, 0xFFFFFFFF)],
    *[("CAF", size) for size in (-1, 2**63 - 1)],
    *[("W64", size) for size in (-1, 24, 2**63 - 1)],
    *[("RF64", size) for size in (0, -1, 2**63 - 1)],
]


@pytest.mark.parametrize(("container", "size"), PIPES)
def test_a_size_that_programs_write_to_a_pipe_means_everything_up_to_the_end(
    tmp_path: Path, container: str, size: int
) -> None:
    whole = read(tmp_path / "whole", encoded(container))
    assert np.array_equal(read(tmp_path / "x", data_size(container, size)), whole)


@pytest.mark.parametrize("container", ["WAV", "AIFF", "AU", "CAF", "W64", "RF64"])
@pytest.mark.parametrize("size", [20_000, 31_000, 40_000, 0x10000000])
def test_a_wrong_size_is_refused(tmp_path: Path, container: str, size: int) -> None:
    with pytest.raises(AudioError, match=r"truncated|more bytes follow"):
        read(tmp_path / "x", data_size(container, size))


def test_an_empty_data_chunk_before_other_chunks_is_empty(tmp_path: Path) -> None:
    content = encoded("WAV", samples=SAMPLES[:0]) + b"LIST" + le(4) + b"INFO"
    with pytest.raises(AudioError, match="holds no audio"):
        read(tmp_path / "x", content)


def test_bw64_is_read_as_rf64(tmp_path: Path) -> None:
    assert len(read(tmp_path / "x", b"BW64" + encoded("RF64")[4:])) == 16_000


def test_flac_without_a_total_length_is_read_to_its_end(tmp_path: Path) -> None:
    content = bytearray(encoded("FLAC"))
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    assert np.array_equal(read(tmp_path / "x", bytes(content)), read(tmp_path / "y", encoded("FLAC")))
    with pytest.raises(AudioError):
        read(tmp_path / "x", bytes(content[:-1000]))
    with pytest.raises(AudioError, match=r"must be at most 0\.5 s"):
        read_audio(tmp_path / "y", longest_s=0.5)


def test_flac_with_another_total_than_it_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="do not match the checksum"):
        read(tmp_path / "x", replaced(encoded("FLAC"), 22, be(12_000)))


def test_a_gsm_file_is_read_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(encoded("WAV", "GSM610"))
    assert len(read_audio(path)) == 16_000
    with pytest.raises(AudioError, match=r"must be at most 0\.5 s"):
        read_audio(path, longest_s=0.5)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_without_its_last_page_or_with_a_broken_one_is_refused(tmp_path: Path, subtype: str) -> None:
    content = encoded("OGG", subtype)
    last = content.rindex(b"OggS")
    with pytest.raises(AudioError, match="its Ogg stream has no last page"):
        read(tmp_path / "x", content[:last])
    second = content.index(b"OggS", 4)
    with pytest.raises(AudioError, match="page 1 of its Ogg stream does not match its checksum"):
        read(tmp_path / "x", replaced(content, second + 40, bytes([content[second + 40] ^ 1])))
    third = content.index(b"OggS", second + 4)
    with pytest.raises(AudioError, match="page 1 of its Ogg stream is missing"):
        read(tmp_path / "x", content[:second] + content[third:])
    with pytest.raises(AudioError, match="several Ogg streams"):
        read(tmp_path / "x", content + encoded("OGG", subtype, SAMPLES[:9000]))


def test_a_format_without_a_length_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(encoded("VOC"))
    kind = "audio files in a format that does not show whether they are complete"
    assert read_with_notes(tmp_path / "x")[1] == [(kind, "VOC")]


# --- signals ----------------------------------------------------------------------------------------------------------

TIME = np.arange(16_000) / 16_000
VOICE = 0.2 * np.sin(2 * np.pi * 180 * TIME) * (1 + np.sin(2 * np.pi * 3 * TIME))
RANDOM = np.random.default_rng(5)
STEP = 2.0**-15
NO_SPEECH = {
    "zeros": np.zeros(16_000),
    "a constant": np.full(16_000, 0.5),
    "an offset and one step of noise": 0.3 + RANDOM.integers(-1, 2, 16_000) * STEP,
    "one step of noise": RANDOM.integers(-1, 2, 16_000) * STEP,
    "zeros and one click": np.eye(1, 16_000, 80)[0] * 200 * STEP,
    "two silent channels": np.zeros((16_000, 2)),
    "two offsets": np.tile([0.5, -0.2], (16_000, 1)),
}


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize("name", NO_SPEECH)
def test_a_signal_that_hardly_varies_is_refused(tmp_path: Path, name: str, subtype: str) -> None:
    with pytest.raises(AudioError, match="is silent or constant: the deviation from the mean is channel 1 -"):
        read(tmp_path / "x", encoded("WAV", subtype, NO_SPEECH[name]))


def test_the_limit_is_two_steps_of_the_files_own_resolution(tmp_path: Path) -> None:
    for subtype, step in (("PCM_16", 2.0**-15), ("PCM_U8", 2.0**-7)):
        square = np.where(np.arange(16_000) // 40 % 2, 1, -1)
        assert len(read(tmp_path / "x", encoded("WAV", subtype, 3 * step * square))) == 16_000
        with pytest.raises(AudioError, match="is silent"):
            read(tmp_path / "x", encoded("WAV", subtype, 1 * step * square))


def test_the_level_is_that_of_each_channel_around_its_mean(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"is channel 1 -90\.3 dBFS, channel 2 -inf dBFS RMS, must be 2 quantisation"):
        read(tmp_path / "x", encoded("WAV", "FLOAT", np.stack([2**0.5 * STEP * np.sin(4000 * TIME), 0 * TIME], axis=1)))


@pytest.mark.parametrize("leak", [0.0, 0.001, 0.01, 0.02])
def test_antiphase_stereo_is_refused(tmp_path: Path, leak: float) -> None:
    with pytest.raises(AudioError, match=r"channels in antiphase, which cancel when averaged: -.* dBFS of differences"):
        read(tmp_path / "x", encoded("WAV", "PCM_16", np.stack([VOICE, -VOICE * (1 - leak) + 0.1], axis=1)))


@pytest.mark.parametrize("other", [VOICE, 0.5 * VOICE, -0.8 * VOICE, RANDOM.normal(0, 0.1, 16_000)])
def test_other_stereo_is_read(tmp_path: Path, other: npt.NDArray[np.floating]) -> None:
    assert notes(tmp_path, np.stack([VOICE, other], axis=1)) == []


def notes(tmp_path: Path, samples: npt.NDArray[np.floating], subtype: str = "PCM_16") -> list[Note]:
    (tmp_path / "x").write_bytes(encoded("WAV", subtype, samples))
    return read_with_notes(tmp_path / "x", resample=True)[1]


def test_one_silent_channel_a_low_level_and_clipping_are_warnings_with_channel_and_level(tmp_path: Path) -> None:
    assert notes(tmp_path, VOICE) == []
    assert notes(tmp_path, np.stack([VOICE, 0 * VOICE], axis=1)) == [
        ("audio with a silent channel", "channel 2 -inf dBFS")
    ]
    # The root mean square of VOICE is 0.2 x sqrt(1/2) x sqrt(3/2), or -15.2 dBFS.
    assert notes(tmp_path, VOICE / 200) == [("audio below -60 dBFS", "channel 1 -61.2 dBFS")]
    assert notes(tmp_path, VOICE / 150) == []
    ((kind, text),) = notes(tmp_path, (6 * VOICE).clip(-1, 1))
    assert (kind, text.endswith("samples in flat peaks")) == ("clipped audio", True)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "PCM_U8"])
def test_clipping_is_found_at_full_scale_and_below(tmp_path: Path, subtype: str) -> None:
    assert [kind for kind, _ in notes(tmp_path, (6 * VOICE).clip(-1, 1), subtype)] == ["clipped audio"]
    assert [kind for kind, _ in notes(tmp_path, (6 * VOICE).clip(-1, 0.9), subtype)] == ["clipped audio"]
    if subtype != "PCM_U8":
        assert [kind for kind, _ in notes(tmp_path, 0.5 * (6 * VOICE).clip(-1, 1), subtype)] == ["clipped audio"]
        assert notes(tmp_path, VOICE / np.abs(VOICE).max() * 0.999, subtype) == []


def test_samples_beyond_full_scale_count_as_clipped(tmp_path: Path) -> None:
    assert [kind for kind, _ in notes(tmp_path, VOICE * 32768, "FLOAT")] == ["clipped audio"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(AudioError, match="holds NaN or infinite samples"):
        read(tmp_path / "x", encoded("WAV", "FLOAT", np.where(np.arange(16_000) == 7, value, VOICE)))


def test_sound_that_is_gone_at_16_khz_is_refused(tmp_path: Path) -> None:
    high = 0.2 * np.sin(2 * np.pi * 20_000 * np.arange(48_000) / 48_000) * np.hanning(48_000)
    with pytest.raises(AudioError, match=r"is silent or constant.*after conversion to 16 kHz"):
        mono_16khz(high[:, None].astype(np.float32), 48_000)


def test_the_shortest_audio_is_the_encoders_receptive_field() -> None:
    check_length(SAMPLES[:790], 790)
    with pytest.raises(AudioError, match="has 789 samples at 16 kHz, must have 790 or more"):
        check_length(SAMPLES[:789], 790)
