"""Whatever is in a file: a configuration, a corpus, audio, an encoder - or the error of its kind, with a message."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cvrunner.config.reading import load_config
from cvrunner.config.schema import valid_keys
from cvrunner.data.checks import NAMES as NAME_COLUMNS
from cvrunner.data.checks import same_name
from cvrunner.data.folds import check_labels, find_leaks, make_folds
from cvrunner.data.iemocap import load_iemocap
from cvrunner.data.manifest import OPTIONAL, REQUIRED
from cvrunner.data.utterance import AudioError, read_audio
from cvrunner.encoders.files import find_encoder
from cvrunner.errors import ConfigError, CorpusError, EncoderError
from tests.corpora import (
    DIMENSIONS,
    SCALE,
    TURNS,
    csv_text,
    json_lines,
    label_file,
    label_text,
    load_manifest,
    manifest_rows,
    write_bytes,
    write_iemocap,
)
from tests.tiny_encoders import save_encoder

FINETUNE = Path(__file__).parent.parent / "configs" / "finetune.yaml"
pytestmark = pytest.mark.suites("test", "ci", "all")
BOUNDED = settings(settings.get_profile("fuzz"), suppress_health_check=[HealthCheck.function_scoped_fixture])
"""The number of examples per kind is set by the suite, in tests/conftest.py."""


@contextlib.contextmanager
def only(kind: type[Exception]) -> Iterator[None]:
    """Lets an error of this kind pass, which must say something."""
    try:
        yield
    except kind as error:
        if not str(error).strip():
            raise AssertionError(f"{kind.__name__} without a message") from error


def load(path: Path, *overrides: str) -> None:
    """A configuration, and every condition of it, as commands ask for them."""
    with only(ConfigError):
        config = load_config(path, overrides)
        for name in config.conditions:
            assert config.for_condition(name).numerics


TEXT = st.text(max_size=60) | st.text("ab:{}[]&*!|>-#'\"\n\t, 019e.~?", max_size=60)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ODD = st.dates() | st.datetimes() | st.binary(max_size=4) | st.sets(st.integers(0, 3), max_size=2)
VALUES = st.recursive(
    SCALARS | ODD,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["lr", "model", "seeds", ""]) | SCALARS, inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(valid_keys()) | st.lists(st.sampled_from(["train", "model", "conditions", "a", "lr"])).map(
    ".".join
)


@BOUNDED
@given(st.binary(max_size=80) | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"train: {lr: !!int ''}")
@example(b"train: {lr: !!timestamp x}")
@example(b"train: {lr: 2001-99-99}")
@example(b"train: {lr: !!bool x}")
@example(b"? !!binary aGk=\n: 1")
@example(b"conditions: {a: {model: !!binary gICA}}")
@example(b"conditions: {a: &a [*a]}")
@example(b"conditions: {a: {<<: {model: {width: 8}}}}")
@example(b"base: ''")
@example(b'base: "\\0"')
@example(b'base: "\\uD800"')
@example(b"train: !!set {epochs}")
@example(b"x: " + b"1" * 5000)
def test_any_bytes_as_configuration(tmp_path: Path, content: bytes) -> None:
    write_bytes(tmp_path / "config.yaml", content)
    load(tmp_path / "config.yaml")


@BOUNDED
@given(st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=3))
@example([("conditions", {"a": {"model": {"width": datetime.date(2020, 1, 1)}}})])
@example([("conditions", {"a": {"model": {"width": {1, 2}}}})])
@example([("model", {None: 1})])
def test_a_good_configuration_with_any_values(tmp_path: Path, changes: list[tuple[str, Any]]) -> None:
    data = yaml.safe_load(FINETUNE.read_text())
    data.pop("base", None)
    for key, value in changes:
        place = data
        *above, last = key.split(".")
        for part in above:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[last] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    load(tmp_path / "config.yaml")


@BOUNDED
@given(st.lists(st.builds("{}={}".format, KEYS, TEXT) | TEXT, max_size=3))
def test_any_overrides(overrides: list[str]) -> None:
    load(FINETUNE, *overrides)


LR = st.sampled_from(["0.1", "1e-1", "0.2", "1_0", "010", '"0.1"', "0.1 # faster", ""])
CHANGES = st.tuples(
    st.sampled_from(["conditions.", "conditions.a.", "conditions.b.", "conditions.B.", "conditions.bb.", ""]),
    st.sampled_from(
        ["train.lr", "train.seeds", "model.freeze_speech_encoder", "corpus.root", "cluster", "train", "model"]
    ),
    LR | st.sampled_from(["{}", "[1]", "true", "{lr: 0.1}", "{a: {}}"]),
).map(lambda parts: f"{parts[0]}{parts[1]}={parts[2]}")
CONDITION = st.fixed_dictionaries(
    {},
    optional={
        "train": st.dictionaries(
            st.sampled_from(["lr", "seeds", "epochs"]), st.sampled_from([1, 2, [1], 0.1]), max_size=2
        ),
        "model": st.dictionaries(
            st.sampled_from(["freeze_speech_encoder", "width"]), st.booleans() | st.just(64), max_size=1
        ),
        "corpus": st.just({}),
    },
)


@BOUNDED
@given(
    st.dictionaries(st.sampled_from(["a", "b", "c"]), CONDITION, min_size=1, max_size=3), st.lists(CHANGES, max_size=3)
)
@example({"a": {}, "b": {}}, [])
@example({"a": {}, "b": {"train": {"lr": 0.1}}}, ["conditions.b.train.lr=0.0001"])
def test_conditions_that_are_accepted_can_be_compared(
    tmp_path: Path, conditions: dict[str, Any], overrides: list[str]
) -> None:
    text = yaml.safe_dump({"base": str(FINETUNE), "conditions": conditions}, sort_keys=False)
    (tmp_path / "config.yaml").write_text(text)
    with only(ConfigError):
        config = load_config(tmp_path / "config.yaml", overrides)
        assert list(config.conditions) == list(conditions)
        resolved = [config.for_condition(name) for name in conditions]
        assert {one.train.seeds for one in resolved} == {config.train.seeds}
        assert len({one.model_copy(update={"conditions": {}}).model_dump_json() for one in resolved}) == len(resolved)


@BOUNDED
@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=20))
@example("a #b")
def test_a_value_of_an_override_arrives_as_it_is_or_is_refused(value: str) -> None:
    with only(ConfigError):
        root = load_config(FINETUNE, [f"corpus.root={value}"]).corpus.root
        # Quotes and space around a value belong to YAML.
        assert root == value.strip(" ") or value.strip(" ")[:1] in "'\"|>!&"


# --- corpora ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]]]:
    """Audio and rows of a good manifest."""
    folder = tmp_path_factory.mktemp("corpus")
    return folder, manifest_rows(folder)


def read(path: Path) -> None:
    """A manifest, and what is made of it."""
    with only(CorpusError):
        corpus = load_manifest(path, SCALE, DIMENSIONS, False)
        for column in NAME_COLUMNS:
            names = {getattr(u, "id" if column == "utterance" else column) for u in corpus.utterances} - {None}
            assert len({same_name(name) for name in names} - {""}) == len(names)
        assert corpus.digest
        assert corpus.describe()
        folds = make_folds(corpus, "leave_one_session_out")
        find_leaks(folds)
        check_labels(corpus, folds, DIMENSIONS)


NAMES = [*REQUIRED, *OPTIONAL]
CELLS = (
    st.sampled_from(
        ["audio/s1t0.wav", "../x.wav", "/dev/zero", "nan", "-inf", "1e400", "2,5", "", " ", "F", "test", "\0"]
    )
    | st.sampled_from(
        ["1_10", "7", "7.0", "07", "a\u200b", "a", "Zo\u00eb", "Zoe\u0308", "None", "<NA>", "3_5", "85%", "\u0663"]
    )
    | st.text(max_size=12)
    | st.integers().map(str)
)


@BOUNDED
@given(st.binary(max_size=120) | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"{" * 100_000)
@example(b'"' + b"," * 200_000)
@example(b"\xff\xfe{\x00}\x00")
@example(b'{"path": ' + b"[" * 5000)
@example(b'{"turn": ' + b"1" * 5000 + b"}")
def test_any_bytes_as_manifest(good: tuple[Path, list[dict[str, object]]], content: bytes) -> None:
    path = good[0] / "any.csv"
    write_bytes(path, content)
    read(path)


@BOUNDED
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(NAMES), CELLS), max_size=4), st.sampled_from(",;"))
def test_good_csv_rows_with_any_cells(
    good: tuple[Path, list[dict[str, object]]], changes: list[tuple[int, str, str]], delimiter: str
) -> None:
    folder, rows = good
    changed = [dict(row) for row in rows]
    for index, name, cell in changes:
        changed[index][name] = cell
    write_bytes(folder / "cells.csv", csv_text(changed, delimiter).encode("utf-8", "surrogatepass"))
    read(folder / "cells.csv")


@BOUNDED
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(NAMES), CELLS | SCALARS | st.text(st.characters(), max_size=4)),
        max_size=4,
    ),
    st.lists(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3)), max_size=1),
)
@example([(0, "speaker", "\ud800")], [])
@example([(0, "session", "1" * 5000)], [])
@example([(0, "turn", 10**400)], [])
@example([(0, "valence", "1" * 5000)], [])
@example([(0, "utterance", "a\nb")], [])
def test_good_json_lines_with_any_values(
    good: tuple[Path, list[dict[str, object]]], changes: list[tuple[int, str, object]], more: list[object]
) -> None:
    folder, rows = good
    changed = [dict(row) for row in rows]
    for index, name, value in changes:
        changed[index][name] = value
    write_bytes(folder / "cells.jsonl", (json_lines(changed) + "".join(map(json.dumps, more))).encode())
    read(folder / "cells.jsonl")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree as IEMOCAP's."""
    return write_iemocap(tmp_path_factory.mktemp("tree"))


