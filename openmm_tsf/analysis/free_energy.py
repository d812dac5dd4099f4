"""Free-energy differences by MBAR over all rungs, with errors that know about correlation.

pymbar solves for the rungs' free energies. Its own covariance takes samples as independent; ours
are correlated in time and, through the swaps, between rungs. So the estimate is linearised: every
sample has an influence on it (the estimating equations of MBAR are those of a multinomial logistic
regression), the influences of one iteration and walker are summed over the rungs, and that series
goes through the same standard error as any other mean.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.errors import MeanEstimate, estimate_mean, timeseries
from openmm_tsf.statistics import logit_free_energy

Array = npt.NDArray[np.float64]


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
            information = np.diag(p.sum(axis=(0, 1, 2))) - np.einsum("nwrk,nwrl->kl", p, p)
            gradient = -np.einsum("nwr,nwrk->k", residual, p)
            influence += (drawn_from - p) @ np.linalg.solve(information, gradient)
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


def reweight(energy: Array, betas: Array, beta: float) -> Reweighted:
    """Weight the samples of all rungs to the inverse temperature `beta` by MBAR.

    Shirts and Chodera, J. Chem. Phys. 129, 124105 (2008), eqs. 11 and 13.

    Parameters
    ----------
    energy
        [n, W, R] in kJ/mol.
    betas
        Inverse temperatures [R] of the rungs in mol/kJ.
    beta
        The target's.
    """
    n_rungs = len(betas)
    n_each = energy.shape[0] * energy.shape[1]
    if n_rungs == 1:
        f = np.zeros(1)
    else:
        timeseries()  # imports pymbar without its announcements
        from pymbar import MBAR

        flat = energy.reshape(n_each, n_rungs).T.ravel()
        solved = MBAR(np.outer(betas, flat), np.full(n_rungs, n_each))
        f = np.asarray(solved.f_k, dtype=np.float64)
    log_terms = f - energy[..., None] * betas  # [n, W, R, K]
    high = log_terms.max(axis=-1, keepdims=True)
    terms = np.exp(log_terms - high)
    total = terms.sum(axis=-1, keepdims=True)
    log_weights = -beta * energy - (high + np.log(total))[..., 0]
    weights = np.exp(log_weights - log_weights.max())
    return Reweighted(weights=weights / weights.sum(), memberships=terms / total)


def state_free_energy(
    inside: npt.NDArray[np.bool_], energy: Array, betas: Array, beta: float
) -> tuple[float, float]:
    """-ln[P(inside)/P(outside)] in kT at `beta`, and its standard error.

    Infinite with a NaN error where a state was never, or always, visited.
    """
    if inside.all() or not inside.any():
        return (-np.inf if inside.all() else np.inf), np.nan
    probability = reweight(energy, betas, beta).mean(inside)
    return logit_free_energy(min(probability.value, 1.0), probability.stderr)
