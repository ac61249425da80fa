"""The two levels of a comparison: what holds on this corpus, and what can be expected for new speakers.

A difference between two conditions varies with the test dialogues, with the randomness of training (the seed) and with
the speakers. Level 1 takes sessions and training sets as given and covers the first two; level 2 covers all three.

Shapes: `M` conditions compared with one baseline, `F` folds, `S` seeds, `R` resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cvrunner.records.summary import CorpusLevel, Interval, SpeakersLevel

Floats = npt.NDArray[np.float64]

ALPHA = 0.05
POWER = 0.80
# One fold has few degrees of freedom: with two seeds its interval covers only 87 %.
MIN_SEEDS, MIN_SEEDS_ONE_FOLD = 2, 3
MAX_T_DRAWS = 100_000


def too_few_seeds(folds: int, seeds: int) -> str | None:
    """Return why the variance of training cannot be estimated; None if it can."""
    if folds == 1 and seeds < MIN_SEEDS_ONE_FOLD:
        return f"one fold needs at least {MIN_SEEDS_ONE_FOLD} seeds, so that the randomness of training can be measured"
    if seeds < MIN_SEEDS:
        return f"the randomness of training can only be measured with at least {MIN_SEEDS} seeds"
    return None


def corpus_levels(differences: Floats, draws: Floats, df_clusters: int, margin: float) -> list[CorpusLevel]:
    """Return level 1 for the differences `[M, F, S]` and the bootstrap `draws [R, M, S]` of their means over folds.

    Variance V = B + T. B: of the draws, averaged over seeds. T = sum over folds of s_f^2 / (S F^2), with s_f^2 the
    variance over the seeds of fold f, minus what other test clusters alone would make the seeds differ: that part is
    in B, and is measured by how the seeds of one draw differ from their mean (with one fold nothing is subtracted).
    Degrees of freedom, with T as it is before the subtraction: Welch (1938, Biometrika 29:350) and Satterthwaite (1946,
    Biometrics Bulletin 2:110). With several conditions the intervals are simultaneous, from a multivariate t with the
    covariance B + T and the smallest degrees of freedom (Dunnett 1955, JASA 50:1096). Needs S >= 2.
    """
    _, folds, seeds = differences.shape
    clusters, raw = np.atleast_2d(np.cov(draws.mean(axis=2), rowvar=False)), _training_covariance(differences)
    of_clusters, of_seeds = np.diag(clusters), np.diag(raw)
    in_both = draws.var(axis=0, ddof=1) - draws.mean(axis=2, keepdims=True).var(axis=0, ddof=1)
    # With one fold T has so few degrees of freedom that subtracting from it would cost coverage.
    counted_twice = in_both.sum(axis=1) / (seeds * (seeds - 1)) if folds > 1 else 0.0
    training = np.maximum(0.0, of_seeds - counted_twice)
    variance, df_training = of_clusters + training, folds * (seeds - 1)
    df = min(
        _satterthwaite(v, (b, df_clusters), (t, df_training))
        for v, b, t in zip(variance, of_clusters, of_seeds, strict=True)
    )
    correlation = _correlation(clusters + raw)
    wide, narrow = (critical_value(level, df, correlation) for level in (1 - ALPHA, 1 - 2 * ALPHA))
    # What one more seed of every trial would give: T shrinks, and its degrees of freedom grow.
    shrunk = seeds / (seeds + 1)
    levels = []
    for m, mean in enumerate(differences.mean(axis=(1, 2))):
        error = float(np.sqrt(variance[m]))
        more = float(of_clusters[m] + shrunk * training[m])
        more_df = _satterthwaite(more, (of_clusters[m], df_clusters), (shrunk * of_seeds[m], folds * seeds))
        levels.append(
            CorpusLevel(
                interval=_interval(mean, wide * error, 1 - ALPHA),
                equivalence=_interval(mean, narrow * error, 1 - 2 * ALPHA),
                standard_error=error,
                df=df,
                p=p_value(float(mean), error, df, correlation),
                detectable=detectable(error, df, wide),
                equality_power=_equality_power(error, df, narrow, margin),
                dialogues_sd=float(np.sqrt(of_clusters[m])),
                training_sd=float(np.sqrt(training[m])),
                sessions_sd=_sessions_sd(differences[m].mean(axis=1), float(variance[m])),
                one_more_seed=critical_value(1 - ALPHA, more_df, correlation) * float(np.sqrt(more)),
            )
        )
    return levels


def speakers_level(
    by_fold: Floats, test_train_ratio: float, margin: float, comparisons: int = 1, shared: tuple[float, int] = (0.0, 1)
) -> SpeakersLevel | None:
    """Return level 2 for the differences `[F]`, each averaged over seeds; None for one fold or undefined values.

    The training sets of folds overlap, so the variance of the mean is taken as (1/F + test/train) s^2 (Nadeau and
    Bengio 2003, Machine Learning 52:239), with F - 1 degrees of freedom. The same t, as a posterior, gives the
    probabilities that the true difference is below, within and above the margin (Benavoli et al. 2017, JMLR 18:77).
    With several `comparisons` the interval and p are adjusted by Bonferroni. `shared`: a variance that all differences
    have in common and that their spread cannot show, with its degrees of freedom.
    """
    # scipy.stats takes a second to import, and most commands compute no test.
    from scipy import stats

    folds = len(by_fold)
    if folds < 2 or not np.isfinite(by_fold).all():
        return None
    mean, between = float(by_fold.mean()), float((1 / folds + test_train_ratio) * by_fold.var(ddof=1))
    error = float(np.sqrt(between + shared[0]))
    if error == 0:
        return None
    df, level = folds - 1, 1 - ALPHA / comparisons
    if shared[0]:
        df = int(_satterthwaite(error**2, (between, df), shared))
    critical = critical_value(level, df)
    worse, up_to_margin = (float(stats.t.cdf((edge - mean) / error, df)) for edge in (-margin, margin))
    # Of equal sessions, each fold trains on all but two; one more session also enlarges every training set.
    ratio = test_train_ratio * (folds - 2) / (folds - 1) if folds > 2 else test_train_ratio
    more = critical_value(level, df + 1) * float(np.sqrt((1 / (folds + 1) + ratio) * by_fold.var(ddof=1) + shared[0]))
    return SpeakersLevel(
        interval=_interval(mean, critical * error, 1 - ALPHA),
        t=mean / error,
        df=df,
        p=min(1.0, comparisons * p_value(mean, error, df)),
        folds=folds,
        test_train_ratio=test_train_ratio,
        detectable=detectable(error, df, critical),
        worse=worse,
        equal=up_to_margin - worse,
        better=1 - up_to_margin,
        one_more_session=more,
    )


def critical_value(level: float, df: float, correlation: Floats | None = None) -> float:
    """Return the two-sided critical value of Student's t, or of the maximum |t| of correlated ones, at a level."""
    from scipy import stats

    if correlation is None or len(correlation) == 1:
        return float(stats.t.ppf((1 + level) / 2, df))
    return float(np.quantile(_max_t(correlation, df), level))


