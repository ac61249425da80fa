"""`predict` and `export`: what they compose. What is parsed is in `cli.py`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cvrunner.errors import UsageError
from cvrunner.run.steps import find_run_directory

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from cvrunner.inference.members import Members
    from cvrunner.records.run_directory import RunDirectory


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
    """Ratings of audio files by the models of a run; exit code 1 where a file could not be read."""
    from cvrunner.inference.members import find_members
    from cvrunner.inference.windows import chosen_windows

    window_s, hop_s = chosen_windows(window_s, hop_s)
    paths = audio_files(files)
    directory = find_run_directory(run)
    members = find_members(directory, condition)
    _announce(directory, members)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before it is imported
    from cvrunner.inference import tables
    from cvrunner.inference.ensemble import load_groups, predict_files

    groups = load_groups(members.folders, chosen_device(device), encoder)
    passes = 1 if members.folders[0].read().frozen else len(members.folders)
    with _progress(passes * len(paths)) as heard:
        found = predict_files(paths, groups, window_s, hop_s, heard)
    table = tables.window_table if by_window else tables.file_table
    text = tables.as_json(found, members.condition, by_window) if as_json else table(found).to_csv(index=False)
    _write(text.rstrip("\n") + "\n", output)
    if not by_window and any(len(file.spans_s) > 1 for file in found.files):
        _tell(f"longer than {window_s:g} s: the mean over windows ({hop_s:g} s apart); --windows shows each")
    for path, problem in found.problems.items():
        _tell(f"error: {path}: {problem}")
    return 1 if found.problems else 0


def export(run: Path, folder: Path, condition: str | None, encoder: str | None, log: bool, console: Console) -> int:
    """The models of one condition as an MLflow model that needs neither the run nor a hub."""
    if folder.exists():
        raise UsageError(f"{folder}: is there already; give a folder that is not")
    from cvrunner.inference.export import export_model, log_model
    from cvrunner.inference.members import find_members

    directory = find_run_directory(run)
    members = find_members(directory, condition)
    _announce(directory, members)
    export_model(directory, members.condition, members.folders, folder, encoder)
    lines = [f"MLflow model in {folder.absolute()}"]
    if log:
        lines.append(f"in MLflow as {log_model(directory, members.condition, folder)}")
    console.print(*lines, sep="\n", markup=False, highlight=False, soft_wrap=True)
    return 0


def audio_files(given: Sequence[Path]) -> list[Path]:
    """The files, and of folders all audio files in them, sorted. Raises UsageError for a folder without any."""
    found: list[Path] = []
    for path in given:
        inside = _inside(path) if path.is_dir() else [path]
        if not inside:
            raise UsageError(f"{path}: no audio files in this folder")
        found += inside
    return found


def _inside(folder: Path) -> list[Path]:
    import soundfile

    # A raw file does not say its rate.
    endings = {f".{name.lower()}" for name in soundfile.available_formats()} - {".raw"} | {".aif", ".opus"}
    files = (p for p in folder.rglob("*") if p.suffix.lower() in endings and not p.name.startswith("."))
    return sorted(p for p in files if p.is_file())


def chosen_device(name: str | None) -> torch.device:
    """A device by its name; without one, the first GPU or else the CPU. Raises UsageError where it is not there."""
    import torch

    from cvrunner.training.device import default_device

    if name is None:
        return default_device()
    gpus = torch.cuda.device_count()
    there = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if name not in there:
        raise UsageError(f"--device {name}: this machine has {', '.join(there)}")
    return torch.device(name)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error, where somebody watches it."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("files x models", total=total)
        yield lambda: bar.advance(task)


def _announce(directory: RunDirectory, members: Members) -> None:
    """Which models speak, and which are missing."""
    count = len(members.folders)
    run = directory.read_run()
    turns = "; protocol dialogue: the files are the turns of one dialogue, in order" if _by_dialogue(members) else ""
    _tell(f"{run.run}: {count} model{'s' if count != 1 else ''} of {members.condition} ({members.reason}){turns}")
    if run.synthetic:
        _tell("trained on synthetic speech: the numbers say nothing about people's speech")
    if members.missing:
        _tell(f"warning: without the models of {', '.join(members.missing)}, which are missing in the run")


def _by_dialogue(members: Members) -> bool:
    return members.folders[0].read().model.protocol == "dialogue"


def _write(text: str, output: Path | None) -> None:
    """To a file, or to standard output and nothing else with it."""
    if output is not None:
        from cvrunner.files import write_atomically

        write_atomically(output, text)
        _tell(f"written to {output}")
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
