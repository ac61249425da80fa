"""Ridge regression on the statistics of hidden states: the linear probe, and the start of the head's linear path.

The features of an utterance are mean and standard deviation over its frames of hidden states, at the encoder's own
frame rate. They are standardised on the training part. Penalty and stretch are chosen per dimension by the CCC of the
validation part. Nothing is random.

`n` training utterances, `N` utterances, `L` hidden states of width `D`, `F = 2 L D` features, `P` penalties, `K`
dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from cvrunner.data.features import FeatureStore
from cvrunner.data.folds import Fold
from cvrunner.data.utterance import Utterance
from cvrunner.errors import Stopped
from cvrunner.verdict.ccc import ccc, defined

Floats = npt.NDArray[np.float64]
ReadLayer = Callable[[int], npt.NDArray[np.float32]]
"""Returns the features `[N, 2 D]` of one hidden state: only one state at a time is in memory."""
PENALTIES = tuple(10.0 ** (power / 2) for power in range(-6, 7))
"""In units of F, the mean squared length of a standardised feature vector, so that they mean the same for every
encoder."""
MOST_TRAINING = 10_000
"""Largest number of training utterances to fit on; of more, this many are taken, evenly spaced. Memory grows with the
square of the number and time with its cube."""


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
    for two matrices `[n, n]`, whatever F is.
    """
    # These take a second to import, which every worker would pay at the top of the file.
    from scipy.linalg import solve
    from sklearn.preprocessing import StandardScaler

    count, features = len(labels), 0
    products, scalers = np.zeros((count, count)), [StandardScaler() for _ in range(layers)]
    # Memory for one more matrix, used for all that follows: large arrays made one by one leave holes in the heap.
    work = np.empty((count, count))
    product = work.view(np.float32)[:, :count]
    for layer, scaler in enumerate(scalers):
        standardised = scaler.fit_transform(read(layer))
        features += standardised.shape[1]
        # Products in float32 take half the time; over the hidden states they are summed in float64.
        products += np.matmul(standardised, standardised.T, out=product)
    products /= features
    centre, duals = labels.mean(axis=0), []
    for penalty in PENALTIES:
        work[:] = products
        np.fill_diagonal(work, products.diagonal() + penalty)
        # In place, which LAPACK does with columns in a row: the matrix is symmetric. The same bits as scikit-learn's
        # KernelRidge, which copies the matrix twice more.
        duals.append(solve(work.T, labels - centre, assume_a="pos", overwrite_a=True, check_finite=False))
    dual = np.concatenate(duals, axis=1) / features
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
        choices.append(max(candidates, key=lambda c: (c.ccc is not None, c.ccc or 0.0, c.penalty)))
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


@dataclass(frozen=True)
class Linear:
    """A linear map from the features of an utterance to the rating scale."""

    weights: Floats
    """`[L, 2 D, K]`"""
    bias: Floats
    """`[K]`"""

    def predict(self, read: ReadLayer) -> Floats:
        """Return predictions `[N, K]`."""
        values: Floats = self.bias + sum(read(layer) @ weights for layer, weights in enumerate(self.weights))
        return values


def chosen(ridge: Ridge, choices: Sequence[Choice]) -> Linear:
    """Return the map with the chosen penalty and stretch of each dimension, for features that are not standardised."""
    penalties, stretch = [c.penalty for c in choices], np.array([c.stretch for c in choices])
    weights, bias = [], ridge.centre
    for scaler, of_all in ridge.layers:
        by_penalty = of_all.reshape(len(of_all), len(PENALTIES), len(choices))
        of_choices = stretch * by_penalty[:, penalties, range(len(choices))]
        weights.append(of_choices / scaler.scale_[:, None])
        bias = bias - scaler.mean_ @ weights[-1]
    return Linear(np.stack(weights), bias)


def fit(
    store: FeatureStore,
    fold: Fold,
    layers: Sequence[int],
    dimensions: Sequence[str],
    threads: int,
    should_stop: Callable[[], bool],
) -> tuple[Linear, list[Choice]]:
    """Fit on the training part of a fold and choose on its validation part, from the statistics of `layers`.

    Raises Stopped.
    """
    parts = (evenly(fold.train), fold.validation)
    train, validation = (reader(store, part, layers, should_stop) for part in parts)
    labels = [labels_of(part, dimensions) for part in parts]
    # The number of threads decides the order of floating-point additions.
    with threadpool_limits(threads):
        ridge = fit_ridge(train, len(layers), labels[0])
        choices = choose(ridge.deviations(validation), labels[1], ridge.centre)
        return chosen(ridge, choices), choices


def labels_of(utterances: Sequence[Utterance], dimensions: Sequence[str]) -> Floats:
    """Return the labels `[N, K]` on the rating scale."""
    return np.array([[u.label(dimension) for dimension in dimensions] for u in utterances])


def evenly(utterances: Sequence[Utterance]) -> list[Utterance]:
    """Return the training utterances to fit on: all of them, or `MOST_TRAINING`."""
    count = min(len(utterances), MOST_TRAINING)
    return [utterances[i * len(utterances) // count] for i in range(count)]


def reader(
    store: FeatureStore, utterances: Sequence[Utterance], layers: Sequence[int], should_stop: Callable[[], bool]
) -> ReadLayer:
    """Return a function that reads the statistics of one of `layers`, for all utterances. It raises Stopped."""

    def read(place: int) -> npt.NDArray[np.float32]:
        if should_stop():
            raise Stopped("stopped while a linear probe was fitted; the same command fits it again")
        features = np.stack([store.read(u)[0, layers[place]].ravel() for u in utterances]).astype(np.float32)
        # Pages of the files would otherwise count as memory of this process, until all of them do.
        store.unmap()
        return features

    return read
