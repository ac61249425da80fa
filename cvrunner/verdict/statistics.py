"""Uncertainty of a CCC difference: paired cluster bootstrap, corrected t over folds, sign count.

Utterances of one dialogue resemble each other, so whole dialogues are drawn, within their session. A CCC depends on its
data through six sums, so the sums are computed once per dialogue and a resample is a weighted sum of them.

Shapes: `S` seeds, `N` utterances, `K` dimensions, `C` dialogues, `R` resamples. `K + 1` stands for the dimensions and,
last, their mean (CCC-Avg).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cvrunner.records.results import CorrectedT, Interval, SignCount

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.generic]

RESAMPLES = 2000
LEVEL = 0.95
# z(0.975) + z(0.80): a true difference of this many standard errors is found in 80 % of replications.
DETECTABLE_STANDARD_ERRORS = 1.959964 + 0.841621
# If more resamples than this have no CCC, the others are a biased selection.
MAX_UNDEFINED_SHARE = 0.01


@dataclass(frozen=True)
class Paired:
    """Out-of-fold predictions of two conditions on the same utterances; each utterance is tested in one fold."""

    baseline: Floats
    """`[S, N, K]`"""
    other: Floats
    """`[S, N, K]`"""
    truth: Floats
    """`[N, K]`; NaN if an utterance has no label in a dimension."""
    fold: Labels
    """`[N]`"""
    session: Labels
    """`[N]`"""
    dialogue: Labels
    """`[N]`; the same name in two sessions is two dialogues."""


@dataclass(frozen=True)
class Bootstrap:
    """Resampled differences, other minus baseline, averaged over seeds within each resample."""

    fold_mean: Floats
    """`[R, K + 1]`: mean over folds of the per-fold CCC difference."""
    pooled: Floats
    """`[R, K + 1]`: difference of the CCC of all utterances together."""
    reason: str | None
    """Why there is no interval; None if there is one."""

    def interval(self, column: int, pooled: bool = False, level: float = LEVEL) -> Interval | None:
        """Return the percentile interval of one dimension, or of CCC-Avg for the last column; None if undefined."""
        values = self.fold_mean[:, column]
        if pooled:
            values = self.pooled[:, column]
        defined = values[np.isfinite(values)]
        if self.reason or len(defined) < (1 - MAX_UNDEFINED_SHARE) * len(values):
            return None
        low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
        standard_error = float(defined.std(ddof=1))
        return Interval(
            low=float(low),
            high=float(high),
            standard_error=standard_error,
            detectable=DETECTABLE_STANDARD_ERRORS * standard_error,
            level=level,
            resamples=len(values),
        )


def paired_bootstrap(data: Paired, resamples: int = RESAMPLES, seed: int = 0) -> Bootstrap:
    """Resample dialogues within sessions, the same ones for both conditions and all seeds.

    From the n dialogues of a session, n - 1 are drawn with replacement and weighted n / (n - 1), which makes the
    variance of a sum unbiased; n draws would make it (n - 1) / n of that (Rao and Wu 1988, JASA 83:231). The interval
    covers the choice of test dialogues for the models as trained, but neither new sessions nor another training.
    """
    if reason := _why_not(data):
        empty = np.full((0, data.truth.shape[1] + 1), np.nan)
        return Bootstrap(empty, empty, reason)
    random = np.random.default_rng(seed)
    # Large values would cancel in the moments, and a common shift does not change a CCC.
    centre = np.nanmean(data.truth, axis=0)
    both = np.stack([data.baseline, data.other]) - centre
    folds = np.unique(data.fold)
    fold_sum: Floats | float = 0.0
    all_moments: Floats | float = 0.0
    for fold in folds:
        rows = data.fold == fold
        cluster, session_of = _clusters(data.session[rows], data.dialogue[rows])
        moments = _moments_by_cluster(both[:, :, rows], data.truth[rows] - centre, cluster)
        resampled = np.tensordot(_weights(session_of, resamples, random), moments, axes=1)
        fold_sum = fold_sum + _difference(resampled)
        # Sums of all folds together give the pooled CCC of a resample.
        all_moments = all_moments + resampled
    return Bootstrap(np.asarray(fold_sum) / len(folds), _difference(np.asarray(all_moments)), None)


def ccc_of_moments(moments: Floats) -> Floats:
    """Return the CCC from the sums `[..., 6]` of 1, p, t, p^2, t^2, pt (biased moments, as Lin 1989); NaN if undefined.

    The data must have been shifted near zero by a common constant, which does not change the CCC.
    """
    count, p, t, pp, tt, pt = np.moveaxis(moments, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        covariance = pt / count - (p / count) * (t / count)
        # var(p) + var(t) + (mean(p) - mean(t))^2, written out.
        square = (pp + tt) / count
        denominator = square - 2 * (p / count) * (t / count)
        ccc = np.where(denominator > 1e-12 * square, 2 * covariance / denominator, np.nan)
    return np.asarray(ccc, dtype=np.float64)


def _why_not(data: Paired) -> str | None:
    """Return why resampling would show too little spread or none; None if it can be done."""
    if not len(data.truth):
        return "there are no utterances"
    pairs = {(str(f), str(s), str(d)) for f, s, d in zip(data.fold, data.session, data.dialogue, strict=True)}
    counts: dict[tuple[str, str], int] = {}
    for fold, session, _ in pairs:
        counts[fold, session] = counts.get((fold, session), 0) + 1
    single = sorted({session for (_, session), count in counts.items() if count == 1})
    if single:
        return f"session {', '.join(single)} has a single dialogue in its test set"
    return None


def _clusters(session: Labels, dialogue: Labels) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Number dialogues: return the dialogue of each utterance `[N]` and the session of each dialogue `[C]`."""
    _, session_number = np.unique(session, return_inverse=True)
    dialogues, dialogue_number = np.unique(dialogue, return_inverse=True)
    # A dialogue name may occur in several sessions, so the pair is what is numbered.
    codes, cluster = np.unique(session_number * len(dialogues) + dialogue_number, return_inverse=True)
    return cluster, codes // len(dialogues)


