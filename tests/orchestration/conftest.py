"""The Ray that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="package")
def local_ray() -> Iterator[Any]:
    """A Ray in this process with two logical GPUs and its own ports; it reports its metrics every second."""
    import ray

    yield ray.init(
        address="local",
        num_cpus=2,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        namespace="test",
        _node_ip_address="127.0.0.1",
        _system_config={"metrics_report_interval_ms": 1000},
    )
    ray.shutdown()