@BOUNDED
@given(st.integers(0, 150), st.integers(0, 20), st.binary(max_size=20) | TEXT.map(str.encode))
@example(55, 0, b"\xd9\xa1" * 5)
@example(0, 0, b"[" + b"9" * 5000 + b" - 1] Ses01F_impro01_F000 neu [1, 2, 3]\n")
def test_a_label_file_with_anything_in_it(root: Path, start: int, cut: int, content: bytes) -> None:
    text = label_text("Ses01F_impro01", TURNS).encode()
    write_bytes(label_file(root, "Ses01F_impro01"), text[:start] + content + text[start + cut :])
    with only(CorpusError):
        assert load_iemocap(root, "header", SCALE, DIMENSIONS, False).digest


# --- audio ------------------------------------------------------------------------------------------------------------

CONTAINERS = [
    *[("WAV", "PCM_16"), ("WAVEX", "FLOAT"), ("WAV", "GSM610"), ("RF64", "PCM_16"), ("W64", "PCM_24")],
    *[("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("AIFF", "PCM_16"), ("CAF", "PCM_16"), ("AU", "ULAW")],
]
LENGTH = 4000


@pytest.fixture(scope="module")
def recordings() -> dict[tuple[str, str], bytes]:
    """Noise of 0.25 s in each container."""
    found = {}
    for container, subtype in CONTAINERS:
        file = io.BytesIO()
        noise = np.random.default_rng(1).normal(0, 0.1, LENGTH)
        soundfile.write(file, noise, 16_000, format=container, subtype=subtype)
        found[container, subtype] = file.getvalue()
    return found


def stated_frames(content: bytes) -> float | None:
    """Length at 16 kHz by the headers, for RIFF, RF64 and Wave64 with a plain encoding; None if not stated or known."""
    wave64, chunks = content.startswith(b"riff"), {}
    at = 40 if wave64 else 12
    while at + 8 <= len(content) and b"data" not in chunks:
        name = content[at : at + 4]
        size = int.from_bytes(content[at + 16 : at + 24], "little") - 24 if wave64 else 0
        size = size or int.from_bytes(content[at + 4 : at + 8], "little")
        start = at + (24 if wave64 else 8)
        chunks.setdefault(name, (size, content[start : start + 40]))
        at = start + size + (-size % 8 if wave64 else size % 2)
    if not {b"fmt ", b"data"} <= set(chunks):
        return None
    form, size = chunks[b"fmt "][1], chunks[b"data"][0]
    if content.startswith((b"RF64", b"BW64")) and size == 0xFFFFFFFF and b"ds64" in chunks:
        size = int.from_bytes(chunks[b"ds64"][1][8:16], "little")
    tag, block, rate_hz = (int.from_bytes(form[i : i + n], "little") for i, n in ((0, 2), (12, 2), (4, 4)))
    if tag not in (1, 3, 0xFFFE) or not 0 < size <= len(content) or not block or not rate_hz:
        return None
    return size // block * 16_000 / rate_hz


BYTES = st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF]) | st.integers(0, 255)
PLACES = st.integers(0, 120) | st.integers(0, 9000)


