"""What a run is called in MLflow: tags, metrics, parameters, the saved view and addresses. Pure; knows no mlflow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from urllib.parse import quote

from cvrunner.config.schema import Config
from cvrunner.records.results import EpochRecord, RunRecord, Summary, TrialResult
from cvrunner.report.evidence import flatten
from cvrunner.report.panels import COLOURS
from cvrunner.verdict.ccc import mean_if_all

ROLE, RUN, RUN_KEY, KEY, CONDITION = (f"cvrunner.{name}" for name in ("role", "run", "run_key", "key", "condition"))
PARENT = "mlflow.parentRunId"
# The page opens on a view of language-model traces unless told otherwise.
PAGE = "workflowType=machine_learning"

Metrics = dict[str, float]


def epoch_metrics(record: EpochRecord) -> Metrics:
    """An epoch of a trial."""
    metrics: Metrics = {
        "train/loss": record.train_loss,
        "time/train_s": record.train_s,
        "time/validation_s": record.validation_s,
        "time/utterances_per_s": record.utterances_per_s,
        "memory/peak_mib": record.peak_memory_mib,
        "train/padding_share": record.padding_share,
    }
    metrics |= _ccc("validation/ccc", record.validation_ccc)
    for name, group in record.groups.items():
        metrics[f"group_{name}/learning_rate"] = group.learning_rate
        metrics[f"group_{name}/gradient_norm"] = group.gradient_norm
        metrics[f"group_{name}/weight_change"] = group.weight_change
    for dimension, weights in record.layer_weights.items():
        metrics |= {f"layer_weights/{dimension}_{i:02d}": weight for i, weight in enumerate(weights)}
    return metrics | {f"ema_decay/{dimension}": value for dimension, value in record.ema_decay.items()}


def result_metrics(result: TrialResult) -> Metrics:
    """The outcome of a trial."""
    metrics = _ccc("test/ccc", result.test_ccc) | _ccc("selected/validation_ccc", result.validation_ccc)
    metrics |= {"selected/epoch": result.best_epoch, "time/total_train_s": result.train_s}
    return metrics | {"memory/peak_mib_trial": result.peak_memory_mib}


def result_tags(result: TrialResult) -> dict[str, str]:
    """Facts of a trial that may differ between two runs of it, so that they cannot be parameters."""
    return {
        "cvrunner.device": result.device,
        "cvrunner.precision": result.precision,
        "cvrunner.encoder": result.encoder,
        "cvrunner.encoder_digest": result.encoder_digest,
        "cvrunner.split_digest": result.split_digest,
        "cvrunner.collapsed": ", ".join(result.collapsed) or "none",
    }


def mean_metrics(records: Mapping[str, EpochRecord], dimensions: list[str]) -> Metrics:
    """One epoch of a condition, from all its trials, under other names than theirs, or the charts would mix them."""
    metrics: Metrics = {}
    for dimension in (*dimensions, "avg"):
        average = mean_if_all(record.validation_ccc.get(dimension) for record in records.values())
        if average is not None:
            metrics[f"mean/validation_ccc_{dimension}"] = average
    metrics["mean/train_loss"] = sum(record.train_loss for record in records.values()) / len(records)
    return metrics


def fold_metrics(fold: int, seed: int, seeds: int, record: EpochRecord) -> Metrics:
    """A trial's epoch as a curve of its condition: `fold_1/...`, or `fold_1_seed_0/...` with several seeds."""
    series = _series(fold, seed, seeds)
    return {fold_marker(fold, seed, seeds): record.train_loss} | _ccc(f"{series}/validation_ccc", record.validation_ccc)


def fold_marker(fold: int, seed: int, seeds: int) -> str:
    """The metric that every step of `fold_metrics` has; a CCC may be undefined."""
    return f"{_series(fold, seed, seeds)}/train_loss"


def _series(fold: int, seed: int, seeds: int) -> str:
    return f"fold_{fold}" if seeds == 1 else f"fold_{fold}_seed_{seed}"


def score_metrics(summary: Summary, condition: str) -> Metrics:
    """Test scores of a condition: `ccc_mean/avg`, `ccc_std/avg`, `ccc_pooled/avg`."""
    metrics: Metrics = {}
    for dimension, score in summary.scores.get(condition, {}).items():
        values = {"mean": score.mean, "std": score.std, "pooled": score.pooled}
        metrics |= {f"ccc_{name}/{dimension}": v for name, v in values.items() if v is not None}
    return metrics


