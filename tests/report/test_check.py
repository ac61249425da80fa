"""`report --check`: a sound run passes on any machine; a truncated or altered file is named with the reason."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from cvrunner.errors import ResultsError
from cvrunner.orchestration import ray_executor
from cvrunner.records.results import TrialResult
from cvrunner.records.run_directory import RunDirectory
from cvrunner.report.check import check_run
from cvrunner.report.write import write_report
from cvrunner.run import commands
from cvrunner.verdict.ledger import LEDGER
from tests.blank_figures import blank_figures
from tests.corpora import manifest_rows, write_manifest
from tests.run.test_commands import Inline
from tests.tiny_encoders import save_encoder

pytestmark = pytest.mark.filterwarnings("ignore")
FROZEN, UNFROZEN = "frozen/fold-1/seed-0", "unfrozen/fold-2/seed-0"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of one tiny run. Read only."""
    folder = tmp_path_factory.mktemp("trained")
    save_encoder(folder / "wavlm")
    manifest = write_manifest(folder / "corpus" / "manifest.csv", manifest_rows(folder / "corpus", turns=6))
    config = folder / "tiny.yaml"
    config.write_text(f"""
corpus: {{format: manifest, root: {manifest}, scale: [1, 7]}}
model: {{encoder: {folder / "wavlm"}, width: 16, mamba: {{state_size: 4, head_dim: 8, layers: 1}}}}
train: {{epochs: 1, lr: 1e-3}}
cluster: {{cache_dir: {folder / "cache"}}}
tracking: {{enabled: false}}
results: {{root: {folder / "results"}}}
""")
    with pytest.MonkeyPatch.context() as patch, blank_figures():
        patch.setattr(ray_executor, "RayExecutor", Inline)
        assert commands.all_folds(config, [], False, True, Console(file=io.StringIO())) == 0
    return folder / "results"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunDirectory:
    """A copy of the run with its ledger, in another place."""
    results = shutil.copytree(trained, tmp_path / "results")
    (file,) = results.glob("*/run.json")
    return RunDirectory(file.parent)


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert re.search(old, text)
    path.write_text(re.sub(old, new, text, count=1))


def rewrite(directory: RunDirectory, name: str, **changes: object) -> None:
    file = directory.path / name / "result.json"
    result = TrialResult.from_json(file.read_bytes(), str(file))
    file.write_text(result.model_copy(update=changes).to_json())


def test_a_sound_run_passes_without_its_ledger_and_the_check_writes_nothing(run: RunDirectory) -> None:
    (run.path.parent / LEDGER).unlink()
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    found = check_run(run)
    assert found.problems == ()
    assert found.trials == 6
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_report_that_was_written_again_passes(run: RunDirectory) -> None:
    with blank_figures():
        write_report(run)
    assert check_run(run).problems == ()


def cut(file: str, keep: float = 0.5) -> Callable[[RunDirectory], None]:
    def damage(run: RunDirectory) -> None:
        data = (run.path / file).read_bytes()
        (run.path / file).write_bytes(data[: int(len(data) * keep)])

    return damage


def altered(file: str, old: str, new: str) -> Callable[[RunDirectory], None]:
    return lambda run: replaced(run.path / file, old, new)


