"""Settings of all tests, the suites they belong to, and the one finished run that they share."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

# Before transformers is imported: no look-ups on a network that may not be there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Before Ray is imported: it listens to this machine alone.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import pytest
from hypothesis import HealthCheck, settings

from cvrunner.records.run_directory import RunDirectory
from tests.end_to_end.programs import FinishedRun, cvrunner, tiny_config

# Machines are shared and slow at times; a slow draw is not a failure.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

SUITES = ("test", "ci", "all")
"""`make test`, `make test-ci` and `make test-all`; a test without the marker `suites` belongs to `test`."""
FUZZ_EXAMPLES = {"test": 25, "ci": 300, "all": 10_000}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--suite", choices=SUITES, default="test", help="run the tests of `make test`, test-ci or test-all"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # A shell starts programs in the background with SIGINT ignored, and so would every program that the tests start be.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    suite = config.getoption("suite")
    settings.register_profile(
        "fuzz", settings.get_profile("shared"), max_examples=FUZZ_EXAMPLES[suite], derandomize=suite == "test"
    )
    # The larger suites look for something new each time; hypothesis reads the option when it is configured after this.
    if config.option.hypothesis_seed is None and suite != "test":
        config.option.hypothesis_seed = str(random.randrange(2**32))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    seed = config.option.hypothesis_seed
    if exitstatus and seed is not None:
        terminalreporter.write_line(f"random examples: repeat them with --hypothesis-seed={seed}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    suite = config.getoption("suite")
    others = []
    for item in items.copy():
        marker = item.get_closest_marker("suites")
        names = marker.args if marker else ("test",)
        assert names, f"{item.nodeid}: suites() without a name"
        assert set(names) <= set(SUITES), f"{item.nodeid}: suites{names}"
        if suite not in names:
            others.append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.fixture
def without_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cluster and no token, not even the user's; what commands for jobs set in the environment is taken back."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        # Set first: pytest does not take back what a test sets after the removal of a variable that did not exist.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> str:
    """Name of the suite that is running."""
    return str(request.config.getoption("suite"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run of all folds that `cvrunner all-folds` trained on a local Ray. Read only."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_config(folder, name="configs/demo.yaml")
    done = cvrunner("all-folds", "--config", config, folder=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (record,) = (folder / "results").glob("demo-*/run.json")
    return FinishedRun(folder, config, RunDirectory(record.parent), done.stdout, done.stderr)
