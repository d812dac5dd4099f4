"""Free-energy differences by MBAR over all rungs, with errors that know about correlation.

pymbar solves for the rungs' free energies. Its own covariance takes samples as independent; ours
are correlated in time and, through the swaps, between rungs. So the estimate is linearised: every
sample has an influence on it (the estimating equations of MBAR are those of a multinomial logistic
regression), the influences of one iteration and walker are summed over the rungs, and that series
goes through the same standard error as any other mean.
"""

import logging
from dataclasses import dataclass, replace
from functools import cache, cached_property
from types import ModuleType

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.statistics import logit_free_energy
from openmm_tsf.analysis.uncertainty import MeanEstimate, estimate_mean

Array = npt.NDArray[np.float64]

_PYMBAR_SAMPLES = 60_000
_NEWTON_STEPS = 20
_TOLERANCE = 1e-10
#: Information below this part of a rung's samples is none: rungs do not overlap.
_SINGULAR = 1e-12
#: What an estimate may pull, relative to all its residuals, at free energies that are not known.
_NO_PULL = 1e-9


class Mbar:
    """Samples of all rungs and their reduced free energies, ready to be weighted anywhere.

    Attributes
    ----------
    energy
        [n, W, K] in kJ/mol.
    betas
        Inverse temperatures [K] of the rungs in mol/kJ.
    f
        Reduced free energies [K] of the rungs.
    memberships
        Probability [n, W, K, K] that a sample stems from rung k, given its energy.
    scores
        1 - Σ p_k over the samples of one iteration and walker [n, W, K-1]: what they pull at f_k
        with, k > 0. The first f is the gauge.

    Parameters
    ----------
    energy, betas
        As above.
    f
        What `solve_mbar` returns for them; solved here when left out.
    """

    def __init__(self, energy: Array, betas: Array, f: Array | None = None) -> None:
        self.energy, self.betas = energy, betas
        self.f: Array = solve_mbar(energy, betas) if f is None else f
        self.memberships, self._log_total = _memberships(energy, betas, self.f)
        self.scores: Array = 1.0 - self.memberships[..., 1:].sum(axis=2)

    @cached_property
    def _information(self) -> Array:
        return _information(self.memberships)

    def at(self, beta: float) -> "Reweighted":
        """Weight the samples of all rungs to the inverse temperature `beta` (eq. 13, ibid.)."""
        log_weights = -beta * self.energy - self._log_total
        weights = np.exp(log_weights - log_weights.max())
        return Reweighted(weights / weights.sum(), self)

    def pull(self, residual: Array) -> Array:
        """What a sum of residuals [n, W, K] owes to the uncertainty of f: [n, W].

        NaN where it hangs on the free energies of rungs that do not overlap.
        """
        if self.betas.size == 1:  # no f to be uncertain of
            return np.zeros(self.energy.shape[:2])
        gradient = -np.einsum("nwr,nwrk->k", residual, self.memberships[..., 1:])
        response, left = _solve(self._information, gradient, self._n_each)
        if left > _NO_PULL * np.abs(residual).sum():
            return np.full(self.energy.shape[:2], np.nan)
        pulled: Array = self.scores @ response
        return pulled

    @property
    def _n_each(self) -> int:
        """Samples of every rung."""
        return self.energy.shape[0] * self.energy.shape[1]


