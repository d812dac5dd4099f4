"""Means and free-energy differences by MBAR over all rungs, with errors of correlated samples.

Shirts and Chodera, J. Chem. Phys. 129, 124105 (2008). pymbar solves for the free energies of the
rungs. Its covariance takes the samples as independent; samples of replica exchange are correlated
in time and, through the swaps, between rungs. So the estimate is linearised: every sample has an
influence on it (the estimating equations of MBAR are those of a multinomial logistic regression),
the influences of one iteration and walker are summed over the rungs, and the error is that of the
mean of this series, as `openmm_tsf.analysis.uncertainty` computes it.
"""

import logging
from dataclasses import dataclass, replace
from functools import cache, cached_property
from types import ModuleType

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp  # type: ignore[import-untyped]

from openmm_tsf.analysis.statistics import Array, logit_free_energy
from openmm_tsf.analysis.uncertainty import MeanEstimate, estimate_mean

_PYMBAR_SAMPLES = 60_000
_STEPS = 200
#: Above this residual, per sample of a rung, every second step is one of self-consistent iteration
#: (eq. 11), the others go further.
_FAR = 0.1
_TOLERANCE = 1e-10
#: Eigenvalues of the information below this, per sample of a rung, are zero: rungs do not overlap.
_SINGULAR = 1e-12
#: An estimate may depend this much, relative to its residuals, on free energies that are not known.
_NEGLIGIBLE = 1e-9


class Mbar:
    """Samples of all rungs and their reduced free energies, to be reweighted to any temperature.

    Energies are [n, W, K] in kJ/mol, inverse temperatures [K] in mol/kJ; `f` is [K], by default
    that of `solve_mbar`. ``memberships`` [n, W, K, K] is the probability that a sample was drawn at
    rung k, given its energy. ``scores`` [n, W, K-1], 1 - Σ p_k over the samples of one iteration
    and walker, is their influence on f_k, k > 0, up to the inverse of the information; the first f
    is the gauge.
    """

    def __init__(self, energy: Array, betas: Array, f: Array | None = None) -> None:
        self.energy, self.betas = energy, betas
        self.f: Array = solve_mbar(energy, betas) if f is None else f
        self.memberships, self._log_total = _memberships(energy, betas, self.f)
        self.scores: Array = 1.0 - self.memberships[..., 1:].sum(axis=2)

    @cached_property
    def _information(self) -> Array:
        return _information(self.memberships)

    def reweight(self, beta: float) -> "Reweighted":
        """Weight the samples of all rungs to the inverse temperature `beta` (eq. 13)."""
        log_weights = -beta * self.energy - self._log_total
        weights = np.exp(log_weights - log_weights.max())
        return Reweighted(weights / weights.sum(), self)

    def influence_through_f(self, residual: Array) -> Array:
        """Return the influence [n, W] on a sum of residuals [n, W, K] that acts through f.

        NaN where the sum depends on free energies between rungs that do not overlap.
        """
        n, n_walkers, n_rungs = self.energy.shape
        if n_rungs == 1:  # f has no error
            return np.zeros((n, n_walkers))
        gradient = -np.einsum("nwr,nwrk->k", residual, self.memberships[..., 1:])
        response, unresolved = _solve(self._information, gradient, n * n_walkers)
        if unresolved > _NEGLIGIBLE * np.abs(residual).sum():
            return np.full((n, n_walkers), np.nan)
        influence: Array = self.scores @ response
        return influence


@dataclass(frozen=True)
class Reweighted:
    """Samples of all rungs weighted to one temperature; weights [n, W, R] are normalised."""

    weights: Array
    mbar: Mbar

    @property
    def kish(self) -> float:
        """Kish's effective sample size 1/Σw², without the cost of correlation."""
        return float(1.0 / np.sum(self.weights**2))

    def free_energy(self, inside: npt.NDArray[np.bool_]) -> tuple[float, float]:
        """Return -ln[P(inside)/P(outside)] in kT at the target temperature, and its standard error.

        For truth values [n, W, R]; (±inf, NaN) where one of the two states was never visited.
        """
        if inside.all() or not inside.any():
            return (-np.inf if inside.all() else np.inf), np.nan
        probability = self.mean(inside)
        return logit_free_energy(min(probability.value, 1.0), probability.stderr)

    def mean(self, observable: npt.ArrayLike) -> MeanEstimate:
        """Return the mean of an observable [n, W, R] at the target temperature.

        ``g`` and the two errors are those of the series of influences summed over rungs;
        ``variance`` is that of the observable at the target temperature. The errors are NaN where
        the mean depends on free energies between rungs that do not overlap.
        """
        values = self._check(observable)
        mean = float(np.sum(self.weights * values))
        variance = float(np.sum(self.weights * (values - mean) * (values - mean)))
        influence = self.influence(values)
        if np.isnan(influence).any():
            return MeanEstimate.without_error(mean, values.size, variance)
        estimate = estimate_mean(influence)
        return replace(estimate, value=mean, n_samples=values.size, variance=variance)

    def influence(self, observable: npt.ArrayLike) -> Array:
        """Return the influence [n, W] on the mean of an observable [n, W, R].

        The error of the mean is that of the mean of this series. NaN where the mean depends on free
        energies between rungs that do not overlap.
        """
        values = self._check(observable)
        residual = self.weights * (values - float(np.sum(self.weights * values)))
        n, n_walkers, _ = values.shape
        return (residual.sum(axis=2) + self.mbar.influence_through_f(residual)) * (n * n_walkers)

    def _check(self, observable: npt.ArrayLike) -> Array:
        values = np.asarray(observable, dtype=np.float64)
        if values.shape != self.weights.shape:
            raise ValueError(f"observable: expected shape {self.weights.shape}, got {values.shape}")
        return values


