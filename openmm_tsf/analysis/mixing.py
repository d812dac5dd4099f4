"""How well replicas and walkers mix: round trips, mixing matrix, relaxation, split-R̂, drift."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri  # type: ignore[import-untyped]

from openmm_tsf.analysis.statistics import Array, as_normal, finite_series, statistical_inefficiency

#: The fewest iterations whose two halves each have a variance.
_MIN_ITERATIONS = 4
#: Fewer walkers say too little of their spread: a drift is then judged by correlation times.
_MIN_WALKERS = 4


def round_trips(replica: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Count the completed trips lowest rung → highest → lowest [W, R] of each replica.

    Of labels [n, W, R], the replica at each rung. Zero for a single rung. Trips between saved
    iterations are not seen: with thinned output the count is a lower bound.
    """
    labels = _check_labels(replica)
    _, n_walkers, n_rungs = labels.shape
    trips = np.zeros((n_walkers, n_rungs), dtype=np.int64)
    if n_rungs == 1:
        return trips
    walkers = np.arange(n_walkers)
    # 0: not yet at the lowest rung; 1: going up since then; 2: going down since the highest rung.
    phase = np.zeros((n_walkers, n_rungs), dtype=np.int8)
    for now in labels:
        bottom, top = now[:, 0], now[:, -1]
        trips[walkers, bottom] += phase[walkers, bottom] == 2
        phase[walkers, bottom] = 1
        phase[walkers, top] = np.where(phase[walkers, top] == 1, 2, phase[walkers, top])
    return trips


def mixing_matrix(replica: npt.ArrayLike) -> Array:
    """Return the probability [R, R] that the replica at rung i is at rung j one iteration later.

    Of labels [n, W, R], the replica at each rung. Iterations are the saved ones; with fewer than
    two of them every entry is NaN.
    """
    labels = _check_labels(replica)
    n_iterations, _, n_rungs = labels.shape
    rung_of = np.argsort(labels, axis=2)
    flat = (rung_of[:-1] * n_rungs + rung_of[1:]).ravel()
    counts = np.bincount(flat, minlength=n_rungs**2).reshape(n_rungs, n_rungs).astype(np.float64)
    if n_iterations < 2:
        return np.full((n_rungs, n_rungs), np.nan)
    return counts / counts.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Relaxation:
    """The relaxation time of the walk of replicas over rungs.

    ``second_eigenvalue`` is the largest below the trivial 1 of the symmetrised mixing matrix, NaN
    for one rung or fewer than two iterations; ``iterations`` is 1/(1 - second_eigenvalue) in saved
    iterations, infinite where some rungs never exchange.
    """

    second_eigenvalue: float
    iterations: float


def relaxation(matrix: npt.ArrayLike) -> Relaxation:
    """Return the relaxation time of a mixing matrix [R, R], as openmmtools reports it.

    The matrix is symmetrised first: the uniform distribution is stationary, so (M + Mᵀ)/2 is the
    additive reversibilisation (Fill, Ann. Appl. Probab. 1, 62 (1991)). The walk is not Markovian
    where a conformation changes more slowly than the rung, nor reversible in a deterministic
    even-odd scheme: read the time as a lower bound, beside `round_trips`.
    """
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or values.size == 0:
        raise ValueError(f"matrix: expected shape [R, R], got {values.shape}")
    if len(values) == 1 or np.isnan(values).all():
        return Relaxation(np.nan, np.nan)
    if not ((values >= 0).all() and np.allclose(values.sum(axis=1), 1.0)):
        raise ValueError("matrix: expected rows of probabilities that sum to one")
    eigenvalue = float(np.linalg.eigvalsh(0.5 * (values + values.T))[-2])
    if eigenvalue > 1.0 - 1e-12:  # 1 up to rounding
        return Relaxation(1.0, np.inf)
    return Relaxation(eigenvalue, 1.0 / (1.0 - eigenvalue))


