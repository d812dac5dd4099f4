"""Free-energy differences by MBAR over all rungs, with errors that know about correlation.

pymbar solves for the rungs' free energies. Its own covariance takes samples as independent; ours
are correlated in time and, through the swaps, between rungs. So the estimate is linearised: every
sample has an influence on it (the estimating equations of MBAR are those of a multinomial logistic
regression), the influences of one iteration and walker are summed over the rungs, and that series
goes through the same standard error as any other mean.
"""

import logging
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.errors import MeanEstimate, estimate_mean
from openmm_tsf.statistics import logit_free_energy

Array = npt.NDArray[np.float64]

_PYMBAR_SAMPLES = 60_000
_NEWTON_STEPS = 20
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Reweighted:
    """Samples of all rungs weighted to one temperature.

    Attributes
    ----------
    weights
        Normalised weights [n, W, R].
    memberships
        Probability [n, W, R, K] that a sample stems from rung k, given its energy.
    """

    weights: Array
    memberships: Array

    def mean(self, observable: npt.ArrayLike) -> MeanEstimate:
        """Mean of an observable [n, W, R] at the target temperature.

        ``n_samples``, ``g`` and the two errors refer to the series of summed influences.
        """
        values = np.asarray(observable, dtype=np.float64)
        if values.shape != self.weights.shape:
            raise ValueError(f"observable: expected shape {self.weights.shape}, got {values.shape}")
        mean = float(np.sum(self.weights * values))
        residual = self.weights * (values - mean)
        influence = residual.copy()
        n_rungs = self.weights.shape[2]
        if n_rungs > 1:
            # Score of a sample for f_k: 1[it was drawn from k] - p_k. The first f is the gauge.
            p = self.memberships[..., 1:]
            drawn_from = np.eye(n_rungs)[:, 1:]
            gradient = -np.einsum("nwr,nwrk->k", residual, p)
            influence += (drawn_from - p) @ np.linalg.solve(
                _information(self.memberships), gradient
            )
        n, n_walkers, _ = values.shape
        errors = estimate_mean(influence.sum(axis=2) * (n * n_walkers))
        return MeanEstimate(
            value=mean,
            stderr=errors.stderr,
            stderr_correlation=errors.stderr_correlation,
            stderr_groups=errors.stderr_groups,
            g=errors.g,
            n_samples=values.size,
        )


def solve_mbar(energy: Array, betas: Array) -> Array:
    """Reduced free energies f [K] of the rungs, f[0] = 0, from samples [n, W, K] of them.

    Shirts and Chodera, J. Chem. Phys. 129, 124105 (2008), eq. 11. pymbar solves on at most
    60 000 samples; Newton steps on all of them follow, which the solution there starts well.

    Raises
    ------
    RuntimeError
        If the equations do not converge.
    """
    n, n_walkers, n_rungs = energy.shape
    if n_rungs == 1:
        return np.zeros(1)
    stride = -(-energy.size // _PYMBAR_SAMPLES)
    thinned = energy[::stride]
    flat = np.moveaxis(thinned, 2, 0).ravel()
    counts = np.full(n_rungs, thinned.shape[0] * n_walkers)
    # pymbar's default solver warns about an option that scipy does not know, and its default
    # tolerance is relative: where every f is near 0, rounding keeps it from ever being met.
    solver = {"method": "adaptive", "tol": 1e-6, "options": {"maxiter": 100}}
    solved = _pymbar().MBAR(np.outer(betas, flat), counts, solver_protocol=(solver,))
    f = np.array(solved.f_k, dtype=np.float64)
    for _ in range(_NEWTON_STEPS):
        p, _ = _memberships(energy, betas, f)
        score = n * n_walkers - p.sum(axis=(0, 1, 2))
        if np.abs(score).max() <= _TOLERANCE * n * n_walkers:
            return f - f[0]
        f[1:] += np.linalg.solve(_information(p), score[1:])
    raise RuntimeError(f"MBAR did not converge: {score / (n * n_walkers)} left of 1 sample each")


def _memberships(energy: Array, betas: Array, f: Array) -> tuple[Array, Array]:
    """Probabilities [..., K] that a sample stems from rung k; log of their denominator [...]."""
    log_terms = f - energy[..., None] * betas
    high = log_terms.max(axis=-1, keepdims=True)
    terms = np.exp(log_terms - high)
    total = terms.sum(axis=-1, keepdims=True)
    return terms / total, (high + np.log(total))[..., 0]


def _information(memberships: Array) -> Array:
    """Σ p_k (δ_kl - p_l) [K-1, K-1] over all samples; the first rung is the gauge."""
    p = memberships[..., 1:].reshape(-1, memberships.shape[-1] - 1)
    return np.diag(p.sum(axis=0)) - p.T @ p


def reweight(energy: Array, betas: Array, f: Array, beta: float) -> Reweighted:
    """Weight the samples of all rungs to the inverse temperature `beta` (eq. 13, ibid.).

    Parameters
    ----------
    energy
        [n, W, R] in kJ/mol.
    betas
        Inverse temperatures [R] of the rungs in mol/kJ.
    f
        What `solve_mbar` returned for them.
    beta
        The target's.
    """
    memberships, log_total = _memberships(energy, betas, f)
    log_weights = -beta * energy - log_total
    weights = np.exp(log_weights - log_weights.max())
    return Reweighted(weights=weights / weights.sum(), memberships=memberships)


@cache
def _pymbar() -> ModuleType:
    """pymbar, imported late: it takes seconds, and announces itself in the log."""
    logger = logging.getLogger("pymbar")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import pymbar
    finally:
        logger.setLevel(level)
    return pymbar


def state_free_energy(
    inside: npt.NDArray[np.bool_], energy: Array, betas: Array, f: Array, beta: float
) -> tuple[float, float]:
    """-ln[P(inside)/P(outside)] in kT at `beta`, and its standard error.

    Infinite with a NaN error where a state was never, or always, visited.

    Parameters
    ----------
    inside
        [n, W, R].
    energy, betas, f, beta
        As for `reweight`.
    """
    if inside.all() or not inside.any():
        return (-np.inf if inside.all() else np.inf), np.nan
    probability = reweight(energy, betas, f, beta).mean(inside)
    return logit_free_energy(min(probability.value, 1.0), probability.stderr)
