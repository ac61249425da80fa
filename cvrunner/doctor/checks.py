"""Whether the run fits this machine, and can write where it must: versions, GPUs, memory, encoder, corpus, disks.

What a run takes is an estimate from the configuration; `plan` measures it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from packaging.specifiers import SpecifierSet

from cvrunner.config.schema import Config
from cvrunner.doctor.access import is_loopback
from cvrunner.doctor.facts import (
    CHECKED_PACKAGES,
    Encoder,
    Facts,
    Finding,
    Packages,
    Store,
    ok,
    problem,
    short,
    warning,
)
from cvrunner.orchestration.machine import Hardware, socket_path_bytes
from cvrunner.orchestration.resources import logical_gpus, trials_that_fit
from cvrunner.run.estimate import MOMENTS, feature_bytes, most_checkpoint_bytes
from cvrunner.text import format_bytes

TRIAL_BYTES = 2**30
"""Memory of a trial's process with its libraries and a small encoder: the demo's trials peak below 0.95 GiB."""
IEMOCAP_SESSIONS = 5
CORPUS_S = 12 * 3600.0
"""Length of IEMOCAP; assumed for manifests too, which are not read here."""
DEMO_UTTERANCE_S = 2.8
LEAST_DISK_BYTES = 2**30
"""For journals, predictions, reports and MLflow's database."""
SHM_BYTES = 2**30
"""With less, Ray moves objects to disk."""
FULL_DISK = 0.95
"""Above this share Ray refuses new objects."""


def check_packages(packages: Packages) -> Iterator[Finding]:
    """Check that packages are installed, and within pyproject.toml's range."""
    for name in CHECKED_PACKAGES:
        installed, required = packages.installed.get(name), packages.required.get(name, "")
        line = f"a Python {required}" if name == "python" else f"pip install '{name}{required}'"
        tested = packages.tested.get(name)
        if installed is None:
            yield problem(name, "not installed", line)
        elif not SpecifierSet(required).contains(installed, prereleases=True):
            yield problem(name, f"{installed}, must be {required}", line)
        # A suffix such as +cu130 names the build, not the version.
        elif tested is None or installed.partition("+")[0] == tested:
            yield ok(name, installed)
        else:
            yield ok(name, f"{installed} (tested with {tested})")


# --- whether the run fits ---------------------------------------------------------------------------------------------


def check_machine(facts: Facts) -> Iterator[Finding]:
    """Run all checks of this section."""
    yield check_gpus(facts)
    yield check_capacity(facts)
    yield check_memory(facts)
    yield check_encoder(facts.encoder)
    yield check_corpus(facts)


def check_gpus(facts: Facts) -> Finding:
    """Compare the driver's GPUs with CUDA_VISIBLE_DEVICES, torch's build and Ray's count."""
    hardware, cluster, torch = facts.hardware, facts.cluster, facts.packages.installed.get("torch")
    subject, gpus, driver, hidden = "GPUs", hardware.gpus, hardware.driver, hardware.hidden_gpus
    if not gpus and hidden:
        what = f"CUDA_VISIBLE_DEVICES hides {'the only one' if hidden == 1 else f'all {hidden}'}: trials run on CPU"
        return warning(subject, what, "unset CUDA_VISIBLE_DEVICES, or --set train.device=cpu if that is meant")
    if not gpus:
        return ok(subject, "no NVIDIA driver or no GPU; trials run on CPU")
    names = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
    if facts.packages.torch_cuda is None:
        what = f"{names}, but torch {torch} is a CPU build: trials that need a GPU fail"
        do = "pip install --force-reinstall torch --index-url URL, with the URL for this driver from pytorch.org"
        return problem(subject, what, do)
    # Within one major version of CUDA, an older driver is enough.
    if driver is not None and int(driver.cuda.partition(".")[0]) < int(facts.packages.torch_cuda.partition(".")[0]):
        what = (
            f"{names}, but driver {driver.version} supports CUDA {driver.cuda} at most, and torch {torch} is built for "
            f"CUDA {facts.packages.torch_cuda}: torch sees no GPU, and trials fail"
        )
        return problem(subject, what, "update the driver, or install a torch for this driver: URL from pytorch.org")
    if hidden:
        what = f"{names}; CUDA_VISIBLE_DEVICES hides {hidden} more"
        return warning(subject, what, "unset CUDA_VISIBLE_DEVICES to use all")
    # A cluster of several nodes has GPUs that this machine's driver does not know.
    if cluster is not None and cluster.error is None and cluster.nodes == 1 and cluster.gpus != len(gpus):
        what = f"{names}, but Ray counts {cluster.gpus:g}"
        return warning(subject, what, f"start Ray with --num-gpus {len(gpus)}, or without --num-gpus")
    return ok(subject, f"{names}; torch built for CUDA {facts.packages.torch_cuda}")


