"""The commands `demo-data`, `encoder` and `init`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import soundfile
import yaml
from typer import prompt

from cvrunner import paths
from cvrunner.config.reading import load_config
from cvrunner.config.sections import DEMO_UTTERANCES
from cvrunner.data.demo import write_demo_corpus
from cvrunner.data.iemocap import session_folders
from cvrunner.data.manifest import read_columns
from cvrunner.data.utterance import DIMENSIONS
from cvrunner.errors import CorpusError, UsageError
from cvrunner.files import write_atomically
from cvrunner.text import line_printer, plural

if TYPE_CHECKING:
    from rich.console import Console

SCALES = ((1.0, 5.0), (1.0, 7.0), (1.0, 9.0), (0.0, 1.0), (-1.0, 1.0), (0.0, 10.0), (0.0, 100.0), (-100.0, 100.0))
"""Usual rating scales; the first one that holds all ratings of a table is proposed."""
TABLES = (".csv", ".jsonl", ".ndjson")
FILES_LOOKED_AT = 50
LAYOUT = (
    "must be IEMOCAP's folder with Session1, Session2, ..., or a CSV or JSONL table with a row per utterance and the "
    "columns of docs/corpora.md, or a folder with one such table"
)


def demo_data(root: Path, seed: int, utterances: int | None, console: Console) -> int:
    """Write the synthetic corpus; without `utterances`, as many as a configuration asks for by default."""
    write_demo_corpus(root, seed=seed, utterances=utterances or DEMO_UTTERANCES)
    console.print(f"synthetic corpus in {root.absolute()}", soft_wrap=True)
    return 0


def encoder(
    name: str, folder: Path, revision: str | None, trust_pickle: bool, from_wheel: bool, console: Console
) -> int:
    """Write the folder of an encoder, and say how to use it."""
    # It needs torch and transformers, which take seconds to import.
    from cvrunner.setup.encoder import write_encoder

    files = write_encoder(name, folder, revision, trust_pickle, from_wheel)
    kind, depth, width = files.settings.model_type, files.settings.depth, files.settings.width
    console.print(f"{kind} with {depth} layers of width {width} in {folder.absolute()}", soft_wrap=True)
    if files.tuned:
        console.print(f"It {files.tuned}: it was probably tuned on emotion, and runs will refuse it.", soft_wrap=True)
    console.print(f"--set model.encoder={folder.absolute()}", soft_wrap=True)
    return 0


def init(
    corpus: Path | None,
    output: Path | None,
    scale: tuple[float, float] | None,
    labels: str | None,
    split: bool | None,
    encoder: str | None,
    console: Console,
) -> int:
    """Write a commented configuration for a corpus, after at most five questions, and print what to type next.

    Without a terminal nothing is asked, and what is not given gets its default. Raises UsageError and CorpusError.
    """
    asking, print_line = sys.stdin.isatty(), line_printer(console)

    def ask(question: str, default: str, valid: Callable[[str], bool] = bool) -> str:
        while asking:
            answer = str(prompt(question, default=default)).strip()
            if valid(answer):
                return answer
            print_line(f"{answer!r} is no answer to this question")
        return default

    if corpus is None:
        if not asking:
            raise UsageError(f"init: name the corpus; it {LAYOUT}")
        corpus = Path(ask("Corpus (IEMOCAP's folder, or a table)", ".")).expanduser()
    table = find_table(corpus)
    root, corpus_format, folds = (table or corpus).absolute(), "manifest", ""
    if table is None:
        corpus_format = "iemocap"
        print_line(f"IEMOCAP with {plural(len(session_folders(corpus)), 'session')} in {root}")
        variants = ("header", "observers", "all_raters")
        labels = labels or ask(f"Labels ({', '.join(variants)})", variants[0], variants.__contains__)
        about = [f"  labels: {labels}   # header: as published; observers, all_raters: means of single ratings"]
    else:
        columns = read_columns(table)
        print_line(
            f"{plural(len(columns['path']), 'row')}, {plural(len(set(columns['session'])), 'session')}, "
            f"{plural(len(set(columns['speaker'])), 'speaker')} in {root}"
        )
        low, high = range_of_labels(columns, table)
        if scale is None:
            proposed = next((s for s in SCALES if s[0] <= low and high <= s[1]), (low, high))
            answer = ask(
                "Lowest and highest rating", "{:g} {:g}".format(*proposed), lambda text: bool(two_numbers(text))
            )
            scale = two_numbers(answer)
        assert scale is not None
        about = [
            f"  scale: [{scale[0]:g}, {scale[1]:g}]   # lowest and highest rating; the table has {low:g} to {high:g}"
        ]
        if needs_resampling(table, columns["path"]):
            about.append("  resample: true   # some audio is not 16 kHz mono; it is converted while it is read")
        if "split" in columns:
            if split is None:
                answer = ask(
                    "Folds by the table's split column, or by sessions (split, sessions)",
                    "split",
                    {"split", "sessions"}.__contains__,
                )
                split = answer == "split"
            schemes = {True: "manifest_split", False: "leave_one_session_out"}
            folds = f"folds:\n  scheme: {schemes[split]}   # or {schemes[not split]}\n"
    base = paths.default_config("finetune.yaml")
    encoder = encoder or ask("Encoder (hub name or folder)", load_config(base, []).model.encoder)
    output = output or Path(ask("Configuration to write", f"{root.stem}.yaml"))
    if output.exists():
        raise UsageError(f"{output}: exists already; choose another --output, or delete it")
    # Relative inside of the working directory, which `submit` uploads as a whole.
    shown_base = str(base)
    if base.is_relative_to(Path.cwd()) and output.absolute().is_relative_to(Path.cwd()):
        shown_base = os.path.relpath(base, output.absolute().parent)
    text = f"""\
