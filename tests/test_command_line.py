"""The command line's manners: help, typos, completion, JSON, colours, quiet and verbose."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.main import get_command

from cvrunner import __version__
from cvrunner.cli import app, main
from cvrunner.config.reading import load_config
from cvrunner.errors import ResultsError
from cvrunner.options import CONDITIONS, complete_runs
from cvrunner.paths import default_config
from cvrunner.run import commands
from cvrunner.run.progress import Progress
from tests.end_to_end.programs import REPOSITORY
from tests.orchestration.test_gauges import epoch
from tests.runs import make_run
from tests.trials import tiny_trials

NAMES = list(get_command(app).commands)  # type: ignore[attr-defined]


def says(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int | str | None, str, str]:
    """Exit code, standard output and standard error of `cvrunner ...` in this process."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    output = capsys.readouterr()
    return ended.value.code, output.out, output.err


def python(script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a new process and capture its output."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(commands.__file__).parent.parent.parent), **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def loads(statement: str) -> list[str]:
    """Slow libraries that a new process has imported after `statement`."""
    slow = "{'torch', 'transformers', 'ray', 'mlflow', 'pandas'}"
    ended = python(f"import sys\n{statement}\nprint('loaded', *{slow} & set(sys.modules))")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split("loaded")[-1].split()


def test_without_arguments_it_shows_its_help_and_the_exit_code_is_that_of_misuse(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = says(capsys)
    assert code == 2
    assert "Usage: cvrunner [OPTIONS] COMMAND" in out + err


def test_the_version_needs_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert says(capsys, "--version") == (0, f"cvrunner {__version__}\n", "")


def test_the_list_of_commands_is_in_the_order_of_their_use_and_no_line_is_cut(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = says(capsys, "--help")
    assert code == 0
    assert "..." not in out[out.index("Commands:") :]
    order = [name for name in NAMES if name in ("all-folds", "report", "compare", "submit", "status", "logs", "stop")]
    assert order == ["all-folds", "report", "compare", "submit", "status", "logs", "stop"]
    assert says(capsys, "-h")[1] == out


@pytest.mark.parametrize("name", NAMES)
def test_every_help_page_is_plain_and_explains_each_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = says(capsys, name, "--help")
    assert code == 0
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    for parameter in get_command(app).commands[name].params:  # type: ignore[attr-defined]
        assert getattr(parameter, "help", None) or parameter.name == "help", parameter.name


def test_the_python_interface_loads_nothing_slow() -> None:
    assert loads("import cvrunner.api, cvrunner.inference.command, cvrunner.run.verify") == []


def test_help_loads_nothing_slow() -> None:
    assert loads("from cvrunner.cli import main\ntry: main(['all-folds', '--help'])\nexcept SystemExit: pass") == []


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["al-folds"], "No such command 'al-folds'. Did you mean 'all-folds'"),
        (["all-folds", "--confg", "x"], "No such option: --confg"),
        (["all-folds", "--confg", "x"], "--config"),
        (["audit", "--set", "train.lrr=1"], "train.lrr: unknown key in override train.lrr=1; did you mean train.lr?"),
        (["fold", "--fold", "1", "--condition", "frozn"], "unknown condition; choose one of frozen, unfrozen"),
        (["audit", "--set", "corpus.dimensions=[valnce]"], "should be 'valence', 'arousal' or 'dominance'"),
    ],
)
def test_a_typo_is_answered_with_what_there_is_and_without_a_traceback(
    arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = says(capsys, *arguments)
    assert code == 2
    assert answer in err
    assert "Traceback" not in out + err


def test_a_run_that_is_not_there_is_answered_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "results", "demo-1a2b3c4d", epochs=1)
    code, _, err = says(capsys, "report", "demo-1a2b")
    assert (code, err) == (2, "error: demo-1a2b: no run here (run.json is missing); did you mean demo-1a2b3c4d?\n")


def test_three_runs_are_refused_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = says(capsys, "compare", "a", "b", "c")
    assert (code, err) == (2, "error: compare: takes two runs, not 3 (a, b, c)\n")


@pytest.mark.parametrize("arguments", [["--debug", "report", "nothing"], ["report", "nothing", "--debug"]])
def test_debug_shows_where_a_users_error_was_raised(arguments: list[str]) -> None:
    with pytest.raises(ResultsError):
        main(arguments)


def test_debug_that_is_passed_on_is_not_ours(capsys: pytest.CaptureFixture[str], without_cluster: None) -> None:
    code, _, err = says(capsys, "submit", "--address", "http://127.0.0.1:9", "--", "report", "nothing", "--debug")
    assert (code, err.count("\n")) == (2, 1)
    assert "Traceback" not in err


