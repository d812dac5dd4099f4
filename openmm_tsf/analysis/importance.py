"""Thermodynamic functions from independent weighted draws, whatever model made them.

A flow gives draws at any temperature, whether or not it is a rung; only their log weights
ln[exp(-U/kT)/q], or those of the joint density with auxiliary momenta, are needed here.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from openmm import unit

from openmm_tsf.analysis.statistics import (
    Array,
    EffectiveSampleSize,
    logit_free_energy,
    reverse_ess,
    reverse_ess_stderr,
    weighted_mean,
)
from openmm_tsf.analysis.thermodynamics import PROFILE_BINS, Profile, make_profile
from openmm_tsf.units import (
    DIMENSIONLESS,
    KELVIN,
    KJ_PER_MOLE,
    RADIAN,
    as_array,
    as_temperature,
    in_unit,
)
from openmm_tsf.utils.validation import check_positive


@dataclass(frozen=True)
class ImportanceEstimate:
    """Estimates at one temperature from weighted draws; each is (value, standard error).

    Attributes
    ----------
    temperature
        In K.
    ess, ess_stderr
        Kish's effective sample size, and the standard error of its fraction. No estimate or error
        here sees a basin that the model never draws; with a largest weight near 1 all of them rest
        on a single draw.
    energy
        ⟨U⟩ in kJ/mol.
    heat_capacity
        Configurational part in kJ/(mol K).
    delta_f
        -ln[P(inside)/P(outside)] in kT; (NaN, NaN) where `inside` was not given.

    Examples
    --------
    >>> import numpy as np
    >>> from openmm_tsf.analysis import importance_thermodynamics
    >>> x = np.random.default_rng(1).normal(0.0, 1.2, 10_000)  # draws of N(0, 1.2²)
    >>> energy = 0.5 * x**2  # the target at T = 1, k_B = 1: N(0, 1), so that ⟨U⟩ = 1/2
    >>> result = importance_thermodynamics(-energy + 0.5 * (x / 1.2) ** 2, energy, 1.0, 1.0)
    >>> mean, stderr = result.energy
    >>> bool(abs(mean - 0.5) < 3 * stderr)
    True
    """

    temperature: float
    ess: EffectiveSampleSize
    ess_stderr: float
    energy: tuple[float, float]
    heat_capacity: tuple[float, float]
    delta_f: tuple[float, float]


def importance_thermodynamics(
    log_weights: npt.ArrayLike,
    energy: npt.ArrayLike,
    temperature: float,
    boltzmann_constant: float,
    inside: npt.ArrayLike | None = None,
) -> ImportanceEstimate:
    """Compute thermodynamic functions from independent weighted draws.

    Parameters
    ----------
    log_weights
        ln[target/model] [N] up to a constant; -inf where the target vanishes or the draw is outside
        the model's domain.
    energy
        U [N] in kJ/mol; any value where the weight is zero.
    temperature, boltzmann_constant
        Of the target, in K and kJ/(mol K).
    inside
        Truth values [N] of a state.
    """
    temperature = as_temperature(temperature)
    constant = in_unit(boltzmann_constant, KJ_PER_MOLE / KELVIN, "boltzmann_constant")
    logs, kept, values = _weighted(log_weights, "energy", energy, KJ_PER_MOLE)
    mean = weighted_mean(values, logs)
    variance, stderr = weighted_mean((values - mean[0]) ** 2, logs)
    scale = check_positive(constant, "boltzmann_constant") * temperature**2
    delta_f = (np.nan, np.nan)
    if inside is not None:
        state = np.asarray(inside)
        if state.dtype != np.bool_ or state.shape != kept.shape:
            got = f"{state.dtype} of shape {state.shape}"
            raise ValueError(f"inside: expected truth values of shape {kept.shape}, got {got}")
        probability, error = weighted_mean(state[kept], logs)
        delta_f = logit_free_energy(min(probability, 1.0), error)
    return ImportanceEstimate(
        temperature=temperature,
        ess=reverse_ess(log_weights),
        ess_stderr=reverse_ess_stderr(log_weights),
        energy=mean,
        heat_capacity=(variance / scale, stderr / scale),
        delta_f=delta_f,
    )


def importance_profile(
    log_weights: npt.ArrayLike, angles: npt.ArrayLike, temperature: float, bins: int = PROFILE_BINS
) -> Profile:
    """Compute the free-energy profile along a dihedral from independent weighted draws.

    Parameters
    ----------
    log_weights, angles
        As for `importance_thermodynamics`, and the dihedral [N] in rad, any value where the weight
        is zero.
    temperature, bins
        In K, for the record; the number of equal bins over [-π, π].
    """
    temperature = as_temperature(temperature)
    logs, _, values = _weighted(log_weights, "angles", angles, RADIAN)
    weights = np.exp(logs - logs.max())
    return make_profile(
        temperature, values, bins, weights, lambda inside: weighted_mean(inside, logs)
    )


def _weighted(
    log_weights: npt.ArrayLike, name: str, values: npt.ArrayLike, target: unit.Unit
) -> tuple[Array, npt.NDArray[np.bool_], Array]:
    """Return log weights and values of the draws whose weight is not zero, and which they are."""
    logs = as_array(log_weights, DIMENSIONLESS, "log_weights")
    array = as_array(values, target, name)
    kept = ~np.isneginf(logs)
    if logs.ndim != 1 or not kept.any():
        raise ValueError("log_weights: expected a vector with at least one weight above zero")
    if array.shape != logs.shape:
        raise ValueError(f"{name}: expected shape {logs.shape}, got {array.shape}")
    if not np.isfinite(array[kept]).all():
        raise ValueError(f"{name}: expected finite values where the weight is not zero")
    return logs[kept], kept, array[kept]
