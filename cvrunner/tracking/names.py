"""Names and values in MLflow: tags, metrics, parameters, the saved view and addresses. Pure; does not import mlflow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import quote

from cvrunner.config.schema import Config, flatten
from cvrunner.records.results import EpochRecord, Provenance, RunRecord, TrialResult
from cvrunner.records.summary import Summary
from cvrunner.report.panels import COLOURS
from cvrunner.verdict.ccc import mean_if_all

ROLE, RUN, RUN_KEY, KEY, CONDITION = (f"cvrunner.{name}" for name in ("role", "run", "run_key", "key", "condition"))
PARENT = "mlflow.parentRunId"
UI_ADDRESS = "http://127.0.0.1:5000"
"""Where `cvrunner ui` serves MLflow by default if the store is a database."""
PAGE = "workflowType=machine_learning"
"""Without this parameter the page opens on a view of language-model traces."""
ENDED: dict[str, str] = {
    "COMPLETE": "FINISHED",
    "INCOMPLETE": "FAILED",
    "DONE": "FINISHED",
    "PRUNED": "KILLED",
    "FAILED": "FAILED",
    "STOPPED": "KILLED",
    "INTERRUPTED": "KILLED",
}
"""MLflow's status of a run, trial, sweep or setting that has ended."""

Metrics = dict[str, float]


def epoch_metrics(record: EpochRecord) -> Metrics:
    """Return the metrics of a trial's epoch."""
    metrics: Metrics = {
        "train/loss": record.train_loss,
        "time/train_s": record.train_s,
        "time/validation_s": record.validation_s,
        "time/utterances_per_s": record.utterances_per_s,
        "memory/peak_mib": record.peak_memory_mib,
        "train/padding_share": record.padding_share,
    }
    metrics |= ccc_metrics("val/ccc", record.validation_ccc)
    for name, group in record.groups.items():
        metrics[f"group_{name}/learning_rate"] = group.learning_rate
        metrics[f"group_{name}/gradient_norm"] = group.gradient_norm
        metrics[f"group_{name}/weight_change"] = group.weight_change
    for dimension, weights in record.layer_weights.items():
        metrics |= {f"layer_weights/{dimension}_{i:02d}": weight for i, weight in enumerate(weights)}
    return metrics | {f"ema_decay/{dimension}": value for dimension, value in record.ema_decay.items()}


def result_entry(result: TrialResult) -> tuple[Metrics, dict[str, str]]:
    """Return the metrics of a finished trial, and as tags how it was trained."""
    metrics: Metrics = {
        **ccc_metrics("test/ccc", result.test_ccc),
        **ccc_metrics("selected/validation_ccc", result.validation_ccc),
        "selected/epoch": result.best_epoch,
        "time/total_train_s": result.train_s,
        "memory/peak_mib_trial": result.peak_memory_mib,
    }
    # These may differ when a trial is repeated, and so cannot be parameters, which never change.
    return metrics, {
        "cvrunner.device": result.device,
        "cvrunner.precision": result.precision,
        "cvrunner.encoder": result.encoder,
        "cvrunner.encoder_digest": result.encoder_digest,
        "cvrunner.split_digest": result.split_digest,
        "cvrunner.collapsed": ", ".join(result.collapsed) or "none",
    }


def mean_metrics(records: Sequence[EpochRecord], dimensions: list[str]) -> Metrics:
    """Return the means of one epoch over all trials of a condition.

    Their names differ from those of a trial: MLflow draws equal names in one chart. The average comes first, because
    the page that compares runs opens with the first metric that they have.
    """
    metrics: Metrics = {}
    for dimension in ("avg", *dimensions):
        average = mean_if_all(record.validation_ccc.get(dimension) for record in records)
        if average is not None:
            metrics[f"val_mean/ccc_{dimension}"] = average
    metrics["mean/train_loss"] = sum(record.train_loss for record in records) / len(records)
    return metrics


