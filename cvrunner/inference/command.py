"""The commands `predict`, `evaluate` and `export`. `cli.py` parses their arguments."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import soundfile
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from cvrunner.config.adaptation import adaptation_of
from cvrunner.errors import UsageError
from cvrunner.files import write_atomically
from cvrunner.inference.ensemble import (
    Members,
    chosen_windows,
    file_table,
    find_members,
    json_text,
    load_groups,
    predict_files,
)
from cvrunner.records.run_directory import RunDirectory
from cvrunner.run.prepare import find_run_directory
from cvrunner.text import line_printer, plural

if TYPE_CHECKING:
    import torch

# libsndfile's own; a raw file does not contain its sample rate.
FORMATS = {f".{name.lower()}" for name in soundfile.available_formats()} - {".raw"}
AUDIO_ENDINGS = FORMATS | {".aif", ".aifc", ".bwf", ".iff", ".mat", ".mpc", ".oga", ".opus", ".sf", ".snd", ".sph"}
"""The names of libsndfile's formats, and the extensions that differ from them."""


def predict(
    run: Path,
    files: Sequence[Path],
    condition: str | None,
    as_json: bool,
    output: Path | None,
    by_window: bool,
    window_s: float | None,
    hop_s: float | None,
    device: str | None,
    encoder: str | None,
) -> int:
    """Rate audio files with the models of a run; exit code 1 if a file could not be read."""
    window_s, hop_s = chosen_windows(window_s, hop_s)
    paths = audio_files(files)
    directory = find_run_directory(run)
    members = find_members(directory, condition)
    # Before the models are loaded, which takes a while: the choice may not be the one that the user expects.
    _announce(directory, members)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # transformers reads it when it is imported
    groups = load_groups(members.folders, chosen_device(device), encoder)
    passes = len(members.folders) if adaptation_of(members.folders[0].read().model).trains_encoder else 1
    # On standard error, where it does not get into a table that is piped on.
    terminal = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("files x models", total=passes * len(paths))
        found = predict_files(paths, groups, window_s, hop_s, lambda: bar.advance(task))
    if as_json:
        text = json_text(found, members.condition, by_window)
    else:
        text = file_table(found, by_window).to_csv(index=False)
    text = text.rstrip("\n") + "\n"
    if output is not None:
        write_atomically(output, text)
        _print_note(f"written to {output}")
    else:
        sys.stdout.write(text)
        sys.stdout.flush()
    if not by_window and any(len(file.spans_s) > 1 for file in found.files):
        _print_note(f"longer than {window_s:g} s: the mean over windows ({hop_s:g} s apart); --windows shows each")
    for path, problem in found.problems.items():
        _print_note(f"error: {path}: {problem}")
    return int(bool(found.problems))


def evaluate(
    run: Path,
    config: Path,
    overrides: Sequence[str],
    name: str | None,
    speakers_differ: bool,
    device: str | None,
    encoder: str | None,
    as_json: bool,
    console: Console,
) -> int:
    """Compare the conditions of a run on another corpus."""
    # It imports the report and MLflow's mirror, which `predict` does not need.
    from cvrunner.inference.evaluate import evaluate_run

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return evaluate_run(run, config, overrides, name, speakers_differ, chosen_device(device), encoder, as_json, console)


def export(
    run: Path,
    folder: Path,
    condition: str | None,
    encoder: str | None,
    log: bool,
    console: Console,
    hub: str | None = None,
    public: bool = False,
) -> int:
    """Write the models of one condition as an MLflow model that needs neither the run nor a hub.

    `hub`: also upload it under this name, to a private repository unless `public`.
    """
    if public and hub is None:
        raise UsageError("--public: says how --hub uploads, which is not given")
    if folder.exists():
        raise UsageError(f"{folder}: exists already; give a folder that does not exist")
    # It imports mlflow, which takes seconds; `predict` and the API do not need it.
    from cvrunner.inference.export import check_hub_name, export_model, log_model, upload

    if hub is not None:
        check_hub_name(hub)

    directory = find_run_directory(run)
    members = find_members(directory, condition)
    _announce(directory, members)
    export_model(directory, members.condition, members.folders, folder, encoder)
    print_line = line_printer(console)
    lines = [f"MLflow model in {folder.absolute()}"]
    if log:
        lines.append(f"in MLflow as {log_model(directory, members.condition, folder)}")
    print_line("\n".join(lines))
    if hub is not None:
        print_line(f"on the hub as {upload(folder, hub, not public)} ({'public' if public else 'private'})")
    return 0


def audio_files(given: Sequence[Path]) -> list[Path]:
    """Return the files, and all audio files in the folders, sorted; hidden folders are left out, other files counted.

    Raises UsageError for a folder without any.
    """
    found: list[Path] = []
    skipped: Counter[str] = Counter()
    for path in given:
        if not path.is_dir():
            found.append(path)
            continue
        files = [p for p in path.rglob("*") if p.is_file() and not is_hidden(p.relative_to(path))]
        inside = sorted(p for p in files if p.suffix.lower() in AUDIO_ENDINGS)
        others = Counter(p.suffix.lower() or "no extension" for p in files if p.suffix.lower() not in AUDIO_ENDINGS)
        if not inside:
            raise UsageError(f"{path}: no audio files in this folder{_counted(others)}")
        found += inside
        skipped += others
    if skipped:
        _print_note(f"skipped, as their extension is none of audio{_counted(skipped)}")
    return found


def is_hidden(inside: Path) -> bool:
    """Return whether a file, or a folder on the way to it, is hidden."""
    return any(part.startswith(".") for part in inside.parts)


def _counted(files: Counter[str]) -> str:
    return "".join(f"{': ' if i == 0 else ', '}{n} {name}" for i, (name, n) in enumerate(files.most_common()))


def chosen_device(name: str | None) -> torch.device:
    """Return a device by its name, by default the first GPU or else the CPU. Raises UsageError if it is missing."""
    # torch takes seconds to import; arguments and files are checked before.
    import torch

    from cvrunner.training.device import default_device

    if name is None:
        return default_device()
    available = ["cpu"]
    if gpus := torch.cuda.device_count():
        available += ["cuda", *(f"cuda:{index}" for index in range(gpus))]
    if name not in available:
        raise UsageError(f"device {name}: this machine has {', '.join(available)}")
    return torch.device(name)


def _announce(directory: RunDirectory, members: Members) -> None:
    """Print which models are used, and which are missing."""
    run, first = directory.read_run(), members.folders[0].read()
    line = f"{run.run}: {plural(len(members.folders), 'model')} of {members.condition} ({members.reason})"
    if first.model.protocol == "dialogue":
        line += "; protocol dialogue: the files are the turns of one dialogue, in order"
    _print_note(line)
    if run.synthetic:
        _print_note("trained on synthetic speech: the numbers say nothing about people's speech")
    if members.missing:
        _print_note(f"warning: without the models of {', '.join(members.missing)}, which are missing in the run")


def _print_note(line: str) -> None:
    """Print to standard error, since standard output holds the table."""
    print(line, file=sys.stderr, flush=True)
