"""The command line: parses, calls a command, and turns errors into one sentence and an exit code.

0 ok; 1 a trial failed, the run is incomplete, `doctor` found a problem or `predict` could not read a file; 2 usage,
configuration or corpus error; 3 `verify` missed its target; 143 stopped; 130 where Ctrl-C left a job running on a
cluster.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cvrunner import __version__
from cvrunner.errors import CvrunnerError
from cvrunner.files import PERMANENT
from cvrunner.run import completion
from cvrunner.training.faults import NONE, Chaos, parse_chaos

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Does unfreezing the speech encoder help, by how much, and how sure are we?",
)


def _verbose(wanted: bool) -> bool:
    """Logging from INFO on, to standard error; Ray follows it (`ray_executor.py`)."""
    if wanted:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    return wanted


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cvrunner {__version__}")
        raise typer.Exit


ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML configuration.", show_default="configs/demo.yaml")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Override a key, such as train.lr=1e-4.",
        autocompletion=completion.settings,
    ),
]
ChaosOption = Annotated[
    str | None,
    typer.Option(
        "--chaos",
        metavar="KIND=PROBABILITY,...",
        help="Break things on purpose: kill and oom per epoch, tracker per write: kill=0.1,oom=0.05,tracker=0.1.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Where the cluster's dashboard answers.",
        show_default="RAY_ADDRESS if http, RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265",
    ),
]
EncoderFolder = Annotated[
    str | None, typer.Option("--encoder", help="Where the encoder is now.", show_default="where it was in training")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only problems and the result.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also what libraries, Ray and its processes log.", callback=_verbose)
]
RunFolder = Annotated[
    Path, typer.Argument(help="A run's folder, or its name in results.", autocompletion=completion.runs)
]
ModelsOf = Annotated[
    str | None,
    typer.Option(
        "--condition",
        help="Whose models.",
        show_default="the best on validation",
        autocompletion=completion.conditions,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of user errors.")] = False,
) -> None:
    """Options of all commands."""


@app.command("all-folds")
def all_folds(
    config: ConfigFile = None,
    set_: Set = None,
    new: Annotated[bool, typer.Option("--new", help="Begin a new run even where this one is there.")] = False,
    chaos: ChaosOption = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Every condition, fold and seed on Ray, then the comparison. Run again, it repeats nothing."""
    from cvrunner.run import commands

    _end(commands.all_folds(config, set_ or [], new, quiet, _console(), _chaos(chaos)))