# --- completion -------------------------------------------------------------------------------------------------------


def completed(line: str) -> list[str]:
    """What bash would offer after `line`."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    asked = python("from cvrunner.cli import main; main()", _CVRUNNER_COMPLETE="complete_bash", **words)
    assert asked.stderr == ""
    return asked.stdout.split()


def test_the_shell_completes_commands_options_runs_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "results", "demo-1a2b3c4d", epochs=1)
    assert completed("cvrunner all") == ["all-folds"]
    assert "--config" in completed("cvrunner all-folds --c")
    assert completed("cvrunner report de") == ["demo-1a2b3c4d"]
    assert completed("cvrunner all-folds --set train.accumulation_") == ["train.accumulation_steps="]
    assert completed("cvrunner fold --condition un") == ["unfrozen"]


def test_completed_conditions_are_those_of_the_default_configuration() -> None:
    assert tuple(load_config(default_config()).conditions) == CONDITIONS


def test_completing_needs_no_results_and_loads_nothing_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert complete_runs("") == []
    assert loads("from cvrunner import options; options.complete_settings('train.'); options.complete_runs('')") == []


# --- output -----------------------------------------------------------------------------------------------------------


def test_a_report_as_json_is_the_summary(tmp_path: Path) -> None:
    directory = make_run(tmp_path, folds=2, epochs=1, missing=["frozen/fold-1/seed-0"])
    console = Console(file=io.StringIO(), width=60)
    assert commands.report(directory.path, console, as_json=True) == 1
    printed = json.loads(console.file.getvalue())  # type: ignore[attr-defined]
    assert printed == json.loads(directory.summary_file.read_text())
    assert printed["missing"] == ["frozen/fold-1/seed-0"]


def test_an_audit_as_json_has_all_that_its_tables_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert commands.audit(None, ["corpus.demo.utterances=60"], Console(width=60), as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert [fold["fold"] for fold in found["folds"]] == [1, 2, 3, 4, 5]
    assert found["leaks"] == []
    assert {"valence", "arousal", "avg"} <= set(found["floor"]["scenario"]["mean"])


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_no_color_is_respected(no_color: str, coloured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    screen = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=100)
    progress = Progress(tiny_trials(tmp_path), 1, screen)
    next(iter(progress.eta.trials.values())).state = "done"
    screen.print(progress._table())
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert bool(re.search(r"\x1b\[3[0-7]m", text)) is coloured


def test_the_time_left_is_an_upper_bound_until_each_condition_has_a_measured_epoch(tmp_path: Path) -> None:
    trials = tiny_trials(tmp_path, train={"epochs": 4})
    frozen, unfrozen = (next(t for t in trials if t.condition == name) for name in ("frozen", "unfrozen"))
    screen = Console(file=io.StringIO(), width=200)
    progress = Progress([frozen, unfrozen], 1, screen)
    progress.event(unfrozen, epoch(1, 4, seconds=10.0))
    progress.event(frozen, epoch(1, 4, seconds=1.0))
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.partition("| ")[2] for line in lines] == ["1 of 8 epochs, ETA up to 70 s", "2 of 8 epochs, ETA 33 s"]


def test_verbose_lets_libraries_speak() -> None:
    script = (
        "import logging, sys\nfrom cvrunner.run import commands\nfrom cvrunner.cli import main\n"
        "commands.all_folds = lambda *_: logging.getLogger('some.library').info('hello') or 0\nmain(sys.argv[1:])"
    )
    for options, said in ((["-v"], "some.library: hello\n"), ([], ""), (["-q", "-v"], "some.library: hello\n")):
        ended = python(script, "all-folds", *options)
        assert (ended.returncode, ended.stderr) == (0, said)


def test_a_command_goes_on_when_the_reader_of_its_output_has_gone(tmp_path: Path) -> None:
    script = (
        "import sys; from cvrunner import cli; from cvrunner.run import commands\n"
        "def audit(*_):\n"
        "    for line in range(100_000): print(line)\n"
        "    return 2\n"
        "commands.audit = audit; cli.main(['audit'])"
    )
    command = f"'{sys.executable}' -c \"$SCRIPT\" | head -1; exit ${{PIPESTATUS[0]}}"
    env = os.environ | {"SCRIPT": script}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "0\n")
    assert done.stderr == "the reader of standard output is gone; the command goes on\n"


def test_a_deleted_working_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = f"cd '{tmp_path / 'gone'}' && rmdir . ../gone 2>/dev/null; '{sys.executable}' -m cvrunner audit"
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: the working directory was deleted; change to a folder that exists\n"
