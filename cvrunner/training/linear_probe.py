"""The linear probe of one fold: what a ridge regression reads from the frozen encoder, a reference for trained heads.

The features of an utterance are mean and standard deviation over its frames of every hidden state, at the encoder's own
frame rate. They are standardised on the training part. Penalty and stretch are chosen per dimension by the CCC of the
validation part; the test part is then predicted once. Nothing is random, so there is no seed.

`n` training utterances, `N` utterances, `L` hidden states of width `D`, `F = 2 L D` features, `P` penalties, `K`
dimensions.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cvrunner.config.adaptation import FROZEN
from cvrunner.data.features import FeatureStore
from cvrunner.data.utterance import Utterance
from cvrunner.encoders.loading import build_encoder
from cvrunner.errors import Stopped
from cvrunner.files import remove_leftovers, write_atomically
from cvrunner.records.results import ProbeResult
from cvrunner.training.device import choose_precision, device_name, free_memory
from cvrunner.training.fold_trainer import Event, TrialContext
from cvrunner.training.inputs import Inputs
from cvrunner.training.trial import LinearProbe
from cvrunner.verdict.ccc import ccc, ccc_by_dimension, defined, mean_if_all
from cvrunner.verdict.predictions import write_predictions

Floats = npt.NDArray[np.float64]
ReadLayer = Callable[[int], npt.NDArray[np.float32]]
"""Returns the features `[N, 2 D]` of one hidden state: only one state at a time is in memory."""
PENALTIES = tuple(10.0 ** (power / 2) for power in range(-6, 7))
"""In units of F, the mean squared length of a standardised feature vector, so that they mean the same for every
encoder."""
MOST_TRAINING = 10_000
"""Largest number of training utterances to fit on; of more, this many are taken, evenly spaced. Memory grows with the
square of the number and time with its cube."""
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

    # Features: those that a frozen trial has written, or else computed now.
    torch.set_num_threads(config.cluster.cpus_per_trial)
    precision = choose_precision(config.train.precision, context.device)
    encoder = build_encoder(probe.encoder, config.model, FROZEN, precision).to(context.device).eval()
    inputs = Inputs(encoder, probe.encoder, fold.utterances, context.cache_dir, context.device, config.corpus.resample)
    yield from inputs.fill_statistics()
    store = inputs.statistics
    # A large encoder needs as much memory as the fit.
    del inputs, encoder
    free_memory(context.device)

    # Fit on the training part, choose on the validation part, predict the test part once.
    dimensions, count = config.corpus.dimensions, min(len(fold.train), MOST_TRAINING)
    train = [fold.train[i * len(fold.train) // count] for i in range(count)]
    _, layers, _, width = store.read(train[0]).shape
    parts = {"train": train, "validation": fold.validation, "test": fold.test}
    readers = {name: _reader(store, part, context.should_stop) for name, part in parts.items()}
    labels = {name: np.array([[u.label(d) for d in dimensions] for u in part]) for name, part in parts.items()}
    # Not at the top of the file: every worker would pay the second that it takes to import scikit-learn.
    from threadpoolctl import threadpool_limits

    # The number of threads decides the order of floating-point additions.
    with threadpool_limits(config.cluster.cpus_per_trial):
        ridge = fit_ridge(readers["train"], layers, labels["train"])
        choices = choose(ridge.deviations(readers["validation"]), labels["validation"], ridge.centre)
        predicted = apply(choices, ridge.deviations(readers["test"]), ridge.centre)

    # Write predictions, then the result, which so implies that they are complete.
    true, scored = (dict(zip(dimensions, values.T, strict=True)) for values in (labels["test"], predicted))
    write_predictions(directory.predictions, fold.test, (probe.condition, fold.number, probe.seed), true, scored)
    validation_ccc = {d: choice.ccc for d, choice in zip(dimensions, choices, strict=True)}
    result = ProbeResult(
        key=probe.key,
        predictions_sha256=hashlib.sha256(directory.predictions.read_bytes()).hexdigest(),
        fold=fold.number,
        penalty={d: PENALTIES[choice.penalty] for d, choice in zip(dimensions, choices, strict=True)},
        stretch={d: choice.stretch for d, choice in zip(dimensions, choices, strict=True)},
        validation_ccc={**validation_ccc, "avg": mean_if_all(validation_ccc.values())},
        test_ccc=ccc_by_dimension(scored, true),
        train_utterances=len(train),
        validation_utterances=len(fold.validation),
        test_utterances=len(fold.test),
        layers=layers,
        features=2 * layers * width,
        split_digest=probe.split_digest,
        corpus_digest=probe.corpus_digest,
        encoder=probe.encoder.name,
        encoder_digest=probe.encoder.digest,
        device=device_name(context.device),
        precision=str(precision).removeprefix("torch."),
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


def _reader(store: FeatureStore, utterances: Sequence[Utterance], should_stop: Callable[[], bool]) -> ReadLayer:
    """Return a function that reads the features of one hidden state of all utterances."""

    def read(layer: int) -> npt.NDArray[np.float32]:
        if should_stop():
            raise Stopped("stopped; the same command fits the linear probe again")
        features = np.stack([store.read(u)[0, layer].ravel() for u in utterances]).astype(np.float32)
        # Pages of the files would otherwise count as memory of this process, until all of them do.
        store.unmap()
        return features

    return read


# --- the regression ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ridge:
    """Ridge regressions with all penalties."""

    centre: Floats
    """`[K]`, means of the training labels."""
    layers: tuple[tuple[Any, Floats], ...]
    """Per hidden state, the StandardScaler of its features, and weights `[2 D, P K]`."""

    def deviations(self, read: ReadLayer) -> Floats:
        """Return predictions less `centre`, `[P, N, K]`."""
        found = sum(scaler.transform(read(i)) @ weights for i, (scaler, weights) in enumerate(self.layers))
        return np.moveaxis(np.reshape(found, (-1, len(PENALTIES), len(self.centre))), 1, 0)


def fit_ridge(read: ReadLayer, layers: int, labels: Floats) -> Ridge:
    """Fit labels `[n, K]` on the standardised features of all hidden states, with every penalty.

    In the dual (Saunders et al. 1998), because a large encoder has more features than a corpus has utterances: memory
    for a few matrices `[n, n]`, whatever F is.
    """
    # scikit-learn takes a second to import, which every worker would pay at the top of the file.
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.preprocessing import StandardScaler

    count, features = len(labels), 0
    products, scalers = np.zeros((count, count)), [StandardScaler() for _ in range(layers)]
    for layer, scaler in enumerate(scalers):
        standardised = scaler.fit_transform(read(layer))
        features += standardised.shape[1]
        # Products in float32 take half the time; over the hidden states they are summed in float64.
        products += standardised @ standardised.T
    products /= features
    centre = labels.mean(axis=0)
    fits = (KernelRidge(alpha=penalty, kernel="precomputed").fit(products, labels - centre) for penalty in PENALTIES)
    dual = np.concatenate([fit.dual_coef_ for fit in fits], axis=1) / features
    weights = [scaler.transform(read(layer)).T @ dual for layer, scaler in enumerate(scalers)]
    return Ridge(centre, tuple(zip(scalers, weights, strict=True)))


@dataclass(frozen=True)
class Choice:
    """The setting of one dimension."""

    penalty: int
    """Index in PENALTIES."""
    stretch: float
    ccc: float | None
    """Of the validation part; None if undefined."""


def choose(deviations: Floats, labels: Floats, centre: Floats) -> list[Choice]:
    """Return penalty and stretch with the highest CCC for each dimension.

    `deviations` `[P, N, K]` and `labels` `[N, K]` of the validation part. Of equal penalties the largest is taken.
    """
    choices = []
    for k in range(labels.shape[1]):
        candidates = []
        for penalty, deviation in enumerate(deviations[:, :, k]):
            stretch = best_stretch(deviation, labels[:, k] - centre[k])
            score = defined(ccc(centre[k] + stretch * deviation, labels[:, k]))
            candidates.append(Choice(penalty, stretch, score))
        choices.append(max(candidates, key=lambda c: (-math.inf if c.ccc is None else c.ccc, c.penalty)))
    return choices


def best_stretch(deviation: Floats, truth: Floats) -> float:
    """Return the factor s > 0 with which `s * deviation` `[N]` has the highest CCC with `truth` `[N]`.

    With c their covariance, CCC(s) = 2 c s / (a s^2 + b s + d), a = mean(deviation^2) and d = mean(truth^2), whose
    derivative is zero where a s^2 = d. 1 for deviations of 0.
    """
    power = float(np.mean(deviation**2))
    if power == 0:
        return 1.0
    return math.sqrt(float(np.mean(truth**2)) / power)


def apply(choices: Sequence[Choice], deviations: Floats, centre: Floats) -> Floats:
    """Return predictions `[N, K]` on the rating scale from deviations `[P, N, K]`."""
    columns = [centre[k] + c.stretch * deviations[c.penalty, :, k] for k, c in enumerate(choices)]
    return np.stack(columns, axis=1)
