"""On a real Ray: the metrics port has a series for each metric, also after the actors are gone, and the logs of actors
name their trials."""

from __future__ import annotations

import contextlib
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from cvrunner.config.sections import ClusterConfig, RetriesConfig
from cvrunner.orchestration.failures import Decision, Failure
from cvrunner.orchestration.ray_metrics import METRICS, Gauges
from cvrunner.orchestration.scheduler import run_trials
from cvrunner.records.run_directory import TrialDirectory
from tests.end_to_end.programs import wait_until
from tests.trials import tiny_trials

ray = pytest.importorskip("ray")
from cvrunner.orchestration import ray_metrics  # noqa: E402
from cvrunner.orchestration.ray_executor import RayExecutor  # noqa: E402

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

RUN = "a-run"


def series(name: str) -> dict[tuple[str, ...], float]:
    """By the values of its labels, as Prometheus would read it; without those that another test's run left on this
    Ray."""
    (metric,) = (m for m in METRICS if m.name == name)
    with contextlib.suppress(OSError):
        page = urllib.request.urlopen(f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics", timeout=5)
        found = {}
        for labels, value in re.findall(rf"^ray_{name}{{(.*)}} (\S+)$", page.read().decode(), flags=re.MULTILINE):
            given = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if given["run"] == RUN:
                found[tuple(given[label] for label in metric.labels)] = float(value)
        return found
    return {}


def test_each_metric_reaches_rays_port_with_its_labels_and_outlives_its_trial(
    tmp_path: Path, local_ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_metrics, "EXPORT_EVERY_S", 0.5)
    trials = tiny_trials(tmp_path)
    trial = next(t for t in trials if t.name == "frozen/fold-2/seed-0")
    gauges = Gauges(RUN, trials, trials, slots=1)
    logs = Path(local_ray.address_info["session_dir"]) / "logs"
    # A process that Ray had started in advance may become the actor, or one of another test's actors may have ended.
    before = {path: len(path.read_text()) for path in logs.glob("worker-*.out")}
    with ray_metrics.exported(gauges):
        executor = RayExecutor("metrics", ClusterConfig(), tmp_path / "cache", 1)
        run_trials([trial], lambda t: TrialDirectory(tmp_path / t.name), executor, [gauges], RetriesConfig())
        executor.close()
        # The actor is dead. What follows shows that the older series are sent again with the newer ones.
        gauges.failed(trials[0], Failure("worker_died", "its process is gone"), Decision.RETRY)
        wait_until(lambda: series("cvrunner_retries") == {(RUN, "worker_died"): 1}, "the retry at the metrics port")
        for metric in METRICS:
            assert series(metric.name) == pytest.approx(gauges.values()[metric])
        assert series("cvrunner_trials")[RUN, "done"] == 1
        assert set(series("cvrunner_validation_ccc")) == {
            (RUN, "frozen", "2", "0", dimension) for dimension in ("valence", "arousal", "avg")
        }
    said = [path.read_text()[before.get(path, 0) :] for path in logs.glob("worker-*.out")]
    (log,) = (text for text in said if trial.name in text)
    assert len(re.findall(rf"^[\d:]{{8}}  {trial.name}  epoch \d/3  loss .* CCC-V ", log, flags=re.MULTILINE)) == 3
    assert ":actor_name:fold-trainer-1\n" in log
