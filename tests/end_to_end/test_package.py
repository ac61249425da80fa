"""The wheel, installed outside of the repository: it holds all that a user needs, and nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import pytest

import cvrunner
from tests.end_to_end.programs import REPOSITORY, environment

pytestmark = pytest.mark.end_to_end
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
FAMILIES = {"MIT": "MIT", "BSD": "BSD", "Apache": "Apache", "LGPL": "LGPL", "PSF": "matplotlib"}
"""Word that a package's metadata must contain, by the first letters of the licence in our table."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", str(folder), folder=REPOSITORY)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in a separate folder; its dependencies come from this environment."""
    (wheel,) = built.glob("*.whl")
    target = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(wheel), folder=target)
    return target


def run(*command: str, folder: Path, **settings: str) -> str:
    """Run a program and return its standard output; fail with all its output if it fails."""
    env = {**environment(folder), **settings}
    ended = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_installed_elsewhere_it_runs_the_demo_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    place = {"folder": tmp_path, "PYTHONPATH": str(installed)}
    program = str(installed / "bin" / "cvrunner")
    assert run(program, "--version", **place) == f"cvrunner {cvrunner.__version__}\n"  # type: ignore[arg-type]
    audited = run(program, "audit", "--json", "--set", "corpus.demo.utterances=60", **place)  # type: ignore[arg-type]
    assert json.loads(audited)["leaks"] == []
    script = (
        "from cvrunner import paths; from cvrunner.encoders.files import find_encoder; "
        "print(find_encoder('demo').folder, paths.default_config(), paths.default_runtime_env(), sep='\\n')"
    )
    used = run(sys.executable, "-c", script, **place).splitlines()  # type: ignore[arg-type]
    assert [Path(line).relative_to(installed / "cvrunner").as_posix() for line in used] == [
        "demo_encoder",
        "configs/demo.yaml",
        "jobs/runtime_env.yaml",
    ]
    assert os.listdir(tmp_path) == ["demo-corpus"]


def test_the_wheel_holds_the_program_its_settings_and_notices_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        facts = archive.read(f"cvrunner-{cvrunner.__version__}.dist-info/METADATA").decode()
    info = f"cvrunner-{cvrunner.__version__}.dist-info/"
    assert {name.split("/")[0] for name in names} == {"cvrunner", info.strip("/")}
    assert {
        f"{info}licenses/LICENSE",
        f"{info}licenses/docs/third_party.md",
        "cvrunner/demo_encoder/model.safetensors",
        "cvrunner/jobs/grafana_dashboard.json",
        "cvrunner/report/report.html.j2",
    } <= names
    assert f"\nVersion: {cvrunner.__version__}\n" in facts
    assert "\nLicense-Expression: MIT\n" in facts


def test_the_source_archive_builds_and_holds_no_tests_results_or_audio(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"pyproject.toml", "LICENSE", "configs/demo.yaml", "jobs/runtime_env.yaml", "docs/third_party.md"} <= names
    assert not [name for name in names if re.match(r"(tests|results|demo-corpus)/|.*\.wav$|.*\.db$", name)]


def test_the_version_is_written_once_and_has_its_changes() -> None:
    assert "version" in PROJECT["dynamic"]
    assert "version" not in PROJECT
    assert f"\n## {cvrunner.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()


def used_packages() -> list[str]:
    groups = [
        PROJECT["dependencies"],
        PROJECT["optional-dependencies"]["audformat"],
        PROJECT["optional-dependencies"]["demo"],
        PROJECT["optional-dependencies"]["cuda"],
    ]
    return [re.match(r"[\w-]+", requirement)[0] for group in groups for requirement in group]  # type: ignore[index]


def test_the_notices_name_every_package_that_we_depend_on_with_the_licence_that_it_states() -> None:
    text = (REPOSITORY / "docs" / "third_party.md").read_text()
    rows: dict[str, str] = dict(re.findall(r"^\| ([\w-]+)(?: \(extra `\w+`\))? \| (.+?) \|", text, flags=re.MULTILINE))
    rows.pop("package", None)
    assert list(rows) == used_packages()
    for name, licence in rows.items():
        if stated := licences(name):
            family = next(words for start, words in FAMILIES.items() if licence.startswith(start))
            assert family in stated, f"{name}: {licence}, but its metadata has {stated[:200]}"


def licences(name: str) -> str:
    """What the metadata of an installed package states; empty if it is not installed or states nothing."""
    try:
        facts: Any = metadata(name)
    except PackageNotFoundError:
        return ""
    said = [facts.get("License-Expression"), facts.get("License"), *facts.get_all("Classifier", [])]
    return "\n".join(line for line in said if line and ("::" not in line or line.startswith("License")))