@BOUNDED
@given(
    st.sampled_from(CONTAINERS),
    st.lists(st.tuples(PLACES, BYTES), max_size=4),
    st.none() | st.tuples(PLACES, st.integers(0, 50), st.binary(max_size=20)),
    st.booleans(),
)
@example(("WAV", "PCM_16"), [(at, 0xFF) for at in (40, 41, 42, 43)], None, True)
@example(("W64", "PCM_24"), [], (9000, 0, b"list"), True)
def test_audio_with_any_bytes_has_the_length_that_it_states_or_is_refused(
    recordings: dict[tuple[str, str], bytes],
    tmp_path: Path,
    kind: tuple[str, str],
    changes: list[tuple[int, int]],
    splice: tuple[int, int, bytes] | None,
    resample: bool,
) -> None:
    content = bytearray(recordings[kind])
    for place, value in changes:
        content[place % len(content)] = value
    if splice:
        place = splice[0] % (len(content) + 1)
        content[place : place + splice[1]] = splice[2]
    (tmp_path / "x").write_bytes(content)
    with only(AudioError):
        found = len(read_audio(tmp_path / "x", resample))
        stated = stated_frames(bytes(content))
        if kind[0] == "OGG" or (kind[0] == "FLAC" and content == recordings[kind]):
            stated = LENGTH
        # Resampling rounds.
        assert stated is None or abs(found - stated) <= 1