def _check_labels(replica: npt.ArrayLike) -> npt.NDArray[np.int64]:
    labels = np.asarray(replica)
    if labels.ndim != 3 or not np.issubdtype(labels.dtype, np.integer):
        got = f"{labels.dtype} of shape {labels.shape}"
        raise ValueError(f"replica: expected integers [n, W, R], got {got}")
    if (np.sort(labels, axis=2) != np.arange(labels.shape[2])).any():
        raise ValueError("replica: expected a permutation of the rungs in each [iteration, walker]")
    return labels.astype(np.int64)


def split_r_hat(series: npt.ArrayLike) -> float:
    """Return the rank-normalised split-R̂ over walkers [n, W]: 1 if they agree, larger if not.

    Vehtari, Gelman, Simpson, Carpenter and Bürkner, Bayesian Analysis 16, 667 (2021), eqs. 1 to 4
    and 14: every walker's series is cut into two halves, values are replaced by normal scores of
    their ranks, and the larger of R̂ of the values and of their distances from the median is
    returned. For a truth value it is the classic split-R̂ (Gelman and Rubin, Statist. Sci. 7, 457
    (1992)). For walkers shorter than their correlation time, a large R̂ says that they differ, not
    that their mean is wrong: the standard error counts such walkers as one sample each. Infinite
    where every half is constant but not all are equal; NaN for fewer than 4 iterations or a
    constant series.
    """
    values = finite_series(series)
    if len(values) < _MIN_ITERATIONS:
        return np.nan
    half = len(values) // 2
    halves = np.concatenate([values[:half], values[-half:]], axis=1)
    if np.ptp(halves) == 0.0:
        return np.nan
    folded = np.abs(halves - np.median(halves))
    return float(np.nanmax([_r_hat(_normal_scores(chains)) for chains in (halves, folded)]))


def drift_between_halves(series: npt.ArrayLike) -> float:
    """Return z of the mean of the second half of a series [n, W] less that of the first.

    From the differences of the walkers, by Student's distribution; of fewer than 4 walkers from
    the correlation within the halves. NaN for fewer than 4 iterations or a constant series.
    """
    values = finite_series(series)
    n, n_walkers = values.shape
    half = n // 2
    if n < _MIN_ITERATIONS or np.ptp(values) == 0.0:
        return np.nan
    first, second = values[:half], values[n - half :]
    difference = second.mean(axis=0) - first.mean(axis=0)
    mean = float(difference.mean())
    if mean == 0.0:
        return 0.0
    if n_walkers >= _MIN_WALKERS:
        stderr, dof = float(difference.std(ddof=1) / np.sqrt(n_walkers)), n_walkers - 1.0
    else:
        around = np.concatenate([first - first.mean(), second - second.mean()], axis=1)
        pieces = around.size / statistical_inefficiency(around) if np.ptp(around) > 0 else np.inf
        stderr = 2.0 * float(around.std()) / np.sqrt(max(pieces - 2.0, 1.0))
        dof = max(pieces - 2.0, 1.0)
    t = mean / stderr if stderr > 0 else np.copysign(np.inf, mean)
    return as_normal(float(t), dof)


def _r_hat(chains: Array) -> float:
    """Return sqrt[((n-1)/n W + B/n) / W] of chains [n, M] with variances W within, B between."""
    if not np.ptp(chains, axis=0).any():
        return np.inf if np.ptp(chains) > 0.0 else np.nan
    n = len(chains)
    within = chains.var(axis=0, ddof=1).mean()
    between_over_n = chains.mean(axis=0).var(ddof=1)
    return float(np.sqrt((n - 1) / n + between_over_n / within))


def _normal_scores(values: Array) -> Array:
    """Return Φ⁻¹[(rank - 3/8)/(S + 1/4)] of S values; ties share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - 0.5 * (counts - 1)
    scores: Array = ndtri((ranks - 0.375) / (values.size + 0.25))
    return scores[inverse.reshape(values.shape)]
