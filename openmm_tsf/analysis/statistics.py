"""Effective sample sizes, distances between histograms, correlation: plain numbers, numpy only.

Standard errors of correlated series are made of these in ``analysis.errors``; how replicas and
walkers mix is in ``mixing``.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

#: Added to every bin's probability in `kl_divergence`, so that an empty bin costs a finite amount.
KL_EPSILON = 1e-10
#: Fewer effective samples than this: a figure is not known, nor is its error.
MIN_EFFECTIVE_SAMPLES = 100


def n_eff(probability: float, stderr: float) -> float:
    """Independent samples that would give this standard error: p(1-p) / SE².

    Returns 0 where the error is not known (NaN) or the state was never left (p = 0 or 1): such a
    series says nothing about how well the probability is known.
    """
    variance = probability * (1.0 - probability)
    if not (np.isfinite(stderr) and stderr > 0 and variance > 0):
        return 0.0
    return float(variance / stderr**2)


def logit_free_energy(probability: float, stderr: float) -> tuple[float, float]:
    """Free-energy difference -ln[p/(1-p)] in kT and its standard error SE / [p(1-p)].

    The error is the delta method's, so it holds while it is well below 1 kT. Where p is 0 or 1 the
    value is infinite and the error NaN.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability: expected a number in [0, 1], got {probability}")
    if probability in (0.0, 1.0):
        return (np.inf if probability == 0.0 else -np.inf), np.nan
    value = float(np.log1p(-probability) - np.log(probability))
    return value, float(stderr / (probability * (1.0 - probability)))


@dataclass(frozen=True)
class EffectiveSampleSize:
    """An effective sample size and what it hangs on.

    Attributes
    ----------
    fraction
        Effective over actual number of samples, in (0, 1].
    largest_weight
        The largest normalised weight: near 1, the figure rests on a single sample.
    n_samples
        Number of weights.
    """

    fraction: float
    largest_weight: float
    n_samples: int


def _checked_log_weights(log_weights: npt.ArrayLike) -> Array:
    values = np.asarray(log_weights, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"log_weights: expected a non-empty vector, got shape {values.shape}")
    if np.isnan(values).any() or np.isposinf(values).any():
        raise ValueError("log_weights: expected finite values or -inf, got NaN or +inf")
    if np.isneginf(values).all():
        raise ValueError("log_weights: every weight is zero")
    return values


def reverse_ess(log_weights: npt.ArrayLike) -> EffectiveSampleSize:
    """Kish's effective sample size (Σw)² / (N Σw²) of samples drawn from the model, unclipped.

    Parameters
    ----------
    log_weights
        ln[target / model] [N] at samples of the model, up to a constant; -inf is a weight of zero.
    """
    values = _checked_log_weights(log_weights)
    weights = np.exp(values - values.max())
    total = weights.sum()
    return EffectiveSampleSize(
        fraction=float(total**2 / (values.size * np.sum(weights**2))),
        largest_weight=float(weights.max() / total),
        n_samples=values.size,
    )


def reverse_ess_stderr(log_weights: npt.ArrayLike) -> float:
    """Standard error of the fraction that `reverse_ess` gives, by the delta method.

    With m₁ = E[w] and m₂ = E[w²], d ln(m₁²/m₂) = 2 dw/m₁ - d(w²)/m₂. It is as blind as the
    fraction itself to weights that were never drawn. NaN for a single weight.

    Parameters
    ----------
    log_weights
        As for `reverse_ess`: of independent draws.
    """
    values = _checked_log_weights(log_weights)
    if values.size == 1:
        return np.nan
    weights = np.exp(values - values.max())
    first, second = weights.mean(), np.mean(weights**2)
    influence = 2.0 * weights / first - weights**2 / second
    return float(first**2 / second * influence.std(ddof=1) / np.sqrt(values.size))