def _moments_by_cluster(predicted: Floats, truth: Floats, cluster: npt.NDArray[np.intp]) -> Floats:
    """Return sums `[C, ..., K, 6]` over the utterances of each dialogue: predictions `[..., N, K]`, truth `[N, K]`."""
    known = ~np.isnan(truth)
    t = np.broadcast_to(np.where(known, truth, 0.0), predicted.shape)
    p = np.where(known, predicted, 0.0)
    columns = np.stack([np.broadcast_to(known, p.shape), p, t, p * p, t * t, p * t], axis=-1)
    columns = np.moveaxis(columns, -3, 0)
    total = np.zeros((cluster.max() + 1, *columns.shape[1:]))
    # Unlike `total[cluster] += columns`, this adds every utterance of a dialogue.
    np.add.at(total, cluster, columns)
    return total


def _weights(session_of: npt.NDArray[np.intp], resamples: int, random: np.random.Generator) -> Floats:
    """Return the weight of each dialogue in each resample, `[R, C]`."""
    weights = np.empty((resamples, len(session_of)))
    for session in np.unique(session_of):
        columns = np.flatnonzero(session_of == session)
        n = len(columns)
        draws = random.multinomial(n - 1, np.full(n, 1 / n), size=resamples)
        weights[:, columns] = draws * (n / (n - 1))
    return weights


def _difference(moments: Floats) -> Floats:
    """Return other minus baseline, mean over seeds, `[R, K + 1]`, from sums `[R, 2, S, K, 6]`."""
    ccc = ccc_of_moments(moments)
    ccc = np.concatenate([ccc, ccc.mean(axis=-1, keepdims=True)], axis=-1)
    return np.asarray((ccc[:, 1] - ccc[:, 0]).mean(axis=1), dtype=np.float64)


# --- over folds ------------------------------------------------------------------------------------------------------


def corrected_t(differences: Floats, test_train_ratio: float) -> CorrectedT | None:
    """Test the mean of per-fold differences `[F]` with F - 1 degrees of freedom, two-sided.

    Training sets of folds overlap, so the variance is multiplied by `1/F + test/train` instead of `1/F` (Nadeau and
    Bengio 2003, Machine Learning 52:239). None for fewer than two folds or differences that are all equal.
    """
    # scipy.stats takes a second to import, and most commands compute no test.
    from scipy import stats

    n = len(differences)
    if n < 2 or np.ptp(differences) == 0 or not np.isfinite(differences).all():
        return None
    t = differences.mean() / np.sqrt((1 / n + test_train_ratio) * differences.var(ddof=1))
    p = float(2 * stats.t.sf(abs(t), n - 1))
    return CorrectedT(t=float(t), p=p, folds=n, test_train_ratio=test_train_ratio)


def sign_count(differences: Floats) -> SignCount:
    """Count folds above and below zero; with the exact two-sided p, and the smallest that this many folds can reach."""
    from scipy import stats

    above, below = int((differences > 0).sum()), int((differences < 0).sum())
    p = 1.0
    if untied := above + below:
        p = float(stats.binomtest(above, untied).pvalue)
    return SignCount(above=above, below=below, p=p, smallest_p=min(1.0, 2 * 0.5 ** len(differences)))
