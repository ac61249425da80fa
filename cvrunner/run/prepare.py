"""From a configuration to a checked experiment, and from a name to a finished run."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cvrunner import paths
from cvrunner.config.reading import load_config
from cvrunner.config.schema import Config
from cvrunner.config.sections import ModelConfig
from cvrunner.data.corpus import has_synthetic_speech, load_corpus
from cvrunner.data.folds import Fold, check_labels, check_leaks, make_folds
from cvrunner.data.utterance import SAMPLE_RATE_HZ, SHORTEST_SAMPLES, Corpus
from cvrunner.encoders.files import check_encoder, encoder_settings, local_folder
from cvrunner.errors import ConfigError, CorpusError, CvrunnerError, EncoderError, ResultsError, UsageError
from cvrunner.records.run_directory import RunDirectory


@dataclass(frozen=True)
class Experiment:
    """A configuration with its corpus and folds; every check before training has passed."""

    name: str
    config: Config
    corpus: Corpus
    folds: tuple[Fold, ...]
    results_root: Path
    cache_dir: Path


def prepare(config_path: Path | None, overrides: Sequence[str], for_training: bool = True) -> Experiment:
    """Read and check the configuration (default: the demo), then as `prepare_config`."""
    path = config_path or paths.default_config()
    return prepare_config(load_config(path, overrides), path.stem, for_training)


def prepare_config(config: Config, name: str, for_training: bool = True) -> Experiment:
    """Read and check everything that training needs.

    Raises ConfigError, CorpusError and, if it is for training, EncoderError and LeakError.
    """
    results_root = paths.lasting(config.results.root, "results.root")
    cache_dir = paths.lasting(config.cluster.cache_dir, "cluster.cache_dir")
    root = paths.corpus_root(config.corpus.root)
    if for_training:
        if problem := paths.not_writable(results_root):
            raise ResultsError(f"results.root: {results_root} cannot be written: {problem}")
        # The nodes of a cluster may have a disk that its head, where the driver runs, lacks.
        if (problem := paths.not_writable(cache_dir)) and not os.environ.get("RAY_ADDRESS"):
            raise ConfigError(f"cluster.cache_dir: {cache_dir} cannot be written: {problem}")
    demo_encoder: list[str] = []
    fields: list[int] = []
    # Cheap checks come first: a large corpus takes minutes to read.
    for condition, overrides in config.conditions.items():
        common = config.for_condition(condition)
        encoder, revision = common.model.encoder, common.model.revision
        if encoder == "demo" and not has_synthetic_speech(config.corpus, root):
            demo_encoder.append(condition)
            if for_training and "encoder" not in {*config.model.model_fields_set, *overrides.get("model", {})}:
                raise ConfigError(
                    "model.encoder: not set, and its default `demo` is a toy that knows synthetic speech alone; "
                    "begin the file with `base: configs/finetune.yaml`, or set it to microsoft/wavlm-large, or to demo"
                )
        of_folds = [config.for_condition(condition, fold) for fold in config.folds_of(condition)]
        for resolved in (common, *of_folds) if for_training else ():
            model, train = resolved.model, resolved.train
            # Empty: all layers.
            layers: tuple[int, ...] = () if model.layers == "all" else model.layers
            check_encoder(
                model.encoder,
                model.revision,
                layers,
                resolved.adaptation.masks_input,
                model.allow_tuned_encoder,
            )
            kind = encoder_settings(model.encoder, model.revision).model_type
            if model.whisper_window != "unpadded" and kind != "whisper":
                raise ConfigError(
                    f"model.whisper_window {model.whisper_window}: the encoder {model.encoder} is a {kind}, which "
                    "always runs on the utterance alone; remove the key"
                )
            if model.unfreeze_top_layers is not None:
                check_depth(model, [model.unfreeze_top_layers], "model.unfreeze_top_layers")
            depth = encoder_settings(model.encoder, model.revision).depth
            last = resolved.adaptation.last_start(depth, max(layers, default=depth))
            if last > train.epochs:
                raise ConfigError(
                    f"train.unfreeze_layers_per_epoch {train.unfreeze_layers_per_epoch}: the lowest layer of "
                    f"{condition} would start in epoch {last} of {train.epochs}; unfreeze more per epoch"
                )
        # `audit` works without a network and without an encoder.
        with contextlib.nullcontext() if for_training else contextlib.suppress(EncoderError, ConfigError):
            if for_training or local_folder(encoder):
                fields.append(encoder_settings(encoder, revision).shortest_samples)
    scheme = config.folds.scheme if "scheme" in config.folds.model_fields_set else None
    corpus = load_corpus(config.corpus, root, scheme, max(fields, default=SHORTEST_SAMPLES))
    if demo_encoder:
        text = "conditions with the encoder demo, which knows synthetic speech alone"
        warning = f"{text}: {len(demo_encoder)} ({', '.join(demo_encoder)})"
        corpus = replace(corpus, warnings=(*corpus.warnings, warning))
    check_durations(config, corpus, for_training)
    folds = make_folds(corpus, config.folds.scheme)
    for condition in config.conditions:
        for fold in config.folds_of(condition):
            check_fold(fold, len(folds), f"conditions.{condition}.folds", ConfigError)
    if for_training:
        # `audit` must not stop at a leak: it lists all of them.
        check_leaks(folds)
    check_labels(corpus, folds, config.corpus.dimensions)
    return Experiment(name, config, corpus, folds, results_root, cache_dir)


def check_durations(config: Config, corpus: Corpus, for_training: bool) -> None:
    """Raise CorpusError listing the utterances that are too short or too long for the encoder of a condition."""
    problems = []
    models = [config.for_condition(condition).model for condition in config.conditions]
    for name, revision in dict.fromkeys((model.encoder, model.revision) for model in models):
        try:
            # `audit` works without a network and without an encoder.
            if not for_training and not local_folder(name):
                continue
            settings = encoder_settings(name, revision)
        except EncoderError:
            if for_training:
                raise
            continue
        shortest, longest = settings.shortest_samples, settings.longest_samples
        for u in corpus.utterances:
            where = f"{u.id}: {u.path}"
            if u.samples < shortest:
                rule = f"must have {shortest} or more (one frame of the encoder {name})"
                problems.append(f"{where}: has {u.samples} samples at 16 kHz, {rule}")
            if longest is not None and u.samples > longest:
                rule = f"must be at most {longest / SAMPLE_RATE_HZ:g} s for the encoder {name}: split it"
                problems.append(f"{where}: is {u.duration_s:.1f} s long, {rule}")
    if problems:
        raise CorpusError(corpus.name, problems)


def check_depth(model: ModelConfig, requested: Sequence[int], key: str) -> None:
    """Raise ConfigError naming `key` if it requests more transformer layers than the encoder has."""
    depth = encoder_settings(model.encoder, model.revision).depth
    if (most := max(requested, default=0)) > depth:
        raise ConfigError(f"{key}: {most} is more than the {depth} transformer layers of the encoder {model.encoder}")


def check_fold(fold: int, count: int | None, key: str = "fold", error: type[CvrunnerError] = UsageError) -> None:
    """Raise an error naming `key` unless `fold` is one of `count` folds; None: the count is not known yet."""
    if fold < 1 and count is None:
        raise error(f"{key} {fold}: folds are numbered from 1")
    if count is not None and not 1 <= fold <= count:
        raise error(f"{key} {fold}: there are folds 1 to {count}")


def find_run_directory(run: Path) -> RunDirectory:
    """Find a run by its folder, or by its name in the results folder. Raises ResultsError if there is none."""
    for path in (run, paths.lasting("results", "results.root") / run):
        if (path / "run.json").is_file():
            # Absolute, because the folder's own name is the name of the run, also if `.` was given.
            return RunDirectory(path.absolute())
    hint = ""
    if near := difflib.get_close_matches(run.name, paths.run_names(), n=3, cutoff=0.3):
        hint = f"; did you mean {' or '.join(near)}?"
    raise ResultsError(f"{run}: no run here (run.json is missing){hint}")
