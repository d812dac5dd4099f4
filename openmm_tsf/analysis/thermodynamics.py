"""⟨U⟩, C_V, free energies and profiles at any temperature of the ladder, by MBAR over all rungs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.mbar import Mbar
from openmm_tsf.analysis.statistics import Array
from openmm_tsf.io.files import write_csv
from openmm_tsf.utils.validation import check_int
from openmm_tsf.utils.wells import angle_bins

PROFILE_BINS = 60  # of 6°: an edge at 0


@dataclass(frozen=True)
class Thermodynamics:
    """Functions of temperature with standard errors; every array is [T].

    Attributes
    ----------
    temperatures, energy, energy_stderr
        In K; ⟨U⟩ in kJ/mol.
    heat_capacity, heat_capacity_stderr
        Configurational part, var(U)/(k T²), in kJ/(mol K). A variance is skewed where independent
        samples are few: below some 300 of them it is too low, with too small an error, more often
        than a normal distribution says.
    dihedral, delta_f, delta_f_stderr
        Name of a dihedral, and -ln[P(dihedral > 0)/P(dihedral < 0)] in kT; None and NaN if it was
        not computed.
    kish
        Kish's effective sample size 1/Σw² of the normalised weights at this temperature. The cost
        of correlation is in the errors, not in here.

    Examples
    --------
    >>> import numpy as np
    >>> from openmm_tsf.analysis.mbar import Mbar
    >>> from openmm_tsf.analysis.thermodynamics import compute_thermodynamics
    >>> ladder = np.array([1.0, 2.0])  # of one harmonic mode, k_B = 1: ⟨U⟩ = T/2, C_V = 1/2
    >>> energy = 0.5 * ladder * np.random.default_rng(1).chisquare(1, (2000, 4, 2))
    >>> table = compute_thermodynamics(Mbar(energy, 1 / ladder), [1.5], boltzmann_constant=1.0)
    >>> bool(abs(table.energy[0] - 0.75) < 3 * table.energy_stderr[0])
    True
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
        """Return a dictionary per temperature, with units in the names."""
        columns = {
            "temperature_K": self.temperatures,
            "energy_kJ_mol": self.energy,
            "energy_stderr": self.energy_stderr,
            "heat_capacity_kJ_mol_K": self.heat_capacity,
            "heat_capacity_stderr": self.heat_capacity_stderr,
        }
        if self.dihedral is not None:
            columns[f"delta_F_{self.dihedral}_kT"] = self.delta_f
            columns[f"delta_F_{self.dihedral}_stderr"] = self.delta_f_stderr
        columns["kish"] = self.kish
        return [
            {name: float(values[i]) for name, values in columns.items()}
            for i in range(len(self.temperatures))
        ]

    def to_csv(self, path: str | Path) -> None:
        """Write `rows` as a table."""
        rows = self.rows()
        write_csv(path, list(rows[0]), rows)


def compute_thermodynamics(
    mbar: Mbar,
    temperatures: Sequence[float] | Array,
    boltzmann_constant: float,
    dihedral: str | None = None,
    inside: npt.NDArray[np.bool_] | None = None,
) -> Thermodynamics:
    """Compute functions of temperature (K) by MBAR; with ΔF if 1[dihedral > 0] is given.

    The truth values are [n, W, R]. The errors include correlation in time and between rungs, and
    the error of the rungs' free energies (see `openmm_tsf.analysis.mbar`).
    """
    kelvins = np.asarray(temperatures, dtype=np.float64)
    table = np.full((7, len(kelvins)), np.nan)
    for row, kelvin in zip(table.T, kelvins, strict=True):
        samples = mbar.reweight(1.0 / (boltzmann_constant * kelvin))
        energy = samples.mean(mbar.energy)
        # The variance is stationary in ⟨U⟩: the error of ⟨U⟩ does not enter to first order.
        variance = samples.mean((mbar.energy - energy.value) ** 2)
        row[:2] = energy.pair
        row[2:4] = np.array(variance.pair) / (boltzmann_constant * kelvin**2)
        if inside is not None:
            row[4:6] = samples.free_energy(inside)
        row[6] = samples.kish
    return Thermodynamics(
        kelvins, table[0], table[1], table[2], table[3], dihedral, table[4], table[5], table[6]
    )


@dataclass(frozen=True)
class Profile:
    """The free energy along a dihedral.

    Attributes
    ----------
    temperature, edges
        In K; bin edges [B+1] in rad.
    free_energy, stderr
        -ln p in kT [B], zero at the deepest bin; infinite with a NaN error where a bin is empty.
        The error is that of ln p of the normalised density (pymbar's ``from-normalization``), not
        that of a difference from one chosen bin.
    probability, probability_stderr
        Of the bins [B].
    kish
        Kish's effective sample size 1/Σw² of the weights within every bin [B]. Where few samples
        of a hotter rung carry a bin, those of the largest weight are likely to be missing: below
        some 10, expect the free energy to be too high and its error too small.

    Examples
    --------
    >>> import numpy as np
    >>> from openmm_tsf.analysis import importance_profile
    >>> angles = np.linspace(-np.pi, np.pi, 1000)
    >>> profile = importance_profile(2 * np.cos(angles), angles, 300.0, bins=3)  # U = -2 kT cos φ
    >>> [round(float(f), 1) for f in profile.free_energy]  # in kT
    [2.1, 0.0, 2.1]
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
    angles: Array,
    bins: int,
    weights: Array,
    mean: Callable[[npt.NDArray[np.bool_]], tuple[float, float]],
) -> Profile:
    """Return the profile along a dihedral in equal bins over [-π, π] from an estimator of means.

    Angles are in rad, of any shape, wrapped; weights are up to a constant. `mean` returns the mean
    of truth values of the samples, and its standard error.
    """
    bins = check_int(bins, "bins")
    index = angle_bins(angles, bins)
    probability, probability_stderr = np.zeros(bins), np.full(bins, np.nan)
    for b in np.unique(index):
        probability[b], probability_stderr[b] = mean(index == b)
    seen = probability > 0
    free_energy, stderr = np.full(bins, np.inf), np.full(bins, np.nan)
    free_energy[seen] = -np.log(probability[seen])
    stderr[seen] = probability_stderr[seen] / probability[seen]
    return Profile(
        temperature=temperature,
        edges=np.linspace(-np.pi, np.pi, bins + 1),
        free_energy=free_energy - free_energy.min(),
        stderr=stderr,
        probability=probability,
        probability_stderr=probability_stderr,
        kish=_kish_by_bin(index.ravel(), weights.ravel(), bins),
    )


def _kish_by_bin(index: npt.NDArray[np.int64], weights: Array, n_bins: int) -> Array:
    """Return (Σw)²/Σw² within every bin; 0 if it is empty."""
    total = np.bincount(index, weights=weights, minlength=n_bins)
    squares = np.bincount(index, weights=weights**2, minlength=n_bins)
    return np.divide(total**2, squares, out=np.zeros(n_bins), where=squares > 0)


def dihedral_profile(
    mbar: Mbar,
    angles: Array,
    temperature: float,
    boltzmann_constant: float,
    bins: int = PROFILE_BINS,
) -> Profile:
    """Compute the profile along a dihedral [n, W, R] (rad) at any temperature by MBAR."""
    samples = mbar.reweight(1.0 / (boltzmann_constant * temperature))
    return make_profile(
        temperature, angles, bins, samples.weights, lambda inside: samples.mean(inside).pair
    )
