"""The size of a Ray cluster, asked by a process of its own: a cluster that listens but does not answer keeps its
callers waiting for most of a minute.

Only reads: no driver is registered and no Ray is started.
"""

from __future__ import annotations

import json
import subprocess
import sys

RAY_STOP_WAIT_S = 3.0
"""What Ray leaves a stopped job where its runtime environment says nothing."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"


def ask_nodes(address: str, limit_s: float) -> tuple[list[dict[str, float]], str | None]:
    """The resources of each live node, or none and the reason in one line. `address` as in RAY_ADDRESS."""
    try:
        asked = subprocess.run(  # noqa: S603 (our own program)
            [sys.executable, "-m", __name__, address],
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [], f"no answer within {limit_s:g} s"
    try:
        nodes, error = json.loads(asked.stdout.strip().rpartition("\n")[2])
    except ValueError:
        return [], "its answer cannot be read"
    return nodes, error


def read_nodes(address: str, limit_s: float) -> tuple[list[dict[str, float]], str | None]:
    """What `ask_nodes` tells, in this process."""
    from ray.util.state import list_nodes

    try:
        nodes = list_nodes(address=address, filters=[("state", "=", "ALIVE")], timeout=int(limit_s), detail=True)
    except Exception as error:  # wrong token, no dashboard, not a Ray: whatever it is, it is the answer
        return [], f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return [dict(node.resources_total or {}) for node in nodes], None


if __name__ == "__main__":
    print(json.dumps(read_nodes(sys.argv[1], 5.0)))