def check_capacity(facts: Facts) -> Finding:
    """Check that at least one trial fits, and report how many do."""
    subject, cluster = "Trials at a time", facts.config.cluster
    gpus, cpus, where = _resources(facts)
    need = f"{cluster.gpus_per_trial:g} GPU and {cluster.cpus_per_trial} CPU"
    have = f"{where} has {gpus:g} GPU and {cpus:g} CPU"
    fit = trials_at_a_time(facts)
    if fit < 1:
        key = "cpus_per_trial=1" if cpus < cluster.cpus_per_trial else "gpus_per_trial=0.5"
        do = f"--set cluster.{key}, or start Ray with more; without GPUs, `ray start --num-gpus 8` gives logical ones"
        return problem(subject, f"none: a trial takes {need}, {have}", do)
    return ok(subject, f"{fit} of {trials(facts.config)}: each takes {need}, {have}")


def trials_at_a_time(facts: Facts) -> int:
    """Number of trials that run at a time; 0: none fits."""
    gpus, cpus, _ = _resources(facts)
    cluster = facts.config.cluster
    fit = trials_that_fit(gpus, cpus, cluster)
    return min(fit, trials(facts.config), cluster.max_concurrent or fit)


def trials(config: Config) -> int:
    """Conditions x seeds x folds; five folds for a manifest by session, which is not read here."""
    folds = 1 if config.folds.scheme == "manifest_split" else IEMOCAP_SESSIONS
    return len(config.conditions) * len(config.train.seeds) * folds


def _resources(facts: Facts) -> tuple[float, float, str]:
    """Return GPUs, cores and where they are: in the cluster, else as `all-folds` would start Ray on this machine."""
    cluster, cores = facts.cluster, facts.hardware.cores
    if cluster is not None and cluster.error is None:
        return cluster.gpus, cluster.cpus, "the cluster"
    if facts.hardware.gpus and facts.packages.torch_cuda:
        return len(facts.hardware.gpus), cores, "this machine"
    return logical_gpus(cores, facts.config.cluster), cores, "this machine (GPUs logical)"


