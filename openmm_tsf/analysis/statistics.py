"""Effective sample sizes, distances between histograms, correlation times: numbers from arrays.

Everything here takes and returns plain numbers and numpy arrays. Standard errors of correlated
series are built on these functions in `openmm_tsf.analysis.uncertainty`; how well replicas and
walkers mix is in `openmm_tsf.analysis.mixing`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtr  # type: ignore[import-untyped]

from openmm_tsf.units import RADIAN, as_array
from openmm_tsf.utils.wells import angle_bins

Array = npt.NDArray[np.float64]

#: Added to the probability of every bin in `kl_divergence`: an empty bin costs a finite amount.
KL_EPSILON = 1e-10
#: With fewer effective samples than this, neither an estimate nor its error is trusted.
MIN_EFFECTIVE_SAMPLES = 100
#: Intervals of a population that start below it have an upper bound only.
SMALLEST_POPULATION = 1e-6
#: Walkers shorter than this, in correlation times g, still depend on where they started.
MIN_CORRELATION_TIMES = 4


def n_eff(probability: float, stderr: float) -> float:
    """Return the number of independent samples with this standard error: p(1-p) / SE².

    It is 0 where the error is not known (NaN) or the state was never entered or left (p = 0 or 1):
    such a series does not say how well the probability is known.
    """
    variance = probability * (1.0 - probability)
    if not (np.isfinite(stderr) and stderr > 0 and variance > 0):
        return 0.0
    return float(variance / stderr**2)


def logit_free_energy(probability: float, stderr: float) -> tuple[float, float]:
    """Return the free-energy difference -ln[p/(1-p)] in kT and its standard error SE / [p(1-p)].

    The error is that of the delta method and holds while it is well below 1 kT. Where p is 0 or 1,
    the value is infinite and the error NaN.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability: expected a number in [0, 1], got {probability}")
    if probability in (0.0, 1.0):
        return (np.inf if probability == 0.0 else -np.inf), np.nan
    value = float(np.log1p(-probability) - np.log(probability))
    return value, float(stderr / (probability * (1.0 - probability)))


def as_normal(t: float, dof: float) -> float:
    """Return the normal deviate that is as improbable as t of Student's distribution.

    At most 37.5 in size, where probabilities underflow: it is finite, also in JSON.

    Examples
    --------
    >>> from openmm_tsf.analysis.statistics import as_normal
    >>> round(as_normal(-5.0, 7.0), 2)
    -3.16
    """
    tail = max(float(stdtr(dof, -abs(t))), float(np.finfo(np.float64).tiny))
    return float(np.copysign(ndtri(tail), t))


@dataclass(frozen=True)
class EffectiveSampleSize:
    """An effective sample size and the weights it rests on.

    Examples
    --------
    >>> from openmm_tsf.analysis.statistics import reverse_ess
    >>> reverse_ess([0.0, 0.0, -float("inf"), -float("inf")])
    EffectiveSampleSize(fraction=0.5, largest_weight=0.5, n_samples=4)
    """

    fraction: float  # effective over actual number of samples, in (0, 1]
    largest_weight: float  # normalised: near 1, the estimate rests on a single sample
    n_samples: int


def _check_log_weights(log_weights: npt.ArrayLike) -> Array:
    values = np.asarray(log_weights, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"log_weights: expected a non-empty vector, got shape {values.shape}")
    if np.isnan(values).any() or np.isposinf(values).any():
        raise ValueError("log_weights: expected finite values or -inf, got NaN or +inf")
    if np.isneginf(values).all():
        raise ValueError("log_weights: expected at least one weight above zero")
    return values


def reverse_ess(log_weights: npt.ArrayLike) -> EffectiveSampleSize:
    """Return Kish's effective sample size (Σw)² / (N Σw²) of samples of the model, unclipped.

    Kish, Survey Sampling (1965). Log weights are ln[target / model] [N], up to a constant; -inf is
    a weight of zero. It does not see modes of the target that the model never draws.
    """
    values = _check_log_weights(log_weights)
    weights = np.exp(values - values.max())
    total = weights.sum()
    fraction = float(total**2 / (values.size * np.sum(weights**2)))
    return EffectiveSampleSize(fraction, float(weights.max() / total), values.size)


def reverse_ess_stderr(log_weights: npt.ArrayLike) -> float:
    """Return the standard error of the fraction that `reverse_ess` gives for independent draws.

    By the delta method: with m₁ = E[w] and m₂ = E[w²], d ln(m₁²/m₂) = 2 dw/m₁ - d(w²)/m₂. It does
    not see weights that were never drawn either. NaN for a single weight.
    """
    values = _check_log_weights(log_weights)
    if values.size == 1:
        return np.nan
    weights = np.exp(values - values.max())
    first, second = weights.mean(), np.mean(weights**2)
    influence = 2.0 * weights / first - weights**2 / second
    return float(first**2 / second * influence.std(ddof=1) / np.sqrt(values.size))