def forward_ess(log_weights: npt.ArrayLike) -> EffectiveSampleSize:
    """Effective sample size 1 / (E_p[w] E_p[1/w]) from samples of the target.

    With w = target / model up to a constant, E_q[w]² / E_q[w²] = Z / E_p[w] and 1/Z = E_p[1/w]:
    the same quantity as `reverse_ess`, but it sees the modes that the model has dropped.

    Parameters
    ----------
    log_weights
        ln[target / model] [N] at samples of the target, up to a constant.
    """
    values = _checked_log_weights(log_weights)
    if np.isneginf(values).any():
        raise ValueError("log_weights: a sample of the target has target density zero")
    high, low = values.max(), values.min()
    weights = np.exp(values - high)
    log_mean = high + np.log(np.mean(weights))
    log_mean_inverse = -low + np.log(np.mean(np.exp(low - values)))
    return EffectiveSampleSize(
        fraction=float(np.exp(-log_mean - log_mean_inverse)),
        largest_weight=float(weights.max() / weights.sum()),
        n_samples=values.size,
    )


def torus_histogram(
    phi: npt.ArrayLike, psi: npt.ArrayLike, bins: int = 64, weights: npt.ArrayLike | None = None
) -> Array:
    """Probabilities [bins, bins] of (φ, ψ) in [-π, π), first axis φ; they sum to one.

    Parameters
    ----------
    phi, psi
        Angles in rad, any shape; wrapped.
    bins
        Bins along each axis.
    weights
        Weights of the samples; equal when left out.
    """
    first, second = np.ravel(np.asarray(phi)), np.ravel(np.asarray(psi))
    if first.size == 0 or first.size != second.size:
        raise ValueError(f"phi, psi: expected equally many angles, got {first.size}, {second.size}")
    flat = np.ravel_multi_index((_bin_index(first, bins), _bin_index(second, bins)), (bins, bins))
    w = None if weights is None else np.ravel(np.asarray(weights, dtype=np.float64))
    counts = np.bincount(flat, weights=w, minlength=bins * bins).astype(np.float64)
    return (counts / counts.sum()).reshape(bins, bins)


def _bin_index(angle: npt.NDArray[np.floating], bins: int) -> npt.NDArray[np.int64]:
    fraction = np.mod(angle.astype(np.float64) + np.pi, 2 * np.pi) / (2 * np.pi)
    # np.mod may round up to 2π itself; that is the first bin again.
    return (fraction * bins).astype(np.int64) % bins


def total_variation(p: npt.ArrayLike, q: npt.ArrayLike) -> float:
    """½ Σ|p - q| of two histograms of probabilities: 0 when equal, 1 when disjoint."""
    first, second = _checked_histograms(p, q)
    return float(0.5 * np.abs(first - second).sum())


def kl_divergence(
    reference: npt.ArrayLike, sample: npt.ArrayLike, epsilon: float = KL_EPSILON
) -> float:
    """KL(reference ‖ sample) = Σ p ln[(p + ε)/(q + ε)] of two histograms of probabilities, in nat.

    ε is added to the probability of a bin (not to a density).
    """
    p, q = _checked_histograms(reference, sample)
    return float(np.sum(p * np.log((p + epsilon) / (q + epsilon))))


def _checked_histograms(p: npt.ArrayLike, q: npt.ArrayLike) -> tuple[Array, Array]:
    first, second = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"histograms: expected equal shapes, got {first.shape}, {second.shape}")
    for name, histogram in (("first", first), ("second", second)):
        if not (np.all(histogram >= 0) and np.isclose(histogram.sum(), 1.0)):
            raise ValueError(f"{name} histogram: expected probabilities that sum to one")
    return first, second


def weighted_mean(values: npt.ArrayLike, log_weights: npt.ArrayLike) -> tuple[float, float]:
    """Self-normalised mean Σw·a / Σw of independent samples and its standard error.

    Parameters
    ----------
    values
        The observable [N].
    log_weights
        Log weights [N], up to a constant.

    Returns
    -------
    mean, stderr
        The error is the delta method's, sqrt(Σ w²(a - mean)²) / Σw.
    """
    a = np.asarray(values, dtype=np.float64)
    logs = _checked_log_weights(log_weights)
    if a.shape != logs.shape:
        raise ValueError(f"values: expected the shape {logs.shape} of log_weights, got {a.shape}")
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()
    mean = float(np.sum(weights * a))
    return mean, float(np.sqrt(np.sum(weights**2 * (a - mean) ** 2)))


