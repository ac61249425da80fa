"""The doctor: each check against facts of a sound machine and of damaged ones; looking at this machine itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cvrunner.config.schema import Config, validate
from cvrunner.doctor import access, checks
from cvrunner.doctor.command import diagnose, exit_code, findings_as_text
from cvrunner.doctor.facts import (
    Encoder,
    Facts,
    Finding,
    Packages,
    Store,
    find_encoder_facts,
    find_packages,
    find_store,
)
from cvrunner.orchestration import machine, ray_cluster
from cvrunner.orchestration.machine import Cluster, Driver, Hardware, Listener, Token
from tests.encoders.hub_server import hub_with
from tests.end_to_end.programs import REPOSITORY, command, cvrunner, tiny_config
from tests.tiny_encoders import save_encoder

GIB = 2**30
GCS = Listener("127.0.0.1", 6379, 41, "gcs_server", "Ray")
DASHBOARD = Listener("127.0.0.1", 8265, 42, "dashboard", "Ray")
MLFLOW = Listener("127.0.0.1", 5000, 43, "mlflow", "MLflow")
TOKEN = Token("token", False, Path("/home/anna/.ray/auth_token"), 0o600, False)
HERE = Cluster("http://127.0.0.1:8265", False, None, 1, 2.0, 16.0)
LARGE = Encoder("wavlm", None, False, weights_bytes=1_261_000_000, width=1024, hidden_states=25, conv_channels=512)
STORES = (
    Store("results.root", Path("/data/results"), None, 7, 900 * GIB),
    Store("cluster.cache_dir", Path("/home/anna/.cache/cvrunner"), None, 8, 300 * GIB),
)
SOUND = Facts(
    config=validate({"corpus": {"format": "iemocap", "root": "/data/IEMOCAP"}}, "test"),
    packages=Packages(
        {"python": "3.11.7", "torch": "2.13.0+cu130", "transformers": "5.24.0", "ray": "2.60.0", "mlflow": "3.17.2"},
        {"python": ">=3.11", "torch": ">=2.7", "transformers": ">=5.20", "ray": ">=2.55", "mlflow": "<4,>=3.15"},
        {"torch": "2.13.0", "ray": "2.60.0"},
        "13.0",
    ),
    token=TOKEN,
    listeners=(GCS, DASHBOARD, MLFLOW, Listener("0.0.0.0", 22, None, "another program", None)),
    cluster=HERE,
    hardware=Hardware("node7", 16, 100 * GIB, ("RTX 4090", "RTX 4090"), 32 * GIB, "/tmp", 0.4, 107),
    encoder=LARGE,
    corpus_exists=True,
    speech_synthesis=True,
    stores=STORES,
    tracking_answers=None,
)


def change(part: str = "", **values: Any) -> Facts:
    """The sound machine with some facts, or some facts of one part, changed."""
    return replace(SOUND, **({part: replace(getattr(SOUND, part), **values)} if part else values))


def versions(**changed: str | None) -> Facts:
    return change("packages", installed={**SOUND.packages.installed, **changed})


def settings(**sections: Any) -> Facts:
    return change(config=validate({**SOUND.config.model_dump(mode="json"), **sections}, "test"))


def of(facts: Facts, subject: str) -> Finding:
    (finding,) = (one for one in diagnose(facts) if one.subject == subject)
    return finding


def test_a_sound_machine_needs_nothing() -> None:
    findings = diagnose(SOUND)
    assert {finding.level for finding in findings} == {"ok"}
    assert not any(finding.do for finding in findings)
    assert exit_code(findings) == 0
    assert findings_as_text(findings).endswith("\nno problems")


UNREACHABLE = Cluster("10.0.0.5:6379", True, "nobody answers there within 1 s")
OUTSIDE = (replace(GCS, host="::"), replace(DASHBOARD, host="0.0.0.0"))
NO_ROOM = tuple(replace(store, free_bytes=GIB // 2) for store in STORES)
DAMAGED: list[tuple[Facts, str, str, str, str]] = [
    (versions(python="3.10.1"), "python", "problem", "3.10.1, must be >=3.11", "a Python >=3.11"),
    (versions(transformers=None), "transformers", "problem", "not installed", "pip install 'transformers>=5.20'"),
    (versions(mlflow="4.0.0"), "mlflow", "problem", "must be <4,>=3.15", "pip install 'mlflow<4,>=3.15'"),
    (versions(ray="2.51.1"), "ray CVEs", "problem", "CVE-2025-62593", "pip install 'ray>=2.55.0'"),
    (versions(ray="2.54.0"), "ray CVEs", "problem", "CVE-2026-41486", "pip install 'ray>=2.55.0'"),
    (versions(mlflow="3.16.1"), "mlflow CVEs", "problem", "CVE-2026-116692", "pip install 'mlflow>=3.17.0'"),
    (change("token", auth_mode="disabled"), "Ray token", "problem", "CVE-2023-48022", "export RAY_AUTH_MODE=token"),
    (change("token", auth_mode="tokn"), "Ray token", "problem", "'tokn'", "export RAY_AUTH_MODE=token"),
    (change("token", auth_mode=None), "Ray token", "warning", "`ray job submit`", "export RAY_AUTH_MODE=token"),
    (change("token", file_mode=None), "Ray token", "problem", "there is none", "ray get-auth-token --generate"),
    (
        replace(change("token", file_mode=None), cluster=None),
        "Ray token",
        "warning",
        "there is none",
        "ray get-auth-token --generate",
    ),
    (
        change("token", file_mode=None, file_chosen=True),
        "Ray token",
        "problem",
        "no such file",
        "unset RAY_AUTH_TOKEN_PATH",
    ),
    (change("token", file_mode=0o644), "Ray token file", "problem", "mode 644", "chmod 600"),
    (change("token", file_mode=0o640), "Ray token file", "problem", "mode 640", "chmod 600"),
    (change(cluster=UNREACHABLE), "Ray cluster", "problem", "10.0.0.5:6379", "unset RAY_ADDRESS"),
    (
        change("cluster", error="AuthenticationError"),
        "Ray cluster",
        "warning",
        "does not report",
        "RAY_AUTH_MODE=token",
    ),
    (
        change("cluster", address="http://10.0.0.5:8265", chosen=True),
        "Ray cluster",
        "warning",
        "unencrypted",
        "ssh -N -L 8265:127.0.0.1:8265 node7",
    ),
    (
        change(listeners=OUTSIDE),
        "Ray listens",
        "problem",
        "dashboard 0.0.0.0:8265, gcs_server [::]:6379",
        "ray start --head --node-ip-address 127.0.0.1 --dashboard-host 127.0.0.1",
    ),
    (change(listeners=OUTSIDE), "Ray listens", "problem", "beyond", "ssh -N -L 8265:127.0.0.1:8265 node7"),
    (
        replace(change("cluster", nodes=4), listeners=OUTSIDE),
        "Ray listens",
        "warning",
        "as 4 nodes need",
        "network",
    ),
    (change(listeners=(replace(MLFLOW, host="192.0.2.2"),)), "MLflow listens", "problem", "192.0.2.2", "cvrunner ui"),
    (change(listeners=None), "Listening", "warning", "administrator", "lsof"),
    (
        change(listeners=(replace(MLFLOW, program="nginx", service=None),)),
        "Port 5000",
        "warning",
        "taken by nginx (pid 43)",
        "cvrunner ui --port 5001",
    ),
    (
        change(listeners=(replace(DASHBOARD, program="another program", pid=None, service=None),)),
        "Port 8265",
        "warning",
        "of another user",
        "--dashboard-port 8266",
    ),
    (change("packages", torch_cuda=None), "GPUs", "problem", "is a CPU build", "pip install --force-reinstall torch"),
    (
        change("hardware", driver=Driver("550.54.15", "12.4")),
        "GPUs",
        "problem",
        "driver 550.54.15 supports CUDA 12.4 at most, and torch 2.13.0+cu130 is built for CUDA 13.0",
        "update the driver",
    ),
    (
        change("hardware", gpus=(), hidden_gpus=2),
        "GPUs",
        "warning",
        "CUDA_VISIBLE_DEVICES hides all 2: trials run on CPU",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    (change("hardware", hidden_gpus=6), "GPUs", "warning", "2 x RTX 4090; CUDA_VISIBLE_DEVICES hides 6", "to use all"),
    (change("cluster", gpus=8.0), "GPUs", "warning", "Ray counts 8", "--num-gpus 2"),
    (change("cluster", gpus=0.0), "GPUs", "warning", "Ray counts 0", "--num-gpus 2"),
    (change("cluster", gpus=0.0), "Trials at a time", "problem", "the cluster has 0 GPU", "gpus_per_trial=0.5"),
    (
        settings(cluster={"cpus_per_trial": 32}),
        "Trials at a time",
        "problem",
        "takes 1 GPU and 32 CPU",
        "cluster.cpus_per_trial=1",
    ),
    (
        change("hardware", available_bytes=GIB + GIB // 2),
        "Memory",
        "warning",
        "1.6 GB available, about 12 GB needed for 2",
        "cluster.max_concurrent=1",
    ),
    (change("encoder", error="model.encoder x: no such folder"), "Encoder", "problem", "no such", "model.encoder="),
    (change("encoder", on_hub=True), "Encoder", "warning", "downloaded at the first use", "hf download wavlm"),
    (change(corpus_exists=False), "Corpus", "problem", "/data/IEMOCAP: does not exist", "--set corpus.root="),
    (
        replace(settings(corpus={"format": "demo"}), corpus_exists=False, speech_synthesis=False),
        "Corpus",
        "problem",
        "espeakng-loader",
        "pip install espeakng-loader",
    ),
    (
        change(stores=(replace(STORES[0], error="is in Ray's temporary folder"),)),
        "results.root",
        "problem",
        "temporary",
        "--set results.root=/",
    ),
    (change(stores=NO_ROOM[:1]), "Disk", "problem", "537 MB free, up to 31 GB", "--set results.root=/"),
    (change(stores=(replace(STORES[1], free_bytes=9 * GIB),)), "Disk", "warning", "9.7 GB free", "cache_dir=/"),
    (settings(tracking={"uri": "sqlite:///mlflow.db"}), "MLflow store", "problem", "is relative", "sqlite:////"),
    (settings(tracking={"uri": "mlruns"}), "MLflow store", "problem", "no longer writes to folders", "sqlite:////"),
    (
        replace(settings(tracking={"uri": "http://10.0.0.9:5000"}), tracking_answers=True),
        "MLflow store",
        "warning",
        "http://10.0.0.9:5000: runs cross the network unencrypted",
        "ssh -N -L 5000:127.0.0.1:5000 10.0.0.9",
    ),
    (
        replace(settings(tracking={"uri": "http://127.0.0.1:5000"}), tracking_answers=False),
        "MLflow store",
        "warning",
        "does not answer",
        "cvrunner sync RUN",
    ),
    (change("hardware", shm_bytes=64 * 2**20), "Shared memory", "warning", "67 MB free", "--shm-size=2g"),
    (change("hardware", temp="/scratch/" + "a" * 40), "Temporary folder", "problem", "at most 107", "RAY_TMPDIR=/tmp"),
    (change("hardware", temp_used=0.97), "Temporary folder", "warning", "97% full", "RAY_TMPDIR"),
]


@pytest.mark.parametrize(("facts", "subject", "level", "what", "do"), DAMAGED, ids=lambda value: str(value)[:30])
def test_what_is_damaged_is_found_with_what_to_type(facts: Facts, subject: str, level: str, what: str, do: str) -> None:
    finding = of(facts, subject)
    assert finding.level == level
    assert what in finding.what
    assert do in finding.do
    assert exit_code([finding]) == (level == "problem")


SOUND_TOO: list[tuple[Facts, str, str]] = [
    (change("token", in_environment=True, file_mode=None), "Ray token", "in RAY_AUTH_TOKEN"),
    (versions(torch="2.14.1+cu130"), "torch", "2.14.1+cu130 (tested with 2.13.0)"),
    (change(cluster=None), "Ray cluster", "`all-folds` starts Ray on this machine"),
    (change(cluster=None), "Trials at a time", "2 of 10: each takes 1 GPU and 1 CPU, this machine has 2 GPU"),
    (
        replace(change("hardware", gpus=(), cores=4), cluster=None),
        "Trials at a time",
        "4 of 10: each takes 1 GPU and 1 CPU, this machine (GPUs logical) has 4 GPU and 4 CPU",
    ),
    (change("hardware", driver=Driver("580.65.06", "13.2")), "GPUs", "2 x RTX 4090; torch built for CUDA 13.0"),
    (
        change("hardware", limits=("4 of 64 cores", "32.0 of 512.0 GB of memory")),
        "Memory",
        "this container has 4 of 64 cores and 32.0 of 512.0 GB of memory",
    ),
    (change("hardware", gpus=()), "GPUs", "no NVIDIA driver or no GPU; trials run on CPU"),
    (settings(cluster={"gpus_per_trial": 0.3333333333}), "Trials at a time", "6 of 10"),
    (settings(cluster={"gpus_per_trial": 0.5, "max_concurrent": 3}), "Trials at a time", "3 of 10"),
    (change(listeners=(replace(GCS, host="::ffff:127.0.0.1"),)), "Ray listens", "gcs_server 127.0.0.1:6379"),
    (change(listeners=()), "Port 8265", "Ray's dashboard: free"),
    (
        replace(settings(corpus={"format": "demo"}), corpus_exists=False),
        "Corpus",
        "synthesised at the first run",
    ),
    (settings(tracking={"enabled": False, "uri": "mlruns"}), "MLflow store", "tracking is off"),
    (change("hardware", shm_bytes=None), "Shared memory", "no /dev/shm"),
]


@pytest.mark.parametrize(("facts", "subject", "what"), SOUND_TOO, ids=lambda value: str(value)[:30])
def test_what_differs_but_is_sound_is_left_alone(facts: Facts, subject: str, what: str) -> None:
    finding = of(facts, subject)
    assert (finding.level, finding.do) == ("ok", "")
    assert what in finding.what


def test_checkpoints_and_features_are_counted_from_the_encoder_and_the_configuration() -> None:
    # Two trials at a time, three generations while the third is written, each of weights, best epoch's weights and two
    # moments, and averages if there are any.
    assert checks.checkpoint_space(SOUND) == 2 * 3 * 4 * LARGE.weights_bytes
    assert checks.checkpoint_space(settings(train={"ema_decay": 0.99})) == 2 * 3 * 5 * LARGE.weights_bytes
    assert checks.checkpoint_space(settings(conditions={"frozen": {}})) == 0
    conv, hidden = 512 * 50, 25 * 1024 * 12.5
    assert checks.feature_space(SOUND) == 12 * 3600 * (conv + hidden) * 2
    top = settings(conditions={"frozen": {"model": {"layers": [24]}}, "again": {"model": {"layers": [24]}}})
    assert checks.feature_space(top) == 12 * 3600 * (conv + 1024 * 12.5) * 2


def test_stores_on_one_disk_share_its_space() -> None:
    together = tuple(replace(store, disk=7, free_bytes=32 * GIB) for store in STORES)
    finding = of(change(stores=together), "Disk")
    assert finding.level == "warning"
    assert finding.what.startswith("results.root, cluster.cache_dir: 34 GB free")


def test_the_report_has_a_line_a_finding_and_what_to_type_below() -> None:
    findings = diagnose(replace(change("token", file_mode=0o644), listeners=None))
    lines = findings_as_text(findings).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("problem  Ray token file"))
    assert lines[at + 1].strip() == "-> chmod 600 /home/anna/.ray/auth_token"
    assert lines[-1] == "1 problem, 1 warning"


@pytest.mark.parametrize(
    ("line", "port", "program", "service"),
    [
        ("/v/site-packages/ray/core/src/ray/gcs/gcs_server --gcs_server_port=6379", 6379, "gcs_server", "Ray"),
        ("/v/site-packages/ray/core/src/ray/raylet/raylet --x", 35063, "raylet", "Ray"),
        ("python /v/ray/dashboard/dashboard.py --host=127.0.0.1 --port=8265", 8265, "dashboard", "Ray"),
        ("python /v/ray/dashboard/dashboard.py --host=127.0.0.1 --port=8265", 44227, "dashboard metrics", "Ray"),
        ("python -u /v/ray/autoscaler/_private/monitor.py --logs", 44217, "monitor", "Ray"),
        ("/v/bin/python -m ray.util.client.server --address=1.2.3.4:6379", 10001, "util.client.server", "Ray"),
        ("ray::DashboardAgent", 52365, "DashboardAgent", "Ray"),
        ("/v/bin/python /v/bin/mlflow ui --port 5000", 5000, "mlflow", "MLflow"),
        ("python -m mlflow server", 5000, "mlflow", "MLflow"),
        ("python -m uvicorn --port 5000 mlflow.server.fastapi_app:app", 5000, "mlflow", "MLflow"),
        ("python /home/ray/notes.py", 8000, "python", None),
        ("python -m pytest tests/test_mlflow.py server", 8000, "python", None),
    ],
)
def test_programs_are_known_by_their_command_line(line: str, port: int, program: str, service: str | None) -> None:
    assert machine.recognise("python", line.split(" "), port) == (program, service)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.0.1.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("localhost", True),
        ("0.0.0.0", False), ("::", False), ("192.168.1.4", False), ("::ffff:10.0.0.1", False), ("node7", False),
    ],
)  # fmt: skip
def test_loopback_is_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert access.is_loopback(host) is expected


# --- looking at this machine ------------------------------------------------------------------------------------------


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield one


def test_facts_can_be_collected_here_without_heavy_imports_and_nothing_is_left(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from cvrunner.config.schema import Config; "
        "from cvrunner.doctor.facts import collect_facts; "
        "from cvrunner.doctor.command import diagnose; "
        "findings = diagnose(collect_facts(Config())); assert len(findings) > 20; "
        "print(sorted({'torch', 'transformers', 'ray', 'mlflow', 'pandas'} & set(sys.modules)))"
    )
    before = sorted(tmp_path.rglob("*"))
    env = {**os.environ, "HOME": str(tmp_path), "RAY_ADDRESS": "local", "PYTHONPATH": str(REPOSITORY)}
    looked = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (looked.stdout.strip(), looked.returncode) == ("[]", 0), looked.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_versions_and_ranges_come_from_the_packages_metadata() -> None:
    packages = find_packages()
    assert packages.installed["python"] == ".".join(map(str, sys.version_info[:3]))
    assert packages.required["ray"].startswith(">=")
    assert packages.tested["ray"] == packages.installed["ray"]


def test_a_listening_program_is_seen_with_its_address_and_pid(listening: socket.socket) -> None:
    host, port = listening.getsockname()
    found = [one for one in machine.find_listeners() or () if one.port == port]
    assert [(one.host, one.pid, one.service) for one in found] == [(host, os.getpid(), None)]


def test_the_token_is_looked_for_where_ray_does_and_never_read(tmp_path: Path) -> None:
    file = tmp_path / ".ray" / "auth_token"
    assert machine.find_token({}, tmp_path) == Token(None, False, file, None, False)
    file.parent.mkdir()
    file.write_text("secret")
    file.chmod(0o640)
    assert machine.find_token({"RAY_AUTH_MODE": "token"}, tmp_path) == Token("token", False, file, 0o640, False)
    other = machine.find_token({"RAY_AUTH_TOKEN_PATH": "/nowhere/token", "RAY_AUTH_TOKEN": "secret"}, tmp_path)
    assert other == Token(None, True, Path("/nowhere/token"), None, True)
    assert "secret" not in repr(other)


def test_an_address_without_a_cluster_costs_seconds(listening: socket.socket) -> None:
    assert machine.find_cluster({}, ()) is None
    assert machine.find_cluster({"RAY_ADDRESS": "local"}, (DASHBOARD,)) is None
    nobody = machine.find_cluster({"RAY_ADDRESS": "127.0.0.1:1"}, ())
    assert nobody is not None
    assert "nobody answers" in str(nobody.error)
    silent = f"http://127.0.0.1:{listening.getsockname()[1]}"
    nodes, error = machine.ask_nodes(silent, 2.0)
    assert nodes == []
    assert "no answer within 2 s" in str(error)


def test_the_size_of_a_cluster_is_that_of_its_live_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.util import state

    node = SimpleNamespace(resources_total={"GPU": 8.0, "CPU": 64.0})
    monkeypatch.setattr(state, "list_nodes", lambda **_: [node, SimpleNamespace(resources_total=None)])
    assert ray_cluster.read_nodes("here", 5.0) == ([{"GPU": 8.0, "CPU": 64.0}, {}], None)

    def refuse(**_: object) -> None:
        raise PermissionError("wrong token\nand more")

    monkeypatch.setattr(state, "list_nodes", refuse)
    assert ray_cluster.read_nodes("here", 5.0) == ([], "PermissionError: wrong token")


def test_a_store_is_tried_without_leaving_anything(tmp_path: Path) -> None:
    good = find_store("results.root", str(tmp_path / "new" / "results"))
    assert good.error is None
    assert good.free_bytes > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for bad in ("file", "file/results"):
        assert find_store("results.root", str(tmp_path / bad)).error
    session = tmp_path / "session_2026-11-25_00-00-00_000000_4711" / "results"
    assert "Ray's temporary folder" in str(find_store("results.root", str(session)).error)


def test_the_encoder_is_looked_at_without_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(name: str) -> Encoder:
        config: Config = validate({"model": {"encoder": name}}, "test")
        return find_encoder_facts(config.model)

    found = look(str(save_encoder(tmp_path / "wavlm")))
    assert found.error is None
    assert found.weights_bytes > 0
    assert found.hidden_states >= 2
    unknown = look("nobody-has/this-encoder")
    assert not unknown.on_hub
    assert checks.check_encoder(unknown).do == "python -m cvrunner encoder nobody-has/this-encoder FOLDER"
    with hub_with("nobody-has/this-encoder", tmp_path / "wavlm", monkeypatch):
        assert look("nobody-has/this-encoder").on_hub
    assert "model.encoder -/-" in str(look("-/-").error)
    assert "no such folder" in str(look(str(tmp_path / "missing")).error)
    (tmp_path / "wavlm" / "model.safetensors").unlink()
    assert "no model.safetensors" in str(look(str(tmp_path / "wavlm")).error)


def test_the_command_says_what_to_type_and_its_exit_code_counts(tmp_path: Path) -> None:
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("not-for-anybody")
    file.chmod(0o644)
    cluster = {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": "local"}
    found = cvrunner("doctor", folder=tmp_path, **cluster)
    assert found.returncode == 1, found.stderr
    assert "problem  Ray token file" in found.stdout
    assert "-> chmod 600 ~/.ray/auth_token" in found.stdout
    assert "not-for-anybody" not in found.stdout + found.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ray"]

    file.chmod(0o600)
    fixed = cvrunner("doctor", "--json", folder=tmp_path, **cluster)
    by_subject = {finding["subject"]: finding for finding in json.loads(fixed.stdout)}
    assert by_subject["Ray token file"]["level"] == "ok"
    # Somebody else's programs on this machine may be a problem, and then it is said.
    assert fixed.returncode == any(finding["level"] == "problem" for finding in by_subject.values())


@pytest.mark.parametrize(
    ("override", "address", "said"),
    [
        ("cluster.cpus_per_trial=999", "local", "error: Trials at a time: none: a trial takes 1 GPU and 999 CPU"),
        ("train.epochs=1", "127.0.0.1:1", "error: RAY_ADDRESS 127.0.0.1:1: nobody answers"),
    ],
)
def test_a_run_that_cannot_begin_here_leaves_no_folder(tmp_path: Path, override: str, address: str, said: str) -> None:
    config = tiny_config(tmp_path)
    refused = cvrunner("all-folds", "--config", config, "--set", override, folder=tmp_path, RAY_ADDRESS=address)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert refused.stderr.startswith(said)
    assert not list(tmp_path.glob("results/*"))


def test_a_wrong_configuration_is_one_sentence(tmp_path: Path) -> None:
    wrong = cvrunner("doctor", "--set", "train.learning_rate=1", folder=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert "Traceback" not in wrong.stderr


def test_the_command_is_in_the_help() -> None:
    assert "doctor" in subprocess.run(command("--help"), capture_output=True, text=True, check=True).stdout


def test_workers_that_share_the_socket_of_mlflows_server_are_known_by_their_parent() -> None:
    server = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); "
    server += "import time; print(s.getsockname()[1], flush=True); time.sleep(60)"
    # As MLflow 3.17 starts it: the parent's command line names the server, the one that owns the socket does not.
    starter = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {server!r}])"
    line = [sys.executable, "-c", starter, "-m", "mlflow.server", "ui"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        try:
            assert parent.stdout is not None
            port = int(parent.stdout.readline())
            found = [one for one in machine.find_listeners() or () if one.port == port]
            assert {(one.program, one.service) for one in found} == {("mlflow", "MLflow")}
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


def test_proxies_are_mentioned_without_their_passwords() -> None:
    finding = of(change(proxies={"http": "http://me:secret@proxy:3128"}), "Proxy")
    assert finding.level == "ok"
    assert "http proxy:3128; not for requests to this machine" in finding.what
    assert "secret" not in finding.what
