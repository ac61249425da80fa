"""Writing files so that a kill at any moment leaves the old or the new content, never a part."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import tenacity

TRANSIENT = frozenset(
    {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN, errno.ENETUNREACH}
    | {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNRESET, errno.ECONNABORTED, errno.EREMOTEIO}
)

PERMANENT = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG})
"""What does not pass by waiting, such as a full disk or a folder of somebody else, and is the user's to mend."""


def is_transient(error: BaseException) -> bool:
    """Whether a disk or network error may pass by itself, as those of network file systems do."""
    return isinstance(error, OSError) and error.errno in TRANSIENT


patiently = tenacity.retry(
    retry=tenacity.retry_if_exception(is_transient),
    wait=tenacity.wait_exponential(0.5, max=8),
    stop=tenacity.stop_after_attempt(6),
    reraise=True,
)
"""Decorator: again after 0.5, 1, 2, 4 and 8 seconds where an error may pass; then it is raised."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` with `content` (text as UTF-8)."""
    data = content.encode() if isinstance(content, str) else content
    write_file_atomically(path, lambda file: file.write(data))


@patiently
def write_file_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace `path` with what `write` writes: temporary sibling, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path)
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@patiently
def write_folder_atomically(path: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `path` with what `fill` writes into it. If it is there by then, it stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path)
    temporary.mkdir()
    try:
        fill(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync_file(file)
        sync_folder(temporary)
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Drop what a process that was killed had not finished writing; nobody else may be writing there."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
