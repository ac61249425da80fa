"""Names that earlier versions of cvrunner wrote into their files: the only place that knows them.

Applied when a file of a run is read. A user's configuration never passes through here: an old key in it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cvrunner.config.schema import RENAMED_KEYS

Names = Mapping[str, str]
"""Old name to new name."""
Renames = Mapping[str, Names]
"""By place in a file: keys joined by dots, `*` for any key; an empty place is the file as a whole."""


def _renamed_in(section: str) -> dict[str, str]:
    """Return the renamed keys of one section of the configuration, without the section."""
    pairs = [(old.rpartition("."), new.rpartition(".")) for old, new in RENAMED_KEYS.items()]
    return {old[2]: new[2] for old, new in pairs if old[0] == section}


MODEL_KEYS, TRAIN_KEYS = _renamed_in("model"), _renamed_in("train")
SEARCHED_KEYS = {old: new for old, new in RENAMED_KEYS.items() if old.startswith(("model.", "train."))}
FAILURE_KINDS = {"lost": "worker_died", "numbers": "non_finite", "user": "configuration", "trial": "permanent"}
WEIGHT_CHANGE = {"movement": "weight_change"}

CONFIG: Renames = {
    "model": MODEL_KEYS,
    "train": TRAIN_KEYS,
    "conditions.*.model": MODEL_KEYS,
    "conditions.*.train": TRAIN_KEYS,
    "cluster": _renamed_in("cluster"),
    "cluster.retries": _renamed_in("cluster.retries"),
    "tune": _renamed_in("tune"),
    "tune.search_space": SEARCHED_KEYS,
}
"""config.yaml."""
RUN: Renames = {"trials.*.failures": FAILURE_KINDS}
"""run.json."""
RESULT: Renames = {"": WEIGHT_CHANGE}
"""result.json."""
EVENT: Renames = {"groups.*": WEIGHT_CHANGE}
"""A line of journal.jsonl."""
MODEL: Renames = {"model": MODEL_KEYS}
"""model/config.json."""
SWEEP: Renames = {"searched": SEARCHED_KEYS, "settings.*.values": SEARCHED_KEYS}
"""sweep.json."""


def with_current_names(data: Any, renames: Renames) -> Any:
    """Return parsed JSON or YAML with this version's names. Pure; what has another shape is left as it is."""
    # In the order of the table: `tune.space` has its new name before its keys are renamed.
    for place, names in renames.items():
        data = _renamed(data, [key for key in place.split(".") if key], names)
    return data


def weight_name(name: str) -> str:
    """Return this version's name of a trained weight."""
    return re.sub(r"^encoder\.wavlm\.", "encoder.backbone.", name)


def _renamed(data: Any, place: Sequence[str], names: Names) -> Any:
    """Rename the keys of each mapping, and the items of each list, at a place."""
    # Names are also values: `searched` in sweep.json lists the keys that a sweep varies.
    if isinstance(data, list) and not place:
        return [names.get(str(item), item) for item in data]
    if not isinstance(data, dict):
        return data
    if not place:
        return {names.get(key, key): value for key, value in data.items()}
    first, rest = place[0], place[1:]
    return data | {key: _renamed(value, rest, names) for key, value in data.items() if first in ("*", key)}
