"""Atomic writes: a kill at any moment leaves the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import tenacity

TRANSIENT = frozenset(
    {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN, errno.ENETUNREACH}
    | {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNRESET, errno.ECONNABORTED, errno.EREMOTEIO}
)

PERMANENT = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG})
"""Errors that waiting does not cure, such as a full disk or missing permission; the user has to act."""


FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
"""The disk is full, or the user's share of it."""
LEAST_FREE_BYTES = 2**20
"""A disk with less is full."""


def is_transient(error: BaseException) -> bool:
    """Return whether a disk or network error may pass by itself, as on network file systems."""
    return isinstance(error, OSError) and error.errno in TRANSIENT


patiently = tenacity.retry(
    retry=tenacity.retry_if_exception(is_transient),
    wait=tenacity.wait_exponential(0.5, max=8),
    stop=tenacity.stop_after_attempt(6),
    reraise=True,
)
"""Decorator that retries after 0.5, 1, 2, 4 and 8 seconds while an error is transient, and then raises it."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` with `content` (text as UTF-8)."""
    data = content.encode() if isinstance(content, str) else content
    write_file_atomically(path, lambda file: file.write(data))


@contextlib.contextmanager
def full_disk_shown(folder: Path) -> Iterator[None]:
    """Raise OSError with ENOSPC for a write that failed on a full disk: numpy and safetensors do not name the cause."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) is None and shutil.disk_usage(folder).free < LEAST_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


@patiently
def write_file_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace the content of `path` with the bytes that `write` writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A rename is atomic only within one file system, so the temporary file is next to its target.
    temporary = _sibling(path)
    try:
        # While the temporary file is there: without it the disk may have room again.
        with full_disk_shown(path.parent), temporary.open("wb") as file:
            write(file)
            file.flush()
            # Without it, a power failure after the rename could leave an empty file under the final name.
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@patiently
def write_folder_atomically(path: Path, fill: Callable[[Path], None]) -> None:
    """Create the folder `path` with the files that `fill` writes into it; a folder made meanwhile is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path)
    temporary.mkdir()
    try:
        with full_disk_shown(path.parent):
            fill(temporary)
        for path_inside in temporary.rglob("*"):
            if path_inside.is_file():
                with path_inside.open("rb") as file:
                    os.fsync(file.fileno())
        sync_folder(temporary)
        try:
            temporary.rename(path)
        except OSError:
            # Another process was faster; its folder has the same content.
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file that nobody changes a second name; where the file system has no hard links, copy it."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def remove_leftovers(folder: Path) -> None:
    """Delete the unfinished files of a killed process. No other process may be writing in the folder."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync_folder(path: Path) -> None:
    """Make the file names of a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