def finite_series(series: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """A series of values of W walkers as an array [n, W].

    Raises
    ------
    ValueError
        If the series is empty, not [n, W], or not finite.
    """
    values = np.asarray(series, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"series: expected a non-empty array [n, W], got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("series: expected finite values")
    return values


def statistical_inefficiency(series: npt.ArrayLike) -> float:
    """g = 1 + 2τ in saved iterations, over all walkers with their pooled mean.

    Walkers are independent of each other (swaps act between the rungs of one walker), so they
    share one correlation function around one mean. A walker that never leaves a basin then counts
    as correlated over its whole length instead of as perfectly sampled. The estimator, and where
    it cuts the sum (the first C(t) ≤ 0 beyond t = 10), are those of pymbar's
    ``timeseries.statistical_inefficiency_multiple`` (Chodera et al., JCTC 3, 26 (2007)), whose
    value this reproduces to rounding; sums by FFT are some fifty times faster.

    Parameters
    ----------
    series
        Values [n, W].

    Returns
    -------
    g
        At least 1, at most n (all of a walker counts as one sample); NaN for a constant series.

    Raises
    ------
    ValueError
        If the series is empty, not [n, W], or not finite.
    """
    values = finite_series(series)
    if np.ptp(values) == 0.0:
        return np.nan
    n, n_walkers = values.shape
    fluctuation = values - values.mean()
    length = 1 << (2 * n - 1).bit_length()  # zero padding: no wrap-around
    power = np.zeros(length // 2 + 1)
    for walker in fluctuation.T:  # one at a time: a long run's transforms need not fit at once
        power += np.abs(np.fft.rfft(walker, length)) ** 2
    lag = np.arange(1, max(n - 1, 1))
    sums = np.fft.irfft(power, length)[lag]
    correlation = sums / ((n - lag) * n_walkers * fluctuation.var())
    crossed = np.flatnonzero((correlation <= 0.0) & (lag > 10))
    end = crossed[0] if crossed.size else lag.size
    g = 1.0 + 2.0 * np.sum(correlation[:end] * (1.0 - lag[:end] / n))
    return float(np.clip(g, 1.0, n))


def between_walker_stderr(series: npt.ArrayLike) -> float:
    """Standard error of the overall mean from the spread of the walkers' own means.

    Parameters
    ----------
    series
        Values [n, W] of W independent walkers.

    Returns
    -------
    stderr
        std(walker means) / √W; NaN for a single walker.
    """
    values = np.asarray(series, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"series: expected a non-empty array [n, W], got shape {values.shape}")
    n_walkers = values.shape[1]
    if n_walkers == 1:
        return np.nan
    return float(values.mean(axis=0).std(ddof=1) / np.sqrt(n_walkers))


def group_means(series: npt.ArrayLike, n_groups: int = 24) -> Array:
    """Means over groups of samples that are taken as independent of each other: [G, ...].

    A walker is a group. Fewer than `n_groups` walkers are cut into equally many consecutive blocks
    each, so that there are at least `n_groups` groups where the length allows.

    Parameters
    ----------
    series
        Values [n, W, ...].
    n_groups
        Number of groups aimed at.
    """
    values = np.asarray(series, dtype=np.float64)
    if values.ndim < 2 or values.shape[0] == 0:
        raise ValueError(f"series: expected a non-empty array [n, W, ...], got {values.shape}")
    n, n_walkers = values.shape[:2]
    n_blocks = max(1, min(n, -(-n_groups // n_walkers)))
    length = n // n_blocks
    blocks = values[n - n_blocks * length :].reshape(n_blocks, length, *values.shape[1:])
    return blocks.mean(axis=1).reshape(n_blocks * n_walkers, *values.shape[2:])