def forward_ess(log_weights: npt.ArrayLike) -> EffectiveSampleSize:
    """Return the effective sample size 1 / (E_p[w] E_p[1/w]) from samples of the target p.

    With w = target / model up to a constant, E_q[w]² / E_q[w²] = Z / E_p[w] and 1/Z = E_p[1/w]: the
    quantity that `reverse_ess` estimates, but sensitive to the modes that the model has dropped.
    """
    values = _check_log_weights(log_weights)
    if np.isneginf(values).any():
        raise ValueError("log_weights: a sample of the target has target density zero")
    high, low = values.max(), values.min()
    weights = np.exp(values - high)
    log_mean = high + np.log(np.mean(weights))
    log_mean_inverse = -low + np.log(np.mean(np.exp(low - values)))
    fraction = float(np.exp(-log_mean - log_mean_inverse))
    return EffectiveSampleSize(fraction, float(weights.max() / weights.sum()), values.size)


def weighted_mean(values: npt.ArrayLike, log_weights: npt.ArrayLike) -> tuple[float, float]:
    """Return the self-normalised mean Σw·a / Σw of independent samples [N] and its standard error.

    The error is that of the delta method, sqrt(Σ w²(a - mean)²) / Σw.
    """
    a = np.asarray(values, dtype=np.float64)
    logs = _check_log_weights(log_weights)
    if a.shape != logs.shape:
        raise ValueError(f"values: expected the shape {logs.shape} of log_weights, got {a.shape}")
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()
    mean = float(np.sum(weights * a))
    return mean, float(np.sqrt(np.sum(weights**2 * (a - mean) ** 2)))


def log_mean_weight(log_weights: npt.ArrayLike) -> tuple[float, float]:
    """Return ln of the mean of independent weights w [N] and its standard error, SD(w)/(w̄ √N).

    With w = exp(-U/kT) / q(x) and x drawn from a normalised q this estimates ln Z, as do the
    weights of annealed importance sampling and the estimates of sequential Monte Carlo populations.
    The error is that of the delta method; the estimate is too low by half its square, and does not
    see modes that were never drawn. NaN for a single weight.

    Examples
    --------
    >>> import numpy as np
    >>> from openmm_tsf.analysis.statistics import log_mean_weight
    >>> x = np.random.default_rng(1).normal(0.0, 1.5, 10_000)  # q = N(0, 1.5²)
    >>> log_q = -0.5 * (x / 1.5) ** 2 - np.log(1.5 * np.sqrt(2.0 * np.pi))
    >>> value, stderr = log_mean_weight(-0.5 * x**2 - log_q)  # Z = √(2π)
    >>> bool(abs(value - 0.5 * np.log(2.0 * np.pi)) < 3 * stderr)
    True
    """
    values = _check_log_weights(log_weights)
    high = values.max()
    weights = np.exp(values - high)
    mean, size = weights.mean(), values.size
    stderr = float(weights.std(ddof=1) / mean / np.sqrt(size)) if size > 1 else np.nan
    return float(high + np.log(mean)), stderr


def torus_bins(phi: npt.ArrayLike, psi: npt.ArrayLike, bins: int = 64) -> npt.NDArray[np.int64]:
    """Return the flat index of the bin of each (φ, ψ) among [bins, bins], first axis φ."""
    return angle_bins(phi, bins) * bins + angle_bins(psi, bins)


def torus_histogram(
    phi: npt.ArrayLike, psi: npt.ArrayLike, bins: int = 64, weights: npt.ArrayLike | None = None
) -> Array:
    """Return the probabilities [bins, bins] of (φ, ψ) in [-π, π), first axis φ; they sum to one."""
    phi, psi = as_array(phi, RADIAN, "phi").ravel(), as_array(psi, RADIAN, "psi").ravel()
    n_phi, n_psi = len(phi), len(psi)
    if n_phi == 0 or n_phi != n_psi:
        raise ValueError(f"phi, psi: expected equally many angles, got {n_phi}, {n_psi}")
    flat = torus_bins(phi, psi, bins)
    w = None if weights is None else np.ravel(np.asarray(weights, dtype=np.float64))
    counts = np.bincount(flat, weights=w, minlength=bins * bins).astype(np.float64)
    return (counts / counts.sum()).reshape(bins, bins)


def total_variation(p: npt.ArrayLike, q: npt.ArrayLike) -> float:
    """Return ½ Σ|p - q| of two histograms of probabilities: 0 if equal, 1 if disjoint."""
    first, second = _check_histograms(p, q)
    return float(0.5 * np.abs(first - second).sum())


