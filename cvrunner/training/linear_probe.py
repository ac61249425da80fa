"""The linear probe of one fold: what a ridge regression reads from the frozen encoder, a reference for trained heads.

How it is fitted stands in `ridge.py`; the test part is predicted once. Nothing is random, so there is no seed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from cvrunner.config.adaptation import FROZEN
from cvrunner.encoders.loading import build_encoder
from cvrunner.files import remove_leftovers, write_atomically
from cvrunner.records.results import ProbeResult
from cvrunner.training.device import choose_precision, device_name, free_memory, precision_name
from cvrunner.training.fold_trainer import Event, TrialContext
from cvrunner.training.inputs import Inputs, statistics_store
from cvrunner.training.ridge import MOST_TRAINING, PENALTIES, evenly, fit, labels_of, reader
from cvrunner.training.trial import LinearProbe
from cvrunner.verdict.ccc import ccc_by_dimension, mean_if_all
from cvrunner.verdict.predictions import write_predictions

OPERATIONS_PER_S = 4e10
"""Assumed for one core. Measured: 7e10, with IEMOCAP's number of utterances and the size of WavLM-large."""


def fit_fold(probe: LinearProbe, context: TrialContext) -> Iterator[Event]:
    """Fit and test the probe of one fold, unless that was done before; the last event is its ProbeResult.

    Raises Stopped if asked to stop (nothing is kept, since fitting again takes minutes at most), and EncoderError.
    """
    # No lock: a second process would write the same files, each of them atomically.
    directory, fold, config = context.directory, probe.fold, probe.config
    if (result := directory.read_result(ProbeResult, probe.key)) is not None:
        yield result
        return
    began = time.monotonic()
    remove_leftovers(directory.path)
    # A result of other code or data must not be read if this attempt fails.
    directory.result_file.unlink(missing_ok=True)

    # Features: those that a frozen trial has written, or else computed now. To load the encoder takes seconds.
    torch.set_num_threads(config.cluster.cpus_per_trial)
    dtype = choose_precision(config.train.precision, context.device)
    precision, cache_dir = precision_name(dtype), context.cache_dir
    store = statistics_store(probe.encoder, config.model.whisper_window, precision, fold.utterances, cache_dir)
    if store.missing():
        encoder = build_encoder(probe.encoder, config.model, FROZEN, dtype).to(context.device).eval()
        resample = config.corpus.resample
        inputs = Inputs(encoder, probe.encoder, fold.utterances, cache_dir, context.device, resample)
        yield from inputs.fill_cache(only_statistics=True)
        # A large encoder needs as much memory as the fit.
        del inputs, encoder
        free_memory(context.device)

    # Fit on the training part, choose on the validation part, predict the test part once.
    dimensions, should_stop = config.corpus.dimensions, context.should_stop
    _, layers, _, width = store.read(fold.train[0]).shape
    linear, choices = fit(store, fold, range(layers), dimensions, config.cluster.cpus_per_trial, should_stop)
    predicted = linear.predict(reader(store, fold.test, range(layers), should_stop))

    # Write predictions, then the result, which so implies that they are complete.
    true, scored = (
        dict(zip(dimensions, values.T, strict=True)) for values in (labels_of(fold.test, dimensions), predicted)
    )
    trial_id = (probe.condition, fold.number, probe.seed)
    sha256 = write_predictions(directory.predictions, fold.test, trial_id, true, scored)
    validation_ccc = {d: choice.ccc for d, choice in zip(dimensions, choices, strict=True)}
    result = ProbeResult(
        key=probe.key,
        predictions_sha256=sha256,
        fold=fold.number,
        penalty={d: PENALTIES[choice.penalty] for d, choice in zip(dimensions, choices, strict=True)},
        stretch={d: choice.stretch for d, choice in zip(dimensions, choices, strict=True)},
        validation_ccc={**validation_ccc, "avg": mean_if_all(validation_ccc.values())},
        test_ccc=ccc_by_dimension(scored, true),
        train_utterances=len(evenly(fold.train)),
        validation_utterances=len(fold.validation),
        test_utterances=len(fold.test),
        layers=layers,
        features=2 * layers * width,
        split_digest=probe.split_digest,
        corpus_digest=probe.corpus_digest,
        encoder=probe.encoder.name,
        encoder_digest=probe.encoder.digest,
        device=device_name(context.device),
        precision=precision,
        total_s=time.monotonic() - began,
    )
    write_atomically(directory.result_file, result.to_json())
    directory.error.unlink(missing_ok=True)
    yield result


def estimated_s(utterances: int, features: int, cores: int) -> float:
    """Return the time to fit the probe of a fold with this number of training utterances."""
    count = min(utterances, MOST_TRAINING)
    operations = 2 * count**2 * features + len(PENALTIES) * count**3 / 3
    return operations / (OPERATIONS_PER_S * cores)