def score_metrics(summary: Summary, condition: str) -> Metrics:
    """Return the test scores of a condition, `ccc_mean/avg`, `ccc_std/avg` and `ccc_pooled/avg`, and what it costs.

    Also `delta/mean`, `delta/low` and `delta/high`: its difference from the baseline in the primary outcome, with the
    interval on this corpus; the baseline has none.
    """
    metrics: Metrics = {}
    if cost := summary.costs.get(condition):
        metrics = {"cost/trained_parameters": cost.parameters, "cost/hours": cost.hours}
    for dimension, score in summary.scores.get(condition, {}).items():
        values = {"mean": score.mean, "std": score.std, "pooled": score.pooled}
        metrics |= {f"ccc_{name}/{dimension}": v for name, v in values.items() if v is not None}
    difference = summary.differences.get(condition, {}).get(summary.primary)
    if difference and difference.mean is not None and (level := difference.on_corpus):
        metrics["delta/mean"] = difference.mean
        metrics |= {"delta/low": level.interval.low, "delta/high": level.interval.high}
    return metrics


def delta_metrics(summary: Summary) -> Iterator[tuple[int, Metrics]]:
    """Yield steps with the differences from the baseline; nothing if there are none.

    Step 0 has `delta/<condition>_<dimension>`, both intervals (`_low`, `_high`: on this corpus; `_speakers_low`,
    `_speakers_high`: for new speakers), pooled values and p values. The others are the differences per
    fold and seed, `delta_by_fold/<condition>_<dimension>`; the step is the trial's position in the order.
    """
    metrics: Metrics = {}
    for condition, by_dimension in summary.differences.items():
        for dimension, d in by_dimension.items():
            name = f"delta/{condition}_{dimension}"
            values: dict[str, float | None] = {"": d.mean, "_pooled": d.pooled}
            if level := d.on_corpus:
                values |= {"_low": level.interval.low, "_high": level.interval.high, "_p": level.p}
                values |= {"_detectable": level.detectable}
            if speakers := d.new_speakers:
                values |= {"_speakers_low": speakers.interval.low, "_speakers_high": speakers.interval.high}
                values |= {"_speakers_p": speakers.p, "_speakers_detectable": speakers.detectable}
            metrics |= {name + end: value for end, value in values.items() if value is not None}
    if metrics:
        yield 0, metrics
    for condition, by_dimension in summary.differences.items():
        for dimension, difference in by_dimension.items():
            for step, value in enumerate(difference.by_trial.values(), 1):
                if value is not None:
                    yield step, {f"delta_by_fold/{condition}_{dimension}": value}


def of_evaluation(name: str, metrics: Metrics) -> Metrics:
    """Return the metrics of an evaluation, such as `emotale/ccc_mean/avg`, without what training cost."""
    return {f"{name}/{metric}": value for metric, value in metrics.items() if not metric.startswith("cost/")}


def run_tags(run: Provenance, role: str, key: str) -> dict[str, str]:
    """Return the tags by which a part of a run, or of a sweep, is found again."""
    return {ROLE: role, RUN: run.run, RUN_KEY: run.key, KEY: key}