@app.command("fold")
def fold(
    fold: Annotated[int, typer.Option("--fold", help="Fold number, from 1.")],
    condition: Annotated[
        str | None,
        typer.Option("--condition", help="One condition; all without it.", autocompletion=completion.conditions),
    ] = None,
    gpu: Annotated[int | None, typer.Option("--gpu", help="Index of the GPU to use.")] = None,
    config: ConfigFile = None,
    set_: Set = None,
    chaos: ChaosOption = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """One fold in this process, without Ray. The same numbers bit for bit."""
    from cvrunner.run import commands

    _end(commands.one_fold(config, set_ or [], fold, condition, gpu, quiet, _console(), _chaos(chaos)))


@app.command("verify")
def verify(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML configuration.", show_default="configs/finetune.yaml")
    ] = None,
    set_: Set = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """One fold before a long run, against the target. Exit code 3 where it is missed."""
    from cvrunner.run import verify as verify_command

    _end(verify_command.verify(config, set_ or [], quiet, _console()))


@app.command("tune")
def tune(
    config: ConfigFile = None,
    set_: Set = None,
    new: Annotated[bool, typer.Option("--new", help="Begin a new sweep even where this one is there.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Search for better settings by the folds' validation parts. With Ray Tune; run again, it continues."""
    from cvrunner.tune import command

    _end(command.tune(config, set_ or [], new, quiet, _console()))


@app.command("audit")
def audit(config: ConfigFile = None, set_: Set = None, as_json: Json = False) -> None:
    """Corpus, labels, folds, leaks and no-audio floor. Trains nothing."""
    from cvrunner.run import commands

    _end(commands.audit(config, set_ or [], _console(), as_json))


@app.command("plan")
def plan(
    config: ConfigFile = None,
    set_: Set = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", help="Plan for so many GPUs.", show_default="those here")
    ] = None,
    as_json: Json = False,
) -> None:
    """Memory, batch size, time and makespan. From real updates of each condition; trains nothing."""
    from cvrunner.plan import command

    _end(command.plan(config, set_ or [], gpus, as_json, _console()))


@app.command("report")
def report(run: RunFolder, as_json: Json = False) -> None:
    """Tables, figures and report.html again. From the files of a run alone."""
    from cvrunner.run import commands

    _end(commands.report(run, _console(), as_json))


@app.command("compare")
def compare(
    first: RunFolder,
    second: Annotated[
        Path, typer.Argument(help="Another run, which is held against the first.", autocompletion=completion.runs)
    ],
    condition: Annotated[
        str | None,
        typer.Option("--condition", help="Condition of the first run.", autocompletion=completion.conditions),
    ] = None,
    with_: Annotated[
        str | None, typer.Option("--with", help="Condition of the second run.", autocompletion=completion.conditions)
    ] = None,
    unpaired: Annotated[bool, typer.Option("--unpaired", help="Scores side by side, without a difference.")] = False,
    as_json: Json = False,
) -> None:
    """Two runs on the same split, paired. Conditions of the same name, or --condition against --with."""
    from cvrunner.run import commands

    _end(commands.compare(first, second, condition, with_, unpaired, as_json, _console()))


@app.command("sync")
def sync(
    run: RunFolder,
    uri: Annotated[
        str | None, typer.Option("--uri", help="MLflow store or server.", show_default="the run's own")
    ] = None,
) -> None:
    """The run in MLflow again, from its files. What is there already stays."""
    from cvrunner.run import commands

    _end(commands.sync(run, uri, _console()))


@app.command("predict")
def predict(
    run: RunFolder,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Audio files, or folders of them.")],
    condition: ModelsOf = None,
    format_: Annotated[Literal["csv", "json"], typer.Option("--format", help="json has each model's own too.")] = "csv",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write.", show_default="standard output")
    ] = None,
    by_window: Annotated[bool, typer.Option("--windows", help="Each window of long files, not their mean.")] = False,
    window_s: Annotated[
        float | None, typer.Option("--window-s", help="Longer files are cut into windows of it.", show_default="15")
    ] = None,
    hop_s: Annotated[
        float | None, typer.Option("--hop-s", help="From one window's start to the next.", show_default="2/3 window")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1.", show_default="the first GPU, else cpu")
    ] = None,
    encoder: EncoderFolder = None,
) -> None:
    """Ratings of audio files by the folds' models. Mean, and sd over the models. Exit code 1 where a file could not be
    read."""
    from cvrunner.inference import command

    as_json = format_ == "json"
    _end(command.predict(run, files, condition, as_json, output, by_window, window_s, hop_s, device, encoder))


@app.command("export")
def export(
    run: RunFolder,
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    condition: ModelsOf = None,
    encoder: EncoderFolder = None,
    log: Annotated[bool, typer.Option("--log", help="Put it into MLflow too, beside the condition's run.")] = False,
) -> None:
    """The folds' models as one MLflow model. With all that it needs, the encoder too."""
    from cvrunner.inference import command

    _end(command.export(run, folder, condition, encoder, log, _console()))


@app.command("submit", context_settings={"allow_interspersed_args": False})
def submit(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- COMMAND [ARGUMENTS]", help="What to run.", show_default="all-folds"),
    ] = None,
    address: Address = None,
    working_dir: Annotated[
        Path, typer.Option("--working-dir", help="Folder to upload, the job's working directory.")
    ] = Path("."),
    runtime_env: Annotated[
        Path | None, typer.Option("--runtime-env", help="Ray's settings.", show_default="jobs/runtime_env.yaml")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not follow the job.")] = False,
    python: Annotated[str, typer.Option("--python", help="The cluster's Python.")] = "python",
) -> None:
    """A command as a job on a Ray cluster, followed to its end. Ends with its exit code. What runs already is only
    followed."""
    from cvrunner.jobs import command

    _end(command.submit(arguments or [], address, working_dir, runtime_env, not no_wait, python, _console()))


@app.command("status")
def status(
    job: Annotated[str | None, typer.Argument(help="One job.", show_default="all of cvrunner's")] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """The jobs on a cluster and how they stand. Since when, and where their results are."""
    from cvrunner.jobs import command

    _end(command.status(job, address, as_json, _console()))


@app.command("logs")
def logs(
    job: Annotated[str, typer.Argument(help="Its id, as `status` shows it.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="To the job's end; then its exit code.")] = False,
    address: Address = None,
) -> None:
    """What a job has printed."""
    from cvrunner.jobs import command

    _end(command.logs(job, address, follow, _console()))


@app.command("stop")
def stop(job: Annotated[str, typer.Argument(help="Its id, as `status` shows it.")], address: Address = None) -> None:
    """Have a job save and end, and wait for it."""
    from cvrunner.jobs import command

    _end(command.stop(job, address, _console()))


@app.command("doctor")
def doctor(
    config: ConfigFile = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """What is wrong with this machine, and what to type. Versions, Ray, tokens, ports, GPUs, stores, disk. Exit code 1
    with problems."""
    from cvrunner.doctor import command

    _end(command.doctor(config, set_ or [], as_json, _console()))


@app.command("demo-data")
def demo_data(
    root: Annotated[Path, typer.Argument(help="Folder to write.")] = Path("demo-corpus"),
    seed: Annotated[int, typer.Option(help="Seed of the corpus.")] = 0,
    utterances: Annotated[
        int | None,
        typer.Option(help="Number of utterances.", min=40, max=5000, show_default="corpus.demo.utterances"),
    ] = None,
) -> None:
    """The synthetic corpus, as a folder in IEMOCAP's layout."""
    from cvrunner.setup import command

    _end(command.demo_data(root, seed, utterances, _console()))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    arguments = _debug_first(sys.argv[1:] if arguments is None else arguments)
    debug = arguments[:1] == ["--debug"]
    try:
        app(arguments, prog_name="cvrunner")
    except CvrunnerError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if debug or error.errno not in PERMANENT:
            raise
        typer.echo(f"error: {error.filename or 'writing'}: {error.strerror}; nothing is lost, go on later", err=True)
        sys.exit(1)


def _debug_first(arguments: list[str]) -> list[str]:
    """`--debug` before the command, also where it was typed behind it; what `submit` passes on stays as it is."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--debug" not in own:
        return arguments
    return ["--debug", *(one for one in own if one != "--debug"), *arguments[len(own) :]]


def _chaos(text: str | None) -> Chaos:
    return NONE if text is None else parse_chaos(text)


def _console() -> Any:
    from rich.console import Console

    console = Console()
    # Where no one is watching, lines are as long as they are.
    return console if console.is_terminal else Console(width=200, soft_wrap=True)


def _end(code: int) -> None:
    if code:
        raise typer.Exit(code)
