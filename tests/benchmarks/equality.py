"""Does a change of the code leave every number as it is? `python -m tests.benchmarks.equality OTHER_CHECKOUT`.

The other checkout and this one each run two main jobs with the same Python: the demo, and a small manifest that uses
more of the settings. Then predictions, weights, journals, results and summaries are compared bit for bit; times and
memory are not. Exit code 1 where anything differs. About six minutes a checkout on two cores; what a commit gave is
kept in `--folder` and not made again.

    git worktree add /tmp/base COMMIT
    python -m tests.benchmarks.equality /tmp/base
    python -m tests.benchmarks.equality --reference /tmp/cvrunner-equality/COMMIT   # what was kept, no checkout
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent
RUNS = {"demo": "results", "manifest": "manifest-results"}
"""The main jobs, and where each leaves its run."""
OLD_NAMES = {
    "unfreeze_top_layers": "unfreeze_layers",
    "early_stopping_patience": "early_stopping",
    "ema_decay": "weights_ema",
    "length_bucket_batches": "length_pool",
}
"""Keys of the configuration that had another name once."""
RENAMED = {"movement": "weight_change"}
"""Fields of results and journals that had another name once: old to new."""
WITHOUT_MLFLOW = ("--set", "tracking.enabled=false")
TIME_OR_MEMORY = re.compile(r"_(s|mib)$")
"""Fields that no two runs agree on."""
SHOWN = 5
"""Differences of a trial that are printed."""
HEADER = re.compile(r"^\[(\S+) - \S+\]\t(\S+)\t\S+\t\[(\S+), (\S+), \S+\]$", re.MULTILINE)
"""Of an utterance in IEMOCAP's evaluation files: start, name, valence, arousal."""
Value = float | str | None
Values = dict[str, Value]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.equality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("other", nargs="?", type=Path, metavar="OTHER_CHECKOUT", help="what this one is compared with")
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="its results, where they are there already")
    default = Path(tempfile.gettempdir()) / "cvrunner-equality"
    parser.add_argument("--folder", type=Path, default=default, help=f"where results are kept (default: {default})")
    arguments = parser.parse_args()
    if not (arguments.other or arguments.reference):
        parser.error("give OTHER_CHECKOUT or --reference")
    folder = arguments.folder.absolute()
    other = arguments.reference or recorded(arguments.other.absolute(), folder)
    return compare(other, recorded(REPOSITORY, folder))


# --- running ----------------------------------------------------------------------------------------------------------


def recorded(checkout: Path, folder: Path) -> Path:
    """The folder with a checkout's results, by its commit; made now unless it is there and nothing is uncommitted."""
    commit = _git(checkout, "rev-parse", "--short=12", "HEAD")
    changed = _git(checkout, "status", "--porcelain", "--", "cvrunner", "configs")
    kept = folder / (f"{commit}-changed" if changed else commit)
    if changed or not kept.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f"{kept.name}-", dir=folder))
        run_both(checkout, made)
        shutil.rmtree(kept, ignore_errors=True)
        made.rename(kept)
    return kept


