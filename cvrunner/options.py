"""What the commands share: options, and the modules that run them, imported when first called."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from cvrunner.paths import run_names
from cvrunner.training.faults import Chaos, parse_chaos


class LateModule:
    """A module that is imported when one of its functions is called: `--help` and Tab completion need no command."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, function: str) -> Callable[..., Any]:
        return lambda *arguments: getattr(importlib.import_module(self.name), function)(*arguments)


if TYPE_CHECKING:
    from cvrunner.doctor import command as doctor_command
    from cvrunner.inference import command as inference
    from cvrunner.jobs import command as jobs
    from cvrunner.plan import command as plan_command
    from cvrunner.run import commands as run_commands
    from cvrunner.run import ui as ui_command
    from cvrunner.run import verify as verify_command
    from cvrunner.setup import command as setup
    from cvrunner.tune import command as tune_command
else:
    # To the type checker they are modules, so that it sees the commands' arguments.
    doctor_command, inference, jobs, plan_command, setup, tune_command = (
        LateModule(f"cvrunner.{wing}.command") for wing in ("doctor", "inference", "jobs", "plan", "setup", "tune")
    )
    run_commands, verify_command, ui_command = (
        LateModule(f"cvrunner.run.{name}") for name in ("commands", "verify", "ui")
    )

# Written down: reading a configuration takes longer than a shell waits for Tab.
CONDITIONS = ("frozen", "unfrozen")


def complete_runs(incomplete: str) -> list[str]:
    """Complete names of runs in the results folder; the shell itself adds files and folders."""
    return [name for name in run_names() if name.startswith(incomplete)]


def complete_settings(incomplete: str) -> list[str]:
    """Complete `train.lr=` and every other key that holds a value."""
    # pydantic takes as long to import as everything else that `--help` needs.
    from cvrunner.config.schema import valid_keys

    return [f"{key}=" for key in valid_keys(sections=False) if f"{key}=".startswith(incomplete)]


def complete_conditions(incomplete: str) -> list[str]:
    """Conditions of the shipped configurations."""
    return [name for name in CONDITIONS if name.startswith(incomplete)]


def start_logging(requested: bool) -> bool:
    """Log to standard error from INFO on; Ray's processes follow (`ray_executor.py`)."""
    # A callback, because every command that has the option would begin with this line.
    if requested:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    return requested


ConfigFile = Annotated[
    Path | None, Option("--config", "-c", help="YAML configuration.", show_default="configs/demo.yaml")
]
SET_HELP = "Override a key, such as train.lr=1e-4."
Set = Annotated[
    list[str] | None,
    Option("--set", "-s", metavar="KEY=VALUE", help=SET_HELP, autocompletion=complete_settings),
]
ChaosOption = Annotated[
    Chaos | None,
    Option(
        "--chaos",
        parser=parse_chaos,
        metavar="KIND=PROBABILITY,...",
        help="Inject faults: kill and oom per epoch, tracker per write, such as kill=0.1,oom=0.05,tracker=0.1.",
    ),
]
Address = Annotated[
    str | None,
    Option(
        "--address",
        help="Where the cluster's dashboard answers.",
        show_default="RAY_ADDRESS if http, RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265",
    ),
]
Device = Annotated[str | None, Option("--device", help="cpu, cuda, cuda:1.", show_default="the first GPU, else cpu")]
EncoderFolder = Annotated[
    str | None,
    Option("--encoder", help="Path of the encoder, if it was moved.", show_default="where it was in training"),
]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Only problems and the result.")]
VERBOSE_HELP = "Also print the logs of libraries and of Ray's processes."
Verbose = Annotated[bool, Option("--verbose", "-v", help=VERBOSE_HELP, callback=start_logging)]
RunFolder = Annotated[Path, Argument(help="Folder of a run, or its name in results.", autocompletion=complete_runs)]


def condition_option(text: str, name: str = "--condition", default: str | bool = False) -> Any:
    return Option(name, help=text, autocompletion=complete_conditions, show_default=default)


ModelsOf = Annotated[str | None, condition_option("Condition whose models to use.", default="the best on validation")]
Json = Annotated[bool, Option("--json", help="Print JSON instead of tables.")]


def console() -> Any:
    """Return the console that results are printed on."""
    from rich.console import Console  # takes longer to import than all that `--help` needs

    # In a file or a pipe, lines must not be wrapped at the width of a terminal that nobody sees.
    return terminal if (terminal := Console()).is_terminal else Console(width=200, soft_wrap=True)
