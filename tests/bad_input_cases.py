"""Bad input by name, with a regular expression that its message must match."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import soundfile
from safetensors.numpy import save_file

from tests.bad_input import (
    BAD_WAV,
    TABLE,
    TURN,
    Build,
    add_pickle,
    arguments,
    audio,
    changed,
    command,
    config,
    cut,
    encoder,
    encoder_json,
    every_row,
    instead_of_labels,
    labels,
    manifest,
    only_pickle,
    overlay,
    row,
    rows,
    settings,
    tree,
    turn_audio,
)
from tests.corpora import sparse_wav, write_bytes, write_noise

HEAD = b"path,utterance,speaker,session,dialogue,turn,valence,arousal\n"
NOISE = np.random.default_rng(8).normal(0, 0.1, 3200)
OWN_CORPUS = f"corpus: {{format: manifest, root: {TABLE}}}"
LOOP = "a symbolic link that leads nowhere"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)

CONFIG: dict[str, tuple[Build, str]] = {
    "a file that is not there": (arguments("all-folds", "--config", "no.yaml"), r"no\.yaml: cannot be read: No such"),
    "a folder": (arguments("all-folds", "--config", "."), r"\.: cannot be read: Is a directory"),
    "a link to itself": (
        lambda folder: (folder / "loop.yaml").symlink_to("loop.yaml") or ["audit", "-c", "loop.yaml"],
        r"loop\.yaml: cannot be read: Too many levels of symbolic links",
    ),
    "an unknown section": (config("trainer: {}"), r"trainer: unknown key in config\.yaml; did you mean train"),
    "a mistyped key": (config("train: {epoch: 3}"), r"train\.epoch: unknown key .*did you mean train\.epochs\?"),
    "a key of an earlier version": (
        config("train: {warmup: 0.2}"),
        r"train\.warmup \(config\.yaml\): renamed to train\.warmup_ratio",
    ),
    "an override of a key of an earlier version": (
        settings("tune.samples=3"),
        r"tune\.samples \(override tune\.samples=3\): renamed to tune\.num_samples",
    ),
    "a key of another section": (config("model: {lr: 0.1}"), r"model\.lr: unknown key .*did you mean train\.lr\?"),
    "a key that is no word": (config("train: {'lérn rate': 1}"), r"train\.'lérn rate': unknown key in config\.yaml"),
    "a key that is a number": (config("1: {}"), r"1: .*config\.yaml"),
    "a word for a number": (config("train: {lr: fast}"), r"train\.lr: .*valid number, not 'fast' \(config\.yaml\)"),
    "a quoted number": (config("train: {epochs: '20'}"), r"train\.epochs: .*valid integer, not '20'"),
    "a fraction for a count": (config("train: {epochs: 2.5}"), r"train\.epochs: .*valid integer, not 2\.5"),
    "an exponent for a count": (config("train: {epochs: 1e1}"), r"train\.epochs: .*valid integer, not 10\.0"),
    "a list for a section": (config("train: [1, 2]"), r"train: must be a section with keys, not \[1, 2\]"),
    "a number that is none": (config("train: {lr: .nan}"), r"train\.lr: .*finite number, not nan"),
    "a number below the limit": (config("train: {lr: -1}"), r"train\.lr: .*greater than 0, not -1"),
    "a value without end": (config(f"train: {{lr: {'x' * 9999}}}"), r"train\.lr: .*not 'x{70,76}\.\.\. \(config"),
    "a key that stands twice": (config("train: {lr: 1}\ntrain: {lr: 2}"), r"config\.yaml, line 2: duplicate key "),
    "broken YAML": (config("train: [1, 2"), r"config\.yaml, line 1: "),
    "a tab": (config("train:\n\tlr: 1"), r"config\.yaml, line 2: found character '\\t'"),
    "a list of sections": (config("- train"), r"config\.yaml: must hold sections with keys, not list"),
    "a Python object": (
        config("train: !!python/object/apply:os.mkdir ['owned']"),
        r"config\.yaml, line 1: could not determine a constructor",
    ),
    "a tag that does not fit": (config("train: {lr: !!int ''}"), r"config\.yaml, line 1: '' is no int"),
    "an alias that holds itself": (
        config("conditions: &c {a: {model: *c}}"),
        r"line 1: found unconstructable recursive",
    ),
    "an override that holds itself": (
        settings("train.seeds=&a [*a]"),
        r"override train\.seeds=&a \[\*a\]: nested more than 20",
    ),
    "aliases that multiply": (config(LAUGHS), r"config\.yaml: more than 10000 values"),
    "endless nesting": (config("train: " + "[" * 5000), r"config\.yaml: nested far too deep"),
    "bytes that are not UTF-8": (config("# \n# é\n".encode("latin-1")), r"not UTF-8 text \(byte 5, line 2\); save it"),
    "a base that is itself": (overlay(top="base: top.yaml"), r"base files form a circle: top\.yaml -> top\.yaml"),
    "bases in a circle": (
        overlay(top="base: a.yaml", a="base: b.yaml", b="base: a.yaml"),
        r"base files form a circle: a\.yaml -> b\.yaml -> a\.yaml",
    ),
    "a base that is not there": (
        overlay(top="base: gone.yaml"),
        r"gone\.yaml: cannot be read: No such file or directory \(the base of top\.yaml\)",
    ),
    "a base that is no name": (overlay(top="base: [a]"), r"top\.yaml: base must be a file name, not \['a'\]"),
    "a mistake in a base": (
        overlay(top="base: a.yaml", a="train: {epochs: 0}"),
        r"train\.epochs: .*not 0 \(top\.yaml over a\.yaml\)",
    ),
    "an override without a value": (settings("train.lr"), r"override train\.lr: must look like section\.key=value"),
    "an override of no key": (
        settings("train.epoch=3"),
        r"train\.epoch: unknown key in override train\.epoch=3; did you mean",
    ),
    "an empty override": (settings("train.lr="), r"train\.lr: .*valid number, not None \(override train\.lr=\)"),
    "an empty condition list": (config("conditions: {}"), r"conditions must name one condition or more"),
    "a condition with another corpus": (
        config("conditions: {a: {corpus: {root: x}}}"),
        r"conditions\.a\.corpus: a condition may change only model and train",
    ),
    "a condition with a mistyped key": (
        config("conditions: {a: {}, b: {model: {freeze: true}}}"),
        r"model\.freeze: unknown key in conditions\.b",
    ),
    "a condition with a name for folders": (
        config("conditions: {../up: {}}"),
        r"conditions: .*pattern .*, not '\.\./up'",
    ),
    "a scale upside down": (settings("corpus.scale=[5, 1]"), r"corpus: scale must go from low to high, not \[5"),
    "a scheme without its corpus": (
        config("folds: {scheme: manifest_split}"),
        r"folds\.scheme manifest_split needs corpus\.format manifest",
    ),
    "a condition with seeds of its own": (
        config("conditions: {a: {}, b: {train: {seeds: [1]}}}"),
        r"conditions\.b\.train\.seeds \(config\.yaml\): all conditions have the same seeds",
    ),
    "a mistyped condition in an override": (
        settings("conditions.unfrozn.train.lr=1"),
        r"conditions\.unfrozn \(override .*\): no such condition, .* did you mean unfrozen\?",
    ),
    "two conditions that are the same": (
        settings("conditions.unfrozen.model.freeze_speech_encoder=true"),
        r"conditions\.unfrozen \(.*\): has the same settings as conditions\.frozen",
    ),
    "a comment in an override": (settings("corpus.root=a #b"), r"override corpus\.root=a #b: what follows ` #` would"),
    "a number with underscores": (settings("train.epochs=1_0"), r"train\.epochs: .*valid integer, not '1_0'"),
    "a corpus of one's own without an encoder": (
        lambda folder: settings()(folder) and config(OWN_CORPUS, "--set", "tracking.enabled=false")(folder),
        r"model\.encoder: not set, and its default `demo` is a toy that knows synthetic speech alone",
    ),
    "a user who is not there": (
        settings("results.root=~nobody-of-this-name/x"),
        r"results\.root: ~nobody-of-this-name/x: there is no such user",
    ),
    "a NUL in a path": (settings('corpus.root="a\\0b"'), r"corpus\.root: 'a\\x00b' holds the character '\\x00', which"),
    "a path that is too long": (settings(f"corpus.root={'x' * 5000}"), r"does not exist; set corpus\.root"),
    "results in a file": (
        changed(lambda folder: write_bytes(folder / "file", b""), "results.root=file"),
        r"results\.root: .*/file is a file, must be a folder",
    ),
    "a cache in a file": (
        changed(lambda folder: write_bytes(folder / "file", b""), "cluster.cache_dir=file"),
        r"cluster\.cache_dir: .*/file is a file, must be a folder",
    ),
    "a demo corpus in a file": (
        lambda folder: write_bytes(folder / "file", b"") or command(root="file/demo", form="demo"),
        r"corpus\.root: .*/file/demo: the demo corpus cannot be written: File exists",
    ),
    "a demo corpus over something else": (
        lambda folder: write_bytes(folder / "mine" / "thesis.tex", b"x") or command(root="mine", form="demo"),
        r"corpus\.root: .*mine exists and is not a demo corpus: choose a folder",
    ),
}

RUN: dict[str, tuple[Build, str]] = {
    "fold 6 of the demo": (arguments("fold", "--fold", "6"), r"fold 6: there are folds 1 to 5"),
    "fold 0": (arguments("fold", "--fold", "0"), r"fold 0: there are folds 1 to 5"),
    "fold 4 of three sessions": (
        lambda folder: ["fold", "--fold", "4", *settings()(folder)[1:]],
        r"fold 4: there are folds 1 to 3",
    ),
    "fold 6 of IEMOCAP": (
        lambda folder: ["fold", "--fold", "6", *tree(lambda _: None, 5)(folder)[1:]],
        r"fold 6: there are folds 1 to 5",
    ),
    "an unknown condition": (
        arguments("fold", "--fold", "1", "--condition", "melted"),
        r"conditions\.melted: unknown condition; choose one of frozen, unfrozen",
    ),
    "a GPU that is not there": (
        arguments("fold", "--fold", "1", "--gpu", "99"),
        r"gpu 99: this machine has \d+ GPUs?",
    ),
    "two GPUs a trial": (settings("cluster.gpus_per_trial=2"), r"cluster\.gpus_per_trial: .*equal to 1, not 2"),
    "no GPU a trial": (settings("cluster.gpus_per_trial=0"), r"cluster\.gpus_per_trial: .*greater than 0, not 0"),
    "less than no GPU": (settings("cluster.gpus_per_trial=-1"), r"cluster\.gpus_per_trial: .*greater than 0, not -1"),
    "half a core": (settings("cluster.cpus_per_trial=0.5"), r"cluster\.cpus_per_trial: .*valid integer, not 0\.5"),
    "no trial at a time": (settings("cluster.max_concurrent=0"), r"cluster\.max_concurrent: .*equal to 1, not 0"),
    "unknown chaos": (arguments("all-folds", "--chaos", "flood=1"), r"chaos flood=1: must be kill, oom, tracker"),
    "a report of no run": (arguments("report", "nowhere"), r"nowhere: no run here"),
    "a comparison of no runs": (arguments("compare", "here", "there"), r"here: no run here"),
    "ratings by no run": (arguments("predict", "nowhere", "a.wav"), r"nowhere: no run here"),
    "windows with gaps": (
        arguments("predict", "nowhere", "a.wav", "--window-s", "5", "--hop-s", "6"),
        r"hop_s 6: must be from 0\.1 s to the window's 5 s",
    ),
    "an export of no run": (arguments("export", "nowhere", "folder"), r"nowhere: no run here"),
    "MLflow for no run": (arguments("sync", "nowhere"), r"nowhere: no run here"),
}

MANIFEST: dict[str, tuple[Build, str]] = {
    "a manifest that is not there": (
        arguments(*command()),
        r"table\.csv: 1 problem\n  does not exist; set corpus\.root",
    ),
    "a folder as manifest": (
        changed(lambda folder: (shutil.rmtree(folder / "corpus"), (folder / TABLE).mkdir(parents=True))),
        r"table\.csv: 1 problem\n  corpus\.root cannot be read as a manifest: it is not a file but a folder",
    ),
    "a pipe as manifest": (
        changed(lambda folder: ((folder / TABLE).unlink(), os.mkfifo(folder / TABLE))),
        r"corpus\.root cannot be read as a manifest: it is not a file but a folder, a pipe",
    ),
    "an empty manifest": (manifest(b""), r"table\.csv: 1 problem\n  has no rows; "),
    "a manifest of columns alone": (manifest(HEAD), r"has no rows; "),
    "a manifest in Latin-1": (
        manifest(HEAD + "é".encode("latin-1")),
        r"is not UTF-8 text \(byte 61, line 2\); save it",
    ),
    "a manifest in UTF-16": (manifest(HEAD.decode().encode("utf-16-le")), r"holds a NUL character \(line 1\); save it"),
    "NUL bytes": (manifest(HEAD + b"a.wav,\0\n"), r"holds a NUL character \(line 2\); save it as UTF-8 text"),
    "a JSON list": (
        manifest(b'[{"path": "a.wav"}]', "table.json"),
        r"is a JSON list; must have one JSON object per line",
    ),
    "a broken JSON line": (
        manifest(b'\n{"path": "a.wav"\n', "a.jsonl"),
        r"a\.jsonl line 2: is not a JSON row: Expecting.*at character 17",
    ),
    "a list in JSON lines": (manifest(b"[1]\n", "a.jsonl"), r"a\.jsonl line 1: is not a JSON row: must be an object"),
    "half a character in JSON": (
        rows(lambda good: good[2].update(speaker="\ud800"), name="a.jsonl"),
        r"a\.jsonl line 3: s2t0: speaker '\\ud800' holds a line end or another control character",
    ),
    "a cell without end": (manifest(HEAD + b"a" * 140_000), r"table\.csv line 2: is not CSV: field larger than"),
    "a name without end": (row(session="1" * 5000), r"line 4: s2t0: session '1+'\.\.\. has 5000 characters, must have"),
    "a row that is too short": (manifest(HEAD + b"a.wav,a\n"), r"table\.csv line 2: has 2 cells, must have 8"),
    "tabs between cells": (
        manifest(HEAD.replace(b",", b"\t") + b"a\tb\n"),
        r"has none of the columns .*commas or semicolons",
    ),
    "a column that is missing": (
        rows(lambda good: [one.pop("turn") for one in good] and None),
        r"table\.csv: column 'turn' is missing; required are path, utterance",
    ),
    "a mistyped column": (
        rows(lambda good: [{"valance": one.pop("valence"), **one} for one in good]),
        r"table\.csv: unknown column 'valance'; did you mean 'valence'\?",
    ),
    "a column that stands twice": (manifest(b"path,path\n"), r"table\.csv line 1: duplicate column 'path'"),
    "no label": (row(valence=""), r"table\.csv line 4: s2t0: valence is missing"),
    "a label that is no number": (row(valence="high"), r"table\.csv line 4: s2t0: valence 'high' is not a number"),
    "a label of NaN": (row(arousal="nan"), r"table\.csv line 4: s2t0: arousal is nan, must be a finite number"),
    "a label off the scale": (row(valence=9), r"table\.csv line 4: s2t0: valence is 9, outside corpus\.scale 1\.\.5"),
    "the same label everywhere": (
        every_row(valence=3),
        r"table: 9 problems\n  fold 1: train \(3\): every valence is 3 \(2 utterances\); labels must differ",
    ),
    "an utterance twice": (
        row(utterance="s1t0"),
        r"line 4: s1t0: duplicate utterance; the first is at table\.csv line 2",
    ),
    "a turn twice": (row(turn=1), r"line 5: s2t1: duplicate turn 1 of dialogue d2; the first is at table\.csv line 4"),
    "no speaker": (row(speaker=""), r"table\.csv line 4: s2t0: speaker is empty"),
    "a speaker in two sessions": (row(speaker="s1a"), r"line 4: s2t0: speaker s1a is in more than one session"),
    "an unknown split": (every_row(split="dev"), r"line 2: s1t0: split 'dev' must be one of train, validation, test"),
    "a split that the folds ignore": (
        every_row(split="train"),
        r"table\.csv line 2: s1t0: split is 'train', as in 6 rows, but folds\.scheme is not set",
    ),
    "a key that stands twice in JSON": (
        manifest(b'{"path": "a.wav", "Path": "b.wav"}\n', "a.jsonl"),
        r"a\.jsonl line 1: is not a JSON row: keys 'path' and 'Path' are the same column",
    ),
    "NaN for a name": (row(session="nan"), r"table\.csv line 4: s2t0: session is empty"),
    "a speaker as a number and as a fraction": (
        rows(lambda good: (good[0].update(speaker="7"), good[1].update(speaker="7.0"))),
        r"table\.csv line 3: s1t1: speaker '7\.0' looks like '7' at table\.csv line 2",
    ),
    "a session with a space that does not break": (
        rows(lambda good: (good[0].update(session="a b"), good[1].update(session="a\xa0b"))),
        r"table\.csv line 3: s1t1: session 'a\\xa0b' looks like 'a b' at table\.csv line 2",
    ),
    "an underscore in a number": (row(turn="1_10"), r"table\.csv line 4: s2t0: turn '1_10' is not a number \(digits"),
    "a percent sign": (row(valence="85%"), r"table\.csv line 4: s2t0: valence '85%' is not a number \(write 85"),
    "one utterance": (rows(lambda good: good[:1]), r"table: 1 problem\n  has 1 session \(1\); .*needs three or more"),
    "one session": (rows(lambda good: good[:2]), r"has 1 session \(1\); .*needs three or more"),
    "a session of one utterance": (
        rows(lambda good: good[:-1]),
        r"fold 2: validation \(3\): every valence is 1\.5 \(1 utterance\); labels must differ",
    ),
    "a split without test": (
        rows(lambda good: [one | {"split": "train"} for one in good], "folds.scheme=manifest_split"),
        r"needs a split column with train, validation, test; no utterance has validation or test",
    ),
    "a split that leaks": (
        rows(
            lambda good: [one | {"split": ("train", "test", "validation")[i % 3]} for i, one in enumerate(good)],
            "folds.scheme=manifest_split",
        ),
        r"must share nothing: \d+ problems\n(.*\n)?  fold 1: dialogue d1 is in train and in test",
    ),
}

AUDIO: dict[str, tuple[Build, str]] = {
    "no file": (audio(lambda _: None), r"line 4: s2t0: .*/s2t0\.wav: is missing: there is no such audio file"),
    "a path out of the folder": (
        row(path="../../etc/x.wav"),
        r"line 4: s2t0: path '\.\./\.\./etc/x\.wav' leaves the manifest's folder; use a path inside it, or an absolute",
    ),
    "an absolute path to nothing": (row(path="/nowhere/x.wav"), r"line 4: s2t0: /nowhere/x\.wav: is missing"),
    "a path that is too long": (row(path="x/" * 3000), r"line 4: s2t0: .*is missing"),
    "a folder": (audio(Path.mkdir), r"s2t0\.wav: is not a file but a folder, a pipe or a device"),
    "a pipe": (audio(os.mkfifo), r"s2t0\.wav: is not a file but a folder, a pipe or a device"),
    "a device": (row(path="/dev/zero"), r"line 4: s2t0: /dev/zero: is not a file but a folder, a pipe or a device"),
    "a link to itself": (audio(lambda path: path.symlink_to(path)), rf"s2t0\.wav: is {LOOP}"),
    "a link to nothing": (audio(lambda path: path.symlink_to("gone.wav")), rf"s2t0\.wav: is {LOOP}"),
    "an empty file": (audio(Path.touch), r"s2t0\.wav: cannot be read as audio: .*; must be a WAV or FLAC file"),
    "text": (
        audio(lambda path: path.write_text("hello")),
        r"s2t0\.wav: cannot be read as audio: Format not recognised",
    ),
    "a truncated header": (
        changed(lambda folder: cut(folder / BAD_WAV, 30)),
        r"s2t0\.wav: is truncated: it has 30 of 6444 bytes; copy it again",
    ),
    "truncated audio": (
        changed(lambda folder: cut(folder / BAD_WAV, -1000)),
        r"s2t0\.wav: is truncated: it has 5444 of 6444 bytes; copy it again",
    ),
    "8 kHz": (
        audio(lambda path: write_noise(path, 1, rate_hz=8000)),
        r"s2t0\.wav: 8000 Hz with 1 channel, must be 16000",
    ),
    "stereo": (
        audio(lambda path: write_noise(path, 1, channels=2)),
        r"s2t0\.wav: 16000 Hz with 2 channels, must be .*sox",
    ),
    "half an hour": (audio(lambda path: sparse_wav(path, 1800)), r"s2t0\.wav: is 1800 s long, must be at most 600 s"),
    "half an hour at 8 kHz": (
        audio(lambda path: sparse_wav(path, 1800, rate_hz=8000), "corpus.resample=true"),
        r"s2t0\.wav: is 1800 s long, must be at most 600 s: split it into one file per utterance",
    ),
    "less than a frame": (
        audio(lambda path: write_noise(path, 1, 0.02)),
        r"has 320 samples at 16 kHz, must have 790",
    ),
    "no samples": (audio(lambda path: write_noise(path, 1, 0)), r"s2t0\.wav: holds no audio"),
    "silence": (audio(lambda path: soundfile.write(path, np.zeros(3200), 16_000)), r"s2t0\.wav: is silent"),
    "a truncated Wave64 file": (
        audio(lambda path: (soundfile.write(path, NOISE, 16_000, format="W64"), cut(path, -100))),
        r"s2t0\.wav: is truncated: it has 6300 of 6400 bytes of audio; copy it again",
    ),
    "an offset alone": (
        audio(lambda path: soundfile.write(path, np.full(3200, 0.5), 16_000)),
        r"table\.csv line 4: s2t0: .*s2t0\.wav: is silent or constant: the deviation from the mean is channel 1 -",
    ),
    "channels in antiphase": (
        audio(lambda path: soundfile.write(path, np.stack([NOISE, -NOISE], axis=1), 16_000), "corpus.resample=true"),
        r"table\.csv line 4: s2t0: .*s2t0\.wav: has channels in antiphase, which cancel when averaged",
    ),
    "samples of NaN": (
        audio(lambda path: soundfile.write(path, np.full(3200, np.nan), 16_000, subtype="FLOAT")),
        r"s2t0\.wav: holds NaN or infinite samples",
    ),
    "the same audio in two sessions": (
        changed(lambda folder: shutil.copy(folder / "corpus/audio/s1t0.wav", folder / BAD_WAV)),
        r"s1t0 \(test\) and s2t0|s2t0 \(validation\) and s1t0 \(test\) are the same audio",
    ),
}

IEMOCAP: dict[str, tuple[Build, str]] = {
    "a root that is not there": (
        tree(lambda _: None, root="gone"),
        r"gone: 1 problem\n  does not exist; set corpus\.root",
    ),
    "the folder above": (
        tree(lambda _: None, root="."),
        r"must be the folder that holds Session1.*did you mean .*IEMOCAP",
    ),
    "a session as root": (
        tree(lambda _: None, root="IEMOCAP/Session1"),
        r"Session1: 1 problem\n  corpus\.root must be the",
    ),
    "two sessions": (
        tree(lambda _: None, 2),
        r"IEMOCAP: 1 problem\n  has 2 sessions \(Ses01, Ses02\); .*three or more",
    ),
    "a session that is missing": (
        tree(lambda root: shutil.rmtree(root / "Session2"), 5, "IEMOCAP", "corpus.partial=false"),
        r"IEMOCAP: 1 problem\n  Session2: is missing, with 1811 of the 10,039 published turns",
    ),
    "a session in small letters": (
        tree(lambda root: (root / "Session1").rename(root / "session1"), 5),
        r"  session1: looks like a session but is not read",
    ),
    "a session without labels": (
        tree(lambda root: shutil.rmtree(root / "Session2" / "dialog")),
        r"Session2/dialog/EmoEvaluation: there is no label file \(\*\.txt\)",
    ),
    "a folder as label file": (
        instead_of_labels(Path.mkdir),
        r"Ses02F_impro01\.txt: must be a label file, but is a folder",
    ),
    "a pipe as label file": (
        instead_of_labels(os.mkfifo),
        r"Ses02F_impro01\.txt: must be a label file, but is a folder, a",
    ),
    "a label file as link to itself": (
        instead_of_labels(lambda path: path.symlink_to(path)),
        r"Ses02F_impro01\.txt: must be a label file, but is .* broken link",
    ),
    "a header that is no header": (
        labels("[1.0000 - 1.2000]", "[1.0000 1.2000]"),
        r"Ses02F_impro01\.txt line 3: a turn must look like `\[start - end\] name emotion",
    ),
    "one dimension": (labels("2.5000, 3.0000, 3.5000", "2.5000"), r"Ses02F_impro01\.txt line 3: a turn must look like"),
    "four dimensions": (labels("3.5000]", "3.5000, 1.0000]"), r"Ses02F_impro01\.txt line 3: a turn must look like"),
    "a label of NaN": (
        labels("2.5000", "nan"),
        rf"Ses02F_impro01\.txt line 3: {TURN}: valence is nan, must be a finite",
    ),
    "a rating that is no rating": (
        labels("C-E2:", "A-E2: val x;"),
        r"Ses02F_impro01\.txt line 4: a rating must look like `A-E1: val 3; act 2; dom 2;`",
    ),
    "a turn of another dialogue": (
        labels(TURN, "Ses02F_impro09_F000"),
        r"the turn must be named Ses02F_impro01_F000 or",
    ),
    "audio that is missing": (
        tree(lambda root: turn_audio(root).unlink()),
        rf"line 3: {TURN}: .*{TURN}\.wav: is missing",
    ),
    "audio of 8 kHz": (
        tree(lambda root: write_noise(turn_audio(root), 1, rate_hz=8000)),
        rf"{TURN}\.wav: 8000 Hz with 1",
    ),
    "truncated audio": (
        tree(lambda root: cut(turn_audio(root), -100)),
        rf"{TURN}\.wav: is truncated: it has 6344 of 6444 bytes",
    ),
}

ENCODER: dict[str, tuple[Build, str]] = {
    "no folder": (settings("model.encoder=./gone"), r"model\.encoder \./gone: no such folder"),
    "no name on the hub": (
        settings("model.encoder=nobody/wavlm"),
        r"model\.encoder nobody/wavlm: no such folder, and the hub does not give it: .*or give a local folder",
    ),
    "a NUL in its name": (settings('model.encoder="a\\0b"'), r"model\.encoder: 'a\\x00b' holds the character"),
    "a name that is too long": (settings(f"model.encoder=./{'x' * 5000}"), r"model\.encoder \./x+: no such folder"),
    "no config.json": (
        encoder(lambda folder: (folder / "config.json").unlink()),
        r"config\.json is missing in .*/wavlm",
    ),
    "broken JSON": (
        encoder(lambda folder: (folder / "config.json").write_text("{")),
        r"model\.encoder \./wavlm: .*/config\.json cannot be read: Expecting",
    ),
    "a JSON list": (
        encoder(lambda folder: (folder / "config.json").write_text("[]")),
        r"config\.json must hold a JSON obj",
    ),
    "a wav2vec2": (
        encoder_json(model_type="wav2vec2"),
        r"weights have encoder\.layers\.0\.attention\.rel_attn_embed\.weight, so model\.safetensors is not of",
    ),
    "a SEW": (
        encoder_json(model_type="sew"),
        r"is a 'sew', must be one of WavLM, wav2vec 2\.0 .*, HuBERT, data2vec-audio, Whisper's encoder \(model_type in",
    ),
    "a model with adapters": (
        encoder_json(add_adapter=True),
        r"model\.encoder \./wavlm: has adapters \(add_adapter in config\.json\), which cvrunner does not run",
    ),
    "another frame rate": (
        encoder_json(conv_stride=[5, 2, 2, 2, 2, 2, 1]),
        r"has 100 frames per second \(the product of conv_stride in config\.json is 160\), must have 50 \(320\)",
    ),
    "convolutions in words": (
        encoder_json(conv_kernel="ten"),
        r"conv_kernel, conv_stride, conv_dim in config\.json must",
    ),
    "fewer layers than weights": (
        encoder_json(num_hidden_layers=1),
        r"weights that would not be used, first encoder\.layers\.1\..*; model\.safetensors is not of the model",
    ),
    "a window that only Whisper has": (
        encoder(lambda _: None, "wavlm", "model.whisper_window=30s"),
        r"model\.whisper_window 30s: the encoder \./wavlm is a wavlm, which always runs on the utterance alone",
    ),
    "no kind at all": (encoder_json(model_type=None), r"is a model of unknown type, must be one of WavLM"),
    "a classifier": (encoder_json(architectures=["WavLMForSequenceClassification"]), r"is a classifier, already tuned"),
    "layers in words": (
        encoder_json(num_hidden_layers="two"),
        r"num_hidden_layers is 'two' in config\.json, must be a",
    ),
    "audio of 8 kHz": (
        encoder_json("preprocessor_config.json", sampling_rate=8000),
        r"expects audio of 8000 Hz, must be 16000",
    ),
    "made from one tuned on emotion": (
        encoder_json(_name_or_path="audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim"),
        r"\./wavlm: config\.json says that it is audeering/.*, which matches \*emotion\*: .*heard the test speakers",
    ),
    "a folder named for the corpus": (
        encoder(lambda _: None, "wavlm-IEMOCAP"),
        r"matches \*iemocap\*: .*heard the test",
    ),
    "a hub name tuned on emotion": (settings("model.encoder=superb/wavlm-base-plus-er"), r"matches \*superb\*-er: "),
    "a folder with the word ser": (
        encoder(lambda _: None, "wavlm-ser_large"),
        r"matches the word ser: .*heard the test",
    ),
    "no weights": (
        encoder(lambda folder: (folder / "model.safetensors").unlink()),
        r"no model\.safetensors in .*/wavlm",
    ),
    "pickled weights alone": (
        encoder(only_pickle),
        r"no model\.safetensors in .* \(pickled weights are not loaded: .*`python -m cvrunner encoder",
    ),
    "weights cut off": (
        encoder(lambda folder: cut(folder / "model.safetensors", -100)),
        r"model\.encoder \./wavlm: .*/model\.safetensors cannot be read, copy it again: ",
    ),
    "a pickle named safetensors": (
        encoder(lambda folder: add_pickle(folder).rename(folder / "model.safetensors")),
        r"model\.safetensors cannot be read, copy it again: ",
    ),
    "weights of something else": (
        encoder(lambda folder: save_file({"a": np.zeros(1)}, folder / "model.safetensors")),
        r"weights are missing in its files, first encoder\.layers\.0\..*; model\.safetensors is not of the model",
    ),
    "weights of another width": (
        encoder_json(hidden_size=32),
        r"q_proj\.weight has shape \[16, 16\], must be \[32, 32\]; ",
    ),
    "a layer that it does not have": (
        encoder(lambda _: None, "wavlm", "model.layers=[0, 3]"),
        r"model\.layers 3: the encoder \./wavlm has hidden states 0\.\.2",
    ),
}

GROUPS = {"config": CONFIG, "run": RUN, "manifest": MANIFEST, "audio": AUDIO, "iemocap": IEMOCAP, "encoder": ENCODER}
CASES = {f"{group}: {name}": case for group, cases in GROUPS.items() for name, case in cases.items()}