def condition_entry(
    run: RunRecord, config: Config, condition: str, fold: int | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the tags and the parameters of a condition: its name, its colour in the figures, its settings, in a fold
    if one is given, and who chose them.

    The name is no parameter, because the page groups trials by that one.
    """
    tags = {CONDITION: condition, "mlflow.runColor": COLOURS[run.conditions.index(condition) % len(COLOURS)]}
    settings = config.for_condition(condition, fold).model_dump(mode="json", include={"model", "train"})
    # The runs of one condition differ in the seed, which each trial has as a parameter of its own.
    settings["train"].pop("seeds")
    origin = config.settings_from
    settings["settings_from"] = {
        **origin.model_dump(include={"source", "sweep", "objective", "nested"}),
        "samples": origin.samples(condition),
    }
    if fold is None and config.folds_of(condition):
        settings["folds"] = config.conditions[condition]["folds"]
    # MLflow refuses longer values.
    return tags, {name: str(value)[:500] for name, value in flatten(settings).items()}


def view_state(run: RunRecord, created_at_ms: int, parents: Sequence[str]) -> str:
    """Return the saved view: this run's scores as charts, in the report's colours. MLflow does not document the format.

    Not grouped by condition, because MLflow picks the colours of groups itself, and shows their means instead of folds.
    Names of metrics are short because a card shows some sixteen characters of them, and nothing else as its title.
    `parents`: ids of the runs that have the mean curves, and under which the page hides the trials until expanded.
    """
    sections, charts = [], []
    for section, kind, metric in (
        ("Test CCC: a bar per fold and seed", "BAR", "test/ccc"),
        ("Validation CCC by epoch: means", "LINE", "val_mean/ccc"),
        ("Validation CCC by epoch: folds and seeds", "LINE", "val/ccc"),
    ):
        sections.append({"uuid": metric, "name": section, "display": True, "isReordered": True, "cardHeight": 300})
        for dimension in (*run.dimensions, "avg"):
            chart = {
                "uuid": f"{metric}_{dimension}",
                "type": kind,
                "metricKey": f"{metric}_{dimension}",
                "metricSectionId": metric,
                "runsCountToCompare": len(run.trials) + len(parents),
                "deleted": False,
                "isGenerated": False,
            }
            if kind == "LINE":
                chart |= {
                    "selectedMetricKeys": [f"{metric}_{dimension}"],
                    "lineSmoothness": 0,
                    "xAxisKey": "step",
                    "yAxisKey": "metric",
                    "useGlobalXaxisKey": True,
                    "useGlobalLineSmoothing": True,
                }
            charts.append(chart)
    state = {
        "searchFilter": f"tags.`{ROLE}` != 'comparison' AND tags.`{RUN}` = '{run.run}'",
        "orderByKey": "params.`condition`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": ["params.`condition`", "params.`fold`", "params.`seed`", "metrics.`test/ccc_avg`"],
        "columnOrder": [],
        "columnWidths": {},
        "runsExpanded": dict.fromkeys(parents, True),
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsHiddenMode": "SHOW_ALL",
        "viewMaximized": False,
        # Where the list would be, there is room for charts next to the panel that MLflow opens on a first visit.
        "runListHidden": True,
        "compareRunCharts": charts,
        "compareRunSections": sections,
        # Keeps the order of the sections; the charts that the page generates follow.
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }
    name = f"{' vs '.join(run.conditions).capitalize()}: {run.run}"
    return json.dumps({"name": name, "createdAt": created_at_ms, "state": json.dumps(state)})


def page_links(
    uri: str, base_url: str | None, experiment_id: str, view_key: str, parents: list[str], comparison: str
) -> dict[str, str]:
    """Return addresses in MLflow's page: the saved view, the parents side by side, the comparison.

    A server at `uri` has its own page. The page of a database is started at `base_url`; without that it has none.
    """
    if uri.startswith(("http://", "https://")):
        base_url = uri
    if base_url is None:
        return {}
    base = f"{base_url.rstrip('/')}/#"
    home = f"{base}/experiments/{experiment_id}/runs"
    runs = quote(json.dumps(parents, separators=(",", ":")))
    experiments = quote(json.dumps([experiment_id], separators=(",", ":")))
    return {
        "scores and curves of all folds": f"{home}?viewStateShareKey={view_key}&compareRunsMode=CHART&{PAGE}",
        "conditions side by side": f"{base}/compare-runs?runs={runs}&experiments={experiments}&{PAGE}",
        "difference with intervals, report, predictions": (
            f"{base}/experiments/{experiment_id}/runs/{comparison}/artifacts/figures/differences.png?{PAGE}"
        ),
    }


def ccc_metrics(prefix: str, ccc: Mapping[str, float | None]) -> Metrics:
    """Return a metric per dimension whose CCC is defined, such as `test/ccc_valence`."""
    return {f"{prefix}_{dimension}": value for dimension, value in ccc.items() if value is not None}
