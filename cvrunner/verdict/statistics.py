"""Paired cluster bootstrap of CCCs: how much a score or a difference depends on which dialogues were tested.

Utterances of one dialogue, or of one speaker, resemble each other, so whole clusters are drawn, within their session. A
CCC depends on its data through six sums, so the sums are computed once per cluster and a resample is a weighted sum of
them.

Shapes: `S` seeds, `N` utterances, `K` dimensions, `C` clusters, `R` resamples. `K + 1` stands for the dimensions and,
last, their mean (CCC-Avg).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.generic]

RESAMPLES = 2000
# If more resamples than this have no CCC, the others are a biased selection.
MAX_UNDEFINED_SHARE = 0.01


@dataclass(frozen=True)
class Compared:
    """Predictions of several predictors on the same utterances; each utterance is tested in one fold, or in several."""

    predicted: Mapping[str, Floats]
    """Per predictor: `[S, N, K]`; one without seeds, such as the no-audio floor, has `S = 1`."""
    truth: Floats
    """`[N, K]`; NaN if an utterance has no label in a dimension."""
    fold: Labels
    """`[N]`"""
    session: Labels
    """`[N]`"""
    cluster: Labels
    """`[N]`: dialogue or speaker; the same name in two sessions is two clusters."""
    folds_share_test: bool = False
    """Whether folds may have been tested on the same utterances, so that all of them must get the same draws."""


@dataclass(frozen=True)
class Bootstrap:
    """Resampled CCCs, averaged over folds within each resample; the same draws for every predictor and seed."""

    ccc: Mapping[str, Floats]
    """Per predictor: `[R, S, K + 1]`; NaN where a CCC is undefined."""
    clusters: int
    """Number of clusters, over all folds and sessions."""
    df: int
    """Degrees of freedom of the variance over resamples: clusters minus sessions."""
    reason: str | None
    """Why nothing can be resampled; None if it can."""

    def differences(self, others: list[str], baseline: str, column: int) -> Floats | None:
        """Return resampled differences `[R', M, S]` of `M` predictors from the baseline; None if they are undefined.

        `column`: a dimension, or -1 for CCC-Avg. Resamples without a CCC are left out, unless they are too many.
        """
        if self.reason:
            return None
        draws = np.stack([self.ccc[name][:, :, column] - self.ccc[baseline][:, :, column] for name in others], axis=1)
        defined = np.isfinite(draws).all(axis=(1, 2))
        if defined.mean() < 1 - MAX_UNDEFINED_SHARE:
            return None
        return np.asarray(draws[defined])


def bootstrap(data: Compared, unit: str, resamples: int = RESAMPLES, seed: int = 0) -> Bootstrap:
    """Resample whole clusters within sessions, the same ones for all predictors and seeds.

    From the n clusters of a session, n - 1 are drawn with replacement and weighted n / (n - 1), which makes the
    variance of a sum unbiased; n draws would make it (n - 1) / n of that (Rao and Wu 1988, JASA 83:231). CCCs are
    averaged over seeds, never predictions: the mean of several models is another, better model. `unit` names a cluster
    in `reason`.
    """
    sizes = _clusters_per_session(data)
    clusters = sum(sizes.values())
    if reason := _why_not(sizes, unit):
        return Bootstrap({}, clusters, 0, reason)
    random = np.random.default_rng(seed)
    # Large values would cancel in the sums, and a common shift does not change a CCC.
    centre = np.nanmean(data.truth, axis=0)
    folds = np.unique(data.fold)
    total: dict[str, Floats | float] = dict.fromkeys(data.predicted, 0.0)
    if data.folds_share_test:
        everywhere, session_of = _numbered(data.session, data.cluster)
        of_all = _weights(session_of, resamples, random)
    for fold in folds:
        rows = data.fold == fold
        if data.folds_share_test:
            present, cluster = np.unique(everywhere[rows], return_inverse=True)
            weights = of_all[:, present]
        else:
            cluster, session_of = _numbered(data.session[rows], data.cluster[rows])
            weights = _weights(session_of, resamples, random)
        for name, predicted in data.predicted.items():
            sums = _sums_by_cluster(predicted[:, rows] - centre, data.truth[rows] - centre, cluster)
            ccc = ccc_of_sums(np.tensordot(weights, sums, axes=1))
            total[name] = total[name] + np.concatenate([ccc, ccc.mean(axis=-1, keepdims=True)], axis=-1)
    averaged = {name: np.asarray(value, dtype=np.float64) / len(folds) for name, value in total.items()}
    return Bootstrap(averaged, clusters, clusters - len(sizes), None)


def ccc_of_sums(sums: Floats) -> Floats:
    """Return the CCC from the sums `[..., 6]` of 1, p, t, p^2, t^2, pt (biased moments, as Lin 1989); NaN if undefined.

    The data must have been shifted near zero by a common constant, which does not change the CCC.
    """
    count, p, t, pp, tt, pt = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        covariance = pt / count - (p / count) * (t / count)
        # var(p) + var(t) + (mean(p) - mean(t))^2, written out.
        square = (pp + tt) / count
        denominator = square - 2 * (p / count) * (t / count)
        ccc = np.where(denominator > 1e-12 * square, 2 * covariance / denominator, np.nan)
    return np.asarray(ccc, dtype=np.float64)


def _clusters_per_session(data: Compared) -> dict[tuple[str, str], int]:
    """Return the number of clusters per fold and session; per session alone (fold `""`) if folds share their test."""
    counts: dict[tuple[str, str], int] = {}
    folds = [""] * len(data.fold) if data.folds_share_test else data.fold
    for fold, session, _ in {
        (str(f), str(s), str(c)) for f, s, c in zip(folds, data.session, data.cluster, strict=True)
    }:
        counts[fold, session] = counts.get((fold, session), 0) + 1
    return counts


def _why_not(sizes: Mapping[tuple[str, str], int], unit: str) -> str | None:
    """Return why resampling would show too little spread or none; None if it can be done."""
    if not sizes:
        return "there are no utterances"
    single = sorted({session for (_, session), count in sizes.items() if count == 1})
    if single:
        return f"session {', '.join(single)} has a single {unit} in its test set"
    return None


def _numbered(session: Labels, cluster: Labels) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Number clusters: return the cluster of each utterance `[N]` and the session of each cluster `[C]`."""
    _, session_number = np.unique(session, return_inverse=True)
    names, cluster_number = np.unique(cluster, return_inverse=True)
    # A name may occur in several sessions, so the pair is what is numbered.
    codes, number = np.unique(session_number * len(names) + cluster_number, return_inverse=True)
    return number, codes // len(names)