def run_both(checkout: Path, folder: Path) -> None:
    """The demo and, on some of the corpus it leaves, the manifest; both without MLflow."""
    home = folder / "home"
    home.mkdir()
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CVRUNNER_"))}
    own = {"HOME": str(home), "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    environment = {**keep, **own}
    _check_import(checkout, folder, environment)
    _all_folds(checkout / "configs" / "demo.yaml", folder, environment, "demo")
    write_manifest(folder / "demo-corpus", folder / "manifest.csv")
    config = folder / "manifest.yaml"
    config.write_text(json.dumps(manifest_config(checkout), indent=2))  # JSON is YAML
    _all_folds(config, folder, environment, "manifest")
    shutil.rmtree(home)


def write_manifest(corpus: Path, manifest: Path) -> None:
    """Three sessions of the demo's corpus, the first four dialogues of each, the first eight turns of each, as CSV."""
    columns = ["path", "utterance", "speaker", "session", "dialogue", "turn", "gender", "valence", "arousal"]
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for session in (1, 2, 3):
            folder = corpus / f"Session{session}"
            for dialogue in sorted((folder / "dialog" / "EmoEvaluation").glob("*.txt"))[:4]:
                turns = sorted((float(start), *rest) for start, *rest in HEADER.findall(dialogue.read_text()))
                for start, name, valence, arousal in turns[:8]:
                    path = (folder / "sentences" / "wav" / dialogue.stem / f"{name}.wav").relative_to(manifest.parent)
                    gender = name.rpartition("_")[2][0]
                    about = [path, name, f"{session}{gender}", session, dialogue.stem, start, gender]
                    writer.writerow([*about, valence, arousal])


def manifest_config(checkout: Path) -> dict[str, Any]:
    """Tiny, and yet with most of what changes the training."""
    top, patience, ema, buckets = (key_name(checkout, name) for name in OLD_NAMES)
    frozen, unfrozen = {"freeze_speech_encoder": True}, {"freeze_speech_encoder": False}
    return {
        "corpus": {"format": "manifest", "root": "manifest.csv"},
        "model": {"encoder": "demo", "width": 16, "mamba": {"state_size": 4, "head_dim": 8, "layers": 1}},
        "train": {
            "batch_size": 4, "accumulation_steps": 2, "epochs": 3, "lr": 1e-3, "encoder_lr": 5e-4, "seeds": [0, 1],
            patience: 1, ema: 0.8,
        },
        "conditions": {
            "frozen": {"model": frozen},
            "unfrozen": {
                "model": {**unfrozen, "encoder_dropout": 0.1},
                "train": {"freeze_epochs": 1, "gradient_checkpointing": True, "max_batch_s": 8.0},
            },
            "top": {
                "model": {**unfrozen, top: 1, "mamba": {"bidirectional": True}},
                "train": {"accumulation": "averaged", buckets: 2},
            },
            "dialogue": {"model": {**frozen, "protocol": "dialogue", "pooling": "mean", "output": "sigmoid"}},
        },
        "results": {"root": RUNS["manifest"]},
    }  # fmt: skip


def key_name(checkout: Path, name: str) -> str:
    """What a checkout calls a key of the configuration: the name, or the old one. Raises LookupError."""
    code = "".join(path.read_text() for path in (checkout / "cvrunner" / "config").rglob("*.py"))
    for candidate in (name, OLD_NAMES[name]):
        if re.search(rf"^    {candidate}: ", code, re.MULTILINE):
            return candidate
    raise LookupError(f"{checkout}/cvrunner/config has no key {name} or {OLD_NAMES[name]}")


def _all_folds(config: Path, folder: Path, environment: dict[str, str], what: str) -> None:
    print(f"running the {what} in {folder} ...", file=sys.stderr, flush=True)
    began, log = time.monotonic(), folder / f"{what}.log"
    command = [sys.executable, "-m", "cvrunner", "all-folds", "--config", str(config), *WITHOUT_MLFLOW]
    with log.open("w") as output:
        code = subprocess.run(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        raise SystemExit(f"the {what} ended with {code}, see {log}:\n{log.read_text()[-4000:]}")
    print(f"... {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def _check_import(checkout: Path, folder: Path, environment: dict[str, str]) -> None:
    """Raise SystemExit where Python would import another cvrunner than the checkout's."""
    command = [sys.executable, "-c", "import cvrunner; print(cvrunner.__file__)"]
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    if not Path(found.strip()).resolve().is_relative_to(checkout.resolve()):
        raise SystemExit(f"cvrunner would be imported from {found.strip()}, not from {checkout}")


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# --- comparing --------------------------------------------------------------------------------------------------------


def compare(other: Path, this: Path) -> int:
    """Print a line for each trial and each summary, and what came out. 1 where anything differs."""
    print(f"{other}\nagainst {this}")
    trials = predictions = 0
    differing: list[str] = []
    for what, root in RUNS.items():
        left, right = (run_values(side / root) for side in (other, this))
        for name in sorted(left | right):
            one, two = left.get(name, {}), right.get(name, {})
            found = list(differences(one, two))
            told = f"DIFFERS in {len(found)} of {len(one | two)} values" if found else f"{len(one)} values equal"
            print(f"{what:8} {name:24} {told}")
            for line in found[:SHOWN]:
                print(f"         {line}")
            differing += [f"{what} {name}"] * bool(found)
            trials += name != "summary"
            predictions += sum("_predicted " in place for place in one)
    total = f"{trials} trials, {predictions} predictions"
    print(f"{total}: {', '.join(differing)} differ" if differing else f"{total}: all equal")
    return int(bool(differing) or not trials)


def differences(left: Values, right: Values) -> Iterator[str]:
    """Where two sets of values are not the same to the last bit."""
    for place in left | right:
        if place not in left or place not in right:
            yield f"{place}: only in {'this' if place in right else 'the other'}"
        elif repr(left[place]) != repr(right[place]):  # repr tells all doubles apart, and 0.0 from -0.0
            yield f"{place}: {left[place]!r} was, {right[place]!r} is"


def run_values(root: Path) -> dict[str, Values]:
    """All values of the one run below `root`, by trial name and `summary`."""
    (run,) = (path.parent for path in root.glob("*/run.json"))
    found = {str(trial.relative_to(run)): trial_values(trial) for trial in run.glob("*/fold-*/seed-*")}
    return {**found, "summary": dict(_numbers(json.loads((run / "summary.json").read_text()), "summary.json"))}


def trial_values(trial: Path) -> Values:
    """Predictions, digest of the weights, and the numbers of journal and result, by place."""
    values: Values = {}
    with (trial / "predictions.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            cells = {RENAMED.get(column, column): _cell(text) for column, text in row.items()}
            values |= {f"predictions.csv {column} {row['utterance']}": value for column, value in cells.items()}
    values["model.safetensors"] = hashlib.sha256((trial / "model" / "model.safetensors").read_bytes()).hexdigest()
    for line in (trial / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["event"] == "epoch":
            values.update(_numbers(record, f"journal.jsonl epoch {record['epoch']}"))
    values.update(_numbers(json.loads((trial / "result.json").read_text()), "result.json"))
    return values


def _numbers(data: Any, place: str) -> Iterator[tuple[str, Value]]:
    """Every number in JSON and every null, by place; texts are names, digests and sentences."""
    if isinstance(data, dict):
        for key, value in data.items():
            if not TIME_OR_MEMORY.search(key):
                yield from _numbers(value, f"{place} {RENAMED.get(key, key)}")
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _numbers(value, f"{place} {index}")
    elif data is None or isinstance(data, int | float):
        yield place, None if data is None else float(data)


def _cell(text: str) -> Value:
    try:
        return float(text)
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(main())