def solve_mbar(energy: Array, betas: Array) -> Array:
    """Return the reduced free energies f [K], f[0] = 0, of rungs with energies [n, W, K].

    Shirts and Chodera 2008, eq. 11. pymbar solves on at most 60 000 samples; Newton steps on all of
    them start from its solution. Where neighbouring rungs do not overlap, nothing determines the
    difference of their f: it stays the one at which half of their samples belong to each.
    """
    n, n_walkers, n_rungs = energy.shape
    if n_rungs == 1:
        return np.zeros(1)
    # f_b - f_a = (β_b - β_a) median(U) of both rungs: half of the samples are more likely at each.
    # A mean would be that of a single sample in a clash, and no rung would seem to overlap.
    pairs = np.stack([energy[..., :-1], energy[..., 1:]])
    f = np.append(0.0, np.cumsum(np.median(pairs, axis=(0, 1, 2)) * np.diff(betas)))
    information = _information(_memberships(energy, betas, f)[0])
    if np.linalg.eigvalsh(information)[0] > _SINGULAR * n * n_walkers:
        f = _solve_by_pymbar(energy, betas)
    for step in range(_STEPS):
        p, log_total = _memberships(energy, betas, f)
        score = n * n_walkers - p.sum(axis=(0, 1, 2))
        if np.abs(score).max() <= _TOLERANCE * n * n_walkers:
            return f - f[0]
        if np.abs(score).max() > _FAR * n * n_walkers:  # a Newton step might go anywhere
            if step % 2:
                f = np.array([-logsumexp(-beta * energy - log_total) for beta in betas])
            else:
                f = _solve_in_turn(energy, betas, f)
        else:
            f[1:] += _solve(_information(p), score[1:], n * n_walkers)[0]
    raise RuntimeError(f"MBAR did not converge: residuals {score / (n * n_walkers)} per sample")


def _solve_in_turn(energy: Array, betas: Array, f: Array) -> Array:
    """Return f after each was set in turn to where as many samples belong to its rung as it has.

    A sample is counted for the rung if that is at least as likely as the others together. Such
    steps are of any length.
    """
    f, n_each = f.copy(), energy[..., 0].size
    for k in range(len(f)):
        others = np.delete(f - energy[..., None] * betas, k, axis=-1)
        border = np.partition((betas[k] * energy + logsumexp(others, axis=-1)).ravel(), n_each)
        f[k] = 0.5 * (border[:n_each].max() + border[n_each])
    return f


def _solve_by_pymbar(energy: Array, betas: Array) -> Array:
    _, n_walkers, n_rungs = energy.shape
    stride = -(-energy.size // _PYMBAR_SAMPLES)
    thinned = energy[::stride]
    flat = np.moveaxis(thinned, 2, 0).ravel()
    counts = np.full(n_rungs, thinned.shape[0] * n_walkers)
    # pymbar's default solver warns about an option that scipy does not know; its default tolerance
    # is relative, and cannot be met up to rounding where every f is near 0.
    solver = {"method": "adaptive", "tol": 1e-6, "options": {"maxiter": 100}}
    solved = _pymbar().MBAR(np.outer(betas, flat), counts, solver_protocol=(solver,))
    return np.array(solved.f_k, dtype=np.float64)


def _solve(information: Array, right: Array, n_each: int) -> tuple[Array, float]:
    """Solve information x = right outside the null space; also return the largest part in it."""
    values, vectors = np.linalg.eigh(information)
    known = values > _SINGULAR * n_each
    components = vectors.T @ right
    solution = vectors[:, known] @ (components[known] / values[known])
    return solution, float(np.abs(components[~known]).max(initial=0.0))


def _memberships(energy: Array, betas: Array, f: Array) -> tuple[Array, Array]:
    """Return the probabilities [..., K] of the rungs and the log of their denominator [...]."""
    log_terms = f - energy[..., None] * betas
    high = log_terms.max(axis=-1, keepdims=True)
    terms = np.exp(log_terms - high)
    total = terms.sum(axis=-1, keepdims=True)
    return terms / total, (high + np.log(total))[..., 0]


def _information(memberships: Array) -> Array:
    """Return Σ p_k (δ_kl - p_l) [K-1, K-1] over all samples; the first rung is the gauge."""
    p = memberships[..., 1:].reshape(-1, memberships.shape[-1] - 1)
    return np.diag(p.sum(axis=0)) - p.T @ p


@cache
def _pymbar() -> ModuleType:
    """Import pymbar when it is needed, quietly: it takes seconds, and writes to the log."""
    logger = logging.getLogger("pymbar")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import pymbar
    finally:
        logger.setLevel(level)
    return pymbar