def kl_divergence(
    reference: npt.ArrayLike, sample: npt.ArrayLike, epsilon: float = KL_EPSILON
) -> float:
    """Return KL(reference ‖ sample) = Σ p ln[(p + ε)/(q + ε)] of two histograms, in nat.

    ε is added to the probability of a bin (not to a density).
    """
    p, q = _check_histograms(reference, sample)
    return float(np.sum(p * np.log((p + epsilon) / (q + epsilon))))


def _check_histograms(p: npt.ArrayLike, q: npt.ArrayLike) -> tuple[Array, Array]:
    first, second = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"histograms: expected equal shapes, got {first.shape}, {second.shape}")
    for name, histogram in (("first", first), ("second", second)):
        if not (np.all(histogram >= 0) and np.isclose(histogram.sum(), 1.0)):
            raise ValueError(f"{name} histogram: expected probabilities that sum to one")
    return first, second


def _check_series(series: npt.ArrayLike) -> Array:
    values = np.asarray(series, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"series: expected a non-empty array [n, W], got shape {values.shape}")
    return values


def finite_series(series: npt.ArrayLike) -> Array:
    """Return a series of W walkers as an array [n, W]; refuse an empty or non-finite one."""
    values = _check_series(series)
    if not np.isfinite(values).all():
        raise ValueError("series: expected finite values")
    return values


def statistical_inefficiency(series: npt.ArrayLike) -> float:
    """Return g = 1 + 2τ in saved iterations, from all walkers [n, W] and their pooled mean.

    Walkers are independent of each other (swaps act between the rungs of one walker), so they share
    one correlation function around one mean. A walker that never leaves a basin then counts as
    correlated over its whole length instead of as perfectly sampled. The estimator, and where it
    truncates the sum (the first C(t) ≤ 0 beyond t = 10), are those of pymbar's
    ``timeseries.statistical_inefficiency_multiple`` (Chodera et al., J. Chem. Theory Comput. 3, 26
    (2007)), whose value this reproduces to rounding; sums by FFT are some fifty times faster. At
    least 1, at most n (all of a walker counts as one sample); NaN for a constant series.
    """
    values = finite_series(series)
    if np.ptp(values) == 0.0:
        return np.nan
    n, n_walkers = values.shape
    fluctuation = values - values.mean()
    length = 1 << (2 * n - 1).bit_length()  # zero padding: no wrap-around
    power = np.zeros(length // 2 + 1)
    for walker in fluctuation.T:  # one at a time, to bound the memory of a long run's transforms
        power += np.abs(np.fft.rfft(walker, length)) ** 2
    lag = np.arange(1, max(n - 1, 1))
    sums = np.fft.irfft(power, length)[lag]
    correlation = sums / ((n - lag) * n_walkers * fluctuation.var())
    crossed = np.flatnonzero((correlation <= 0.0) & (lag > 10))
    end = crossed[0] if crossed.size else lag.size
    g = 1.0 + 2.0 * np.sum(correlation[:end] * (1.0 - lag[:end] / n))
    return float(np.clip(g, 1.0, n))


def between_walker_stderr(series: npt.ArrayLike) -> float:
    """Return the standard error of the mean, std(walker means) / √W; NaN for one walker."""
    values = _check_series(series)
    n_walkers = values.shape[1]
    if n_walkers == 1:
        return np.nan
    return float(values.mean(axis=0).std(ddof=1) / np.sqrt(n_walkers))


def _block_length(n: int, n_walkers: int, n_groups: int) -> tuple[int, int]:
    """Return the number of blocks that each walker is cut into, and their length."""
    n_blocks = max(1, min(n, -(-n_groups // n_walkers)))
    return n_blocks, n // n_blocks


def group_means(series: npt.ArrayLike, n_groups: int = 24) -> Array:
    """Return the means [G, ...] over groups of samples [n, W, ...] that are taken as independent.

    A walker is a group. Fewer than `n_groups` walkers are cut into equally many consecutive blocks
    each, so that there are at least `n_groups` groups where the length allows; the first few
    iterations are left out where the blocks do not fill the length.
    """
    values = np.asarray(series, dtype=np.float64)
    if values.ndim < 2 or values.shape[0] == 0:
        raise ValueError(f"series: expected a non-empty array [n, W, ...], got {values.shape}")
    n, n_walkers = values.shape[:2]
    n_blocks, length = _block_length(n, n_walkers, n_groups)
    blocks = values[n - n_blocks * length :].reshape(n_blocks, length, *values.shape[1:])
    return blocks.mean(axis=1).reshape(n_blocks * n_walkers, *values.shape[2:])


def group_labels(n: int, n_walkers: int, n_groups: int = 24) -> npt.NDArray[np.int64]:
    """Return the group [n, W] of `group_means` that each sample belongs to; -1 if left out."""
    n_blocks, length = _block_length(n, n_walkers, n_groups)
    block = (np.arange(n) - (n - n_blocks * length)) // length
    labels = block[:, None] * n_walkers + np.arange(n_walkers)
    labels[block < 0] = -1
    return labels
