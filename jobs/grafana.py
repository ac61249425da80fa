"""Write jobs/grafana_dashboard.json, with one panel per metric of cvrunner/orchestration/ray_metrics.py.

python jobs/grafana.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from cvrunner.orchestration import ray_metrics
from cvrunner.orchestration.ray_metrics import METRICS, Metric

FILE = Path(__file__).parent / "grafana_dashboard.json"
PREFIX = "ray_"
"""Prefix that Ray adds to each metric name."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
UNIT = {"_seconds": "s", "_mib": "mbytes", "_utterances_per_second": "none"}
"""Grafana's name of a unit, by the ending of a metric's name; Grafana's `mbytes` are MiB."""
RANGE = {ray_metrics.VALIDATION_CCC: (-1, 1), ray_metrics.EPOCH: (0, None), ray_metrics.MEMORY: (0, None)}
WIDTH, HEIGHT = 12, 8
STAT_WIDTH, STAT_HEIGHT = 8, 5


def main() -> None:
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n")


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it: stat panels of the run, then one graph per trial metric."""
    stats = [m for m in METRICS if m.labels[:2] != ray_metrics.TRIAL[:2]]
    graphs = [m for m in METRICS if m not in stats]
    panels = [_stat(metric, i) for i, metric in enumerate(stats)]
    panels += [_graph(metric, i, len(stats)) for i, metric in enumerate(graphs)]
    return {
        "title": "cvrunner",
        "uid": "cvrunner",
        "tags": ["cvrunner", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _variables() -> list[dict[str, Any]]:
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    run = _variable("run", "Run", f"label_values({PREFIX}{ray_metrics.TRIALS.name}, run)", several=False)
    of_trials = [
        _variable(label, label.capitalize(), f'label_values({PREFIX}{ray_metrics.EPOCH.name}{{run="$run"}}, {label})')
        for label in ("condition", "fold", "seed")
    ]
    return [source, run, *of_trials]


def _variable(name: str, label: str, query: str, several: bool = True) -> dict[str, Any]:
    everything = {"multi": True, "includeAll": True, "allValue": ".*"} if several else {}
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # refresh the list if the time range changes
        "sort": 4 if name == "run" else 3,
        **everything,
    }


def _stat(metric: Metric, index: int) -> dict[str, Any]:
    by = [label for label in metric.labels if label != "run"]
    panel = _panel(metric, index, f"max by ({', '.join(by)})" if by else "max", " ".join(f"{{{{{b}}}}}" for b in by))
    panel["type"] = "stat"
    panel["gridPos"] = {"x": index * STAT_WIDTH, "y": 0, "w": STAT_WIDTH, "h": STAT_HEIGHT}
    panel["fieldConfig"]["defaults"]["noValue"] = "0" if metric is ray_metrics.RETRIES else "-"
    panel["options"] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "none", "textMode": "value_and_name"}
    return panel


def _graph(metric: Metric, index: int, stats: int) -> dict[str, Any]:
    shown = [label for label in metric.labels if label != "run"]
    legend = "{{condition}}/fold-{{fold}}/seed-{{seed}}" + (" {{dimension}}" if "dimension" in shown else "")
    panel = _panel(metric, stats + index, f"max by ({', '.join(shown)})", legend)
    panel["type"] = "timeseries"
    panel["gridPos"] = {"x": index % 2 * WIDTH, "y": STAT_HEIGHT + index // 2 * HEIGHT, "w": WIDTH, "h": HEIGHT}
    panel["options"] = {"legend": {"displayMode": "table", "placement": "right", "calcs": ["lastNotNull"]}}
    return panel


def _panel(metric: Metric, index: int, aggregate: str, legend: str) -> dict[str, Any]:
    """Return a panel. `max by (...)` aggregates over the labels that Ray adds: node, process and session."""
    chosen = 'run="$run"'
    if metric.labels[:2] == ray_metrics.TRIAL[:2]:
        chosen += ', condition=~"$condition", fold=~"$fold", seed=~"$seed"'
    low, high = RANGE.get(metric, (None, None))
    limits = {name: value for name, value in (("min", low), ("max", high)) if value is not None}
    unit = next((u for end, u in UNIT.items() if metric.name.endswith(end)), "none")
    target = {
        "refId": "A",
        "expr": f"{aggregate} ({PREFIX}{metric.name}{{{chosen}}})",
        "legendFormat": legend or metric.title,
    }
    return {
        "id": index + 1,
        "title": metric.title,
        "description": metric.help,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": unit, **limits}, "overrides": []},
        "targets": [{**target, "datasource": DATASOURCE}],
    }


if __name__ == "__main__":
    main()
