"""Whether the run fits: versions, GPUs, cores, memory, encoder, corpus."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.specifiers import SpecifierSet

from cvrunner.config.schema import Config
from cvrunner.doctor.facts import Encoder, Facts, Packages
from cvrunner.doctor.finding import Finding, amount, ok, problem, warning
from cvrunner.orchestration.resources import logical_gpus, trials_that_fit

CHECKED_PACKAGES = ("python", "torch", "transformers", "ray", "mlflow")
TRIAL_BYTES = 2**30
"""A trial's process with its libraries and a small encoder: the demo's trials peak below 0.95 GiB."""
COPIES = 4
"""Of the encoder's weights while it trains: weights, gradient (in memory) or best epoch (on disk), two moments."""
IEMOCAP_SESSIONS = 5


def check_machine(facts: Facts) -> Iterator[Finding]:
    """All of this file, in reading order."""
    yield check_gpus(facts)
    yield check_capacity(facts)
    yield check_memory(facts)
    yield check_encoder(facts.encoder)
    yield check_corpus(facts)


def check_packages(packages: Packages) -> Iterator[Finding]:
    """Installed, and within pyproject.toml's range."""
    for name in CHECKED_PACKAGES:
        installed, wanted = packages.installed.get(name), packages.wanted.get(name, "")
        line = f"pip install '{name}{wanted}'" if name != "python" else f"a Python {wanted}"
        tested = packages.tested.get(name)
        if installed is None:
            yield problem(name, "not installed", line)
        elif not SpecifierSet(wanted).contains(installed, prereleases=True):
            yield problem(name, f"{installed}, must be {wanted}", line)
        else:
            same = tested is None or installed.partition("+")[0] == tested
            yield ok(name, installed + ("" if same else f" (tested with {tested})"))


def check_gpus(facts: Facts) -> Finding:
    """What the driver shows against torch's build and Ray's count."""
    gpus, cluster = facts.hardware.gpus, facts.cluster
    subject = "GPUs"
    if not gpus:
        return ok(subject, "no NVIDIA driver or no GPU; trials run on CPU")
    names = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
    if facts.packages.torch_cuda is None:
        what = f"{names}, but torch {facts.packages.installed.get('torch')} is a CPU build: trials would not use them"
        do = "pip install --force-reinstall torch --index-url URL, with the URL for this driver from pytorch.org"
        return problem(subject, what, do)
    if cluster is not None and cluster.error is None and cluster.nodes == 1 and cluster.gpus != len(gpus):
        what = f"{names}, but Ray counts {cluster.gpus:g}"
        return warning(subject, what, f"start Ray with --num-gpus {len(gpus)}, or without --num-gpus")
    return ok(subject, f"{names}; torch built for CUDA {facts.packages.torch_cuda}")


def check_capacity(facts: Facts) -> Finding:
    """Whether one trial at least fits, and how many do."""
    subject, wanted = "Trials at a time", facts.config.cluster
    gpus, cpus, where = _resources(facts)
    need = f"{wanted.gpus_per_trial:g} GPU and {wanted.cpus_per_trial} CPU"
    room = trials_at_a_time(facts)
    have = f"{where} has {gpus:g} GPU and {cpus:g} CPU"
    if room < 1:
        less = "--set cluster.cpus_per_trial=1" if cpus < wanted.cpus_per_trial else "--set cluster.gpus_per_trial=0.5"
        do = f"{less}, or start Ray with more; without real GPUs `ray start --num-gpus 8` gives logical ones"
        return problem(subject, f"none: a trial takes {need}, {have}", do)
    return ok(subject, f"{room} of {trials(facts.config)}: each takes {need}, {have}")


def trials_at_a_time(facts: Facts) -> int:
    """How many trials run at once; 0: none fits."""
    gpus, cpus, _ = _resources(facts)
    cluster = facts.config.cluster
    room = trials_that_fit(gpus, cpus, cluster)
    return min(room, trials(facts.config), cluster.max_concurrent or room)


def trials(config: Config) -> int:
    """Conditions x seeds x folds; the sessions of a manifest are not known here and taken as five."""
    folds = 1 if config.folds.scheme == "manifest_split" else IEMOCAP_SESSIONS
    return len(config.conditions) * len(config.train.seeds) * folds


def _resources(facts: Facts) -> tuple[float, float, str]:
    """GPUs, cores and whose they are. Without a cluster, as `all-folds` starts Ray: without GPUs, logical ones."""
    cluster, cores = facts.cluster, facts.hardware.cores
    if cluster is not None and cluster.error is None:
        return cluster.gpus, cluster.cpus, "the cluster"
    real = len(facts.hardware.gpus) if facts.packages.torch_cuda else 0
    if real:
        return real, cores, "this machine"
    return logical_gpus(cores, facts.config.cluster), cores, "this machine (GPUs logical)"


def check_memory(facts: Facts) -> Finding:
    """Main memory for the trials of this machine; weights, gradient and moments count there only without a GPU."""
    subject, hardware = "Memory", facts.hardware
    count = max(1, trials_at_a_time(facts))
    if facts.cluster is not None and facts.cluster.nodes > 1:
        count = -(-count // facts.cluster.nodes)
    on_cpu = not hardware.gpus or facts.packages.torch_cuda is None
    need = count * (TRIAL_BYTES + (COPIES * facts.encoder.weights_bytes if on_cpu else 0))
    what = f"{amount(hardware.available_bytes)} available, about {amount(need)} needed for {count} at a time"
    if need > hardware.available_bytes:
        fit = max(1, count * hardware.available_bytes // need)
        return warning(subject, what, f"--set cluster.max_concurrent={fit}")
    return ok(subject, what)


def check_encoder(encoder: Encoder) -> Finding:
    """There, a WavLM, safetensors."""
    if encoder.on_hub:
        what = f"{encoder.name} is not on this machine yet and is downloaded at the first use"
        return warning("Encoder", what, f"hf download {encoder.name} --include '*.json' '*.safetensors'")
    if encoder.error is not None:
        return problem("Encoder", encoder.error, "--set model.encoder=FOLDER with config.json and model.safetensors")
    return ok("Encoder", f"{encoder.name}, {amount(encoder.weights_bytes)}")


def check_corpus(facts: Facts) -> Finding:
    """There, or can be made; `audit` reads it."""
    corpus = facts.config.corpus
    if facts.corpus_there:
        return ok("Corpus", f"{corpus.root} is there; `audit` reads it")
    if corpus.format != "demo":
        return problem("Corpus", f"corpus.root {corpus.root}: not there", "--set corpus.root=/path/to/the/corpus")
    if not facts.speech_synthesis:
        what = f"{corpus.root} is not there, and without espeakng-loader it cannot be synthesised"
        return problem("Corpus", what, "pip install espeakng-loader   (the extra `demo`)")
    return ok("Corpus", f"{corpus.root} is not there; it is synthesised at the first run")
