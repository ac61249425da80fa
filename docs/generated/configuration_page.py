"""The page of every configuration key, generated from the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cvrunner.config.schema import Config

Schema = Mapping[str, Any]
NUMERIC = ("corpus", "folds", "model", "train")
"""The sections that define trials. Their keys that are not in `Config.numerics` count by content."""
ELSEWHERE = {"threads": "cluster.cpus_per_trial"}
"""Keys of other sections by their name in `Config.numerics`."""
TOP = """# Every config key

<span class="reference"></span>

A configuration is a YAML file of sections with keys. A key that is left out has the default below. With
`base: other.yaml` the file overrides another one, key by key; only `conditions` are replaced as a whole. On the command
line, `--set train.lr=1e-4` overrides the file, and each condition overrides both. An unknown key is an error that
suggests the nearest valid one; a key that was renamed is an error with its new name.

**Numbers** shows whether a key affects a trial's numbers, so that changing it trains the trial again. *By content*: the
content that the value names counts (audio, labels, weights, seeds), not the value itself.

This page is generated from `cvrunner/config/`.
"""


class Key(NamedTuple):
    """One row of a table."""

    name: str
    type: str
    default: str
    numbers: str
    meaning: str


def configuration_page() -> str:
    """Return the page as Markdown: a heading and a table per section, nested sections after the one that holds them."""
    schema = Config.model_json_schema()
    return "\n".join([TOP, *(_section(name, node, schema) for name, node in sections(schema))])


def sections(schema: Schema, node: Schema | None = None, prefix: str = "") -> Iterator[tuple[str, Schema]]:
    """Yield every section with its dotted name, in the order of the schema; the top level comes first, as ``."""
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
    """Return the row of a key; None for a nested section, which has its own table."""
    if _inner(value, schema):
        return None
    full = f"{section}.{name}" if section else name
    default = "required" if name in node.get("required", ()) else _default(value.get("default"))
    meaning = value.get("description", "").replace("\n", " ").replace("|", "\\|")
    return Key(full, in_words(value, schema), default, numbers(full), meaning)


def _inner(value: Schema, schema: Schema) -> Schema | None:
    """Return the section of a value, or of the items of a list; None for other values."""
    reference = value.get("$ref") or value.get("items", {}).get("$ref")
    return _referred(reference, schema) if reference else None


def _referred(reference: str, schema: Schema) -> Schema:
    found: Schema = schema["$defs"][reference.rpartition("/")[2]]
    return found


def numbers(key: str) -> str:
    """Return whether a key affects a trial's numbers: yes, by content or no."""
    numerics = {ELSEWHERE.get(name, name): value for name, value in Config().numerics.items()}
    if key in _keys(numerics):
        return "yes"
    return "by content" if key.split(".")[0] in (*NUMERIC, "conditions") else "no"


def _keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys in nested mappings."""
    for name, value in values.items():
        yield prefix + name
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{name}.")


def _default(value: object) -> str:
    return "" if value == "" else f"`{json.dumps(value, ensure_ascii=False)}`".replace('"', "")


def in_words(value: Schema, schema: Schema) -> str:
    """Return a type of JSON schema in plain words."""
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
