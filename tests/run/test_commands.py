"""Commands as functions: a failing trial leaves the others alone, and a mean over what is there is never given."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from cvrunner.config.reading import load_config
from cvrunner.errors import ClusterError, ConfigError, ResultsError
from cvrunner.orchestration import ray_executor
from cvrunner.orchestration.attempt import InlineExecutor
from cvrunner.orchestration.failures import Failure
from cvrunner.records.run_directory import RunDirectory
from cvrunner.report.report import read_report
from cvrunner.run import commands
from cvrunner.run.prepare import prepare
from cvrunner.run.session import open_run
from cvrunner.verdict.ccc import ccc
from cvrunner.verdict.floor import read_floor
from cvrunner.verdict.predictions import out_of_fold, read_probe, read_tables
from tests.corpora import manifest_rows, write_manifest
from tests.runs import make_run
from tests.tiny_encoders import save_encoder

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A manifest corpus of three sessions and an encoder, both tiny; the working directory is a fresh one."""
    monkeypatch.chdir(tmp_path)
    save_encoder(tmp_path / "wavlm")
    manifest = write_manifest(tmp_path / "corpus" / "manifest.csv", manifest_rows(tmp_path / "corpus", turns=6))
    path = tmp_path / "tiny.yaml"
    path.write_text(f"""
corpus: {{format: manifest, root: {manifest}, scale: [1, 7]}}
model: {{encoder: {tmp_path / "wavlm"}, width: 16, mamba: {{state_size: 4, head_dim: 8, layers: 1}}}}
train: {{epochs: 2, lr: 1e-3}}
cluster: {{cache_dir: {tmp_path / "cache"}}}
tracking: {{enabled: false}}
""")
    return path


class Inline(InlineExecutor):
    """Stands in for Ray; `broken` trials fail."""

    broken: tuple[str, ...] = ()
    failure = Failure("permanent", "the loss went away")

    def __init__(self, run: str, cluster: Any, cache_dir: Path, *_: Any) -> None:
        super().__init__(cache_dir)

    def poll(self, timeout_s: float) -> list[Any]:
        if self.current and self.current[0].name in self.broken:
            trial, _ = self.current
            self.current = None
            return [(trial, self.failure)]
        return super().poll(timeout_s)


