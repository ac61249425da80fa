"""Reading YAML configurations, with care, since both people and programs write them.

A file may name a `base` file, which it overrides key by key; only `conditions` are replaced as a whole.
Overrides such as `train.lr=1e-4` come on top of the file, and each condition on top of both.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from cvrunner.config.schema import Config, digest, merge, nested, short, validate
from cvrunner.errors import ConfigError

# Limits of a file, far above the number of keys there are.
MOST_VALUES = 10_000
DEEPEST = 20


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Return the configuration in `path`, on top of its bases and below the overrides (`section.key=value`).

    Raises ConfigError, which begins with the file or the key and names the nearest valid key.
    """
    data, where = _read_with_bases(path, ())
    given = list(overrides)
    for override in given:
        changes = parse_override(override)
        if "conditions" in changes:
            data = _conditions_to_change(data, changes["conditions"], override)
        data = merge(data, changes)
    config = validate(data, where, given)
    _check_conditions(config, where, given)
    return config


def parse_override(text: str) -> dict[str, Any]:
    """Return `train.lr=1e-4` as a nested mapping; the value is YAML."""
    key, separator, value = text.partition("=")
    if not separator or not re.fullmatch(rf"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){{,{DEEPEST}}}", key):
        raise ConfigError(f"override {text}: must look like section.key=value")
    parsed = _parse_yaml(value, f"override {text}")
    if str(parsed).count("#") < value.count("#"):
        raise ConfigError(
            f"override {text}: what follows ` #` would be dropped as a comment; quote it: {key}='\"...\"'"
        )
    return nested(key, parsed)


def _conditions_to_change(data: dict[str, Any], changes: object, override: str) -> dict[str, Any]:
    """Return `data` with the conditions that an override changes. Raises ConfigError for a condition that is not there.

    The section as a whole replaces all conditions, as in a file.
    """
    if override.partition("=")[0] == "conditions":
        return {key: value for key, value in data.items() if key != "conditions"}
    known = data.get("conditions", Config.model_fields["conditions"].default)
    if isinstance(known, dict) and isinstance(changes, dict):
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(map(str, known))};"
                rule = "no such condition, and an override cannot add one"
                raise ConfigError(f"conditions.{name} (override {override}): {rule}; {hint} Add it to the file")
    return {**data, "conditions": known}


def _check_conditions(config: Config, where: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError for conditions that cannot be compared. Stored runs are not checked: they can still be read."""
    problems = []
    source = f"({' with '.join([where, *(o for o in overrides if o.startswith(('conditions', 'model', 'train')))])})"
    first: dict[str, str] = {}
    for name, changes in config.conditions.items():
        if isinstance(changes.get("train"), dict) and "seeds" in changes["train"]:
            rule = "all conditions have the same seeds, so that they can be paired; set train.seeds"
            problems.append(f"conditions.{name}.train.seeds {source}: {rule}")
        resolved = config.for_condition(name)
        model, train = resolved.model.model_dump(mode="json"), resolved.train.model_dump(mode="json")
        same = first.setdefault(digest([model, {**train, "seeds": None}]), name)
        if same != name:
            rule = f"has the same settings as conditions.{same}, so there is nothing to compare; change or remove one"
            problems.append(f"conditions.{name} {source}: {rule}")
    if problems:
        raise ConfigError("\n".join(problems))


def _read_with_bases(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], str]:
    """Return the content of a file merged over its bases, and the names of all files for messages."""
    try:
        # By real paths: with symbolic links, a circle need not repeat a name.
        real = Path(os.path.realpath(path))
    except ValueError as error:
        raise ConfigError(f"{str(path)!r}: not a file name: {error}") from None
    if real in above:
        circle = " -> ".join(p.name for p in (*above[above.index(real) :], real))
        raise ConfigError(f"{path}: base files form a circle: {circle}; remove one `base`")
    try:
        # Some Windows editors put a byte order mark first.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}, line {line}); save it as UTF-8") from None
    except OSError as error:
        needed = f" (the base of {above[-1].name})" if above else ""
        raise ConfigError(f"{path}: cannot be read: {error.strerror}{needed}") from None
    data = _parse_yaml(text, str(path))
    # An empty file is valid: all defaults.
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold sections with keys, not {type(data).__name__}")
    base = data.pop("base", None)
    if base is None:
        return data, str(path)
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base must be a file name, not {short(base)}")
    below, name = _read_with_bases(path.parent / base, (*above, real))
    # Conditions are compared with each other, so a mixture of two files' conditions is hardly ever meant.
    if "conditions" in data:
        below.pop("conditions", None)
    return merge(below, data), f"{path} over {name}"


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads `1e-4` as a number, refuses duplicate keys, and gives a line for every mistake."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:  # PyYAML lets any exception through if a value does not fit its tag
            rule = f"{short(node.value)} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, rule, node.start_mark) from None


# No key takes these types, and JSON, which digests are made of, has no such values.
_Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if str(tag).rpartition(":")[2] not in ("binary", "omap", "pairs", "set")
}
# Numbers in plain decimal notation: YAML 1.1 reads `1_10` as 110, `010` as 8 and `1:30` as 90, but not `1e-4`.
_NUMBERS = {
    "tag:yaml.org,2002:int": r"^[-+]?(0|[1-9][0-9]*)$",
    "tag:yaml.org,2002:float": r"^([-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$",
}
_Loader.yaml_implicit_resolvers = {
    start: [(tag, rule) for tag, rule in rules if tag not in _NUMBERS]
    for start, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _rule in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_rule, re.IGNORECASE), list("-+0123456789."))


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def _parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text.

    Raises ConfigError also if aliases make a value contain itself or multiply, or if nesting is deeper than any key's.
    """
    try:
        data = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except RecursionError:
        raise ConfigError(f"{where}: nested far too deep") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = ""
        if mark:
            place = f", line {mark.line + 1}"
        raise ConfigError(f"{where}{place}: {getattr(error, 'problem', None) or error}") from None
    # A loop with a budget, not a recursion: nine levels of nine aliases would be 10^9 values.
    values = [(data, 0)]
    for _ in range(MOST_VALUES):
        if not values:
            return data
        value, depth = values.pop()
        if depth > DEEPEST:
            raise ConfigError(f"{where}: nested more than {DEEPEST} levels deep, or an alias (*) that contains itself")
        if isinstance(value, dict):
            values += [(one, depth + 1) for one in value.values()]
        elif isinstance(value, list | set):
            values += [(one, depth + 1) for one in value]
    raise ConfigError(f"{where}: more than {MOST_VALUES} values, or aliases (*) that multiply; write fewer")
