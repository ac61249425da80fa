"""`ui`: MLflow's page for the store of a run, on this machine only, with the links of the run."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cvrunner import paths
from cvrunner.errors import ResultsError, UsageError
from cvrunner.records.run_directory import RunDirectory
from cvrunner.run.prepare import find_run_directory
from cvrunner.text import line_printer
from cvrunner.tracking.names import UI_ADDRESS
from cvrunner.tracking.tracker import tracking_uri

if TYPE_CHECKING:
    from rich.console import Console

START_LIMIT_S = 120.0
SETTINGS = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def ui(run: Path | None, port: int, console: Console) -> int:
    """Serve the store of a run, or of the newest run in a results folder, until Ctrl-C. Prints the run's links."""
    print_line = line_printer(console)
    directory, store = find_store(run)
    links = directory.read_run().links if directory else {}
    if store.startswith(("http://", "https://")):
        print_line("\n".join([f"{store} serves its own pages", *map("  ".join, links_at(links, store))]))
        return 0
    file = Path(store.removeprefix("sqlite:///"))
    if store.startswith("sqlite:///") and not file.is_file():
        # mlflow would create an empty one and show nothing.
        name = directory.path if directory else "RUN"
        raise ResultsError(f"{file}: no MLflow store here; `cvrunner sync {name}` writes it from the run's files")
    # `kill` must end the server, too, which a signal by itself would leave behind.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt), served(store, port) as (server, address):
        print_line(f"MLflow on {address} for {store}; Ctrl-C ends it")
        if directory:
            print_line("\n".join([f"run {directory.name}", *map("  ".join, links_at(links, address))]))
        server.wait()
    return 0


def find_store(run: Path | None) -> tuple[RunDirectory | None, str]:
    """Return a run and its store. `run`: its folder, its name, or a results folder; None: the results folder.

    A results folder stands for its newest run, or, without runs, for the database in it. Raises ResultsError.
    """
    folder = run or paths.lasting("results", "results.root")
    if not (folder / "run.json").is_file():
        if names := paths.run_names(folder):
            folder /= names[0]
        elif (folder / "mlflow.db").is_file():
            return None, f"sqlite:///{(folder / 'mlflow.db').absolute()}"
        elif run is None:
            rule = "`cvrunner ui RUN` takes the folder of a run or a results folder"
            raise ResultsError(f"{folder}: no runs here; {rule}")
    directory = find_run_directory(folder)
    return directory, tracking_uri(directory.read_config(), directory.path.parent)


def links_at(links: dict[str, str], address: str) -> Iterator[tuple[str, str]]:
    """Yield links with what they show, for a store that is served at `address` instead of the default one."""
    for name, link in links.items():
        yield f"  {link.replace(UI_ADDRESS, address, 1)}", f"({name})"


@contextlib.contextmanager
def served(store: str, port: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start MLflow for a store on 127.0.0.1; yields the process, once it answers, and the address; ends it afterwards.

    Raises UsageError for a port in use, and ResultsError with the last lines of a server that does not start.
    """
    address = f"http://127.0.0.1:{port}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UsageError(f"--port {port}: {error.strerror}; choose another, such as --port {port + 1}") from None
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # In the environment rather than in the arguments, because the address of a database may contain a password. In an
    # own folder, because mlflow creates folders where it is started, and in an own session, which can be ended as one.
    env = os.environ | SETTINGS | {"MLFLOW_BACKEND_STORE_URI": store}
    with tempfile.TemporaryDirectory(prefix="cvrunner-ui-") as folder, (Path(folder) / "log").open("wb+") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)  # noqa: S603 (our own program)
        try:
            end = time.monotonic() + START_LIMIT_S
            while not _answers(f"{address}/health"):
                if process.poll() is not None or time.monotonic() > end:
                    last = Path(log.name).read_text(errors="replace").strip().splitlines()[-5:]
                    raise ResultsError("\n".join([f"MLflow does not start for {store}:", *last]))
                time.sleep(0.2)
            yield process, address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):  # noqa: S310 (our own server)
            return True
    except OSError:
        return False
