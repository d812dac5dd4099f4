"""Do replicas and walkers mix? Round trips, mixing matrix, relaxation, split-R̂: plain numbers."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri  # type: ignore[import-untyped]

from openmm_tsf.analysis.statistics import finite_series

Array = npt.NDArray[np.float64]

#: Fewer iterations than this cannot be split into two halves that each have a variance.
_MIN_ITERATIONS = 4


def round_trips(replica: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Completed trips lowest rung → highest → lowest of each replica.

    Parameters
    ----------
    replica
        Labels [n, W, R]: which replica sits at rung r. Trips between saved iterations are not
        seen, so with thinned output the count is a lower bound.

    Returns
    -------
    trips
        Counts [W, R] by replica; all zero with a single rung, where there is nothing to travel.
    """
    labels = _checked_labels(replica)
    _, n_walkers, n_rungs = labels.shape
    trips = np.zeros((n_walkers, n_rungs), dtype=np.int64)
    if n_rungs == 1:
        return trips
    walkers = np.arange(n_walkers)
    #: 0: never at the bottom so far; 1: going up, last end seen was the bottom; 2: coming down.
    phase = np.zeros((n_walkers, n_rungs), dtype=np.int8)
    for now in labels:
        bottom, top = now[:, 0], now[:, -1]
        trips[walkers, bottom] += phase[walkers, bottom] == 2
        phase[walkers, bottom] = 1
        phase[walkers, top] = np.where(phase[walkers, top] == 1, 2, phase[walkers, top])
    return trips


def mixing_matrix(replica: npt.ArrayLike) -> Array:
    """Probability [R, R] that the replica at rung i is at rung j one saved iteration later.

    Parameters
    ----------
    replica
        Labels [n, W, R]. With fewer than two iterations every entry is NaN.
    """
    labels = _checked_labels(replica)
    n_iterations, _, n_rungs = labels.shape
    rung_of = np.argsort(labels, axis=2)
    flat = (rung_of[:-1] * n_rungs + rung_of[1:]).ravel()
    counts = np.bincount(flat, minlength=n_rungs**2).reshape(n_rungs, n_rungs).astype(np.float64)
    if n_iterations < 2:
        return np.full((n_rungs, n_rungs), np.nan)
    return counts / counts.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Relaxation:
    """How fast replicas forget their rung.

    Attributes
    ----------
    second_eigenvalue
        The largest eigenvalue below the trivial 1 of the symmetrised mixing matrix; NaN where there
        is nothing to mix (one rung) or nothing was seen (fewer than two iterations).
    iterations
        1/(1 - second_eigenvalue) in saved iterations; infinite where some rungs never exchange.
    """

    second_eigenvalue: float
    iterations: float


def relaxation(matrix: npt.ArrayLike) -> Relaxation:
    """Relaxation of the walk over rungs, as openmmtools reports it.

    The matrix is symmetrised first: the uniform distribution is stationary, so (M + Mᵀ)/2 is the
    additive reversibilisation. Where replicas remember more than their rung (a conformation that
    is slow to change), the true relaxation is slower: read the figure as a lower bound, beside
    `round_trips`. With a deterministic even-odd scheme the walk is not reversible either.

    Parameters
    ----------
    matrix
        What `mixing_matrix` returned, [R, R].

    Raises
    ------
    ValueError
        If it is not square, or its rows are not probabilities.
    """
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or values.size == 0:
        raise ValueError(f"matrix: expected shape [R, R], got {values.shape}")
    if len(values) == 1 or np.isnan(values).all():
        return Relaxation(np.nan, np.nan)
    if not ((values >= 0).all() and np.allclose(values.sum(axis=1), 1.0)):
        raise ValueError("matrix: expected rows of probabilities that sum to one")
    eigenvalue = float(np.linalg.eigvalsh(0.5 * (values + values.T))[-2])
    if eigenvalue > 1.0 - 1e-12:  # 1, but for rounding
        return Relaxation(1.0, np.inf)
    return Relaxation(eigenvalue, 1.0 / (1.0 - eigenvalue))


def _checked_labels(replica: npt.ArrayLike) -> npt.NDArray[np.int64]:
    labels = np.asarray(replica)
    if labels.ndim != 3 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"replica: expected integers [n, W, R], got {labels.dtype} of shape {labels.shape}"
        )
    if not np.array_equal(
        np.sort(labels, axis=2), np.broadcast_to(np.arange(labels.shape[2]), labels.shape)
    ):
        raise ValueError(
            "replica: expected a permutation of the rungs in every [iteration, walker]"
        )
    return labels.astype(np.int64)


def split_r_hat(series: npt.ArrayLike) -> float:
    """Rank-normalised split-R̂ over walkers: 1 where they agree, larger where they do not.

    Vehtari, Gelman, Simpson, Carpenter and Bürkner, Bayesian Analysis 16, 667 (2021), eqs. 1 to 4
    and 14: every walker's series is cut into two halves, values are replaced by normal scores of
    their ranks, and the larger of R̂ of the values and of their distances from the median is
    returned. For a truth value it is the classic split-R̂ (Gelman and Rubin 1992). Of walkers
    shorter than their correlation time a large R̂ says that they differ, not that their mean is
    wrong: that is for the standard error, which counts such walkers as one sample each.

    Parameters
    ----------
    series
        Values [n, W].

    Returns
    -------
    r_hat
        At least √((n'-1)/n') with halves of n' values; infinite where no half ever changes but
        they differ; NaN for fewer than 4 iterations or a constant series.

    Raises
    ------
    ValueError
        If the series is empty, not [n, W], or not finite.
    """
    values = finite_series(series)
    if len(values) < _MIN_ITERATIONS:
        return np.nan
    half = len(values) // 2
    halves = np.concatenate([values[:half], values[-half:]], axis=1)
    if np.ptp(halves) == 0.0:
        return np.nan
    folded = np.abs(halves - np.median(halves))
    found = [_r_hat(_normal_scores(chains)) for chains in (halves, folded)]
    return float(np.nanmax(found))


def _r_hat(chains: Array) -> float:
    """sqrt[((n-1)/n W + B/n) / W] of chains [n, M]: within and between variances W and B."""
    if not np.ptp(chains, axis=0).any():
        return np.inf if np.ptp(chains) > 0.0 else np.nan
    n = len(chains)
    within = chains.var(axis=0, ddof=1).mean()
    between_over_n = chains.mean(axis=0).var(ddof=1)
    return float(np.sqrt((n - 1) / n + between_over_n / within))


def _normal_scores(values: Array) -> Array:
    """Φ⁻¹[(rank - 3/8)/(S + 1/4)]; ties share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - 0.5 * (counts - 1)
    scores: Array = ndtri((ranks - 0.375) / (values.size + 0.25))
    return scores[inverse.reshape(values.shape)]
