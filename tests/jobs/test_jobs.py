"""Jobs on a cluster without a cluster: ids, exit codes, what is uploaded, the scripts, and the manifests."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config
from rich.console import Console

from cvrunner.config.reading import load_config
from cvrunner.errors import ClusterError, ConfigError, EncoderError, UsageError
from cvrunner.jobs import command as job_commands
from cvrunner.jobs import jobs
from cvrunner.jobs.jobs import Job, LogState, read_log
from cvrunner.orchestration.machine import Listener
from cvrunner.orchestration.resources import capacity

REPOSITORY = Path(__file__).parent.parent.parent
FOLDER = REPOSITORY / "jobs"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])
SETTINGS: dict[str, Any] = yaml.safe_load((FOLDER / "runtime_env.yaml").read_text())
COMMAND = ["all-folds", "--config", "configs/finetune.yaml"]
SECRETS = re.compile(r"token|secret|password|credential|api_?key", re.IGNORECASE)


def job(status: str = "RUNNING", code: int | None = None, **more: Any) -> Job:
    entrypoint = "python -m cvrunner all-folds"
    return Job(**{"id": "x", "entrypoint": entrypoint, "status": status, "process_code": code, **more})


# --- how a job ended --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "expected", "outcome"),
    [
        ("SUCCEEDED", 0, 0, "complete"),
        ("STOPPED", None, 143, "stopped"),
        ("FAILED", 143, 143, "stopped"),
        ("FAILED", -15, 143, "stopped"),
        ("FAILED", 1, 1, "failed, exit code 1"),
        ("FAILED", 2, 2, "failed, exit code 2"),
        ("FAILED", 3, 3, "target missed, exit code 3"),
        ("FAILED", None, 1, "failed, exit code 1"),
        ("FAILED", 127, 1, "failed, exit code 1"),
        ("FAILED", 137, 1, "interrupted, exit code 1"),
        ("FAILED", -9, 1, "interrupted, exit code 1"),
    ],
)
def test_the_exit_code_tells_how_the_run_ended(status: str, code: int | None, expected: int, outcome: str) -> None:
    assert (job(status, code).exit_code, job(status, code).outcome) == (expected, outcome)


def test_jobs_of_cvrunner_are_known_also_without_its_mark() -> None:
    assert job().is_cvrunner
    assert job(marked=True, entrypoint="run.sh").is_cvrunner
    assert not job(entrypoint="python train.py").is_cvrunner
    assert job(entrypoint="/env/bin/python -m cvrunner audit --set a=b").command == "audit --set a=b"


def test_the_results_folder_is_the_last_that_the_log_names() -> None:
    log = "run tiny-1 in /home/me/cvrunner/results/tiny-1\n10 trials\nresults  /home/me/cvrunner/results/tiny-2\n"
    assert jobs.RESULTS.findall(log)[-1] == "/home/me/cvrunner/results/tiny-2"
    assert not jobs.RESULTS.findall("nothing yet")


# --- ids --------------------------------------------------------------------------------------------------------------


def test_an_id_belongs_to_a_command_and_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    for name in ("base.yaml", "configs/demo.yaml"):
        (tmp_path / name).write_text("a: 1")
    words = ["all-folds", "--config", "base.yaml"]
    first = jobs.usual_id(words, tmp_path)
    assert re.fullmatch(r"cvrunner-all-folds-[0-9a-f]{10}", first)
    assert jobs.usual_id(words, tmp_path) == first
    assert jobs.usual_id([*words, "--new"], tmp_path) != first
    (tmp_path / "base.yaml").write_text("a: 2")
    second = jobs.usual_id(words, tmp_path)
    assert second != first
    (tmp_path / "configs" / "demo.yaml").write_text("a: 2")
    assert jobs.usual_id(words, tmp_path) not in (first, second)
    jobs.usual_id(["all-folds", "x" * 5000], tmp_path)


def test_an_id_belongs_to_a_user_the_code_and_the_variables_that_are_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cvrunner" / "data").mkdir(parents=True)
    code = tmp_path / "cvrunner" / "data" / "folds.py"
    code.write_text("a = 1")

    def job_id(home: str = "/home/anna", python: str = "python") -> str:
        return jobs.usual_id(["all-folds"], tmp_path, {"CVRUNNER_HOME": home}, None, python)

    first = job_id()
    assert job_id() == first
    others = [job_id(home="/home/ben"), job_id(python="python3.12")]
    code.write_text("a = 2")
    others.append(job_id())
    monkeypatch.setattr(jobs, "user_name", lambda: "ben")
    others.append(job_id())
    assert len({first, *others}) == 5


@pytest.mark.parametrize(
    "word",
    [
        "tracking.uri=http://me:secret@host:5000",
        "https://secret@host",
        "postgresql://me:secret@host/runs?sslmode=require",
        "https://me:a=secret@host",
    ],
)
def test_a_command_with_a_password_is_refused_without_showing_it(word: str) -> None:
    with pytest.raises(UsageError, match="holds a user name or password") as refused:
        jobs.check_for_secrets(["all-folds", "--set", word])
    assert "secret" not in str(refused.value)
    jobs.check_for_secrets(["all-folds", "--set", "tracking.uri=http://host:5000", "--set", "a=b@c"])


def test_what_runs_is_followed_and_what_has_ended_gets_the_next_number() -> None:
    running, ended = job("PENDING"), job("STOPPED")
    assert jobs.free_id("a", {}) == ("a", None)
    assert jobs.free_id("a", {"a": running}) == ("a", running)
    assert jobs.free_id("a", {"a": ended}) == ("a-2", None)
    assert jobs.free_id("a", {"a": ended, "a-2": running}) == ("a-2", running)
    assert jobs.free_id("a", {"a": ended, "a-2": ended}) == ("a-3", None)


# --- what goes with a job ---------------------------------------------------------------------------------------------


def test_without_a_command_the_main_one_is_run() -> None:
    assert jobs.full_command([]) == ["all-folds"]
    assert jobs.full_command(["--config", "a.yaml"]) == ["all-folds", "--config", "a.yaml"]
    assert jobs.full_command(["audit"]) == ["audit"]


def test_only_named_variables_are_taken_along_and_none_with_a_password() -> None:
    here = {"CVRUNNER_HOME": "/data", "RAY_AUTH_TOKEN": "secret", "HOME": "/home/me", "HF_TOKEN": "secret"}
    taken = jobs.runtime_environment(FOLDER / "runtime_env.yaml", here)["env_vars"]
    assert taken == SETTINGS["env_vars"] | {"CVRUNNER_HOME": "/data"}
    assert not any(SECRETS.search(name) for name in jobs.PASSED_ON)
    with pytest.raises(UsageError, match=r"MLFLOW_TRACKING_URI holds a user name or password"):
        jobs.runtime_environment(FOLDER / "runtime_env.yaml", {"MLFLOW_TRACKING_URI": "http://me:secret@host"})


@pytest.mark.parametrize("text", ["[", "a list", "env_vars: [A]", None])
def test_spoilt_settings_are_refused_with_their_file(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "env.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=r"runtime environment .*env\.yaml: \S+"):
        jobs.runtime_environment(file, {})


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (None, {}, "http://127.0.0.1:8265"),
        ("http://a:1/", {"RAY_ADDRESS": "http://b:1"}, "http://a:1"),
        ("a:1", {}, "http://a:1"),
        (None, {"RAY_ADDRESS": "http://b:1", "RAY_API_SERVER_ADDRESS": "http://c:1"}, "http://b:1"),
        (None, {"RAY_ADDRESS": "127.0.0.1:6379", "RAY_API_SERVER_ADDRESS": "http://c:1"}, "http://c:1"),
        (None, {"RAY_ADDRESS": "auto"}, "http://127.0.0.1:8265"),
    ],
)
def test_the_address_is_found_in_its_order(given: str | None, environment: dict[str, str], expected: str) -> None:
    assert jobs.cluster_address(given, environment) == expected


@pytest.mark.parametrize("given", ["ray://a:10001", "http://", "http://a:x", "http://[a"])
def test_an_address_of_another_kind_is_refused(given: str) -> None:
    with pytest.raises(ClusterError, match="must be where Ray's dashboard answers"):
        jobs.cluster_address(given, {})


def test_a_job_needs_a_folder_to_run_in(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such folder"):
        job_commands.submit([], None, tmp_path / "none", None, False, "python", Console())


# --- the upload -------------------------------------------------------------------------------------------------------


def uploaded(folder: Path, archive: Path) -> list[str]:
    """The files that Ray would upload from `folder`, where no .gitignore is."""
    excludes = [*get_runtime_env_default_excludes(), *SETTINGS["excludes"]]
    create_package(str(folder), archive, include_gitignore=False, excludes=excludes)
    with zipfile.ZipFile(archive) as opened:
        return [name for name in opened.namelist() if not name.endswith("/")]


def test_the_upload_has_the_program_and_is_small(tmp_path: Path) -> None:
    names = uploaded(REPOSITORY, tmp_path / "upload.zip")
    assert (tmp_path / "upload.zip").stat().st_size < 4 * 2**20
    package = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "cvrunner").rglob("*.py")}
    assert package <= set(names)
    assert {"configs/demo.yaml", "configs/finetune.yaml", "cvrunner/demo_encoder/model.safetensors"} <= set(names)
    tops = {name.partition("/")[0] for name in names}
    assert tops.isdisjoint({".git", ".venv", "results", "tests", "docs", "demo-corpus", ".mypy_cache"})


def test_data_audio_and_weights_stay_where_they_are(tmp_path: Path) -> None:
    out = [
        "data/x.csv",
        "results/run/run.json",
        "demo-corpus/a.txt",
        "corpus/a.wav",
        "a.flac",
        "wavlm/model.safetensors",
    ]
    out += [".git/config", ".venv/bin/python", "mlruns/0/meta.yaml", "results/mlflow.db", "deep/__pycache__/a.pyc"]
    kept = ["cvrunner/data/folds.py", "cvrunner/demo_encoder/model.safetensors", "labels/manifest.csv", "own.yaml"]
    for name in (*out, *kept):
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_text("x")
    assert sorted(uploaded(tmp_path / "here", tmp_path / "upload.zip")) == sorted(kept)


def test_stopping_leaves_time_to_save_and_nothing_is_secret() -> None:
    assert float(SETTINGS["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) == 60
    assert not [name for name in SETTINGS["env_vars"] if SECRETS.search(name)]


# --- the scripts ------------------------------------------------------------------------------------------------------

RAY = """#!/usr/bin/env bash
# Stands in for Ray: records its calls, and knows the jobs in $JOBS by id and status.
echo "$RAY_ADDRESS ${RAY_AUTH_MODE:-none} $*" >> "$CALLS"
case "$1 $2" in
"job status")
    echo "Job submission server address: $RAY_ADDRESS"
    case $(grep "^$3 " "$JOBS" | cut -d' ' -f2) in
    RUNNING) echo "Status for job '$3': RUNNING" ;;
    SUCCEEDED) echo "Job '$3' succeeded" ;;
    STOPPED) echo "Job '$3' was stopped" ;;
    FAILED) echo "Job '$3' failed"; echo "Status for job: succeeded, was stopped, RUNNING" ;;
    *) exit 1 ;;
    esac ;;
