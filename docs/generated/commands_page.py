"""The page of every command, generated from the command-line parser."""

from __future__ import annotations

import inspect
from typing import Any

import typer

from cvrunner import errors
from cvrunner.cli import app

TOP = """# Every command

<span class="reference"></span>

`cvrunner` and `python -m cvrunner` are the same. `cvrunner COMMAND --help` prints the same text. This page is generated
from `cvrunner/cli.py`.
"""


def commands_page() -> str:
    """Return the page as Markdown: common options, each command, exit codes."""
    group, context = command_line()
    parts = [TOP, "## Options of all commands\n", _table(group, context)]
    parts += [_command(name, group.get_command(context, name), context) for name in group.list_commands(context)]
    return "\n".join([*parts, _exit_codes()])


def command_line() -> tuple[Any, Any]:
    """Return the group of all commands and a context for it, without running anything."""
    group = typer.main.get_command(app)
    return group, group.make_context("cvrunner", [], resilient_parsing=True)


def _command(name: str, command: Any, above: Any) -> str:
    context = type(above)(command, info_name=name, parent=above)
    usage = command.get_usage(context).removeprefix("Usage: ")
    text = inspect.cleandoc(command.help or "")
    return f"## {name}\n\n```\n{usage}\n```\n\n{text}\n\n{_table(command, context)}"


def _table(command: Any, context: Any) -> str:
    """Return a table of arguments and options with their defaults, without `--help`."""
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    shown = [record for record in records if record and not record[0].endswith("--help")]
    rows = [f"| `{_cell(name)}` | {_cell(text)} |" for name, text in shown]
    return "\n".join(["| argument or option | |", "| --- | --- |", *rows, ""]) if rows else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _exit_codes() -> str:
    """Return the program's own explanation, and a table of all errors with their codes."""
    import cvrunner.cli

    said = inspect.cleandoc(cvrunner.cli.__doc__ or "").partition("\n\n")[2].replace("\n", " ")
    rows = [
        f"| {error.exit_code} | `{name}` | {_cell((error.__doc__ or '').split(chr(10) * 2)[0])} |"
        for name, error in vars(errors).items()
        if inspect.isclass(error) and issubclass(error, errors.CvrunnerError) and error is not errors.CvrunnerError
    ]
    rows.sort(key=lambda row: int(row.split("|")[1]))
    head = ["| code | error | when |", "| --- | --- | --- |"]
    return "\n".join(["## Exit codes\n", f"{said}\n", *head, *rows, ""])
