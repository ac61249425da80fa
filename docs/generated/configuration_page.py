"""The page of every config key, made from the schema that reads the files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cvrunner.config.schema import Config

Schema = Mapping[str, Any]
NUMERIC = ("corpus", "folds", "model", "train")
"""The sections that trials are made of. What of them is not in `Config.numerics` acts through what it names."""
ELSEWHERE = {"threads": "cluster.cpus_per_trial"}
"""Names in `Config.numerics` that are keys of other sections."""
TOP = """# Every config key

<span class="reference"></span>

A configuration is a YAML file: sections with keys. What it leaves out has the default below. `base: other.yaml` lays it
over another file, key by key, but for `conditions`, which replace the other file's. `--set train.lr=1e-4` lays one key
over the file, and each condition is laid over both. An unknown key is an error that names the nearest one.

**Numbers** says whether a key changes a trial's numbers, and so whether it is trained again when the key changes. *By
content*: what the value names counts (audio, labels, weights, seeds), not the value itself.

This page is made from `cvrunner/config/sections.py` when it is built.
"""


class Key(NamedTuple):
    """One key of a section, as the page shows it."""

    name: str
    type: str
    default: str
    numbers: str
    meaning: str


def configuration_page() -> str:
    """Markdown: a heading and a table for each section, sections inside of sections after their own."""
    schema = Config.model_json_schema()
    return "\n".join([TOP, *(_section(name, node, schema) for name, node in sections(schema))])


def sections(schema: Schema, node: Schema | None = None, prefix: str = "") -> Iterator[tuple[str, Schema]]:
    """Every section by its dotted name, in the order of the schema; what lies in none comes first, as ``."""
    node = node or schema
    yield prefix, node
    for name, value in node["properties"].items():
        if inner := _inner(value, schema):
            yield from sections(schema, inner, f"{prefix}.{name}" if prefix else name)


def _section(name: str, node: Schema, schema: Schema) -> str:
    keys = [_key(name, key, value, node, schema) for key, value in node["properties"].items()]
    keys = [key for key in keys if key is not None]
    if not keys:
        return ""
    rows = [f"| `{k.name}` | {k.type} | {k.default} | {k.numbers} | {k.meaning} |" for k in keys if k]
    head = ["| key | value | default | numbers | meaning |", "| --- | --- | --- | --- | --- |"]
    above = f"## {name or 'conditions'}\n"
    text = [node["description"].replace("\n", " "), ""] if name and "description" in node else []
    return "\n".join([above, *text, *head, *rows, ""])


def _key(section: str, name: str, value: Schema, node: Schema, schema: Schema) -> Key | None:
    """None for a section inside, which has a table of its own."""
    if _inner(value, schema):
        return None
    full = f"{section}.{name}" if section else name
    default = "required" if name in node.get("required", ()) else _default(value.get("default"))
    meaning = value.get("description", "").replace("\n", " ").replace("|", "\\|")
    return Key(full, in_words(value, schema), default, numbers(full), meaning)


def _inner(value: Schema, schema: Schema) -> Schema | None:
    """The section that a value is, or that the items of a list are."""
    reference = value.get("$ref") or value.get("items", {}).get("$ref")
    return _referred(reference, schema) if reference else None


def _referred(reference: str, schema: Schema) -> Schema:
    found: Schema = schema["$defs"][reference.rpartition("/")[2]]
    return found


def numbers(key: str) -> str:
    """Whether a key changes a trial's numbers: yes, by content or no."""
    numerics = {ELSEWHERE.get(name, name): value for name, value in Config().numerics.items()}
    if key in _keys(numerics):
        return "yes"
    return "by content" if key.split(".")[0] in (*NUMERIC, "conditions") else "no"


def _keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of everything in nested mappings."""
    for name, value in values.items():
        yield prefix + name
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{name}.")


def _default(value: object) -> str:
    return "" if value == "" else f"`{json.dumps(value, ensure_ascii=False)}`".replace('"', "")


def in_words(value: Schema, schema: Schema) -> str:
    """A type of JSON schema in plain words."""
    if "$ref" in value:
        return "keys " + ", ".join(f"`{name}`" for name in _referred(value["$ref"], schema)["properties"])
    if "enum" in value or "const" in value:
        return " or ".join(f"`{one}`" for one in value.get("enum", [value.get("const")]))
    if either := value.get("anyOf") or value.get("oneOf"):
        return " or ".join(in_words(one, schema) for one in either)
    if value.get("type") == "array":
        return f"list of: {in_words(value['items'], schema)}" if "items" in value else f"{value['maxItems']} numbers"
    if value.get("type") == "object":
        inner = value.get("additionalProperties")
        return f"for each name: {in_words(inner, schema)}" if isinstance(inner, Mapping) else "keys"
    words = {
        "integer": "whole number", "number": "number", "string": "text", "boolean": "`true` or `false`",
        "null": "`null`", None: "any value",
    }  # fmt: skip
    return words[value.get("type")] + _limits(value)


def _limits(value: Schema) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    parts = [f"{word} {value[limit]:g}" for limit, word in words.items() if limit in value]
    return " " + " ".join(parts) if parts else ""
