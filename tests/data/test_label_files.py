"""MSP-Podcast, audformat and long tables of ratings: each becomes the corpus that a manifest would give."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import audformat
import numpy as np
import pandas as pd
import pytest
import soundfile
from hypothesis import example, given
from hypothesis import strategies as st

from cvrunner.config.sections import CorpusConfig
from cvrunner.data import label_files
from cvrunner.data.corpus import load_corpus
from cvrunner.data.folds import check_leaks, make_folds
from cvrunner.data.utterance import Corpus
from cvrunner.errors import ConfigError, CorpusError
from tests.corpora import manifest_rows, write_manifest
from tests.test_fuzz import BOUNDED, TEXT, only

# audformat itself uses what pandas is about to remove.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CONSENSUS = """FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set
MSP-PODCAST_0001_0008.wav,N,2.6,4.4,3.2,127,Female,Test1
MSP-PODCAST_0001_0019.wav,H,5.0,6.2,4.6,127,Female,Test1
MSP-PODCAST_0002_0033.wav,S,3.2,1.8,4.0,128,Male,Test1
MSP-PODCAST_0003_0007.wav,A,5.8,2.2,6.0,25,Male,Development
MSP-PODCAST_0003_0040.wav,X,4.0,4.0,4.2,25,Male,Development
MSP-PODCAST_0004_0001.wav,N,3.6,4.6,3.8,30,Female,Development
MSP-PODCAST_0005_0011.wav,O,4.4,3.0,4.6,41,Unknown,Train
MSP-PODCAST_0005_0012.wav,N,2.8,4.2,3.0,Unknown,Female,Train
MSP-PODCAST_0006_0021_0003.wav,U,5.4,5.0,5.2,42,Male,Train
MSP-PODCAST_0003_0050.wav,N,3.0,4.8,3.4,44,Female,Train
MSP-PODCAST_0009_0002.wav,N,4.2,3.8,4.0,127,Female,Train
MSP-PODCAST_0008_0002.wav,N,4.2,3.8,4.0,50,Male,Test2
"""
DETAILED = """FileName,EmoDetail
MSP-PODCAST_0001_0008.wav,"WORKER00000009; Neutral; Neutral,Calm; A:3.000000; V:5.000000; D:4.000000;"
MSP-PODCAST_0001_0008.wav,"WORKER00000010; Happy; A:2.000000; V:4.000000; D:3.000000;"
MSP-PODCAST_0001_0019.wav,"WORKER00000010; Happy; Happy; A:5.000000; V:6.000000; D:4.000000;"
MSP-PODCAST_0005_0012.wav,"WORKER00000010; Sad; Sad; A:5.000000; V:6.000000; D:4.000000;"
"""
IN_COLUMNS = """FileName,Workers,EmoClass_Major,EmoClass_Second,EmoAct,EmoVal,EmoDom
MSP-PODCAST_0001_0008.wav,WORKER00000009,Neutral,Calm,3,5,4
MSP-PODCAST_0001_0008.wav,WORKER00000010,Happy,,2,4,3
MSP-PODCAST_0001_0019.wav,WORKER00000010,Happy,Happy,5,6,4
MSP-PODCAST_0005_0012.wav,WORKER00000010,Sad,Sad,5,6,4
"""


def write_noise(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).normal(0, 0.1, 8000), 16_000)


def load(root: Path, form: str, scheme: Any = "manifest_split", **settings: Any) -> Corpus:
    config = CorpusConfig.model_validate({"format": form, "root": str(root), **settings})
    return load_corpus(config, root, scheme)


# --- MSP-Podcast ------------------------------------------------------------------------------------------------------


@pytest.fixture
def podcast(tmp_path: Path) -> Path:
    """A made MSP-Podcast of twelve utterances."""
    (tmp_path / "Labels").mkdir()
    (tmp_path / "Labels" / "labels_consensus.csv").write_text(CONSENSUS)
    for seed, line in enumerate(CONSENSUS.splitlines()[1:]):
        write_noise(tmp_path / "Audios" / line.split(",")[0], seed)
    return tmp_path


def test_msp_podcast_becomes_one_fold_without_leaks(podcast: Path) -> None:
    corpus = load(podcast, "msp_podcast", scale=[1, 7], dimensions=["valence", "arousal", "dominance"])
    (fold,) = folds = make_folds(corpus, "manifest_split")
    check_leaks(folds)
    assert [len(part) for part in fold.parts.values()] == [2, 3, 3]
    (first, *_) = fold.test
    assert first.id == "MSP-PODCAST_0001_0008"
    assert (first.valence, first.arousal, first.dominance) == (4.4, 2.6, 3.2)
    assert (first.speaker, first.gender, first.dialogue, first.session) == ("127", "F", "0001", "Test1")
    left_out = [warning for warning in corpus.warnings if "left out" in warning]
    assert [warning.partition(": ")[0] for warning in left_out] == [
        "utterances of unknown speakers, who may be in the test set, left out",
        "utterances of other sets than Train, Development and Test1, left out",
        "train utterances that share a speaker or a podcast with test or validation, left out",
    ]
    assert [warning.partition(" left out: ")[2][0] for warning in left_out] == ["1", "1", "2"]


@pytest.mark.parametrize("detailed", [DETAILED, IN_COLUMNS])
def test_detailed_labels_become_raters(podcast: Path, detailed: str) -> None:
    (podcast / "Labels" / "labels_detailed.csv").write_text(detailed)
    corpus = load(podcast, "msp_podcast", scale=[1, 7])
    raters = {u.id: u.raters for u in corpus.utterances if u.raters}
    assert raters == {
        "MSP-PODCAST_0001_0008": {"E1": (5, 3, 4), "E2": (4, 2, 3)},
        "MSP-PODCAST_0001_0019": {"E2": (6, 5, 4)},
    }
    assert any(w.startswith("ratings of utterances that are not in the corpus, ignored: 1") for w in corpus.warnings)


@pytest.mark.parametrize(
    ("file", "old", "new", "rule"),
    [
        ("labels_consensus.csv", "EmoVal", "Valence", r"column 'EmoVal' is missing"),
        ("labels_consensus.csv", "MSP-PODCAST_0002_0033.wav", "0002.wav", r"line 4: FileName '0002\.wav' must look"),
        ("labels_consensus.csv", "3.2,1.8,4.0", "3.2,8.8,4.0", r"line 4: .*valence .*8\.8"),
        ("labels_detailed.csv", "V:5.000000", "V:9", r"labels_detailed\.csv line 2: .*valence is 9, must be .* 1\.\.7"),
        ("labels_detailed.csv", "V:5.000000", "V:x", r"labels_detailed\.csv line 2: .*valence 'x' is not a number"),
        ("labels_detailed.csv", "A:3.000000; V:5.000000; D:4.000000;", "", r"line 2: EmoDetail .* must be like"),
    ],
)
def test_a_bad_label_of_msp_podcast_is_reported_with_its_row(
    podcast: Path, file: str, old: str, new: str, rule: str
) -> None:
    (podcast / "Labels" / "labels_detailed.csv").write_text(DETAILED)
    path = podcast / "Labels" / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(CorpusError, match=rule):
        load(podcast, "msp_podcast", scale=[1, 7])


def test_msp_podcast_without_its_labels_or_scheme_is_refused(podcast: Path) -> None:
    with pytest.raises(CorpusError, match=r"folds\.scheme is not set"):
        load(podcast, "msp_podcast", scheme=None, scale=[1, 7])
    (podcast / "Labels" / "labels_consensus.csv").unlink()
    with pytest.raises(CorpusError, match=r"Labels/labels_consensus\.csv, and that: it does not exist"):
        load(podcast, "msp_podcast", scale=[1, 7])


# --- long tables ------------------------------------------------------------------------------------------------------


def with_ratings(folder: Path, lines: list[str], **settings: Any) -> Corpus:
    rows = [{k: v for k, v in row.items() if k not in ("valence", "arousal")} for row in manifest_rows(folder)]
    table = write_manifest(folder / "table.csv", rows)
    ratings = folder / "ratings.csv"
    ratings.write_text("\n".join(["utterance,rater,valence,arousal,when", *lines]))
    return load(table, "manifest", None, ratings=str(ratings), **settings)


def ratings_of(folder: Path, raters: Callable[[int], list[str]]) -> list[str]:
    """Three ratings of each utterance of the manifest: 2, 3 and 5 for valence, 1, 2 and 4 for arousal."""
    names = [str(row["utterance"]) for row in manifest_rows(folder)]
    return [
        f"{name},{rater},{valence},{valence - 1},noon"
        for index, name in enumerate(names)
        for rater, valence in zip(raters(index), (2, 3, 5), strict=True)
    ]


def test_a_long_table_gives_the_ratings_and_their_mean_as_label(tmp_path: Path) -> None:
    lines = ratings_of(tmp_path, lambda _: ["anna", "bo", "r10"])
    corpus = with_ratings(tmp_path, list(reversed(lines)))
    for utterance in corpus.utterances:
        assert utterance.valence == pytest.approx(10 / 3)
        assert utterance.arousal == pytest.approx(7 / 3)
        assert utterance.raters == {"E1": (2, 1, None), "E2": (3, 2, None), "E3": (5, 4, None)}
    assert corpus.warnings == ("columns of the ratings that cvrunner does not know, ignored: 1 (first: 'when')",)


def test_crowds_are_numbered_within_each_utterance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ratings_of(tmp_path, lambda index: [f"w{3 * index + k}" for k in range(3)])
    everyone = {f"E{number + 1}" for number in range(len(lines))}
    assert {rater for u in with_ratings(tmp_path, lines).utterances for rater in u.raters} == everyone
    monkeypatch.setattr(label_files, "MOST_RATERS", len(lines) - 1)
    for utterance in with_ratings(tmp_path, lines).utterances:
        assert utterance.raters == {"E1": (2, 1, None), "E2": (3, 2, None), "E3": (5, 4, None)}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda lines: [lines[0].replace(",2,", ",2_0,"), *lines[1:]], r"ratings\.csv line 2: .*'2_0' is not a number"),
        (lambda lines: [lines[0].replace(",2,", ",7,"), *lines[1:]], r"ratings\.csv line 2: .*valence is 7, must be"),
        (lambda lines: [lines[0].replace("anna", ""), *lines[1:]], r"ratings\.csv line 2: .*rater is empty"),
        (lambda lines: lines[3:], r"table\.csv line 2: .*valence"),
    ],
)
def test_a_bad_rating_is_reported_with_its_row(
    tmp_path: Path, change: Callable[[list[str]], list[str]], rule: str
) -> None:
    with pytest.raises(CorpusError, match=rule):
        with_ratings(tmp_path, change(ratings_of(tmp_path, lambda _: ["anna", "bo", "r10"])))


def test_a_second_rating_by_one_rater_is_counted_and_ignored(tmp_path: Path) -> None:
    lines = ratings_of(tmp_path, lambda _: ["anna", "bo", "r10"])
    corpus = with_ratings(tmp_path, [*lines, lines[0].replace(",2,", ",4,")])
    assert any("by the same rater, ignored: 1" in warning for warning in corpus.warnings)
    assert {u.valence for u in corpus.utterances} == {10 / 3}


def test_ratings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    table = write_manifest(tmp_path / "table.csv", [row | {"valence_1": 3} for row in manifest_rows(tmp_path)])
    ratings = tmp_path / "ratings.csv"
    ratings.write_text("utterance,rater,valence\na,b,3\n")
    with pytest.raises(CorpusError, match=r"has a column 'valence_1', but ratings come from corpus\.ratings"):
        load(table, "manifest", None, ratings=str(ratings))
    for text, rule in (
        ("utterance,valence\na,3\n", "column 'rater' is missing"),
        ("utterance,rater\na,b\n", "has none of the columns valence, arousal, dominance"),
    ):
        ratings.write_text(text)
        with pytest.raises(CorpusError, match=rule):
            load(table, "manifest", None, ratings=str(ratings))
    with pytest.raises(CorpusError, match=r"corpus\.ratings cannot be read as a table: it does not exist"):
        load(table, "manifest", None, ratings=str(tmp_path / "gone.csv"))
    with pytest.raises(ValueError, match="ratings are for a table of utterances"):
        CorpusConfig.model_validate({"format": "iemocap", "ratings": "x.csv"})


# --- audformat --------------------------------------------------------------------------------------------------------

COLUMNS = {
    "speaker": "files.speaker",
    "gender": "files.speaker:gender",
    "valence": "valence",
    "arousal": "arousal",
    "valence_1": "ratings.a",
    "valence_2": "ratings.b",
}


@pytest.fixture
def database(tmp_path: Path) -> audformat.Database:
    """A database with a table per split, a table of files whose speakers have a gender, and one of ratings."""
    db = audformat.Database("made")
    db.schemes["score"] = audformat.Scheme("float", minimum=0, maximum=1)
    speakers = {f"s{k}": {"gender": "female" if k % 2 else "male"} for k in range(6)}
    db.schemes["speaker"] = audformat.Scheme("str", labels=speakers)
    files = [f"audio/{k:02}.wav" for k in range(12)]
    for seed, file in enumerate(files):
        write_noise(tmp_path / "db" / file, seed)
    for number, split in enumerate(("train", "dev", "test")):
        db.splits[split] = audformat.Split(split)
        table = db[f"emotion.{split}"] = audformat.Table(
            audformat.filewise_index(files[4 * number : 4 * number + 4]), split_id=split
        )
        for name in ("valence", "arousal"):
            table[name] = audformat.Column(scheme_id="score")
            table[name].set([0.1, 0.25, 0.5, 0.9] if name == "valence" else [0.8, 0.6, 0.4, 0.2])
    table = db["files"] = audformat.Table(audformat.filewise_index(files))
    table["speaker"] = audformat.Column(scheme_id="speaker")
    table["speaker"].set([f"s{k // 2}" for k in range(12)])
    table = db["ratings"] = audformat.Table(audformat.filewise_index(files[:4]))
    for name, values in (("a", [0.0, 0.2, 0.4, 1.0]), ("b", [0.2, 0.3, 0.6, 0.8])):
        table[name] = audformat.Column(scheme_id="score")
        table[name].set(values)
    return db


def load_database(db: audformat.Database, folder: Path, storage: str = "csv", **changes: Any) -> Corpus:
    db.save(str(folder / "db"), storage_format=storage)
    tables = ["emotion.train", "emotion.dev", "emotion.test"]
    settings = {"tables": tables, "columns": COLUMNS} | changes
    return load(folder / "db", "audformat", scale=[0, 1], audformat=settings)


@pytest.mark.parametrize("storage", ["csv", "parquet"])
def test_a_database_in_audformat_becomes_a_corpus(database: audformat.Database, tmp_path: Path, storage: str) -> None:
    corpus = load_database(database, tmp_path, storage)
    (fold,) = folds = make_folds(corpus, "manifest_split")
    check_leaks(folds)
    assert [[u.id for u in part] for part in fold.parts.values()] == [
        [f"audio/{k:02}" for k in range(start, start + 4)] for start in (0, 4, 8)
    ]
    first, second = fold.train[:2]
    assert (first.valence, first.arousal, second.valence) == (0.1, 0.8, 0.25)
    assert (first.speaker, first.gender, fold.train[2].gender, first.dialogue) == ("s0", "M", "F", "s0")
    assert first.raters == {"E1": (0.0, None, None), "E2": (0.2, None, None)}
    assert fold.test[0].raters == {}


def test_tables_of_a_database_may_have_other_sessions_than_splits(database: audformat.Database, tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        database[f"emotion.{split}"].split_id = None
    with pytest.raises(CorpusError, match="column 'session' is missing"):
        load_database(database, tmp_path)
    corpus = load_database(database, tmp_path, columns=COLUMNS | {"session": "files.speaker"})
    assert corpus.sessions == tuple(f"s{k}" for k in range(6))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"tables": []}, "corpus.audformat.tables is empty; the database has emotion.dev"),
        ({"tables": ["emotion"]}, "has no table 'emotion'"),
        ({"columns": {"speaker": "files.speaker"}}, r"corpus\.audformat\.columns\.valence: is not set"),
        ({"columns": COLUMNS | {"scenario": "files.text"}}, r"columns\.scenario: there is no column 'files\.text'"),
        ({"columns": COLUMNS | {"scenari": "files.speaker"}}, "unknown column 'scenari'; did you mean 'scenario'"),
        ({"columns": COLUMNS | {"gender": "files.speaker:sex"}}, "cannot be read as a database in audformat: .*sex"),
        ({"columns": COLUMNS | {"arousal": "ratings.a"}}, r"table emotion\.dev row 1: audio/04: .*arousal"),
    ],
)
def test_a_key_that_names_nothing_in_the_database_is_refused(
    database: audformat.Database, tmp_path: Path, changes: dict[str, Any], rule: str
) -> None:
    with pytest.raises((ConfigError, CorpusError), match=rule):
        load_database(database, tmp_path, **changes)


def test_segments_are_refused(database: audformat.Database, tmp_path: Path) -> None:
    index = audformat.segmented_index(["audio/00.wav"], [pd.Timedelta(0)], [pd.Timedelta("100ms")])
    database["segments"] = audformat.Table(index)
    for name in ("valence", "arousal"):
        database["segments"][name] = audformat.Column(scheme_id="score")
    with pytest.raises(CorpusError, match="table segments: has segments of files"):
        load_database(database, tmp_path, tables=["segments"])


def test_nothing_that_could_run_code_is_read_from_a_database(database: audformat.Database, tmp_path: Path) -> None:
    expected = load_database(database, tmp_path)
    root = tmp_path / "db"
    for path in root.glob("db.*.csv"):
        path.with_suffix(".pkl").write_bytes(b"not a pickle")
    settings = {"tables": ["emotion.train", "emotion.dev", "emotion.test"], "columns": COLUMNS}
    assert load(root, "audformat", scale=[0, 1], audformat=settings).digest == expected.digest
    header = root / "db.yaml"
    header.write_text(header.read_text() + f'\nmeta: !!python/object/apply:os.system ["touch {tmp_path / "ran"}"]\n')
    with pytest.raises(CorpusError, match="cannot be read as a database in audformat"):
        load(root, "audformat", scale=[0, 1], audformat=settings)
    assert not (tmp_path / "ran").exists()
    header.unlink()
    with pytest.raises(CorpusError, match=r"has no db\.yaml"):
        load(root, "audformat", scale=[0, 1], audformat=settings)


# --- anything in them -------------------------------------------------------------------------------------------------

CELLS = st.sampled_from(["", "nan", "1_0", "2,5", "8", "a;b", "Unknown", "\u0663", "A:4; V:x;", "train"]) | st.text(
    max_size=12
)
FILES = ("labels_consensus.csv", "labels_detailed.csv", "ratings.csv", "db.yaml", "db.emotion.train.csv")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, bytes]]:
    """Place and content of good files of each kind."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "Labels").mkdir()
    for seed, line in enumerate(CONSENSUS.splitlines()[1:]):
        write_noise(folder / "Audios" / line.split(",")[0], seed)
    database = audformat.Database("made")
    database.splits["train"] = audformat.Split("train")
    table = audformat.Table(audformat.filewise_index(["Audios/MSP-PODCAST_0001_0008.wav"]), split_id="train")
    for name, value in (("speaker", "s1"), ("valence", 0.5), ("arousal", 0.25)):
        table[name] = audformat.Column()
        table[name].set([value])
    database["emotion.train"] = table
    database.save(str(folder), storage_format="csv")
    ratings = "\n".join(["utterance,rater,valence,arousal", *ratings_of(folder, lambda _: ["anna", "bo", "r10"])])
    write_manifest(folder / "table.csv", manifest_rows(folder))
    texts = {"labels_consensus.csv": CONSENSUS, "labels_detailed.csv": DETAILED}
    contents = {f"Labels/{name}": text.encode() for name, text in texts.items()} | {"ratings.csv": ratings.encode()}
    contents |= {name: (folder / name).read_bytes() for name in FILES[3:]}
    return {Path(name).name: (folder / name, content) for name, content in contents.items()}


