"""The size of a Ray cluster, asked in a subprocess: a cluster that listens but does not answer blocks its callers for
most of a minute.

Only reads: no driver is registered and no Ray is started.
"""

from __future__ import annotations

import json
import subprocess
import sys

RAY_STOP_WAIT_S = 3.0
"""Time that Ray leaves a stopped job, unless its runtime environment sets STOP_WAIT."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"


def ask_nodes(address: str, limit_s: float) -> tuple[list[dict[str, float]], str | None]:
    """Return the resources of each live node, or none and the reason in one line. `address` as in RAY_ADDRESS."""
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
        # Ray may print above the answer, which is the last line.
        nodes, error = json.loads(asked.stdout.strip().rpartition("\n")[2])
    except ValueError:
        return [], "its answer cannot be read"
    return nodes, error


def read_nodes(address: str, limit_s: float) -> tuple[list[dict[str, float]], str | None]:
    """Do what `ask_nodes` does, but in this process."""
    from ray.util.state import list_nodes  # takes a second, which only the subprocess pays

    try:
        nodes = list_nodes(address=address, filters=[("state", "=", "ALIVE")], timeout=int(limit_s), detail=True)
    except Exception as error:  # wrong token, no dashboard, not a Ray: each is an answer
        return [], f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return [dict(node.resources_total or {}) for node in nodes], None


if __name__ == "__main__":
    print(json.dumps(read_nodes(sys.argv[1], 5.0)))
