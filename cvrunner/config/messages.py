"""What is wrong in a configuration, where it stands, and what was meant."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Sequence

from pydantic import ValidationError

SECTION = "must be a section with keys"


def sentences(error: ValidationError, where: str, overrides: Sequence[str], keys: Sequence[str]) -> list[str]:
    """A line for each problem that pydantic found in a configuration with these valid keys."""
    lines = []
    for item in error.errors():
        key = _key(item["loc"], item["type"] == "extra_forbidden")
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key in {origin(key, where, overrides)}{nearest(key, keys)}")
        else:
            rule = SECTION if item["type"] in ("model_type", "dict_type") else item["msg"].removeprefix("Value error, ")
            got = "" if item["type"] == "value_error" or not key else f", not {short(item['input'])}"
            rule = f"{key + ': ' if key else ''}{rule[0].lower()}{rule[1:]}"
            lines.append(f"{rule}{got} ({origin(key, where, overrides)})")
    return lines


def origin(key: str, where: str, overrides: Sequence[str]) -> str:
    """The last override of a key, of its section or inside of it, where there is one; else the file."""
    for override in reversed(overrides):
        set_key = override.partition("=")[0]
        if f"{key}.".startswith(f"{set_key}.") or f"{set_key}.".startswith(f"{key}."):
            return f"--set {override}"
    return where


def _key(place: Sequence[int | str], unknown: bool) -> str:
    """The dotted key. Pydantic adds the tags of union members to it; only what the user wrote is shown."""
    parts = [str(part) for part in place]
    plain = [part for part in parts if re.fullmatch(r"[A-Za-z0-9_.-]+", part)]
    # An unknown key is the user's in any case.
    return ".".join([*plain, short(parts[-1])] if unknown and parts[-1] not in plain else plain)


def short(value: object) -> str:
    """A value as a message shows it."""
    text = reprlib.repr(value) if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(key: str, keys: Sequence[str]) -> str:
    """`; did you mean train.epochs?`: the same word elsewhere, else the likest key, else the likest word."""
    last = key.rpartition(".")[2]
    if elsewhere := [name for name in keys if name.endswith(f".{last}")]:
        return f"; did you mean {elsewhere[0]}?"
    if match := difflib.get_close_matches(key, keys, n=1, cutoff=0.75):
        return f"; did you mean {match[0]}?"
    by_last = {name.rpartition(".")[2]: name for name in keys}
    if match := difflib.get_close_matches(last, by_last, n=1, cutoff=0.7):
        return f"; did you mean {by_last[match[0]]}?"
    section = key.rpartition(".")[0]
    siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == section]
    if inside := [name for name in siblings if last in name]:
        return f"; did you mean {inside[0]}?"
    return f"; valid keys: {', '.join(siblings)}" if siblings else ""