def delta_metrics(summary: Summary) -> Metrics:
    """Differences from the baseline: `delta/<condition>_<dimension>` and its interval, pooled value and tests."""
    metrics: Metrics = {}
    for condition, by_dimension in summary.differences.items():
        for dimension, d in by_dimension.items():
            name = f"delta/{condition}_{dimension}"
            values = {"": d.mean, "_pooled": d.pooled, "_corrected_t_p": d.corrected_t.p if d.corrected_t else None}
            if d.interval:
                values |= {"_low": d.interval.low, "_high": d.interval.high, "_detectable": d.interval.detectable}
            metrics |= {name + end: value for end, value in values.items() if value is not None}
    return metrics


def delta_steps(summary: Summary) -> Iterator[tuple[int, Metrics]]:
    """The differences by fold and seed as a curve, the step being the trial's place in the order."""
    for condition, by_dimension in summary.differences.items():
        for dimension, difference in by_dimension.items():
            for step, value in enumerate(difference.by_trial.values(), 1):
                if value is not None:
                    yield step, {f"delta_by_fold/{condition}_{dimension}": value}


def trial_params(config: Config, condition: str, fold: int, seed: int) -> dict[str, str]:
    """What sets a trial apart, and its model and training settings."""
    return {"condition": condition, "fold": str(fold), "seed": str(seed)} | condition_params(config, condition)


def condition_params(config: Config, condition: str) -> dict[str, str]:
    """Model and training settings of a condition; not its name, by which the page groups trials."""
    settings = config.for_condition(condition).model_dump(mode="json", include={"model", "train"})
    settings["train"].pop("seeds")
    return {name: str(value)[:500] for name, value in flatten(settings).items()}


def run_tags(run: RunRecord, role: str, key: str) -> dict[str, str]:
    """How a run is found again."""
    return {ROLE: role, RUN: run.run, RUN_KEY: run.key, KEY: key}


def condition_tags(run: RunRecord, condition: str) -> dict[str, str]:
    """The condition, and the colour that it has in the figures too."""
    return {CONDITION: condition, "mlflow.runColor": COLOURS[run.conditions.index(condition) % len(COLOURS)]}


def view_state(run: RunRecord, created_at_ms: int) -> str:
    """The saved view: this run's trials, grouped by condition, as charts. The format is the page's own.

    The page adds the parents of the trials it finds. Grouped by the tag, which they have too, each joins its condition
    and brings its own curves; by a parameter of the trials, the page would chart the mean of all parents.
    """
    state = {
        "searchFilter": f"tags.`{ROLE}` = 'trial' AND tags.`{RUN}` = '{run.run}'",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": ["params.`condition`", "params.`fold`", "params.`seed`", "metrics.`test/ccc_avg`"],
        "columnOrder": [],
        "columnWidths": {},
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsHiddenMode": "SHOW_ALL",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "tag", "groupByData": CONDITION}],
        },
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }
    name = f"{' vs '.join(run.conditions).capitalize()}: {run.run}"
    return json.dumps({"name": name, "createdAt": created_at_ms, "state": json.dumps(state)})


def served_at(uri: str, base_url: str | None) -> str | None:
    """Where the page over a store is: a server has its own, before a database one has to be started."""
    return uri if uri.startswith(("http://", "https://")) else base_url


def page_links(base_url: str, experiment_id: str, view_key: str, parents: list[str], comparison: str) -> dict[str, str]:
    """Addresses in the MLflow page at `base_url`: the saved view, the parents side by side, the comparison."""
    base = f"{base_url.rstrip('/')}/#"
    home = f"{base}/experiments/{experiment_id}/runs"
    runs = quote(json.dumps(parents, separators=(",", ":")))
    experiments = quote(json.dumps([experiment_id], separators=(",", ":")))
    return {
        "trials grouped by condition": f"{home}?viewStateShareKey={view_key}&compareRunsMode=CHART&{PAGE}",
        "conditions side by side": f"{base}/compare-runs?runs={runs}&experiments={experiments}&{PAGE}",
        "comparison, figures, predictions": f"{base}/experiments/{experiment_id}/runs/{comparison}?{PAGE}",
    }


def _ccc(prefix: str, ccc: Mapping[str, float | None]) -> Metrics:
    return {f"{prefix}_{dimension}": value for dimension, value in ccc.items() if value is not None}
