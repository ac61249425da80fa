"""Names that earlier versions of cvrunner wrote into their files: the only place that knows them.

Applied when a file of a run is read. A user's configuration never passes through here: an old key in it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Names = Mapping[str, str]
"""Old name to new name."""
Renames = Mapping[str, Names]
"""By place in a file: keys joined by dots, `*` for any key; an empty place is the file as a whole."""

MODEL_KEYS = {"unfreeze_layers": "unfreeze_top_layers"}
TRAIN_KEYS = {
    "warmup": "warmup_ratio",
    "early_stopping": "early_stopping_patience",
    "weights_ema": "ema_decay",
    "length_pool": "length_bucket_batches",
}
SEARCHED_KEYS = {
    f"{section}.{old}": f"{section}.{new}"
    for section, keys in (("model", MODEL_KEYS), ("train", TRAIN_KEYS))
    for old, new in keys.items()
}
FAILURE_KINDS = {"lost": "worker_died", "numbers": "non_finite", "user": "configuration", "trial": "permanent"}
WEIGHT_CHANGE = {"movement": "weight_change"}

CONFIG: Renames = {
    "model": MODEL_KEYS,
    "train": TRAIN_KEYS,
    "conditions.*.model": MODEL_KEYS,
    "conditions.*.train": TRAIN_KEYS,
    "cluster": {"change_over": "preempt"},
    "cluster.retries": FAILURE_KINDS,
    "tune": {"samples": "num_samples", "space": "search_space", "grace_epochs": "grace_period"},
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
