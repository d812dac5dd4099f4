"""⟨U⟩, C_V, free energies and profiles at any temperature of the ladder, by MBAR over all rungs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.mbar import Mbar
from openmm_tsf.io.files import write_csv

Array = npt.NDArray[np.float64]

PROFILE_BINS = 60  # of 6°: an edge at 0


@dataclass(frozen=True)
class Thermodynamics:
    """Functions of temperature with standard errors; every array is [T].

    Attributes
    ----------
    temperatures
        In K.
    energy, energy_stderr
        ⟨U⟩ in kJ/mol.
    heat_capacity, heat_capacity_stderr
        Configurational part, var(U)/(k T²), in kJ/(mol K). A variance is skewed where independent
        samples are few: below some 300 of them it is too low, with too small an error, more often
        than a normal distribution says.
    dihedral
        Name of the dihedral of the free-energy difference; None where there is none.
    delta_f, delta_f_stderr
        -ln[P(dihedral > 0)/P(dihedral < 0)] in kT; NaN where there is no dihedral.
    kish
        1/Σw² of the normalised weights: how many of the samples count at this temperature. What
        their correlation costs is in the errors, not in here.
    """

    temperatures: Array
    energy: Array
    energy_stderr: Array
    heat_capacity: Array
    heat_capacity_stderr: Array
    dihedral: str | None
    delta_f: Array
    delta_f_stderr: Array
    kish: Array

    def rows(self) -> list[dict[str, float]]:
        """A dictionary per temperature, with units in the names."""
        names = {
            "temperature_K": self.temperatures,
            "energy_kJ_mol": self.energy,
            "energy_stderr": self.energy_stderr,
            "heat_capacity_kJ_mol_K": self.heat_capacity,
            "heat_capacity_stderr": self.heat_capacity_stderr,
        }
        if self.dihedral is not None:
            names[f"delta_F_{self.dihedral}_kT"] = self.delta_f
            names[f"delta_F_{self.dihedral}_stderr"] = self.delta_f_stderr
        names["kish"] = self.kish
        return [
            {name: float(values[i]) for name, values in names.items()}
            for i in range(len(self.temperatures))
        ]

    def to_csv(self, path: str | Path) -> None:
        """Write `rows` as a table."""
        rows = self.rows()
        write_csv(path, list(rows[0]), rows)


def thermodynamics(
    mbar: Mbar,
    temperatures: Sequence[float] | Array,
    boltzmann_constant: float,
    dihedral: str | None = None,
    inside: npt.NDArray[np.bool_] | None = None,
) -> Thermodynamics:
    """Thermodynamic functions by MBAR.

    Every estimate is linearised in the samples (see `openmm_tsf.analysis.mbar`), so its
    error knows of correlation in time, between rungs, and of the rungs' free energies.

    Parameters
    ----------
    mbar
        The samples of all rungs.
    temperatures
        Where, in K.
    boltzmann_constant
        In kJ/(mol K).
    dihedral, inside
        Name of a dihedral and 1[dihedral > 0] [n, W, R] of every sample.
    """
    kelvins = np.asarray(temperatures, dtype=np.float64)
    table = np.full((7, len(kelvins)), np.nan)
    for row, kelvin in zip(table.T, kelvins, strict=True):
        at = mbar.at(1.0 / (boltzmann_constant * kelvin))
        energy = at.mean(mbar.energy)
        # ⟨U⟩ is stationary in the variance: its error does not enter to first order.
        variance = at.mean((mbar.energy - energy.value) ** 2)
        row[:2] = energy.value, energy.stderr
        row[2:4] = np.array([variance.value, variance.stderr]) / (boltzmann_constant * kelvin**2)
        if inside is not None:
            row[4:6] = at.free_energy(inside)
        row[6] = at.kish
    return Thermodynamics(
        temperatures=kelvins,
        energy=table[0],
        energy_stderr=table[1],
        heat_capacity=table[2],
        heat_capacity_stderr=table[3],
        dihedral=dihedral,
        delta_f=table[4],
        delta_f_stderr=table[5],
        kish=table[6],
    )


@dataclass(frozen=True)
class Profile:
    """Free energy along a dihedral.

    Attributes
    ----------
    temperature
        In K.
    edges
        Bin edges [B+1] in rad.
    free_energy, stderr
        -ln p in kT [B], zero at the deepest bin; infinite with a NaN error where no sample lies.
        The error is that of ln p of the normalised density (pymbar's ``from-normalization``), not
        that of a difference from one chosen bin.
    probability, probability_stderr
        Of the bins [B].
    kish
        1/Σw² of the weights within every bin [B]. Where few samples of a hotter rung carry a bin,
        the best of them are likely to be missing: below some 10, expect the free energy to be too
        high and its error too small.
    """

    temperature: float
    edges: Array
    free_energy: Array
    stderr: Array
    probability: Array
    probability_stderr: Array
    kish: Array


def make_profile(
    temperature: float,
    edges: Array,
    probability: Array,
    probability_stderr: Array,
    kish: Array,
) -> Profile:
    """A profile from the probabilities of equally wide bins."""
    seen = probability > 0
    free_energy, stderr = np.full(len(seen), np.inf), np.full(len(seen), np.nan)
    free_energy[seen] = -np.log(probability[seen])
    stderr[seen] = probability_stderr[seen] / probability[seen]
    return Profile(
        temperature=temperature,
        edges=edges,
        free_energy=free_energy - free_energy.min(),
        stderr=stderr,
        probability=probability,
        probability_stderr=probability_stderr,
        kish=kish,
    )


def kish_by_bin(
    index: npt.NDArray[np.int64], weights: npt.NDArray[np.float64], n_bins: int
) -> Array:
    """(Σw)²/Σw² within every bin [B]; 0 where it is empty."""
    flat, w = index.ravel(), weights.ravel()
    total = np.bincount(flat, weights=w, minlength=n_bins)
    squares = np.bincount(flat, weights=w**2, minlength=n_bins)
    return np.divide(total**2, squares, out=np.zeros(n_bins), where=squares > 0)


def dihedral_bins(angles: Array, n_bins: int) -> tuple[Array, npt.NDArray[np.int64]]:
    """Edges [B+1] of equal bins over [-π, π] and the bin of every angle (wrapped)."""
    if isinstance(n_bins, bool) or not isinstance(n_bins, int) or n_bins < 1:
        raise ValueError(f"bins: expected an integer of at least 1, got {n_bins!r}")
    edges = np.linspace(-np.pi, np.pi, n_bins + 1)
    fraction = np.mod(np.asarray(angles, dtype=np.float64) + np.pi, 2 * np.pi) / (2 * np.pi)
    return edges, (fraction * n_bins).astype(np.int64) % n_bins


def dihedral_profile(
    mbar: Mbar,
    angles: Array,
    temperature: float,
    boltzmann_constant: float,
    bins: int = PROFILE_BINS,
) -> Profile:
    """Free-energy profile along a dihedral at any temperature of the ladder, by MBAR.

    Parameters
    ----------
    mbar
        The samples of all rungs.
    angles
        The dihedral [n, W, R] of every sample in rad.
    temperature, boltzmann_constant
        In K, kJ/(mol K).
    bins
        Equal bins over [-π, π].
    """
    edges, index = dihedral_bins(angles, bins)
    at = mbar.at(1.0 / (boltzmann_constant * temperature))
    probability, stderr = np.zeros(bins), np.full(bins, np.nan)
    for b in np.unique(index):
        estimate = at.mean(index == b)
        probability[b], stderr[b] = estimate.value, estimate.stderr
    kish = kish_by_bin(index, at.weights, bins)
    return make_profile(temperature, edges, probability, stderr, kish)
