"""Thermodynamics from independent weighted draws: of arrays, whoever made the draws.

A flow gives draws at any temperature, also where there is no rung; its log weights
ln[exp(-U/kT)/q], or of the joint with auxiliary momenta, are all that enters here.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.statistics import (
    EffectiveSampleSize,
    logit_free_energy,
    reverse_ess,
    reverse_ess_stderr,
    weighted_mean,
)
from openmm_tsf.analysis.thermodynamics import (
    PROFILE_BINS,
    Profile,
    dihedral_bins,
    kish_by_bin,
    make_profile,
)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ImportanceEstimate:
    """What weighted draws say at one temperature; estimates are (value, standard error).

    Attributes
    ----------
    temperature
        In K.
    ess, ess_stderr
        Kish's effective sample size, and the standard error of its fraction. Estimates, errors
        included, hold as far as no region was left undrawn: with a largest weight near 1 they rest
        on a single draw, and a basin that the model has dropped is not seen by any of them.
    energy
        ⟨U⟩ in kJ/mol.
    heat_capacity
        Configurational part in kJ/(mol K).
    delta_f
        -ln[P(inside)/P(outside)] in kT; (NaN, NaN) where `inside` was not given.
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
    """Thermodynamic functions from independent draws with weights.

    Parameters
    ----------
    log_weights
        ln[target/model] [N] up to a constant; -inf where the target vanishes or the draw is outside
        the model's domain.
    energy
        U [N] in kJ/mol; anything where the weight is zero.
    temperature, boltzmann_constant
        The target's, in K and kJ/(mol K).
    inside
        Truth values [N] of a state.

    Raises
    ------
    ValueError
        If shapes differ, every weight is zero, or an energy with a weight is not finite.
    """
    weights, kept, (values,) = _weighted(log_weights, energy=energy)
    ess = reverse_ess(log_weights)
    mean = weighted_mean(values, weights)
    variance, stderr = weighted_mean((values - mean[0]) ** 2, weights)
    scale = boltzmann_constant * temperature**2
    delta_f = (np.nan, np.nan)
    if inside is not None:
        state = np.asarray(inside)
        if state.dtype != np.bool_ or state.shape != kept.shape:
            raise ValueError(
                f"inside: expected truth values of shape {kept.shape}, got {state.dtype} of shape "
                f"{state.shape}"
            )
        probability, error = weighted_mean(state[kept], weights)
        delta_f = logit_free_energy(min(probability, 1.0), error)
    return ImportanceEstimate(
        temperature=float(temperature),
        ess=ess,
        ess_stderr=reverse_ess_stderr(log_weights),
        energy=mean,
        heat_capacity=(variance / scale, stderr / scale),
        delta_f=delta_f,
    )


def importance_profile(
    log_weights: npt.ArrayLike,
    angles: npt.ArrayLike,
    temperature: float,
    bins: int = PROFILE_BINS,
) -> Profile:
    """Free-energy profile along a dihedral from independent draws with weights.

    Parameters
    ----------
    log_weights
        As for `importance_thermodynamics`.
    angles
        The dihedral [N] in rad; anything where the weight is zero.
    temperature
        In K, for the record.
    bins
        Equal bins over [-π, π].
    """
    weights, _, (values,) = _weighted(log_weights, angles=angles)
    edges, index = dihedral_bins(values, bins)
    probability, stderr = np.zeros(bins), np.full(bins, np.nan)
    for b in np.unique(index):
        probability[b], stderr[b] = weighted_mean(index == b, weights)
    kish = kish_by_bin(index, np.exp(weights - weights.max()), bins)
    return make_profile(float(temperature), edges, probability, stderr, kish)


def _weighted(
    log_weights: npt.ArrayLike, **series: npt.ArrayLike
) -> tuple[Array, npt.NDArray[np.bool_], list[Array]]:
    """The draws that have a weight: their log weights, which ones, their values."""
    logs = np.asarray(log_weights, dtype=np.float64)
    kept = ~np.isneginf(logs)
    if logs.ndim != 1 or not kept.any():
        raise ValueError("log_weights: expected a vector with weights that are not all zero")
    values = []
    for name, given in series.items():
        array = np.asarray(given, dtype=np.float64)
        if array.shape != logs.shape:
            raise ValueError(f"{name}: expected shape {logs.shape}, got {array.shape}")
        if not np.isfinite(array[kept]).all():
            raise ValueError(f"{name}: expected finite values where the weight is not zero")
        values.append(array[kept])
    return logs[kept], kept, values
