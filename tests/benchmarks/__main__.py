"""How fast cvrunner is, against what people use now and against the limit: `python -m tests.benchmarks [NAME...]`.

Prints a markdown table. Without names, everything: hours on two cores; with `--quick`, small sizes and minutes. Nothing
else should run on the machine meanwhile. Accuracy of the intervals and worth of the demo's encoder are separate:
`python -m tests.benchmarks.coverage`, `python -m tests.benchmarks.demo_encoder`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

# Before transformers is imported: no look-ups on a network that may not be there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.benchmarks import makespan, memory, overhead, speed
from tests.benchmarks.table import Options, Row, markdown

MEASUREMENTS: dict[str, Callable[[Options], list[Row]]] = {
    "makespan": makespan.makespan,
    "start": overhead.start,
    "accumulation": memory.accumulation,
    "memory": memory.corpus_size,
    "linear-probe": memory.linear_probe,
    "overhead": overhead.all_folds,
    "unfrozen-demo": partial(speed.unfrozen_epoch, encoder="demo"),
    "unfrozen-base": partial(speed.unfrozen_epoch, encoder="base"),
    "unfrozen-emotale": partial(speed.unfrozen_epoch, encoder="whisper"),
    "frozen-demo": speed.frozen_demo,
    "frozen-base": partial(speed.frozen_extrapolated, encoder="base"),
    "frozen-emotale": partial(speed.frozen_extrapolated, encoder="whisper"),
}
ON_EMOTALE = {"unfrozen-emotale", "frozen-emotale"}
"""Measured on files that do not come with cvrunner."""
ROUNDS = {"unfrozen-base": 3, "unfrozen-emotale": 2, "makespan": 1} | dict.fromkeys(
    ("frozen-demo", "frozen-base", "frozen-emotale"), 1
)
"""Where a round takes long, or where chance is the computer's own; 5 elsewhere, 1 when quick."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="names: " + ", ".join(MEASUREMENTS),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to measure (default: everything)")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round")
    parser.add_argument("--rounds", type=int, help="how often each rival is measured")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores in use (default: all)")
    parser.add_argument("--folder", type=Path, help="where corpora, encoders and caches are made (default: a new one)")
    help_of_clock = "unfrozen epochs: count seconds of CPU, for a machine with other work; only with --threads 1"
    parser.add_argument("--cpu-clock", action="store_true", help=help_of_clock)
    parser.add_argument("--emotale", type=Path, metavar="MANIFEST", help="EmoTale's, as docs/emotale.md makes it")
    parser.add_argument("--whisper", type=Path, metavar="FOLDER", help="Whisper tiny, as `cvrunner encoder` writes it")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and so end what was started
    if unknown := sorted(set(arguments.names) - set(MEASUREMENTS)):
        parser.error(f"unknown: {', '.join(unknown)}; choose of {', '.join(MEASUREMENTS)}")
    if arguments.cpu_clock and arguments.threads > 1:
        parser.error("--cpu-clock adds up the seconds of all threads, which wait for each other; add --threads 1")
    names = arguments.names or list(MEASUREMENTS)
    needed = {"--emotale": arguments.emotale, "--whisper": arguments.whisper}
    if absent := [option for option, path in needed.items() if path is None or not path.exists()]:
        sentence = f"{' and '.join(sorted(ON_EMOTALE))} need {' and '.join(absent)} with a path that exists"
        if ON_EMOTALE & set(arguments.names):
            parser.error(sentence)
        names = [name for name in names if name not in ON_EMOTALE]
        if not arguments.names:
            print(f"skipped: {sentence}", file=sys.stderr)
    given = {option.strip("-"): str(path.absolute()) for option, path in needed.items() if not absent}
    with tempfile.TemporaryDirectory(prefix="cvrunner-bench-") as new:
        folder = (arguments.folder or Path(new)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for name in names:
            rounds = arguments.rounds or (1 if arguments.quick else ROUNDS.get(name, 5))
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            options = Options(arguments.quick, rounds, arguments.threads, folder, arguments.cpu_clock, **given)
            measured = MEASUREMENTS[name](options)
            print(markdown(measured), file=sys.stderr, flush=True)
            rows += measured
    print(f"`{shlex.join(['python', '-m', 'tests.benchmarks', *sys.argv[1:]])}`")
    print(f"{arguments.threads} of {os.cpu_count()} cores, {', '.join(f'{n} {version(n)}' for n in PACKAGES)}\n")
    print(markdown(rows))


PACKAGES = ("torch", "transformers", "accelerate", "ray")

if __name__ == "__main__":
    main()