def gone(file: str) -> Callable[[RunDirectory], None]:
    return lambda run: (run.path / file).unlink()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut(f"{FROZEN}/predictions.csv"), rf"{FROZEN}/predictions\.csv: .*(truncated|altered)"),
        (gone(f"{FROZEN}/predictions.csv"), rf"{FROZEN}/predictions\.csv: cannot be scored"),
        (cut(f"{FROZEN}/result.json"), rf"{FROZEN}/result\.json: .*truncated or altered"),
        (gone(f"{FROZEN}/result.json"), rf"{FROZEN}/result\.json: cannot be read: No such file"),
        (cut(f"{FROZEN}/journal.jsonl", 0.1), rf"{FROZEN}/journal\.jsonl: epoch 1, the best one, is missing"),
        (altered(f"{FROZEN}/result.json", r'"valence": [-\d.e]+', '"valence": 0.5'), r"result\.json: validation_ccc"),
        (cut("summary.json"), r"summary\.json: is not JSON \(truncated"),
        (
            altered("summary.json", r'"mean": [-\d.e]+', '"mean": 0.5'),
            r"summary\.json: scores\.frozen\..*\.mean is",
        ),
        (altered("comparison.md", r"\| 1 \| 0 \| [-\d.]+", "| 1 | 0 | 0.9999"), r"comparison\.md: line or cell \d+ is"),
        (altered("report.html", r"<td[^>]*>-?0\.\d+</td>", "<td>0.9999</td>"), r"report\.html: .*'0\.9999'"),
        (gone("report.html"), r"report\.html: cannot be read"),
        (gone("split.json"), r"split\.json: cannot be read \(missing"),
        (altered("split.json", r'"s1t0"', '"s1t9"'), r"split\.json: its utterances do not give"),
        (altered("protocol.json", r'"margin": 0.02', '"margin": 0.01'), r"protocol\.json: version 1 does not have"),
        (gone("protocol.json"), r"protocol\.json: is missing; run\.json has"),
        (cut("protocol.json"), r"protocol\.json, config\.yaml: .*not a ProtocolFile"),
        (altered("config.yaml", "margin: 0.02", "margin: 0.5"), r"config\.yaml: verdict\.margin is 0\.5, but protocol"),
        (altered("config.yaml", "lr: 0.001", "lr: 0.002"), r"config\.yaml: train\.lr is 0\.002, but protocol"),
        (
            altered("run.json", r'"looks_before": 0', '"looks_before": 3'),
            r"run\.json: looks_before is 3, but",
        ),
        (altered("run.json", r'"seeds": \[\s*0\s*\]', '"seeds": [1]'), r"run\.json: seeds is \[1\], but protocol"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_was_truncated_or_altered_is_named(
    run: RunDirectory, damage: Callable[[RunDirectory], None], problem: str
) -> None:
    damage(run)
    problems = check_run(run).problems
    assert any(re.search(problem, line) for line in problems), problems


def test_predictions_that_were_altered_together_with_their_hash_give_themselves_away(run: RunDirectory) -> None:
    file = run.path / UNFROZEN / "predictions.csv"
    first, row, *rest = file.read_text().splitlines(keepends=True)
    cells = row.rstrip("\n").split(",")
    cells[-1] = repr(float(cells[-1]) + 1)
    file.write_text("".join([first, ",".join(cells) + "\n", *rest]))
    rewrite(run, UNFROZEN, predictions_sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    problems = "\n".join(check_run(run).problems)
    assert f"{UNFROZEN}/result.json: test_ccc." in problems
    assert f"{UNFROZEN}/predictions.csv: is not the file that the ledger recorded: altered" in problems
    for name in ("summary.json", "comparison.md", "report.html"):
        assert f"{name}: " in problems


def test_a_score_in_a_result_is_never_trusted(run: RunDirectory) -> None:
    file = run.path / UNFROZEN / "result.json"
    result = TrialResult.from_json(file.read_bytes(), str(file))
    # Less than what `report` itself refuses.
    score = (result.test_ccc["arousal"] or 0.0) + 1e-6
    rewrite(run, UNFROZEN, test_ccc=result.test_ccc | {"arousal": score})
    problems = check_run(run).problems
    assert [line.partition(":")[0] for line in problems] == [f"{UNFROZEN}/result.json"]
    assert "test_ccc.arousal is" in problems[0]


def test_the_exit_code_and_the_json_say_what_differs(run: RunDirectory) -> None:
    def checked(as_json: bool) -> tuple[int, str]:
        console = Console(file=io.StringIO(), width=200)
        code = commands.report(run.path, console, as_json, check=True)
        return code, console.file.getvalue()  # type: ignore[attr-defined]

    assert checked(False) == (0, f"{run.name}: every number of 6 trials and of the report agrees with the files\n")
    cut("summary.json")(run)
    code, text = checked(False)
    assert code == 1
    assert f"{run.name}: 1 difference\n  summary.json: is not JSON" in text
    code, text = checked(True)
    assert (code, len(json.loads(text)["problems"])) == (1, 1)


def test_a_folder_without_a_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no run here"):
        check_run(RunDirectory(tmp_path))