"job logs") sed -i "s/RUNNING/$END/" "$JOBS" ;;
"job submit") echo "$4 $END" >> "$JOBS" ;;
esac
"""


class Stub:
    """jobs/all_folds.sh with a Ray that is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "ray").write_text(RAY)
        (folder / "ray").chmod(0o755)
        (folder / "jobs").touch()

    def run(self, *arguments: str, end: str = "SUCCEEDED", **settings: str) -> tuple[int, list[str]]:
        """Run the script; its exit code and its calls of Ray."""
        (self.folder / "calls").write_text("")
        places = {"CALLS": str(self.folder / "calls"), "JOBS": str(self.folder / "jobs"), "END": end}
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        ran = subprocess.run(
            [FOLDER / "all_folds.sh", *arguments],
            env={"PATH": path, "HOME": str(self.folder), **places, **settings},
            capture_output=True,
            timeout=60,
            check=False,
        )
        return ran.returncode, (self.folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_the_scripts_are_bash_and_can_be_run(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_the_script_submits_under_the_id_that_the_program_uses(tmp_path: Path) -> None:
    code, calls = Stub(tmp_path).run(*COMMAND[1:], "--set", "a=b c")
    job_id = jobs.usual_id([*COMMAND, "--set", "a=b c"], REPOSITORY, {})
    assert code == 0
    (submitted,) = [call for call in calls if " job submit " in call]
    assert f"--submission-id {job_id} " in submitted
    assert "--runtime-env jobs/runtime_env.yaml --working-dir . " in submitted
    assert submitted.endswith("-- python -m cvrunner all-folds --config configs/finetune.yaml --set a=b c")
    assert submitted.startswith("http://127.0.0.1:8265 none ")


def test_the_script_takes_the_same_variables_along_and_refuses_passwords(tmp_path: Path) -> None:
    variables = {"CVRUNNER_HOME": "/data/my home"}
    _, calls = Stub(tmp_path).run(*COMMAND[1:], **variables)
    (submitted,) = [call for call in calls if " job submit " in call]
    assert f"--submission-id {jobs.usual_id(COMMAND, REPOSITORY, variables)} " in submitted
    assert "-- env CVRUNNER_HOME=/data/my home python -m cvrunner all-folds " in submitted
    for arguments, settings in (
        (["--set", "tracking.uri=http://me:secret@host"], {}),
        ([], {"MLFLOW_TRACKING_URI": "http://me:secret@host"}),
    ):
        assert Stub(tmp_path).run(*arguments, **settings) == (2, [])


def test_the_script_follows_what_runs_and_numbers_what_has_ended(tmp_path: Path) -> None:
    stub, job_id = Stub(tmp_path), jobs.usual_id(COMMAND, REPOSITORY, {})
    (tmp_path / "jobs").write_text(f"{job_id} RUNNING\n")
    code, calls = stub.run(*COMMAND[1:], end="FAILED")
    assert code == 1
    assert [call for call in calls if " job logs " in call] == [
        f"http://127.0.0.1:8265 none job logs --follow {job_id}"
    ]
    assert not [call for call in calls if " job submit " in call]
    code, calls = stub.run(*COMMAND[1:], end="STOPPED")
    assert code == 143
    assert [f"--submission-id {job_id}-2 " in call for call in calls if " job submit " in call] == [True]


def test_the_script_sends_the_token_where_there_is_one(tmp_path: Path) -> None:
    stub = Stub(tmp_path)
    assert stub.run(RAY_AUTH_TOKEN="t")[1][0].split()[1] == "token"
    assert stub.run(RAY_AUTH_TOKEN="t", RAY_AUTH_MODE="disabled")[1][0].split()[1] == "disabled"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t")
    assert stub.run(RAY_ADDRESS="http://127.0.0.1:1")[1][0].startswith("http://127.0.0.1:1 token ")


def test_make_job_submits_the_main_command() -> None:
    words = ["make", "-n", "job", "CONFIG=configs/finetune.yaml", "ARGS=--set train.epochs=3"]
    shown = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert "cvrunner submit -- all-folds --config configs/finetune.yaml --set train.epochs=3" in shown


# --- the manifests ----------------------------------------------------------------------------------------------------


def test_the_cluster_file_is_one_for_ray() -> None:
    cluster = yaml.safe_load((FOLDER / "cluster.yaml").read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    validate_config(prepare_config(cluster))
    start = cluster["head_start_ray_commands"][-1]
    for part in ("RAY_AUTH_MODE=token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0", "--num-gpus 8", "activate"):
        assert part in start


@pytest.fixture
def rayjob() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())
    return loaded


def test_the_rayjob_has_the_fields_of_kuberay(rayjob: dict[str, Any]) -> None:
    schema = json.loads((REPOSITORY / "tests" / "rayjob.schema.json").read_text())
    jsonschema.validate(rayjob, schema)
    rayjob["spec"]["rayClusterSpec"]["workerGroupSpec"] = []
    with pytest.raises(jsonschema.ValidationError, match="workerGroupSpec"):
        jsonschema.validate(rayjob, schema)


def test_the_rayjob_runs_the_main_command_with_settings_that_exist(rayjob: dict[str, Any]) -> None:
    words = shlex.split(rayjob["spec"]["entrypoint"])
    assert words[:6] == ["python", "-m", "cvrunner", "all-folds", "--config", "/data/cvrunner/configs/finetune.yaml"]
    overrides = [word for word in words[6:] if word != "--set"]
    config = load_config(REPOSITORY / "configs" / "finetune.yaml", overrides)
    # Without an upload a job runs in the pod's own folder, which is gone with it.
    assert all(
        path.startswith("/data/") for path in (config.results.root, config.cluster.cache_dir, config.corpus.root)
    )
    (worker,) = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = worker["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert capacity({"GPU": limits["nvidia.com/gpu"], "CPU": float(limits["cpu"])}, config.cluster) == 8


def test_the_rayjob_is_of_the_tested_ray_with_a_token_and_the_same_settings(rayjob: dict[str, Any]) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    tested = re.search(r"^ray==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert tested
    assert cluster["rayVersion"] == tested[1]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    assert images == {f"rayproject/ray:{tested[1]}-py311-gpu"}
    assert yaml.safe_load(rayjob["spec"]["runtimeEnvYAML"])["env_vars"] == SETTINGS["env_vars"]


def test_no_manifest_and_no_script_holds_a_secret() -> None:
    for path in (*SCRIPTS, *FOLDER.glob("*.yaml")):
        assert not re.search(r"(token|password|secret)\s*[:=]\s*['\"]?[0-9a-f]{16}", path.read_text(), re.IGNORECASE), (
            path
        )


LOG = """demo (synthetic, 240 utterances)
run demo-1a2b3c4d in /data/results/demo-1a2b3c4d
20 trials, 3 done, 17 to train: 10 of unfrozen, 7 of frozen
12:00:01  unfrozen/fold-1/seed-0  epoch 1/16  validation CCC-Avg 0.2000  5 s  | 1 of 272 epochs, ETA 23 min
12:00:02  unfrozen/fold-1/seed-0  epoch 2/16  validation CCC-Avg 0.3000  5 s  | 2 of 272 epochs, ETA 22 min
12:00:03  unfrozen/fold-2/seed-0  epoch 1/16  validation CCC-Avg 0.5000  5 s  | 3 of 272 epochs, ETA 21 min
12:00:04  frozen/fold-2/seed-0  epoch 1/16  validation CCC-Avg -0.1000  5 s  | 4 of 272 epochs, ETA 20 min
12:00:05  frozen/fold-2/seed-0  done: test CCC-V 0.2  CCC-A 0.4  CCC-Avg 0.3 at epoch 1  | 20 of 272 epochs, ETA 19 min
error: train.lr: must be positive
"""


def test_the_log_of_a_run_gives_its_progress_its_scores_and_why_it_failed() -> None:
    state = read_log(LOG)
    assert state.results == "/data/results/demo-1a2b3c4d"
    assert (state.trials, state.epochs, state.eta) == ("4 of 20", "20 of 272", "19 min")
    assert state.validation_ccc == {"unfrozen": pytest.approx(0.4), "frozen": -0.1}
    assert state.error == "train.lr: must be positive"
    assert read_log("") == LogState()


def test_a_configuration_that_would_be_refused_is_refused_before_anything_is_uploaded(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train: {epochs: 3}\n")
    job_commands.check_configuration(["all-folds", "--config", "mine.yaml", "--set", "train.epochs=4"], tmp_path)
    job_commands.check_configuration(["all-folds", "--config", "/on/the/cluster.yaml"], tmp_path)
    for wrong in (
        ["-c", "other.yaml"],
        ["--config=mine.yaml", "-s", "train.epochs=0"],
        ["-c", "mine.yaml", "--set=x=1"],
    ):
        with pytest.raises(ConfigError):
            job_commands.check_configuration(["all-folds", *wrong], tmp_path)


def test_corpus_and_encoder_are_looked_for_before_uploading_if_the_cluster_is_this_machine(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"corpus: {{format: iemocap, root: {tmp_path / 'corpus'}}}\n")
    command = ["all-folds", "--config", "mine.yaml"]
    job_commands.check_configuration(command, tmp_path, here=False)
    with pytest.raises(ConfigError, match=r"corpus\.root: .*corpus does not exist on this machine"):
        job_commands.check_configuration(command, tmp_path, here=True)
    (tmp_path / "corpus").mkdir()
    job_commands.check_configuration(command, tmp_path, here=True)
    wrong = [*command, "--set", f"model.encoder={tmp_path / 'wavlm'}"]
    job_commands.check_configuration(wrong, tmp_path, here=False)
    with pytest.raises(EncoderError, match="wavlm"):
        job_commands.check_configuration(wrong, tmp_path, here=True)
    with pytest.raises(ConfigError, match="elsewhere"):
        job_commands.check_configuration(["all-folds", "-c", "/elsewhere.yaml"], tmp_path, here=True)


@pytest.mark.parametrize(
    ("address", "pid", "service", "here"),
    [
        ("http://127.0.0.1:8265", 1, "Ray", True),
        ("http://127.0.0.1:8265", None, None, True),
        ("http://127.0.0.1:8265", 1, None, False),  # such as ssh, with a tunnel
        ("http://127.0.0.1:8266", 1, "Ray", False),
        ("http://head:8265", 1, "Ray", False),
    ],
)
def test_a_cluster_is_here_if_its_dashboard_is(address: str, pid: int | None, service: Any, here: bool) -> None:
    assert jobs.is_here(address, [Listener("127.0.0.1", 8265, pid, "x", service)]) is here
