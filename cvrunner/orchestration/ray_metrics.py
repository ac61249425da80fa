"""The run's gauges at Ray's metrics port, for Prometheus and Grafana. They come from the driver, which outlives actors.

Ray reports a value once and forgets it: what is not set again within two report intervals (10 s each by default) is
gone from the port. So a thread sets all of them again and again, as long as the run lasts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from ray.util.metrics import Gauge

from cvrunner.orchestration.gauges import METRICS, Gauges, Metric

SET_EVERY_S = 5.0


@contextlib.contextmanager
def exported(gauges: Gauges) -> Iterator[None]:
    """Until the end of the context; Ray must be connected."""
    ended = threading.Event()
    ours = {metric: Gauge(metric.name, description=metric.help, tag_keys=metric.labels) for metric in METRICS}

    def export() -> None:
        while not ended.is_set():
            _set(ours, gauges)
            ended.wait(SET_EVERY_S)

    thread = threading.Thread(target=export, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _set(ours, gauges)


def _set(ours: Mapping[Metric, Any], gauges: Gauges) -> None:
    for metric, values in gauges.values().items():
        for labels, value in values.items():
            ours[metric].set(value, tags=dict(zip(metric.labels, labels, strict=True)))