def p_value(mean: float, error: float, df: float, correlation: Floats | None = None) -> float:
    """Return the two-sided p of a zero difference; with a correlation, adjusted for all `M` differences (max-t)."""
    from scipy import stats

    if error == 0:
        return 1.0 if mean == 0 else 0.0
    t = abs(mean) / error
    if correlation is None or len(correlation) == 1:
        return float(2 * stats.t.sf(t, df))
    return float((np.count_nonzero(_max_t(correlation, df) >= t) + 1) / (MAX_T_DRAWS + 1))


def detectable(error: float, df: float, critical: float) -> float:
    """Return the smallest true difference that `|t| > critical` finds with 80 % power, by the noncentral t.

    The standard error is divided by c4, its expected share of the true one with `df` degrees of freedom: the root of an
    unbiased variance is too small on average.
    """
    from scipy import optimize, special, stats

    def excess(shift: float) -> float:
        return float(stats.nct.sf(critical, df, shift)) - POWER

    c4 = np.sqrt(2 / df) * np.exp(special.gammaln((df + 1) / 2) - special.gammaln(df / 2))
    # The power grows with the shift, from about the level at 0 to 1.
    return float(error / c4) * float(optimize.brentq(excess, 1e-3, 4 * critical + 10, xtol=1e-6))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values adjusted for their number (Holm 1979, Scandinavian Journal of Statistics 6:65)."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.minimum(1, np.maximum.accumulate(np.asarray(p_values, dtype=np.float64)[order] * factors))
    result = np.empty_like(adjusted)
    result[order] = adjusted
    return [float(p) for p in result]


def _training_covariance(differences: Floats) -> Floats:
    """Return T `[M, M]`: the covariance, over the seeds of each fold, of the mean difference over folds and seeds."""
    _, folds, seeds = differences.shape
    deviation = differences - differences.mean(axis=2, keepdims=True)
    within = np.einsum("mfs,nfs->mn", deviation, deviation) / (seeds - 1)
    return np.asarray(within / (seeds * folds**2))


def _satterthwaite(variance: float, *parts: tuple[float, float]) -> float:
    """Return the degrees of freedom of a variance estimated from parts, each with its own degrees of freedom."""
    spread = sum(part**2 / df for part, df in parts)
    if spread == 0:
        return float(parts[0][1])
    # Never fewer than the part with the fewest has by itself.
    return float(max(variance**2 / spread, min(df for _, df in parts)))


def _sessions_sd(by_fold: Floats, variance: float) -> float | None:
    """Return the standard deviation over folds beyond what dialogues and training explain; None for one fold."""
    folds = len(by_fold)
    if folds < 2:
        return None
    return float(np.sqrt(max(0.0, by_fold.var(ddof=1) - folds * variance)))


def _correlation(covariance: Floats) -> Floats:
    deviation = np.sqrt(np.diag(covariance))
    # A difference that is exactly constant has no variance and correlates with nothing.
    safe = np.where(deviation > 0, deviation, 1.0)
    correlation = covariance / np.outer(safe, safe)
    np.fill_diagonal(correlation, 1.0)
    return np.asarray(correlation)


def _max_t(correlation: Floats, df: float) -> Floats:
    """Draw the maximum absolute value of correlated t variables with a common denominator; always the same draws."""
    random = np.random.default_rng(0)
    normal = random.multivariate_normal(np.zeros(len(correlation)), correlation, MAX_T_DRAWS, method="eigh")
    return np.asarray(np.abs(normal).max(axis=1) / np.sqrt(random.chisquare(df, MAX_T_DRAWS) / df))


def _equality_power(error: float, df: float, critical: float, margin: float) -> float:
    """Return the probability of finding practical equality if the conditions are truly equal.

    Found if |mean| + critical x error < margin; the error is taken as estimated.
    """
    from scipy import stats

    if error == 0:
        return 1.0
    room = margin / error - critical
    return float(max(0.0, 2 * stats.t.cdf(room, df) - 1))


def _interval(mean: float, half_width: float, level: float) -> Interval:
    return Interval(low=float(mean) - half_width, high=float(mean) + half_width, level=level)
