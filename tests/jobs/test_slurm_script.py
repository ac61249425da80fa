"""jobs/all_folds.sbatch with stand-ins for Slurm, Ray and the program: signals, exit codes, and its page in docs/."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cvrunner.config.reading import load_config
from tests.documentation.documents import ROOT, shell_lines, spans, text_of
from tests.end_to_end.programs import wait_until

SCRIPT = ROOT / "jobs" / "all_folds.sbatch"
PAGE = ROOT / "docs" / "slurm.md"
OPTIONS = re.findall(r"^#SBATCH (\S+)$", SCRIPT.read_text(), flags=re.MULTILINE)
SRUN = """
for word; do [[ -z ${head-} ]] || { folder=$word; break; }; [[ $word != ray ]] || head=yes; done
if [[ -n $folder ]]; then
    [[ ! -v NO_RAY ]] || { echo the reason >cvrunner-7-ray.log; exit 1; }
    stat -c %a "$folder" "$folder/token" >>"$CALLS"
    echo "$folder" >>"$CALLS"
    echo 127.0.0.1:1 >"$folder/ray_current_cluster"
fi
"""
"""Stands in for the step: a head is one with a folder."""
PYTHON = """
[[ $1 != -c ]] || exec "$REAL" "$@"
echo "token ${#RAY_AUTH_TOKEN} ${RAY_AUTH_MODE} ${RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER-unset} $RAY_ADDRESS" >>"$CALLS"
trap 'echo saving; exit "$STOPPED"' TERM
echo training
for ((i = 0; i < $LASTS; i++)); do sleep 0.1; done
exit "$CODE"
"""


class Stub:
    """The script in a job that is none. The program ends with CODE after LASTS tenths of a second."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.calls = folder / "calls"
        self.log = folder / "log"
        self.calls.unlink(missing_ok=True)
        for name, body in {"srun": SRUN, "python": PYTHON, "scontrol": ""}.items():
            (folder / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"$CALLS"\n{body}')
            (folder / name).chmod(0o755)
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "one", "SLURM_CPUS_ON_NODE": "2"}
        stand_ins = {"CALLS": str(self.calls), "REAL": sys.executable, "LASTS": "600", "CODE": "0", "STOPPED": "143"}
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [SCRIPT, "--config", "a b.yaml"],
                env={"PATH": path, "RAY_ADDRESS": "elsewhere", **job, **stand_ins, **settings},
                cwd=folder, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def end(self, sent: signal.Signals | None = None) -> tuple[int, str, str]:
        """Send a signal once it trains; return exit code, calls and log. The folder is gone."""
        if sent:
            wait_until(lambda: "training" in self.log.read_text(), "the training")
            self.process.send_signal(sent)
        code, calls = self.process.wait(60), self.calls.read_text()
        for folder in re.findall(r"^/tmp/cvr-\w+$", calls, flags=re.MULTILINE):
            assert not Path(folder).exists()
        return code, calls, self.log.read_text()


def test_a_job_runs_the_main_command_on_a_ray_of_its_own(tmp_path: Path) -> None:
    code, calls, log = Stub(tmp_path, LASTS="1").end()
    assert code == 0, log
    assert "python -m cvrunner all-folds --config a b.yaml\n" in calls
    assert "token 64 token 0 127.0.0.1:1\n" in calls
    assert "\n700\n600\n" in calls
    assert "ray start --block" in calls
    assert "ray stop" not in SCRIPT.read_text()
    assert "scontrol" not in calls


def test_a_ray_of_several_nodes_listens_beyond_loopback_and_has_workers(tmp_path: Path) -> None:
    code, calls, _ = Stub(tmp_path, SLURM_JOB_NUM_NODES="3", LASTS="1").end()
    assert code == 0
    assert "token 64 token unset 127.0.0.1:1\n" in calls
    (worker,) = [line for line in calls.splitlines() if "--exclude=one" in line]
    assert "--nodes=2 --ntasks=2" in worker
    assert "--address 127.0.0.1:1\n" in calls


@pytest.mark.parametrize(
    ("sent", "stopped", "code", "requeued"),
    [
        (signal.SIGUSR1, "143", 143, True),
        (signal.SIGTERM, "143", 143, False),
        (signal.SIGUSR1, "1", 1, False),
        (signal.SIGUSR1, "0", 0, False),
    ],
)
def test_only_a_run_that_saved_for_the_time_limit_is_queued_again(
    tmp_path: Path, sent: signal.Signals, stopped: str, code: int, requeued: bool
) -> None:
    ended, calls, log = Stub(tmp_path, STOPPED=stopped).end(sent)
    assert ended == code, log
    assert "saving" in log
    assert ("scontrol requeue 7\n" in calls) == requeued


def test_a_job_fails_with_the_exit_code_of_its_run_or_if_ray_does_not_start(tmp_path: Path) -> None:
    assert Stub(tmp_path, LASTS="1", CODE="2").end()[0] == 2
    code, calls, log = Stub(tmp_path, NO_RAY="").end()
    assert code == 1
    assert "Ray did not start; the end of cvrunner-7-ray.log:\nthe reason\n" in log
    assert "cvrunner all-folds" not in calls.rpartition("srun")[2]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    found = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_its_page_lists_the_options_of_the_script_and_its_commands_exist() -> None:
    text = text_of(PAGE)
    listed = re.findall(r"^\| `(--[^`]+)` \|", text, flags=re.MULTILINE)
    assert listed == OPTIONS
    names = {option.partition("=")[0] for option in OPTIONS}
    assert {span.partition("=")[0] for span in spans(text) if span.startswith("--")} <= names | {"--exclusive"}
    commands = [shlex.split(line) for line in shell_lines(text)]
    assert len(commands) >= 2
    for program, *words in commands:
        place = words.index("jobs/all_folds.sbatch")
        assert program == "sbatch"
        assert {word.partition("=")[0] for word in words[:place]} <= names | {"--partition"}
        option, config, *overrides = words[place + 1 :]
        assert option == "--config"
        load_config(ROOT / config, [word for word in overrides if word != "--set"])