# --- encoders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wavlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoders") / "wavlm")


JSON_KEYS = [
    "model_type", "architectures", "_name_or_path", "num_hidden_layers", "hidden_size", "sampling_rate", "conv_kernel",
    "conv_stride", "conv_dim", "add_adapter", "mask_time_prob", "do_normalize",
]  # fmt: skip


@BOUNDED
@given(
    st.sampled_from(["config.json", "preprocessor_config.json"]),
    st.dictionaries(st.sampled_from(JSON_KEYS), st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2))),
    st.binary(max_size=4),
)
@example("config.json", {"num_hidden_layers": 10**12}, b"")
@example("config.json", {"architectures": 7}, b"")
@example("config.json", {"model_type": "whisper", "num_mel_bins": [1]}, b"")
@example("config.json", {"model_type": ["wavlm"], "conv_stride": []}, b"")
@example("config.json", {}, b"{" * 5000)
def test_an_encoder_with_anything_in_its_json(wavlm: Path, file: str, values: dict[str, Any], more: bytes) -> None:
    before = (wavlm / file).read_bytes()
    (wavlm / file).write_bytes(json.dumps({**json.loads(before), **values}).encode() + more)
    try:
        with only(EncoderError):
            assert find_encoder(str(wavlm)).digest
    finally:
        (wavlm / file).write_bytes(before)


@BOUNDED
@given(st.integers(0, 400), st.binary(min_size=1, max_size=8), st.integers(0, 2000))
def test_an_encoder_with_broken_weights(wavlm: Path, place: int, content: bytes, cut: int) -> None:
    path = wavlm / "model.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:place] + content + before[place + len(content) : len(before) - cut])
    try:
        with only(EncoderError):
            assert find_encoder(str(wavlm)).digest
    finally:
        path.write_bytes(before)