def _sums_by_cluster(predicted: Floats, truth: Floats, cluster: npt.NDArray[np.intp]) -> Floats:
    """Return sums `[C, S, K, 6]` over the utterances of each cluster: predictions `[S, N, K]`, truth `[N, K]`."""
    known = ~np.isnan(truth)
    t = np.broadcast_to(np.where(known, truth, 0.0), predicted.shape)
    p = np.where(known, predicted, 0.0)
    columns = np.stack([np.broadcast_to(known, p.shape), p, t, p * p, t * t, p * t], axis=-1)
    order = np.argsort(cluster, kind="stable")
    starts = np.searchsorted(cluster[order], np.arange(cluster.max() + 1))
    return np.asarray(np.add.reduceat(np.moveaxis(columns, -3, 0)[order], starts, axis=0))


def _weights(session_of: npt.NDArray[np.intp], resamples: int, random: np.random.Generator) -> Floats:
    """Return the weight of each cluster in each resample, `[R, C]`."""
    weights = np.empty((resamples, len(session_of)))
    for session in np.unique(session_of):
        columns = np.flatnonzero(session_of == session)
        n = len(columns)
        draws = random.multinomial(n - 1, np.full(n, 1 / n), size=resamples)
        weights[:, columns] = draws * (n / (n - 1))
    return weights