@dataclass(frozen=True)
class Reweighted:
    """Samples of all rungs weighted to one temperature.

    Attributes
    ----------
    weights
        Normalised weights [n, W, R].
    mbar
        Where they come from.
    """

    weights: Array
    mbar: Mbar

    @property
    def memberships(self) -> Array:
        """Probability [n, W, R, K] that a sample stems from rung k, given its energy."""
        return self.mbar.memberships

    @property
    def kish(self) -> float:
        """1/Σw², the number of equal weights that would scatter as much; correlation apart."""
        return float(1.0 / np.sum(self.weights**2))

    def free_energy(self, inside: npt.NDArray[np.bool_]) -> tuple[float, float]:
        """-ln[P(inside)/P(outside)] in kT at the target temperature, and its standard error.

        Infinite with a NaN error where a state was never, or always, visited.

        Parameters
        ----------
        inside
            [n, W, R].
        """
        if inside.all() or not inside.any():
            return (-np.inf if inside.all() else np.inf), np.nan
        probability = self.mean(inside)
        return logit_free_energy(min(probability.value, 1.0), probability.stderr)

    def mean(self, observable: npt.ArrayLike) -> MeanEstimate:
        """Mean of an observable [n, W, R] at the target temperature.

        ``g`` and the two errors refer to the series of summed influences; ``variance`` is that of
        the observable at the target temperature. The errors are NaN where the mean hangs on the
        free energies of rungs that do not overlap.
        """
        values = np.asarray(observable, dtype=np.float64)
        if values.shape != self.weights.shape:
            raise ValueError(f"observable: expected shape {self.weights.shape}, got {values.shape}")
        mean = float(np.sum(self.weights * values))
        residual = self.weights * (values - mean)
        variance = float(np.sum(residual * (values - mean)))
        influence = residual.sum(axis=2) + self.mbar.pull(residual)
        n, n_walkers, _ = values.shape
        if np.isnan(influence).any():
            nan = float("nan")
            return MeanEstimate(mean, nan, nan, nan, nan, values.size, variance)
        return replace(
            estimate_mean(influence * (n * n_walkers)),
            value=mean,
            n_samples=values.size,
            variance=variance,
        )


def solve_mbar(energy: Array, betas: Array) -> Array:
    """Reduced free energies f [K] of the rungs, f[0] = 0, from samples [n, W, K] of them.

    Shirts and Chodera, J. Chem. Phys. 129, 124105 (2008), eq. 11. pymbar solves on at most
    60 000 samples; Newton steps on all of them follow, which the solution there starts well. Where
    neighbouring rungs do not overlap, nothing fixes the difference of their f: it is left as the
    trapezoid of ⟨U⟩ over β has it.

    Raises
    ------
    RuntimeError
        If the equations do not converge.
    """
    n, n_walkers, n_rungs = energy.shape
    if n_rungs == 1:
        return np.zeros(1)
    mean = energy.mean(axis=(0, 1))
    f = np.append(0.0, np.cumsum(0.5 * (mean[1:] + mean[:-1]) * np.diff(betas)))
    information = _information(_memberships(energy, betas, f)[0])
    if np.linalg.eigvalsh(information)[0] > _SINGULAR * n * n_walkers:
        f = _solved_by_pymbar(energy, betas)
    for _ in range(_NEWTON_STEPS):
        p, _ = _memberships(energy, betas, f)
        score = n * n_walkers - p.sum(axis=(0, 1, 2))
        if np.abs(score).max() <= _TOLERANCE * n * n_walkers:
            return f - f[0]
        f[1:] += _solve(_information(p), score[1:], n * n_walkers)[0]
    raise RuntimeError(f"MBAR did not converge: {score / (n * n_walkers)} left of 1 sample each")


def _solved_by_pymbar(energy: Array, betas: Array) -> Array:
    _, n_walkers, n_rungs = energy.shape
    stride = -(-energy.size // _PYMBAR_SAMPLES)
    thinned = energy[::stride]
    flat = np.moveaxis(thinned, 2, 0).ravel()
    counts = np.full(n_rungs, thinned.shape[0] * n_walkers)
    # pymbar's default solver warns about an option that scipy does not know, and its default
    # tolerance is relative: where every f is near 0, rounding keeps it from ever being met.
    solver = {"method": "adaptive", "tol": 1e-6, "options": {"maxiter": 100}}
    solved = _pymbar().MBAR(np.outer(betas, flat), counts, solver_protocol=(solver,))
    return np.array(solved.f_k, dtype=np.float64)


def _solve(information: Array, right: Array, n_each: int) -> tuple[Array, float]:
    """Solution x of information x = right where the information is not null; what is left there."""
    values, vectors = np.linalg.eigh(information)
    known = values > _SINGULAR * n_each
    components = vectors.T @ right
    solution = vectors[:, known] @ (components[known] / values[known])
    return solution, float(np.abs(components[~known]).max(initial=0.0))


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
