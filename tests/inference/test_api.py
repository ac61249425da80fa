"""cvrunner from a notebook."""

from __future__ import annotations

import base64
import threading
from html import escape
from pathlib import Path

import pytest
from rich.console import Console

from cvrunner.api import Run, as_settings, load_run, run_all_folds
from cvrunner.config.reading import load_config
from cvrunner.errors import ConfigError, IncompleteRunError, ResultsError, UsageError
from cvrunner.run import commands, session
from tests.corpora import write_noise
from tests.inference.conftest import OVERRIDES
from tests.runs import make_run

pytestmark = pytest.mark.filterwarnings("ignore")
DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "api.md"


def test_the_example_in_the_documents_runs(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    write_noise(home / "recording.wav", seed=1)
    (code,) = [block.partition("```")[0] for block in DOCUMENT.read_text().split("```python\n")[1:]]
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["run"], Run)
    assert names["run"].path == run.path, "trained again"
    assert run.verdict in capsys.readouterr().out


def test_the_tables_have_a_row_for_each_trial_epoch_and_test_utterance(run: Run) -> None:
    assert len(run.trials) == 10
    assert set(run.trials["status"]) == {"DONE"}
    assert len(run.epochs) == 10 * 2
    assert len(run.predictions) == 2 * 60
    results = run.directory.results(run.record)
    by_name = run.trials.set_index(["condition", "fold", "seed"])
    for result in results.values():
        row = by_name.loc[(result.condition, result.fold, result.seed)]
        assert row["test_ccc_valence"] == result.test_ccc["valence"]
        assert row["validation_ccc_avg"] == result.validation_ccc["avg"]
    best = run.epochs[run.epochs["best"]].groupby(["condition", "fold", "seed"])["epoch"].max()
    assert best.to_dict() == by_name["best_epoch"].to_dict()


def test_a_run_is_found_by_its_name_and_what_is_none_is_refused(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    assert load_run(run.path.name).path == run.path
    with pytest.raises(ResultsError, match="no run here"):
        load_run(home / "configs")
    with pytest.raises(UsageError, match=r"frozen/fold-9/seed-0: no trial of this run; it has frozen/fold-1/seed-0"):
        run.model("frozen", fold=9)


def test_an_incomplete_run_has_tables_but_no_verdict(tmp_path: Path) -> None:
    directory = make_run(tmp_path, folds=2, missing=["unfrozen/fold-2/seed-0"])
    found = load_run(directory.path)
    assert found.status == "INCOMPLETE"
    assert found.trials["test_ccc_valence"].isna().sum() == 1
    assert not found.epochs.empty
    with pytest.raises(IncompleteRunError, match="unfrozen/fold-2/seed-0"):
        _ = found.verdict


def test_a_run_whose_trials_failed_raises_and_names_them(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = make_run(tmp_path, missing=["frozen/fold-3/seed-0"])
    monkeypatch.setattr(commands, "run_all_folds", lambda *_: made_up)
    with pytest.raises(IncompleteRunError, match=r"1 of 10 trials: frozen/fold-3/seed-0 \(NonFiniteError: made up\)"):
        run_all_folds(home / "configs" / "demo.yaml", OVERRIDES)


def test_a_wrong_override_is_raised_and_not_printed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"train\.epoch: unknown key in override train\.epoch=5.*did you mean"):
        run_all_folds(home / "configs" / "demo.yaml", {"train.epoch": 5})
    assert capsys.readouterr() == ("", "")


def test_overrides_of_every_kind_arrive(home: Path) -> None:
    given = {
        "train": {"lr": 1e-5, "seeds": [0, 1]},
        "train.early_stopping_patience": None,
        "corpus.resample": True,
        "results.root": home / "a b: c",
    }
    config = load_config(home / "configs" / "demo.yaml", as_settings(given))
    assert (config.train.lr, config.train.seeds, config.train.early_stopping_patience) == (1e-5, (0, 1), None)
    assert config.corpus.resample
    assert config.results.root == str(home / "a b: c")


def test_outside_of_the_main_thread_signals_are_left_alone() -> None:
    seen: list[bool] = []

    def work() -> None:
        with session.stop_on_signals(Console(quiet=True)) as stop:
            seen.append(stop.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert seen == [False]


def test_a_notebook_shows_sentence_table_and_picture_of_a_run(run: Run) -> None:
    assert repr(run) == f"<Run {run.path.name}: COMPLETE, 10 of 10 trials done, synthetic data>"
    html = run._repr_html_()
    assert escape(run.verdict) in html
    for condition in ("frozen", "unfrozen"):
        assert f"<td>{condition}</td>" in html
    picture = base64.b64encode((run.path / "figures" / "differences.png").read_bytes()).decode()
    assert picture in html


def test_a_run_that_cannot_be_summed_up_is_still_shown(tmp_path: Path) -> None:
    incomplete = load_run(make_run(tmp_path, folds=2, missing=["unfrozen/fold-2/seed-0"]).path)
    assert "3 of 4 trials done" in repr(incomplete)
    assert "3 of 4 trials done" in incomplete._repr_html_()
    incomplete.directory.run_file.write_text("{<b>")
    assert "run.json" in repr(incomplete)
    assert "{<b>" not in incomplete._repr_html_()


def test_a_notebook_shows_what_a_model_rates(run: Run) -> None:
    model = run.model("frozen", fold=1)
    assert repr(model) == "<EmotionModel frozen/fold-1/seed-0: valence, arousal on 1 to 5, cpu>"
    html = model._repr_html_()
    assert "frozen/fold-1/seed-0" in html
    assert escape("says nothing about people's") in html