# Written by `cvrunner init`. All other settings come from the base; the documentation lists all keys.
base: {quoted(shown_base)}
corpus:
  format: {corpus_format}
  root: {quoted(str(root))}
"""
    text += (
        "\n".join(about)
        + f"""
{folds}model:
  encoder: {quoted(encoder)}
train:
  epochs: 20   # a first look; configs/finetune_full.yaml has 50
  seeds: [0, 1, 2]   # a claim needs two; `plan` shows what one, two and three take
"""
    )
    if table is not None:
        text += """\
reference: {source: "", claims: []}   # those of the base are about IEMOCAP
# verify:
#   target: {ccc_valence: 0.5}   # the validation CCC that you expect; that of the base is about IEMOCAP
"""
    write_atomically(output, text)
    load_config(output, [])
    name = quoted(str(output))
    print_line(
        f"wrote {output}\npython -m cvrunner audit --config {name}   # checks all files and labels; trains nothing\n"
        f"python -m cvrunner all-folds --config {name}"
    )
    return 0


def find_table(corpus: Path) -> Path | None:
    """Return the table that `corpus` is or contains; None for IEMOCAP's tree. Raises UsageError for anything else."""
    if corpus.is_file():
        return corpus
    if not corpus.is_dir():
        raise UsageError(f"{corpus}: does not exist; the corpus {LAYOUT}")
    if any(corpus.glob("Session[0-9]*")) or any(corpus.glob("*/Session1")):
        return None
    tables = sorted(path for path in corpus.iterdir() if path.suffix.lower() in TABLES)
    if len(tables) == 1:
        return tables[0]
    found = ", ".join(path.name for path in tables[:5]) or "no table"
    raise UsageError(f"{corpus}: has {found}; the corpus {LAYOUT}")


def range_of_labels(columns: dict[str, list[str]], table: Path) -> tuple[float, float]:
    """Return the lowest and the highest label or rating of a table. Raises CorpusError if there is no number."""
    cells = [cell for name, of_column in columns.items() if name.split("_")[0] in DIMENSIONS for cell in of_column]
    try:
        values = [float(cell) for cell in cells if cell]
        return min(values), max(values)
    except ValueError as error:
        raise CorpusError(str(table), [f"has labels that are no numbers: {error}"]) from None


def two_numbers(text: str) -> tuple[float, float] | None:
    """Return `1 5` or `1, 5` as two numbers in rising order, or None."""
    try:
        low, high = map(float, text.replace(",", " ").split())
    except ValueError:
        return None
    return (low, high) if low < high else None


def needs_resampling(table: Path, files: list[str]) -> bool:
    """Return whether any of some files, evenly spaced, is not 16 kHz mono; `audit` names those that cannot be read."""
    for name in files[:: max(1, len(files) // FILES_LOOKED_AT)]:
        try:
            info = soundfile.info(str(table.parent / name))
        except (soundfile.SoundFileError, OSError):
            continue
        if (info.samplerate, info.channels) != (16_000, 1):
            return True
    return False


def quoted(text: str) -> str:
    """Return text as it stands in YAML, in quotes only if they are needed."""
    return yaml.safe_dump(text, width=10_000, allow_unicode=True).removesuffix("\n").removesuffix("\n...")
