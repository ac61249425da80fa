"""`evaluate`: no model scores a speaker or a recording that it knows, and every place shows the same numbers."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from cvrunner.errors import ResultsError, UsageError
from cvrunner.inference import evaluate as evaluating
from cvrunner.inference.command import evaluate
from cvrunner.inference.evaluate import match_scales
from cvrunner.orchestration import ray_executor
from cvrunner.records.run_directory import RunDirectory
from cvrunner.records.summary import Evaluation, Summary
from cvrunner.report.check import check_run
from cvrunner.report.report import read_report
from cvrunner.report.tables import format_interval
from cvrunner.report.write import write_report
from cvrunner.run import commands
from cvrunner.tracking.mirror import sync_run
from cvrunner.verdict.ccc import ccc
from cvrunner.verdict.ledger import read_ledger
from tests.blank_figures import blank_figures
from tests.corpora import Row, write_manifest, write_noise
from tests.run.test_commands import Inline
from tests.tiny_encoders import save_encoder

pytestmark = pytest.mark.filterwarnings("ignore")
DANISH = {"1": ["s01", "s02"], "2": ["s03", "s04"], "3": ["s05", "s06"]}
# Two spellings of known speakers, one of nobody that the run has.
ENGLISH = {"1": ["S1", "s02", "new"], "2": ["s03", "s04"], "3": ["s05", "s06"]}
STRANGERS = {"1": ["x1", "x2", "x3"], "2": ["y1", "y2", "y3"], "3": ["z1", "z2", "z3"]}
TURNS = 4


def write_corpus(
    folder: Path, speakers: Mapping[str, Sequence[str]], seed: int, scale: tuple[float, float], more: Sequence[Row] = ()
) -> Path:
    """Write a manifest with a dialogue per speaker, ratings by two raters and two scenarios; return its config."""
    random, rows = np.random.default_rng(seed), list[Row]()
    low, high = scale
    for session, names in speakers.items():
        for speaker in names:
            for turn in range(TURNS):
                name = f"{speaker}_{turn}"
                write_noise(folder / "audio" / f"{name}.wav", 1000 * seed + len(rows), duration_s=0.2 + 0.03 * turn)
                ratings = {
                    f"{dimension}_{rater}": round(float(random.uniform(low, high)), 3)
                    for dimension in ("valence", "arousal")
                    for rater in (1, 2)
                }
                about = {"utterance": name, "speaker": speaker, "session": session, "dialogue": f"{speaker}_d"}
                scenario = {"scenario": f"sentence{turn % 2}"}
                rows.append({"path": f"audio/{name}.wav", "turn": turn, **about, **scenario, **ratings})
    manifest = write_manifest(folder / "manifest.csv", [*rows, *more])
    config = folder.parent / f"{folder.name}.yaml"
    config.write_text(f"corpus: {{format: manifest, root: {manifest}, scale: [{low}, {high}]}}\n")
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on Danish, and the configurations english.yaml and strangers.yaml. Read only."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_encoder(folder / "wavlm")
    config = write_corpus(folder / "danish", DANISH, 1, (1, 7))
    config.write_text(
        config.read_text()
        + f"""