def read_changed(sources: dict[str, tuple[Path, bytes]], name: str, content: bytes) -> None:
    """Read the corpus that a file belongs to, with another content of that file."""
    for path, good in sources.values():
        path.write_bytes(good)
    sources[name][0].write_bytes(content)
    root = sources["db.yaml"][0].parent
    columns = {"speaker": "speaker", "valence": "valence", "arousal": "arousal"}
    with only(CorpusError), only(ConfigError):
        if name.startswith("labels"):
            load(root, "msp_podcast", scale=[1, 7])
        elif name == "ratings.csv":
            load(root / "table.csv", "manifest", ratings=str(sources[name][0]))
        else:
            load(root, "audformat", scale=[0, 1], audformat={"tables": ["emotion.train"], "columns": columns})


@pytest.mark.suites("test", "ci", "all")
@BOUNDED
@given(st.sampled_from(FILES), st.binary(max_size=120) | TEXT.map(str.encode), st.integers(0, 400))
@example("db.yaml", b"tables: [1, 2]\nschemes: 3\n", 0)
@example("db.yaml", b"x: " + b"[" * 5000, 0)
def test_any_bytes_in_a_label_file(
    sources: dict[str, tuple[Path, bytes]], name: str, content: bytes, start: int
) -> None:
    good = sources[name][1]
    read_changed(sources, name, good[:start] + content + good[start + len(content) :])


@pytest.mark.suites("test", "ci", "all")
@BOUNDED
@given(st.sampled_from(FILES[:3]), st.lists(st.tuples(st.integers(1, 20), st.integers(0, 8), CELLS), max_size=4))
def test_good_label_files_with_any_cells(
    sources: dict[str, tuple[Path, bytes]], name: str, changes: list[tuple[int, int, str]]
) -> None:
    rows = list(csv.reader(sources[name][1].decode().splitlines()))
    for line, column, cell in changes:
        rows[line % len(rows)][column % len(rows[line % len(rows)])] = cell
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    read_changed(sources, name, text.getvalue().encode("utf-8", "surrogatepass"))
