"""The journal: one JSON object a line, only ever appended. A kill can spoil at most its last line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def append(path: Path, event: str, **fields: Any) -> None:
    """Add a line with the event's name and the time in UTC; it is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"event": event, "time": datetime.now(UTC).isoformat(), **fields}, allow_nan=False)
    with path.open("ab") as file:
        # A torn line of a killed process must not swallow this one.
        start = "\n" if file.tell() and not _ends_with_newline(path) else ""
        file.write(f"{start}{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, event: str | None = None) -> Iterator[dict[str, Any]]:
    """The whole lines, oldest first, of one event or of all. Torn lines are passed over; no file, no lines."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and (event is None or record.get("event") == event):
            yield record


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
