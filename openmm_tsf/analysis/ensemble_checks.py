"""Do the rungs sample the Boltzmann distributions of their temperatures? Tests from energies alone.

`energy_ratio`, the sharp test (Shirts, J. Chem. Theory Comput. 9, 909 (2013), and the package
physical_validation): ln[P_b(U)/P_a(U)] of two rungs is a straight line in U of slope β_a - β_b,
whatever the density of states. `heat_capacity_difference`, the simple one: the heat capacity from
fluctuations within the rungs must integrate to the difference of ⟨U⟩ between them. `basin_ratio`,
for states that are rarely entered: the change of a population between two rungs follows from the
energies inside and outside.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq  # type: ignore[import-untyped]
from scipy.special import logsumexp  # type: ignore[import-untyped]

from openmm_tsf.analysis.convergence import (
    MIN_EFFECTIVE_SUCCESSES,
    assess_probability,
    count_visits,
)
from openmm_tsf.analysis.statistics import (
    MIN_CORRELATION_TIMES,
    MIN_EFFECTIVE_SAMPLES,
    Array,
    as_normal,
)
from openmm_tsf.analysis.uncertainty import MeanEstimate, estimate_mean
from openmm_tsf.units import KJ_PER_MOLE, as_array

_NEWTON_STEPS = 100
_TOLERANCE = 1e-10
#: Eigenvalues of the information (of standardised energies) below this, per sample, are zero.
_SINGULAR = 1e-12
#: A difference beyond this, by the most conservative error, decides even on few samples.
DECISIVE_Z = 5.0


@dataclass(frozen=True)
class EnsembleCheck:
    """An estimate beside the value that it has for Boltzmann distributions."""

    value: float
    stderr: float
    expected: float
    #: Effective samples of ⟨U⟩ at the rung that has fewer (for `basin_ratio`: inside the state at
    #: the rung that has more); NaN where they are not known.
    n_eff: float
    #: Why the errors are too small to trust, in words; None where they are good.
    undecided: str | None = None
    #: Degrees of freedom of stderr.
    dof: float = np.inf
    #: Where the value is only a bound: "lower" or "upper".
    bound: str | None = None

    @property
    def z(self) -> float:
        """(value - expected)/stderr; NaN where the check cannot decide.

        It is `undecided` with fewer than 100 effective samples of ⟨U⟩ at either rung (16 inside a
        state), or with walkers shorter than 4 correlation times: errors of correlated series are
        too small then, those of the third cumulant far too small. It still decides against the
        sampler where even Student's distribution, with the degrees of freedom of the spread of the
        walkers, puts the difference beyond 5 standard deviations of the normal one: z is then that
        deviate. Where the value is a bound that `expected` respects, z is 0.
        """
        difference = self.value - self.expected
        if not self.stderr > 0:  # also for NaN
            return float("nan")
        if self.bound is not None and (difference > 0) != (self.bound == "lower"):
            return 0.0
        z = difference / self.stderr
        if self.undecided is None:
            return float(z)
        conservative = as_normal(z, self.dof)
        return conservative if abs(conservative) > DECISIVE_Z else float("nan")


def heat_capacity(
    energy: npt.ArrayLike, temperature: float, boltzmann_constant: float
) -> MeanEstimate:
    """Return the configurational heat capacity var(U)/(k T²) of energies [n, W] in kJ/(mol K).

    It lacks the kinetic part, 3N k/2 without constraints. With fewer than some 100 effective
    samples (``n_independent``) value and error are too small more often than a normal distribution
    says.
    """
    values = as_array(energy, KJ_PER_MOLE, "energy")
    # The variance is stationary in ⟨U⟩: the error of ⟨U⟩ does not enter to first order.
    squares = (values - values.mean()) ** 2
    return estimate_mean(squares / (boltzmann_constant * temperature**2))


def energy_ratio(
    low: npt.ArrayLike, high: npt.ArrayLike, betas: tuple[float, float]
) -> EnsembleCheck:
    """Estimate the slope of ln[P_high(U)/P_low(U)], to be β_low - β_high, in mol/kJ.

    Maximum likelihood, by a logistic regression of the rung on the energy (Shirts 2013, eqs. 13 to
    17) of two rungs [n, W] that were sampled side by side. The error is that of a mean, of the
    linear influence that each iteration and walker, both rungs together, has on the estimate: it
    includes correlation in time and through swaps. The estimate is NaN where the energies do not
    overlap, or so little that the information of the regression is singular.
    """
    series = _stack(low, high)
    expected = betas[0] - betas[1]
    n_eff, undecided = _effective_samples(series[..., 0], series[..., 1])
    apart = "the energies of the two rungs do not overlap"
    unknown = EnsembleCheck(np.nan, np.nan, expected, n_eff, apart)
    separate = series[..., 0].max() <= series[..., 1].min()
    if separate or series[..., 1].max() <= series[..., 0].min():
        return unknown
    centre, scale = series.mean(), series.std()
    x = (series - centre) / scale
    design = np.stack([np.ones_like(x), x], axis=-1)  # [n, W, 2 rungs, 2]
    theta = _maximum_likelihood(design, np.array([0.0, expected * scale]))
    if theta is None:
        return unknown
    p = _logistic(design @ theta)
    drawn_from = np.array([0.0, 1.0])
    scores = np.einsum("nwr,nwri->nwi", drawn_from - p, design)
    influence = np.linalg.solve(_information(design, p), np.array([0.0, 1.0]))
    n, n_walkers, _ = series.shape
    error = estimate_mean(scores @ influence * (n * n_walkers))
    value, stderr = float(theta[1] / scale), float(error.stderr / scale)
    return EnsembleCheck(value, stderr, expected, n_eff, undecided, error.dof)


def _maximum_likelihood(design: Array, start: Array) -> Array | None:
    """Return the estimate by damped Newton steps; None where the information is singular."""
    labels = np.array([-1.0, 1.0])

    def log_likelihood(theta: Array) -> float:
        return -float(np.logaddexp(0.0, -labels * (design @ theta)).sum())

    theta, likelihood = start, log_likelihood(start)
    n = design[..., 0].size
    for _ in range(_NEWTON_STEPS):
        p = _logistic(design @ theta)
        score = np.einsum("nwr,nwri->i", np.array([0.0, 1.0]) - p, design)
        information = _information(design, p)
        if np.linalg.eigvalsh(information)[0] <= _SINGULAR * n:
            return None
        if np.abs(score).max() <= _TOLERANCE * n:
            return theta
        step = np.linalg.solve(information, score)
        while (proposed := log_likelihood(theta + step)) < likelihood - _TOLERANCE * n:
            step = 0.5 * step
        theta, likelihood = theta + step, proposed
    raise RuntimeError(f"the likelihood of the energies cannot be maximised: gradient {score / n}")


def _logistic(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _information(design: Array, p: Array) -> Array:
    weighted = design * (p * (1.0 - p))[..., None]
    return np.einsum("nwri,nwrj->ij", weighted, design)


def heat_capacity_difference(
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    temperatures: tuple[float, float],
    boltzmann_constant: float,
) -> EnsembleCheck:
    """Compare Δ⟨U⟩/ΔT between two rungs with the mean heat capacity from fluctuations within them.

    ⟨U⟩_b - ⟨U⟩_a = ∫ C dT. The integral is the trapezoid with its end correction, h/2 (C_a + C_b) -
    h²/12 (C'_b - C'_a), with C' = κ₃/(k²T⁴) - 2κ₂/(kT³) from the second and third cumulants of U;
    the remainder is of order h⁵ C''''/720. The energies are [n, W], sampled side by side;
    ``stderr`` is that of the difference of ``value`` and ``expected``, in kJ/(mol K).
    """
    width = temperatures[1] - temperatures[0]
    k = boltzmann_constant
    slope = integral = 0.0
    influence = np.zeros(np.shape(low))
    for energy, kelvin, sign in ((low, temperatures[0], -1.0), (high, temperatures[1], 1.0)):
        values = as_array(energy, KJ_PER_MOLE, "low, high")
        d = values - values.mean()
        second, third = np.mean(d**2), np.mean(d**3)
        # Coefficients of the cumulants in the mean of C over the interval.
        of_third = -sign * width / 12 / (k**2 * kelvin**4)
        of_second = 0.5 / (k * kelvin**2) + sign * width / 6 / (k * kelvin**3)
        slope += sign * values.mean() / width
        integral += of_second * second + of_third * third
        influence += sign * d / width - of_second * (d**2 - second)
        influence -= of_third * (d**3 - third - 3.0 * second * d)
    error = estimate_mean(influence)
    n_eff, undecided = _effective_samples(low, high)
    # The cumulants of walkers that hardly moved are too small, and their errors far too small.
    dof = error.dof if undecided is None else 0.0
    return EnsembleCheck(float(slope), error.stderr, float(integral), n_eff, undecided, dof)


def basin_ratio(
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    inside_low: npt.ArrayLike,
    inside_high: npt.ArrayLike,
    betas: tuple[float, float],
    n_pieces: float | None = None,
) -> EnsembleCheck:
    """Compare ln[P_high(S)/P_low(S)] of a state S with what the energies of two rungs say of it.

    The value is that of the counts. Expected is ln[Z_high(S)/Z_low(S)] - ln[Z_high/Z_low], by BAR
    (Bennett, J. Comput. Phys. 22, 245 (1976)) between the samples inside S and between all of them:
    it does not depend on how often S was visited. So a rung that visits S too rarely is found by
    its neighbour. Energies are [n, W] in kJ/mol of two rungs that were sampled side by side, truth
    values of the same shape, inverse temperatures in mol/kJ.

    Where one rung never visited S, the value is a bound: its population is taken as that which is
    missed with a probability of 5 % by `n_pieces` independent samples (by default, and at least,
    the number of walkers; see `openmm_tsf.analysis.convergence.count_pieces`), and expected comes
    from the samples of the other rung inside S, reweighted. Where neither visited S, or S is
    everywhere, all numbers are NaN.

    ``stderr`` is that of the difference of ``value`` and ``expected``; ``n_eff`` are the effective
    samples inside S at the rung that has more of them; with fewer than 16 the check is undecided.
    """
    energy = _stack(low, high)
    states = [np.asarray(inside_low), np.asarray(inside_high)]
    for name, state in zip(("inside_low", "inside_high"), states, strict=True):
        if state.dtype != np.bool_ or state.shape != energy.shape[:2]:
            got = f"{state.dtype} of shape {state.shape}"
            raise ValueError(f"{name}: expected truth values {energy.shape[:2]}, got {got}")
    truth = np.stack(states, axis=-1)
    counts = truth.sum(axis=(0, 1))
    successes = np.array([_effective_successes(truth[..., k]) for k in range(2)])
    n_eff = float(successes.max())
    nothing = EnsembleCheck(np.nan, np.nan, np.nan, n_eff, "the state was never visited")
    if not counts.any():
        return nothing
    if truth.all():
        return dataclasses.replace(nothing, undecided="the state was never left")
    x = (betas[0] - betas[1]) * energy
    everywhere, influence = _bar(x, np.ones_like(truth))
    if counts.all():
        within, influence_within = _bar(x, truth)
        value, bound = float(np.log(counts[1] / counts[0])), None
        difference = within - everywhere
        influence = influence_within - influence
    else:
        seen = int(np.argmax(counts))
        sign = 2 * seen - 1  # reweighted from the higher rung to the lower one: -1
        log_weights = np.where(truth[..., seen], -sign * x[..., seen], -np.inf)
        log_mean = float(logsumexp(log_weights)) - np.log(log_weights.size)
        unseen = assess_probability(truth[..., 1 - seen], n_pieces).high
        value = sign * float(np.log(counts[seen] / log_weights.size / unseen))
        bound = "lower" if seen else "upper"
        difference = sign * float(log_mean - np.log(unseen)) - everywhere
        influence = sign * (np.exp(log_weights - log_mean) - 1.0) - influence
    error = estimate_mean(influence) if np.isfinite(influence).all() else None
    if error is None:
        apart = "the energies of the two rungs do not overlap inside the state"
        return EnsembleCheck(value, np.nan, value - difference, n_eff, apart, bound=bound)
    stderr, undecided = error.stderr, None
    if bound is None:
        # Of the samples at the rung with fewer: those found or those expected, what is less.
        fewer = int(np.argmin(successes))
        excess = difference if fewer == 1 else -difference
        with np.errstate(divide="ignore"):  # no effective samples: the ratio says nothing
            counting = np.exp(0.5 * max(excess, 0.0)) / np.sqrt(successes[fewer])
        stderr = max(stderr, float(counting))
    if n_eff < MIN_EFFECTIVE_SUCCESSES:
        undecided = (
            f"{n_eff:.2g} effective samples inside the state, fewer than {MIN_EFFECTIVE_SUCCESSES}"
        )
    return EnsembleCheck(value, stderr, value - difference, n_eff, undecided, error.dof, bound)


def _effective_successes(inside: npt.NDArray[np.bool_]) -> float:
    """Return the effective samples inside a state, at most its independent visits."""
    estimate = estimate_mean(inside)
    return float(min(estimate.value * estimate.n_eff, count_visits(inside, estimate.g)))


def _stack(low: npt.ArrayLike, high: npt.ArrayLike) -> Array:
    """Return the energies [n, W, 2] of two rungs."""
    energies = [as_array(low, KJ_PER_MOLE, "low"), as_array(high, KJ_PER_MOLE, "high")]
    shapes = [each.shape for each in energies]
    if shapes[0] != shapes[1] or energies[0].ndim != 2 or energies[0].size == 0:
        raise ValueError(f"low, high: expected energies of one shape [n, W], got {shapes}")
    return np.stack(energies, axis=-1)


def _bar(x: Array, inside: npt.NDArray[np.bool_]) -> tuple[float, Array]:
    """Return the log odds c that a sample inside is of the higher rung, less x; its influences.

    x is (β_low - β_high) U [n, W, 2]. Bennett's equation: as many samples belong to the higher rung
    as it has, Σ 1/(1 + exp(-c - x)). NaN where the rungs do not overlap.
    """
    within = x[inside]
    n_high = int(inside[..., 1].sum())
    margin = np.log(within.size) + 1.0

    def surplus(c: float) -> float:
        return float(_logistic(c + within).sum()) - n_high

    c = float(brentq(surplus, -within.max() - margin, -within.min() + margin, xtol=1e-12))
    p = _logistic(c + x)
    information = float((p * (1.0 - p))[inside].sum())
    if information <= _SINGULAR * within.size:
        return c, np.full(x.shape[:2], np.nan)
    scores = np.where(inside, np.array([0.0, 1.0]) - p, 0.0).sum(axis=2)
    return c, scores * (scores.size / information)


def _effective_samples(low: npt.ArrayLike, high: npt.ArrayLike) -> tuple[float, str | None]:
    """Return the effective samples of ⟨U⟩ at the rung that has fewer, and why they are too few."""
    estimates = [estimate_mean(energy) for energy in (low, high)]
    n_eff = float(np.min([estimate.n_independent for estimate in estimates]))
    if not n_eff >= MIN_EFFECTIVE_SAMPLES:  # also for NaN
        return n_eff, f"{n_eff:.3g} effective samples of <U>, fewer than {MIN_EFFECTIVE_SAMPLES}"
    n, g = np.shape(low)[0], max(estimate.g for estimate in estimates)
    if n < MIN_CORRELATION_TIMES * g:
        return n_eff, (
            f"walkers are shorter than {MIN_CORRELATION_TIMES} correlation times of <U> "
            f"({n} saved iterations, g = {g:.3g})"
        )
    return n_eff, None
