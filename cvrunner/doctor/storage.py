"""Where the run writes: stores, MLflow, disks, shared memory and the temporary folder.

What a run takes is an estimate from the configuration, by the constants below; `plan` measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from cvrunner.config.schema import Config
from cvrunner.doctor.access import is_loopback
from cvrunner.doctor.facts import Facts, Store
from cvrunner.doctor.finding import Finding, amount, ok, problem, short, warning
from cvrunner.doctor.machine import COPIES, trials_at_a_time
from cvrunner.orchestration.machine import Hardware

GENERATIONS = 2
"""Checkpoints that a trial keeps."""
ITEM_BYTES = 2
"""Features are float16."""
CONV_FRAMES_PER_S = 50.0
CORPUS_S = 12 * 3600.0
"""IEMOCAP's length; taken for manifests too, which are not read here."""
DEMO_UTTERANCE_S = 2.8
LEAST_DISK_BYTES = 2**30
"""For journals, predictions, reports and MLflow's database."""
SHM_BYTES = 2**30
"""Ray moves objects to disk where it gets less."""
FULL_DISK = 0.95
"""Ray refuses new objects beyond this share."""
SESSION = "/ray/session_2026-11-25_00-00-00_000000_4194304/sockets/plasma_store"
"""What Ray puts after the temporary folder."""


def check_storage(facts: Facts) -> Iterator[Finding]:
    """All of this file, in reading order."""
    yield from (check_store(store) for store in facts.stores)
    yield check_tracking(facts.config, facts.tracking_answers)
    yield from check_disk(facts)
    yield check_shared_memory(facts.hardware)
    yield check_temp(facts.hardware)


def check_store(store: Store) -> Finding:
    """Absolute, outside of Ray's session folder, writable."""
    if store.error is not None:
        return problem(store.key, store.error, f"--set {store.key}=/absolute/folder/of/yours")
    return ok(store.key, f"{short(store.path)} can be written")


def check_tracking(config: Config, answers: bool | None) -> Finding:
    """Where MLflow's runs go."""
    subject, uri = "MLflow store", config.tracking.uri
    if not config.tracking.enabled:
        return ok(subject, "tracking is off")
    if uri is None:
        return ok(subject, "mlflow.db in results.root")
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        if not answers:
            do = "start the server, or leave it: `cvrunner sync RUN` writes the run later"
            return warning(subject, f"{_without_login(uri)} does not answer; training goes on without it", do)
        if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            do = f"ssh -N -L 5000:127.0.0.1:{parts.port or 80} {parts.hostname}; --set tracking.uri=http://127.0.0.1:5000"
            return warning(subject, f"{_without_login(uri)}: runs cross the network in the clear", do)
    elif parts.scheme in ("", "file"):
        return problem(
            subject, f"{uri}: MLflow no longer writes to folders", "--set tracking.uri=sqlite:////absolute/mlflow.db"
        )
    elif parts.scheme == "sqlite" and not parts.path.startswith("//"):
        do = "--set tracking.uri=sqlite:////absolute/mlflow.db   (four strokes)"
        return problem(subject, f"{uri} is relative, and a Ray job's own folder is thrown away", do)
    return ok(subject, _without_login(uri))


def check_disk(facts: Facts) -> Iterator[Finding]:
    """Free space of each disk against what its stores take at most."""
    checkpoints, features = checkpoint_bytes(facts), feature_bytes(facts)
    by_disk: dict[int, list[Store]] = {}
    for store in facts.stores:
        if store.error is None:
            by_disk.setdefault(store.disk, []).append(store)
    for stores in by_disk.values():
        yield _disk(stores, checkpoints, features)


def _disk(stores: Sequence[Store], checkpoints: int, features: int) -> Finding:
    keys, free = [store.key for store in stores], stores[0].free_bytes
    certain = LEAST_DISK_BYTES + (checkpoints if {"results.root", "cluster.node_dir"} & set(keys) else 0)
    cached = features if "cluster.cache_dir" in keys else 0
    parts = f"up to {amount(certain)} for results" + (f", {amount(cached)} for features" if cached else "")
    what = f"{', '.join(keys)}: {amount(free)} free, {parts}"
    moved = "; ".join(f"--set {key}=/a/larger/disk" for key in keys)
    if free < certain:
        return problem("Disk", what, moved)
    if free < certain + cached:
        return warning("Disk", f"{what} (less where they are there already)", moved)
    return ok("Disk", what)


def checkpoint_bytes(facts: Facts) -> int:
    """Of all trials that run at a time: two generations of weights, two moments and the best epoch's weights each."""
    unfrozen = any(facts.config.for_condition(c).adaptation.trains_encoder for c in facts.config.conditions)
    copies = COPIES * GENERATIONS if unfrozen else 0
    return copies * facts.encoder.weights_bytes * max(1, trials_at_a_time(facts))


def feature_bytes(facts: Facts) -> int:
    """Conv features once, hidden states once for each frozen condition's layers and frame rate."""
    encoder, corpus = facts.encoder, facts.config.corpus
    length_s = corpus.demo.utterances * DEMO_UTTERANCE_S if corpus.format == "demo" else CORPUS_S
    recipes = set()
    for condition in facts.config.conditions:
        resolved = facts.config.for_condition(condition)
        model = resolved.model
        if resolved.adaptation.cached == "hidden":
            states = encoder.hidden_states if model.layers == "all" else len(model.layers)
            recipes.add((model.layers, states * encoder.width * model.frame_rate_hz))
    items_per_s = encoder.conv_channels * CONV_FRAMES_PER_S + sum(items for _, items in recipes)
    return int(length_s * items_per_s * ITEM_BYTES)


def check_shared_memory(hardware: Hardware) -> Finding:
    """Where Ray keeps its objects."""
    subject, free = "Shared memory", hardware.shm_bytes
    if free is None:
        return ok(subject, "this system has none of its own for Ray")
    if free < SHM_BYTES:
        do = "docker run --shm-size=2g, or sudo mount -o remount,size=2G /dev/shm"
        return warning(subject, f"{amount(free)} free: Ray keeps objects on disk instead, slowly", do)
    return ok(subject, f"{amount(free)} free")


def check_temp(hardware: Hardware) -> Finding:
    """Ray's sockets lie there, and their paths must be short."""
    subject = "Temporary folder"
    length, limit = len((hardware.temp + SESSION).encode()), hardware.socket_path_limit
    if length > limit:
        what = f"{hardware.temp}: Ray's socket paths get {length} bytes long, at most {limit} are allowed"
        return problem(subject, what, "export RAY_TMPDIR=/tmp")
    if hardware.temp_used > FULL_DISK:
        what = f"{hardware.temp}: its disk is {hardware.temp_used:.0%} full, Ray stops storing objects at 95 %"
        return warning(subject, what, "make room there, or export RAY_TMPDIR=/a/short/path")
    return ok(subject, hardware.temp)


def _without_login(uri: str) -> str:
    """A user name and a password are nobody's business."""
    before, separator, after = uri.partition("://")
    return f"{before}{separator}{after.rpartition('@')[2]}"