model: {{encoder: {folder / "wavlm"}, width: 16, mamba: {{state_size: 4, head_dim: 8, layers: 1}}}}
train: {{epochs: 1, lr: 1e-3, seeds: [0, 1]}}
cluster: {{cache_dir: {folder / "cache"}}}
tracking: {{enabled: false}}
results: {{root: {folder / "results"}}}
verdict: {{cluster: dialogue}}
"""
    )
    (folder / "english" / "audio").mkdir(parents=True)
    shutil.copy(folder / "danish" / "audio" / "s05_0.wav", folder / "english" / "audio" / "copy.wav")
    copy: Row = {"path": "audio/copy.wav", "utterance": "copy", "speaker": "renamed", "session": "3"}
    copy |= {"dialogue": "copied", "turn": 0, "scenario": "sentence0"}
    copy |= {f"{d}_{rater}": 50 + rater for d in ("valence", "arousal") for rater in (1, 2)}
    write_corpus(folder / "english", ENGLISH, 2, (0, 100), [copy])
    write_corpus(folder / "strangers", STRANGERS, 3, (1, 7))
    with pytest.MonkeyPatch.context() as patch, blank_figures():
        patch.setattr(ray_executor, "RayExecutor", Inline)
        assert commands.all_folds(config, [], False, True, Console(file=io.StringIO())) == 0
        for name in ("english", "strangers"):
            (run,) = (folder / "results").glob("*/run.json")
            assert evaluated(run.parent, folder / f"{name}.yaml")[0] == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunDirectory:
    """A copy of the run with its evaluations."""
    (file,) = shutil.copytree(trained / "results", tmp_path / "results").glob("*/run.json")
    return RunDirectory(file.parent)


def evaluated(run: Path, config: Path, *overrides: str, **options: Any) -> tuple[int, str]:
    given: dict[str, Any] = {"name": None, "speakers_differ": False, "device": "cpu", "encoder": None, "as_json": False}
    console = Console(file=io.StringIO(), width=200)
    with blank_figures():
        code = evaluate(run, config, overrides, **given | options, console=console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return code, text


def record_of(run: RunDirectory, name: str) -> Evaluation:
    return Evaluation.from_json(run.evaluation(name).evaluation_file.read_bytes(), name)


def summary_of(run: RunDirectory, name: str) -> Summary:
    return Summary.from_json(run.evaluation(name).summary_file.read_bytes(), name)


def table_of(run: RunDirectory, name: str) -> pd.DataFrame:
    folder = run.evaluation(name)
    return pd.concat([pd.read_csv(folder.path / trial / "predictions.csv") for trial in record_of(run, name).trials])


# --- who scores whom --------------------------------------------------------------------------------------------------


def test_no_model_scores_a_speaker_or_a_recording_of_its_training_or_validation_part(run: RunDirectory) -> None:
    table = table_of(run, "english")
    split = json.loads(run.split.read_text())["folds"]
    for fold in split:
        met = {name.split("_")[0] for part in ("train", "validation") for name in fold[part]["utterances"]}
        heard = {name for part in ("train", "validation") for name in fold[part]["utterances"]}
        rows = table[table["fold"] == fold["fold"]]
        assert not {speaker.lower().replace("s0", "s") for speaker in rows["speaker"]} & {
            speaker.replace("s0", "s") for speaker in met
        }
        assert ("copy" in set(rows["utterance"])) == ("s05_0" not in heard)
    # Each Danish speaker is tested by one fold, and so is scored in English by that one alone; the new one by all.
    folds = table.groupby("speaker")["fold"].nunique()
    assert dict(folds) == {"S1": 1, "s02": 1, "s03": 1, "s04": 1, "s05": 1, "s06": 1, "new": 3, "renamed": 1}
    record = record_of(run, "english")
    assert record.same_audio == {"copy": ["s05_0"]}
    assert record.same_speakers["S1"] == ["s01"]
    assert record.same_speakers["renamed"] == ["s05"]
    assert record.left_out == []


def test_strangers_are_scored_by_every_model(run: RunDirectory) -> None:
    table = table_of(run, "strangers")
    assert len(table) == 2 * 3 * 2 * 9 * TURNS
    assert record_of(run, "strangers").same_speakers == {}


def test_on_the_runs_own_corpus_the_scores_are_those_of_the_run(trained: Path, run: RunDirectory) -> None:
    assert evaluated(run.path, trained / "danish.yaml")[0] == 0
    own = read_report(run).summary
    for condition, by_outcome in summary_of(run, "danish").scores.items():
        for outcome, scores in by_outcome.items():
            assert scores.by_trial == pytest.approx(own.scores[condition][outcome].by_trial, abs=1e-4)
    # Its ledger line is not one of the run, whose own number of looks stays as it was.
    assert check_run(run).problems == ()


def test_utterances_that_every_model_knows_are_counted_and_named(
    trained: Path, run: RunDirectory, tmp_path: Path
) -> None:
    # Speaker s03 is now in the training part of every fold.
    split = json.loads(run.split.read_text())
    for fold in split["folds"]:
        fold["train"]["utterances"].append("s03_0")
    run.split.write_text(json.dumps(split))
    code, text = evaluated(run.path, trained / "english.yaml", name="fewer")
    assert code == 0
    assert record_of(run, "fewer").left_out == [f"s03_{turn}" for turn in range(TURNS)]
    assert "not scored: 4 utterances, known to all models that could: s03_0, s03_1, s03_2, s03_3" in text
    assert "s03_3" in run.comparison.read_text()


def test_equal_names_are_different_people_if_the_user_says_so(trained: Path, run: RunDirectory) -> None:
    evaluated(run.path, trained / "english.yaml", name="others", speakers_differ=True)
    table, record = table_of(run, "others"), record_of(run, "others")
    folds = table.groupby("speaker")["fold"].nunique()
    # The recording that both corpora have still says who is who.
    assert dict(folds) == dict.fromkeys(folds.index, 3) | {"renamed": 1}
    assert record.same_speakers == {"renamed": ["s05"]}
    assert "1 (renamed = s05)" in run.comparison.read_text()


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "expected"), [(1.0, 0.0), (7.0, 100.0), (4.0, 50.0), (8.0, 700 / 6)])
def test_scales_are_matched_from_end_to_end(value: float, expected: float) -> None:
    assert match_scales(np.array([value]), (1, 7), (0, 100)) == pytest.approx([expected])


def test_predictions_are_on_the_scale_of_the_corpus_which_the_report_names(run: RunDirectory) -> None:
    table = table_of(run, "english")
    assert table["valence_true"].max() > 50
    assert table["valence_predicted"].max() > 10
    assert "0 to 100; predictions mapped linearly from 1 to 7" in run.comparison.read_text()


def test_the_interval_is_the_bootstrap_of_the_corpus_plus_the_variance_over_seeds(run: RunDirectory) -> None:
    table, record = table_of(run, "strangers"), record_of(run, "strangers")
    clusters = sorted(set(zip(table["session"], table["speaker"], strict=True)))
    order = table[(table.condition == "frozen") & (table.fold == 1) & (table.seed == 0)]
    cluster = np.array([clusters.index(key) for key in zip(order["session"], order["speaker"], strict=True)])
    random = np.random.default_rng(0)
    # Rao and Wu: of three clusters in a session two are drawn, each counts 3/2; the same draws for all models.
    weights = np.concatenate([1.5 * random.multinomial(2, [1 / 3] * 3, size=2000) for _ in range(3)], axis=1)
    truth = order["valence_true"].to_numpy()
    differences, draws = np.empty((3, 2)), np.empty((2000, 3, 2))
    for f in range(3):
        for s in range(2):
            of = table[(table.fold == f + 1) & (table.seed == s)]
            one, other = (of[of.condition == c]["valence_predicted"].to_numpy() for c in ("unfrozen", "frozen"))
            differences[f, s] = ccc(one, truth) - ccc(other, truth)
            for r, weight in enumerate(weights[:, cluster]):
                draws[r, f, s] = weighted_ccc(one, truth, weight) - weighted_ccc(other, truth, weight)
    of_corpus = draws.mean(axis=(1, 2)).var(ddof=1)
    of_seeds = (differences.var(axis=1, ddof=1) / (2 * 9)).sum()
    by_seed = draws.mean(axis=1)
    twice = (by_seed.var(axis=0, ddof=1) - by_seed.mean(axis=1).var(ddof=1)).sum() / 2
    variance = of_corpus + max(0, of_seeds - twice)
    df = variance**2 / (of_corpus**2 / (9 - 3) + of_seeds**2 / 3)
    half = stats.t.ppf(0.975, max(df, 3)) * np.sqrt(variance)
    found = summary_of(run, "strangers").differences["unfrozen"]["valence"]
    assert found.mean == pytest.approx(differences.mean())
    assert found.on_corpus is not None
    assert found.on_corpus.interval.low == pytest.approx(differences.mean() - half)
    assert found.on_corpus.interval.high == pytest.approx(differences.mean() + half)
    assert record.cluster is None
    assert summary_of(run, "strangers").cluster == "speaker"


def weighted_ccc(prediction: Any, truth: Any, weight: Any) -> float:
    p, t = (np.average(values, weights=weight) for values in (prediction, truth))
    covariance = np.average((prediction - p) * (truth - t), weights=weight)
    spread = np.average((prediction - p) ** 2, weights=weight) + np.average((truth - t) ** 2, weights=weight)
    return float(2 * covariance / (spread + (p - t) ** 2))


def test_new_speakers_are_judged_over_the_sessions_of_the_corpus(run: RunDirectory) -> None:
    table = table_of(run, "strangers")
    found = summary_of(run, "strangers").differences["unfrozen"]["arousal"]
    assert found.on_corpus is not None
    by_session = []
    for _, of in table.groupby("session"):
        scores = of.groupby(["condition", "fold", "seed"]).apply(
            lambda rows: ccc(rows["arousal_predicted"], rows["arousal_true"])
        )
        by_session.append(scores["unfrozen"].mean() - scores["frozen"].mean())
    error = np.sqrt(np.var(by_session, ddof=1) / 3 + found.on_corpus.training_sd**2)
    level = found.new_speakers
    assert level is not None
    assert (level.interval.low + level.interval.high) / 2 == pytest.approx(np.mean(by_session))
    assert level.t == pytest.approx(np.mean(by_session) / error)
    assert level.folds == 3
    assert level.test_train_ratio == 0


def test_a_corpus_of_one_session_says_nothing_about_new_speakers(
    trained: Path, run: RunDirectory, tmp_path: Path
) -> None:
    config = write_corpus(tmp_path / "single", {"1": STRANGERS["1"]}, 4, (1, 7))
    evaluated(run.path, config)
    difference = summary_of(run, "single").differences["unfrozen"]["avg"]
    assert difference.on_corpus is not None
    assert difference.new_speakers is None
    floor = record_of(run, "single").floor
    assert floor is not None
    assert floor.reason is not None
    assert "one session" in floor.reason


# --- where it is shown ------------------------------------------------------------------------------------------------


def test_terminal_report_files_and_mlflow_have_the_same_numbers(trained: Path, run: RunDirectory) -> None:
    code, text = evaluated(run.path, trained / "strangers.yaml")
    assert code == 0
    summary = summary_of(run, "strangers")
    difference = summary.differences["unfrozen"]["avg"]
    assert difference.mean is not None
    assert difference.on_corpus is not None
    expected = [f"{difference.mean:+.4f}", format_interval(difference.on_corpus.interval), summary.verdict]
    expected += [f"{summary.scores[c]['avg'].mean:.4f}" for c in ("frozen", "unfrozen")]
    expected += [f"{summary.references['floor (scenario)'].scores['avg'].mean:.4f}"]
    places = {"terminal": text, "report": run.report.read_text(), "comparison": run.comparison.read_text()}
    for place, shown in places.items():
        words = " ".join(shown.split())
        assert [number for number in expected if number not in words] == [], place
    assert summary.verdict.startswith("On strangers (36 utterances), ")

    from mlflow import MlflowClient

    uri = f"sqlite:///{run.path.parent}/mlflow.db"
    sync_run(run, uri)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("cvrunner-utterance")
    assert experiment is not None
    entries = client.search_runs([experiment.experiment_id])
    by_role = {(e.data.tags["cvrunner.role"], e.data.tags.get("cvrunner.condition")): e for e in entries}
    metrics = by_role["comparison", None].data.metrics
    assert metrics["strangers/delta/unfrozen_avg"] == difference.mean
    assert metrics["strangers/delta/unfrozen_avg_low"] == difference.on_corpus.interval.low
    frozen = by_role["parent", "frozen"].data.metrics
    assert frozen["strangers/ccc_mean/avg"] == summary.scores["frozen"]["avg"].mean
    assert frozen["ccc_mean/avg"] == read_report(run).summary.scores["frozen"]["avg"].mean


def test_an_evaluation_is_a_look_at_its_corpus(trained: Path, run: RunDirectory) -> None:
    looks = read_ledger(run.path.parent)
    assert [look.run for look in looks] == [
        run.name,
        *(f"{run.name}/evaluations/{n}" for n in ("english", "strangers")),
    ]
    record = record_of(run, "strangers")
    assert looks[-1].corpus_digest == record.corpus_digest
    assert set(looks[-1].scores) == set(record.trials)
    assert record.looks_before == 0
    evaluated(run.path, trained / "strangers.yaml")
    assert len(read_ledger(run.path.parent)) == 3
    evaluated(run.path, trained / "strangers.yaml", name="again")
    assert record_of(run, "again").looks_before == 1


def test_a_sound_evaluation_passes_the_check_and_an_altered_one_is_named(run: RunDirectory) -> None:
    assert check_run(run).problems == ()
    predictions = run.evaluation("english").trial("frozen", 1, 0).predictions
    kept = predictions.read_text()
    predictions.write_text(kept.replace(",frozen,", ",frozen ,", 1))
    problems = check_run(run).problems
    assert any("evaluations/english" in problem and "frozen/fold-1/seed-0" in problem for problem in problems)
    predictions.write_text(kept)
    summary = run.evaluation("strangers").summary_file
    summary.write_text(summary.read_text().replace('"margin": 0.02', '"margin": 0.03', 1))
    assert any(p.startswith("evaluations/strangers/summary.json: margin") for p in check_run(run).problems)


# --- again, and not at all --------------------------------------------------------------------------------------------


def test_the_same_command_rates_nothing_again_and_after_a_kill_only_what_is_missing(
    trained: Path, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    rated: list[str] = []
    written = evaluating._write

    def counted(trial: Any, *rest: Any) -> None:
        rated.append(str(trial.path.relative_to(run.evaluation("strangers").path)))
        written(trial, *rest)

    monkeypatch.setattr(evaluating, "_write", counted)
    files = {path: path.read_bytes() for path in run.evaluations.rglob("*") if path.is_file()}
    evaluated(run.path, trained / "strangers.yaml")
    assert rated == []
    assert {path: path.read_bytes() for path in run.evaluations.rglob("*") if path.is_file()} == files
    run.evaluation("strangers").trial("unfrozen", 2, 1).result_file.unlink()
    with blank_figures():
        write_report(run)
    assert summary_of(run, "strangers").verdict.startswith("INCOMPLETE: 1 of 12 trials")
    evaluated(run.path, trained / "strangers.yaml")
    assert rated == ["unfrozen/fold-2/seed-1"]
    assert (
        summary_of(run, "strangers").model_dump()
        == Summary.from_json(files[run.evaluation("strangers").summary_file], "before").model_dump()
    )


def test_other_inputs_under_the_same_name_are_refused(trained: Path, run: RunDirectory) -> None:
    with pytest.raises(UsageError, match=r"other inputs.*--name"):
        evaluated(run.path, trained / "english.yaml", name="strangers")


def test_a_corpus_that_every_fold_knows_is_refused(trained: Path, run: RunDirectory, tmp_path: Path) -> None:
    split = json.loads(run.split.read_text())
    for fold in split["folds"]:
        fold["train"]["utterances"] += [f"s0{number}_0" for number in range(1, 7)]
    run.split.write_text(json.dumps(split))
    with pytest.raises(UsageError, match=r"no model may score anything.*--speakers-differ"):
        evaluated(run.path, trained / "danish.yaml")


def test_a_corpus_that_has_changed_since_training_is_refused(trained: Path, run: RunDirectory, tmp_path: Path) -> None:
    shutil.rmtree(run.evaluations)
    changed = write_corpus(tmp_path / "changed", DANISH, 9, (1, 7))
    config = run.config.read_text()
    run.config.write_text(config.replace(str(trained / "danish"), str(tmp_path / changed.stem)))
    with pytest.raises(ResultsError, match="is not the corpus of the run any more"):
        evaluated(run.path, trained / "strangers.yaml")


def test_a_run_with_missing_trials_or_models_is_refused(trained: Path, run: RunDirectory) -> None:
    (run.trial("frozen", 1, 0).model.weights).unlink()
    with pytest.raises(ResultsError, match="no trained model here"):
        evaluated(run.path, trained / "strangers.yaml")
    run.trial("frozen", 1, 0).result_file.unlink()
    with pytest.raises(ResultsError, match="1 trial of 12 without a result"):
        evaluated(run.path, trained / "strangers.yaml")


def test_a_corpus_without_the_primary_outcome_is_refused(trained: Path, run: RunDirectory) -> None:
    config = run.config.read_text()
    run.config.write_text(config.replace("primary: avg", "primary: arousal"))
    with pytest.raises(UsageError, match="decides by arousal"):
        evaluated(run.path, trained / "strangers.yaml", "corpus.dimensions=[valence]", name="v")
