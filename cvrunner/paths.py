"""Absolute paths of the corpus, the results and the files that come with cvrunner.

A Ray job runs in a temporary copy of its working directory, and whatever it writes there is lost. So a relative path
starts at the working directory in a shell, and at $CVRUNNER_HOME (default ~/cvrunner) in a Ray job.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from cvrunner.errors import ConfigError, UsageError

RAY_SESSION = re.compile(r"/session_(latest|\d{4}-\d\d-\d\d_[\d-]+_\d+_?\d*)(/|$)")

NO_PATH = re.compile(r"[\0\ud800-\udc7f\udd00-\udfff]")
"""Characters that no file name can hold; the surrogates left out stand for bytes that are not UTF-8."""


def in_ray_session(path: Path) -> bool:
    """Return whether a path is inside the temporary folder of a Ray session."""
    return RAY_SESSION.search(path.absolute().as_posix()) is not None


def base_folder() -> Path:
    """Return the folder at which relative paths start."""
    if in_ray_session(Path.cwd()):
        return Path(os.environ.get("CVRUNNER_HOME", "~/cvrunner")).expanduser().absolute()
    return Path.cwd()


def expanded(path: str, key: str) -> Path:
    """Return the path with `~` expanded. Raises ConfigError naming `key` if it cannot be a path."""
    if unfit := NO_PATH.search(path):
        raise ConfigError(f"{key}: {path!r} holds the character {unfit[0]!r}, which no path can")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{key}: {path}: there is no such user; write the full path instead of ~") from None


def lasting(path: str, key: str) -> Path:
    """Return an absolute path for files that must outlive a job. Raises ConfigError naming `key` if they would not."""
    absolute = (base_folder() / expanded(path, key)).absolute()
    if in_ray_session(absolute):
        raise ConfigError(f"{key}: {absolute} is in Ray's temporary folder and would be lost; choose another folder")
    if os.path.exists(absolute) and not os.path.isdir(absolute):
        raise ConfigError(f"{key}: {absolute} is a file, must be a folder")
    return absolute


def not_writable(path: Path) -> str | None:
    """Return why nothing can be written to a folder, or to its nearest parent that exists; None: it can."""
    place = next(place for place in (path, *path.parents) if os.path.lexists(place))
    # A nameless file, which leaves nothing behind: permission bits alone do not show a read-only mount.
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{place}: {error.strerror}"


def corpus_root(path: str, key: str = "corpus.root") -> Path:
    """Return the path of the corpus: as given if it exists, such as in an uploaded job, else as any other path."""
    given = expanded(path, key)
    # Not Path.exists, which raises if a name is too long or a folder closed.
    return given.absolute() if os.path.exists(given) else base_folder() / given


def check_working_directory() -> None:
    """Raise UsageError if the working directory was deleted, so that no relative path can be resolved."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the working directory was deleted; change to a folder that exists") from None


def run_names(root: Path | None = None) -> list[str]:
    """Names of the runs in a results folder, by default the one of the configuration, newest first; none if it cannot
    be read."""
    try:
        files = list((root or lasting("results", "results.root")).glob("*/run.json"))
        return [file.parent.name for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)]
    except (ConfigError, OSError):
        # It serves Tab completion and hints, which must not fail where a command would.
        return []


def default_config(name: str = "demo.yaml") -> Path:
    """Return the path of configs/demo.yaml, or of another one, in the repository or the installed package."""
    return _shipped("configs", name)


def default_runtime_env() -> Path:
    """Return the path of jobs/runtime_env.yaml in the repository or the installed package."""
    return _shipped("jobs", "runtime_env.yaml")


def _shipped(folder: str, name: str) -> Path:
    # Next to the package in the repository, inside of it in a wheel.
    package = Path(__file__).parent
    candidates = [package.parent / folder / name, package / folder / name]
    return next((path for path in candidates if path.is_file()), candidates[0])