def all_folds(config: Path, *overrides: str, new: bool = False) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    code = commands.all_folds(config, overrides, new, False, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return code, text


def run_of(config: Path) -> RunDirectory:
    (path,) = (config.parent / "results").glob("tiny-*/run.json")
    return RunDirectory(path.parent)


def test_a_failed_trial_makes_the_run_incomplete_and_no_mean_is_printed(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "RayExecutor", Inline)
    monkeypatch.setattr(Inline, "broken", ("unfrozen/fold-2/seed-0",))
    code, text = all_folds(config)
    assert code == 1
    record = run_of(config).read_run()
    assert record.status == "INCOMPLETE"
    assert [n for n, s in record.trials.items() if s.status != "DONE"] == ["unfrozen/fold-2/seed-0"]
    assert record.trials["unfrozen/fold-2/seed-0"].error == "the loss went away"
    assert "unfrozen/fold-2/seed-0  permanent: the loss went away; given up" in text
    comparison = run_of(config).comparison.read_text()
    assert "unfrozen/fold-2/seed-0" in comparison
    assert "±" not in comparison + text

    monkeypatch.setattr(Inline, "broken", ())
    code, text = all_folds(config)
    assert code == 0
    assert "6 trials, 5 done, 1 to train: unfrozen/fold-2/seed-0" in text
    assert run_of(config).read_run().status == "COMPLETE"
    assert "±" in run_of(config).comparison.read_text()


def test_a_bug_in_a_trial_leaves_its_traceback_in_the_trials_folder(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "RayExecutor", Inline)
    monkeypatch.setattr(Inline, "broken", ("frozen/fold-1/seed-0",))
    monkeypatch.setattr(Inline, "failure", Failure("bug", "KeyError: 'x'", "Traceback ..."))
    assert all_folds(config)[0] == 1
    assert (run_of(config).trial("frozen", 1, 0).path / "error.txt").read_text() == "Traceback ..."


def test_a_ladder_runs_and_shows_what_each_step_buys(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "RayExecutor", Inline)
    steps = "{frozen: {}, lora: {model: {freeze_speech_encoder: false, lora: {rank: 2}}, train: {lora_lr: 1e-2}}, "
    steps += "full: {model: {freeze_speech_encoder: false}, train: {layer_lr_decay: 0.5}}}"
    code, text = all_folds(config, f"conditions={steps}")
    assert code == 0
    summary = read_report(run_of(config)).summary
    head = summary.costs["frozen"].parameters
    # Two layers, four projections, `A` and `B` of rank 2 between 16 and 16 values.
    assert (summary.costs["lora"].parameters - head, summary.costs["lora"].adapters) == (512, 512)
    assert summary.costs["full"].parameters > summary.costs["lora"].parameters
    assert summary.costs["frozen"].hours > 0
    assert "What each step buys" in text
    checks = run_of(config).comparison.read_text()
    assert "adapters (LoRA) changed by" in checks


def test_every_fold_gets_a_linear_probe_once_in_the_rows_of_the_comparison(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "RayExecutor", Inline)
    code, text = all_folds(config)
    assert code == 0
    for fold in (1, 2, 3):
        assert f"linear_probe/fold-{fold}  done: test CCC-V" in text
    directory = run_of(config)
    run, results = directory.read_run(), directory.results(directory.read_run())
    assert not any("linear_probe" in name for name in run.trials)
    data = out_of_fold(directory, run, results, read_tables(directory, results))
    probe = read_probe(directory, run, data)
    assert probe.reason is None
    assert probe.predicted is not None
    for fold, result in probe.results.items():
        rows = (data.about["fold"] == fold).to_numpy()
        for k, dimension in enumerate(run.dimensions):
            assert ccc(probe.predicted[rows, k], data.truth[rows, k]) == pytest.approx(result.test_ccc[dimension])
    assert "linear_probe" not in all_folds(config)[1]


def test_a_linear_probe_that_fails_costs_its_row_but_not_the_run(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "RayExecutor", Inline)
    monkeypatch.setattr(Inline, "broken", ("linear_probe/fold-2",))
    code, text = all_folds(config)
    assert code == 0
    assert "linear_probe/fold-2  permanent: the loss went away; no trial depends on it" in text
    directory = run_of(config)
    assert directory.read_run().status == "COMPLETE"
    assert "±" in directory.comparison.read_text()
    results = directory.results(directory.read_run())
    data = out_of_fold(directory, directory.read_run(), results, read_tables(directory, results))
    probe = read_probe(directory, directory.read_run(), data)
    assert (probe.predicted, probe.results, probe.reason) == (None, {}, "linear_probe/fold-2: the loss went away")

    monkeypatch.setattr(Inline, "broken", ())
    code, text = all_folds(config)
    assert code == 0
    assert [line.split()[1] for line in text.splitlines() if "done: test" in line] == ["linear_probe/fold-2"]
    assert read_probe(directory, directory.read_run(), data).reason is None


def test_one_fold_fits_the_linear_probe_of_that_fold(config: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    commands.one_fold(config, [], 2, "frozen", None, False, console)
    assert [path.name for path in (run_of(config).path / "linear_probe").iterdir()] == ["fold-2"]


def test_a_cluster_that_is_too_small_is_refused_before_anything_is_trained(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ClusterError("a trial needs 1 GPU")

    monkeypatch.setattr(ray_executor, "RayExecutor", refuse)
    with pytest.raises(ClusterError):
        all_folds(config)
    assert not list((config.parent / "results").glob("*"))


def test_new_begins_another_run_and_without_it_the_newest_is_continued(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "RayExecutor", Inline)
    for new in (False, True):
        assert all_folds(config, new=new)[0] == 0
    runs = sorted(p.parent.name for p in (config.parent / "results").glob("tiny-*/run.json"))
    assert len(runs) == 2
    assert runs[1] == f"{runs[0]}-2"
    assert "nothing to train" in all_folds(config)[1]


def test_another_setting_is_another_run(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "RayExecutor", Inline)
    all_folds(config)
    assert "6 trials, 0 done, 6 to train: 3 of unfrozen, 3 of frozen" in all_folds(config, "train.lr=2e-3")[1]


def test_a_run_that_is_in_use_is_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "RayExecutor", Inline)
    experiment = prepare(config, [])
    console = Console(file=io.StringIO())
    with (
        open_run(experiment, False, True, console),
        pytest.raises(ResultsError, match="another process is working on this run"),
    ):
        all_folds(config)


def test_fold_commands_share_a_run_unless_they_train_the_same_fold(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "RayExecutor", Inline)
    experiment, console = prepare(config, []), Console(file=io.StringIO())
    with open_run(experiment, False, True, console, only=lambda trial: trial.fold.number == 1) as run:
        run.store.begin()
        assert commands.one_fold(config, [], 2, "frozen", None, True, console) == 0
        # The other command has not ended the run while this one works on it, nor touched its trials.
        record = run_of(config).read_run()
        assert record.status == "RUNNING"
        assert record.trials["frozen/fold-2/seed-0"].status == "DONE"
        with pytest.raises(ResultsError, match="another process is working on this run"):
            commands.one_fold(config, [], 1, "frozen", None, True, console)
        with pytest.raises(ResultsError, match="another process is working on this run"):
            all_folds(config)
        assert run.store.end(stopped=True) == "STOPPED"
    record = run_of(config).read_run()
    assert record.trials["frozen/fold-2/seed-0"].status == "DONE"
    assert all_folds(config)[0] == 0


def test_a_run_whose_process_was_killed_is_interrupted_and_continues(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "RayExecutor", Inline)
    experiment, console = prepare(config, []), Console(file=io.StringIO())
    name = "frozen/fold-1/seed-0"
    with open_run(experiment, False, True, console) as run:
        run.store.begin()
        run.store.attempt(next(trial for trial in run.trials if trial.name == name), 1)
        directory = run.store.directory
        assert directory.current_run() == directory.read_run()
    # The system has freed the lock, as after a kill, and nobody has written how the run ended.
    current = directory.current_run()
    assert (directory.read_run().status, current.status) == ("RUNNING", "INTERRUPTED")
    assert {name: state.status for name, state in current.trials.items() if state.status != "WAITING"} == {
        name: "INTERRUPTED"
    }
    assert commands.report(directory.path, printed := Console(file=io.StringIO())) == 1
    assert "status   INTERRUPTED: its process was killed" in printed.file.getvalue()  # type: ignore[attr-defined]
    assert "INTERRUPTED" in directory.report.read_text()
    assert "| INTERRUPTED |" in (directory.path.parent / "experiment_comparison.md").read_text()
    assert all_folds(config)[0] == 0
    assert directory.current_run().status == "COMPLETE"


def test_a_results_folder_that_cannot_be_written_is_one_sentence(config: Path) -> None:
    (config.parent / "file").write_text("")
    with pytest.raises(ResultsError, match=r"results\.root: .* cannot be written"):
        all_folds(config, f"results.root={config.parent / 'file' / 'results'}")


def test_a_cache_that_cannot_be_written_is_found_before_a_run_folder_is_made(config: Path) -> None:
    (config.parent / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cluster\.cache_dir: .* cannot be written: .*file: Not a directory"):
        all_folds(config, f"cluster.cache_dir={config.parent / 'file' / 'cache'}")
    assert not (config.parent / "results").exists()


def test_a_report_names_a_damaged_result_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make_run(tmp_path, folds=2, epochs=1)
    result = directory.trial("frozen", 2, 0).result_file
    result.write_text(result.read_text()[:100])
    console = Console(file=io.StringIO(), width=200)
    assert directory.read_run().status == "COMPLETE"
    assert commands.report(directory.path, console) == 1
    assert f"warning: frozen/fold-2/seed-0 counts as missing: {result}" in capsys.readouterr().err


def test_the_resolved_configuration_is_kept_with_the_run(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "RayExecutor", Inline)
    all_folds(config, "train.grad_clip=0.3")
    kept = run_of(config).read_config()
    assert kept == load_config(config, ["train.grad_clip=0.3"])


def test_a_report_is_made_without_torch_ray_or_mlflow(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    script = (
        "import io, sys; from pathlib import Path; from rich.console import Console; "
        "from cvrunner.run import commands; "
        "commands.report(Path(sys.argv[1]), Console(file=io.StringIO())); "
        "print(sorted({'torch', 'transformers', 'ray', 'mlflow'} & set(sys.modules)))"
    )
    made = subprocess.run(
        [sys.executable, "-c", script, str(directory.path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert made.stdout.strip() == "[]"
    assert directory.report.is_file()


def test_floor_and_raters_of_a_manifest_are_in_the_run_and_agree_with_its_files(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "RayExecutor", Inline)
    rows = manifest_rows(config.parent / "corpus", turns=6)
    for i, row in enumerate(rows):
        row |= {"scenario": f"scene {i % 3}", "valence_1": 1 + i % 5, "valence_2": 2 + i % 4, "valence_3": 1 + i % 3}
        del row["valence"]
    write_manifest(config.parent / "corpus" / "manifest.csv", rows)
    assert all_folds(config, "train.epochs=1")[0] == 0
    directory = run_of(config)
    report = read_report(directory)
    floor, table, data = report.run.floor, read_floor(directory), report.out_of_fold
    assert floor is not None
    assert table is not None
    assert data is not None
    assert table["utterance"].tolist() == data.about["utterance"].tolist()
    for name, scores in floor.scores.items():
        for k, dimension in enumerate(("valence", "arousal")):
            pooled = ccc(table[f"{name}:{dimension}"].to_numpy(), data.truth[:, k])
            assert scores[dimension].pooled == pytest.approx(pooled)
    assert floor.panel is not None
    assert floor.panel.raters == pytest.approx(3)
    shown = directory.comparison.read_text()
    for row in ("perfect model, stretched", "second panel of 3.0 raters", "unfrozen / perfect model, stretched"):
        assert f"| {row} |" in shown
    assert "| a constant, controlled for scenario |" in shown
    # The audit shows the same numbers, as text and as JSON, and fits a terminal of 100 columns.
    console = Console(file=io.StringIO(), width=100)
    assert commands.audit(config, (), console) == 0
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{floor.panel.scores['attainable']['valence'].mean:.4f}" in text
    assert max(map(len, text.partition("Split digest")[2].splitlines()[1:])) <= 100
    console = Console(file=io.StringIO(), width=100)
    assert commands.audit(config, (), console, as_json=True) == 0
    found = json.loads(console.file.getvalue())  # type: ignore[attr-defined]
    assert found["raters"] == floor.panel.model_dump(mode="json")


def test_another_order_of_conditions_keeps_the_baseline_and_says_so(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "RayExecutor", Inline)
    assert "the baseline is" not in all_folds(config)[1]
    text = config.read_text()
    assert "conditions" not in text
    conditions = load_config(config).conditions
    turned = {name: conditions[name] for name in reversed(conditions)}
    config.write_text(text + yaml.safe_dump({"conditions": turned}, sort_keys=False))
    code, printed = all_folds(config)
    assert code == 0
    assert "the baseline is frozen, as when this run began; the configuration now names unfrozen first" in printed
    assert "nothing to train" in printed
    assert json.loads(run_of(config).summary_file.read_text())["baseline"] == "frozen"


def test_warnings_about_the_corpus_are_printed_recorded_and_audited(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "RayExecutor", Inline)
    rows = manifest_rows(tmp_path / "own", turns=6)
    for row in rows:
        row["arousal"] = row["valence"]
    (tmp_path / "own" / "audio" / "s1t1.wav").write_bytes((tmp_path / "own" / "audio" / "s1t0.wav").read_bytes())
    table = write_manifest(tmp_path / "own" / "table.csv", rows)
    settings = ["corpus.format=manifest", f"corpus.root={table}", "model.encoder=demo"]
    expected = [
        "recordings in several rows, with different labels: 1 "
        "(first: table.csv line 2: s1t0 and table.csv line 3: s1t1)",
        "conditions with the encoder demo, which knows synthetic speech alone: 2 (frozen, unfrozen)",
    ]
    code, printed = all_folds(config, *settings)
    assert code == 0
    assert [line.removeprefix("warning: ") for line in printed.splitlines() if line.startswith("warning")] == expected
    assert run_of(config).read_run().corpus_warnings == expected
    assert expected[0] in run_of(config).comparison.read_text()
    console = Console(file=io.StringIO(), width=200)
    assert commands.audit(config, settings, console) == 0
    assert all(line in console.file.getvalue() for line in expected)  # type: ignore[attr-defined]
