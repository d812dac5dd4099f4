"""Do the rungs sample the Boltzmann distributions of their temperatures? Tests from energies alone.

`energy_ratio`, the sharp test (Shirts, J. Chem. Theory Comput. 9, 909 (2013), and the package
physical_validation): ln[P_b(U)/P_a(U)] of two rungs is a straight line in U of slope β_a - β_b,
whatever the density of states. `heat_capacity_difference`, the simple one: the heat capacity from
fluctuations within the rungs must integrate to the difference of ⟨U⟩ between them.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.statistics import MIN_CORRELATION_TIMES, MIN_EFFECTIVE_SAMPLES, Array
from openmm_tsf.analysis.uncertainty import MeanEstimate, estimate_mean
from openmm_tsf.units import KJ_PER_MOLE, as_array

_NEWTON_STEPS = 100
_TOLERANCE = 1e-10
#: Eigenvalues of the information (of standardised energies) below this, per sample, are zero.
_SINGULAR = 1e-12


@dataclass(frozen=True)
class EnsembleCheck:
    """An estimate beside the value that it has for Boltzmann distributions."""

    value: float
    stderr: float
    expected: float
    #: Effective samples of ⟨U⟩ at the rung that has fewer; NaN where they are not known, 0 where
    #: the walkers are shorter than 4 correlation times g: they may still depend on their start.
    n_eff: float

    @property
    def z(self) -> float:
        """(value - expected)/stderr; NaN where the error is not known.

        It is not known with fewer than 100 effective samples of ⟨U⟩ at either rung: errors of
        correlated series are too small then, those of the third cumulant far too small.
        """
        if not self.n_eff >= MIN_EFFECTIVE_SAMPLES:
            return float("nan")
        return (self.value - self.expected) / self.stderr


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
    series = np.stack([as_array(low, KJ_PER_MOLE, "low"), as_array(high, KJ_PER_MOLE, "high")], -1)
    expected = betas[0] - betas[1]
    if series.ndim != 3 or series.size == 0:
        raise ValueError(f"low, high: expected energies [n, W], got shape {series.shape[:-1]}")
    n_eff = _effective_samples(series[..., 0], series[..., 1])
    unknown = EnsembleCheck(np.nan, np.nan, expected, n_eff)
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
    error = estimate_mean(scores @ influence * (n * n_walkers)).stderr
    return EnsembleCheck(float(theta[1] / scale), float(error / scale), expected, n_eff)


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
    stderr = estimate_mean(influence).stderr
    return EnsembleCheck(float(slope), stderr, float(integral), _effective_samples(low, high))


def _effective_samples(low: npt.ArrayLike, high: npt.ArrayLike) -> float:
    """Return the effective samples of ⟨U⟩ as `EnsembleCheck.n_eff` defines them."""
    estimates = [estimate_mean(energy) for energy in (low, high)]
    if any(np.shape(low)[0] < MIN_CORRELATION_TIMES * estimate.g for estimate in estimates):
        return 0.0
    return float(np.min([estimate.n_independent for estimate in estimates]))