def check_memory(facts: Facts) -> Finding:
    """Check the main memory for the trials of this machine."""
    subject, hardware = "Memory", facts.hardware
    count = max(1, trials_at_a_time(facts))
    # Ray spreads the trials over its nodes; this machine gets its share, rounded up.
    if facts.cluster is not None and facts.cluster.nodes > 1:
        count = -(-count // facts.cluster.nodes)
    # Main memory holds the weights that training started from, and a copy of the checkpoint that is being written.
    copies = 1 + (1 + MOMENTS)
    if not hardware.gpus or facts.packages.torch_cuda is None or facts.config.train.device == "cpu":
        # On a CPU, weights, gradients and moments are there themselves.
        copies += 2 + MOMENTS
    each = TRIAL_BYTES + copies * facts.encoder.weights_bytes
    available, need = hardware.available_bytes, count * each
    what = f"{format_bytes(available)} available, about {format_bytes(need)} needed for {count} at a time"
    if hardware.limits:
        what += f"; this container has {' and '.join(hardware.limits)}"
    if need > available:
        return warning(subject, what, f"--set cluster.max_concurrent={max(1, count * available // need)}")
    return ok(subject, what)


def check_encoder(encoder: Encoder) -> Finding:
    """Check that the encoder is on this machine and can be read."""
    if encoder.on_hub:
        what = f"{encoder.name} is not on this machine yet and is downloaded at the first use"
        return warning("Encoder", what, f"hf download {encoder.name} --include '*.json' '*.safetensors'")
    if encoder.error is not None:
        # The message has the command if files are missing.
        do = "--set model.encoder=FOLDER with config.json and model.safetensors"
        if typed := re.search(r"`((?:python -m cvrunner encoder|hf download) [^`]+)`", encoder.error):
            do = typed[1]
        return problem("Encoder", encoder.error, do)
    return ok("Encoder", f"{encoder.name}, {format_bytes(encoder.weights_bytes)}")


def check_corpus(facts: Facts) -> Finding:
    """Check that the corpus exists, or can be synthesised; `audit` reads it."""
    corpus = facts.config.corpus
    if facts.corpus_exists:
        return ok("Corpus", f"{corpus.root} exists; `audit` reads it")
    if corpus.format != "demo":
        return problem("Corpus", f"corpus.root {corpus.root}: does not exist", "--set corpus.root=/path/to/the/corpus")
    if not facts.speech_synthesis:
        what = f"{corpus.root} does not exist, and without espeakng-loader it cannot be synthesised"
        return problem("Corpus", what, "pip install espeakng-loader   (the extra `demo`)")
    return ok("Corpus", f"{corpus.root} does not exist; it is synthesised at the first run")


# --- where the run writes ---------------------------------------------------------------------------------------------


def check_storage(facts: Facts) -> Iterator[Finding]:
    """Run all checks of this section."""
    for store in facts.stores:
        if store.error is not None:
            yield problem(store.key, store.error, f"--set {store.key}=/absolute/path/to/a/folder")
        else:
            yield ok(store.key, f"{short(store.path)} can be written")
    yield check_tracking(facts.config, facts.tracking_answers)
    yield from check_disks(facts)
    yield check_shared_memory(facts.hardware)
    yield check_temp(facts.hardware)


def check_tracking(config: Config, answers: bool | None) -> Finding:
    """Check where MLflow's runs go."""
    subject, uri = "MLflow store", config.tracking.uri
    if not config.tracking.enabled:
        return ok(subject, "tracking is off")
    if uri is None:
        return ok(subject, "mlflow.db in results.root")
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        if not answers:
            do = "start the server, or do nothing: `cvrunner sync RUN` uploads the run later"
            return warning(subject, f"{uri} does not answer; training works without it", do)
        if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            do = f"ssh -N -L 5000:127.0.0.1:{parts.port or 80} {parts.hostname}; --set tracking.uri=http://127.0.0.1:5000"
            return warning(subject, f"{uri}: runs cross the network unencrypted", do)
    elif parts.scheme in ("", "file"):
        what = f"{uri}: MLflow no longer writes to folders"
        return problem(subject, what, "--set tracking.uri=sqlite:////absolute/mlflow.db")
    elif parts.scheme == "sqlite" and not parts.path.startswith("//"):
        do = "--set tracking.uri=sqlite:////absolute/mlflow.db   (four slashes)"
        return problem(subject, f"{uri} is relative, and a Ray job's working folder is deleted after the job", do)
    return ok(subject, uri)


def check_disks(facts: Facts) -> Iterator[Finding]:
    """Compare the free space of each disk with what its stores take at most."""
    # Stores on the same disk share its free space, so their needs add up.
    by_disk: dict[int, list[Store]] = {}
    for store in facts.stores:
        if store.error is None:
            by_disk.setdefault(store.disk, []).append(store)
    for stores in by_disk.values():
        keys, free = [store.key for store in stores], stores[0].free_bytes
        results, cached = LEAST_DISK_BYTES, 0
        if "results.root" in keys or "cluster.node_dir" in keys:
            results += checkpoint_space(facts)
        if "cluster.cache_dir" in keys:
            cached = feature_space(facts)
        what = f"{', '.join(keys)}: {format_bytes(free)} free, up to {format_bytes(results)} for results"
        if cached:
            what += f", {format_bytes(cached)} for features"
        moved = "; ".join(f"--set {key}=/a/larger/disk" for key in keys)
        if free < results:
            yield problem("Disk", what, moved)
        elif free < results + cached:
            # Only a warning: features of earlier runs are used again.
            yield warning("Disk", f"{what} (less if they exist already)", moved)
        else:
            yield ok("Disk", what)


def checkpoint_space(facts: Facts) -> int:
    """Return the most that checkpoints take at a time; those of a frozen encoder are negligible."""
    config, weights = facts.config, facts.encoder.weights_bytes
    if not any(config.for_condition(condition).adaptation.trains_encoder for condition in config.conditions):
        return 0
    running = max(1, trials_at_a_time(facts))
    averages = any(config.for_condition(condition).train.ema_decay for condition in config.conditions)
    return most_checkpoint_bytes([((1 + MOMENTS + averages) * weights, weights)] * running, running)


def feature_space(facts: Facts) -> int:
    """Return the size of all features: conv features once, hidden states once per layers and frame rate."""
    encoder, corpus = facts.encoder, facts.config.corpus
    audio_s = CORPUS_S
    if corpus.format == "demo":
        audio_s = corpus.demo.utterances * DEMO_UTTERANCE_S
    hidden = set()
    for condition in facts.config.conditions:
        resolved = facts.config.for_condition(condition)
        model = resolved.model
        if resolved.adaptation.cached == "hidden":
            states = encoder.hidden_states if model.layers == "all" else len(model.layers)
            hidden.add((model.layers, states, model.frame_rate_hz))
    shapes = [(states, encoder.width, rate_hz) for _, states, rate_hz in hidden]
    return feature_bytes(encoder.conv_channels, shapes, audio_s)


def check_shared_memory(hardware: Hardware) -> Finding:
    """Check the memory in which Ray keeps its objects."""
    subject, free = "Shared memory", hardware.shm_bytes
    if free is None:
        return ok(subject, "this system has no /dev/shm, and Ray does without")
    if free < SHM_BYTES:
        do = "docker run --shm-size=2g, or sudo mount -o remount,size=2G /dev/shm"
        return warning(subject, f"{format_bytes(free)} free: Ray keeps objects on disk instead, which is slow", do)
    return ok(subject, f"{format_bytes(free)} free")


def check_temp(hardware: Hardware) -> Finding:
    """Check the folder of Ray's sockets, whose paths must be short."""
    subject = "Temporary folder"
    length, limit = socket_path_bytes(hardware.temp), hardware.socket_path_limit
    if length > limit:
        what = f"{hardware.temp}: Ray's socket paths would be {length} bytes long, at most {limit} are allowed"
        return problem(subject, what, "export RAY_TMPDIR=/tmp")
    if hardware.temp_used > FULL_DISK:
        what = f"{hardware.temp}: its disk is {hardware.temp_used:.0%} full, Ray stops storing objects at 95 %"
        return warning(subject, what, "free space there, or export RAY_TMPDIR=/a/short/path")
    return ok(subject, hardware.temp)
