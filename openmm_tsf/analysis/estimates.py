"""A run directory, finished or still growing, as numpy, mdtraj and pymbar objects."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.ensemble_checks import (
    Check,
    energy_ratio,
    heat_capacity,
    heat_capacity_difference,
)
from openmm_tsf.analysis.mbar import Mbar
from openmm_tsf.analysis.mixing import (
    Relaxation,
    mixing_matrix,
    relaxation,
    round_trips,
    split_r_hat,
)
from openmm_tsf.analysis.run_data import RunFiles
from openmm_tsf.analysis.thermodynamics import (
    PROFILE_BINS,
    Profile,
    Thermodynamics,
    dihedral_profile,
    thermodynamics,
)
from openmm_tsf.analysis.uncertainty import MeanEstimate, estimate_mean
from openmm_tsf.units import KELVIN, in_unit

Array = npt.NDArray[np.float64]

_GRID_POINTS = 13


class RunEstimates(RunFiles):
    """Estimates from the data of a run, with their errors."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._estimates: dict[tuple[str, int], MeanEstimate] = {}
        self._mbar: dict[int, Mbar] = {}

    # ------------------------------------------------------------- estimates

    def mean_energy(self, temperature: Any) -> MeanEstimate:
        """⟨U⟩ at one rung in kJ/mol."""
        return self._estimate(
            "energy", temperature, lambda: estimate_mean(self.energies(temperature))
        )

    def positive(self, name: str, temperature: Any) -> MeanEstimate:
        """P(dihedral > 0) at one rung, from that rung's own samples."""
        return self._estimate(
            name, temperature, lambda: estimate_mean(self.dihedral(name, temperature) > 0)
        )

    def _estimate(
        self, name: str, temperature: Any, estimate: Callable[[], MeanEstimate]
    ) -> MeanEstimate:
        self._require_data()
        key = (name, self.rung(temperature))
        if key not in self._estimates:
            self._estimates[key] = estimate()
        return self._estimates[key]

    def free_energy_difference(
        self, indicator: Callable[[mdtraj.Trajectory], npt.ArrayLike], temperature: Any
    ) -> tuple[float, float]:
        """-ln[P(true)/P(false)] in kT by MBAR over all rungs, and its standard error.

        Parameters
        ----------
        indicator
            Maps a trajectory of F frames to F truth values. It is called once per rung.
        temperature
            Any between the lowest and the highest rung, in K.

        Returns
        -------
        value, stderr
            (±inf, NaN) when one of the two states was never seen.

        Raises
        ------
        TypeError
            If the indicator returns something other than truth values.
        ValueError
            If it returns another number of them, or the temperature is outside the ladder.
        """
        self._require_data()
        beta = self._beta(temperature)
        n = min(self._n_iterations_with_frames(rung) for rung in range(self.n_rungs))
        if n == 0:
            raise ValueError(f"{self.path}: the trajectories have no complete iteration yet")
        inside = np.empty((n, self.n_walkers, self.n_rungs), dtype=bool)
        for rung in range(self.n_rungs):
            answer = np.asarray(indicator(self._frames(rung, n)))
            if answer.dtype != np.bool_:
                raise TypeError(f"indicator: expected truth values, got {answer.dtype}")
            if answer.size != n * self.n_walkers:
                raise ValueError(
                    f"indicator: expected {n * self.n_walkers} values, got shape {answer.shape}"
                )
            inside[:, :, rung] = answer.reshape(n, self.n_walkers)
        return self.mbar(n).at(beta).free_energy(inside)

    def free_energy_positive(self, name: str, temperature: Any) -> tuple[float, float]:
        """-ln[P(dihedral > 0)/P(dihedral < 0)] in kT by MBAR over all rungs, and its error.

        As `free_energy_difference`, from the recorded dihedrals: no trajectory is read.
        """
        self._require_data()
        return self.mbar().at(self._beta(temperature)).free_energy(self._dihedrals(name) > 0)

    def mbar(self, n_iterations: int | None = None) -> Mbar:
        """The samples of all rungs with their free energies, of the first iterations or of all."""
        self._require_data()
        n = self.n_iterations if n_iterations is None else n_iterations
        if n not in self._mbar:  # the same for every observable and temperature
            self._mbar[n] = Mbar(self.segments.energy[:n], self.betas)
        return self._mbar[n]

    def thermodynamics(
        self, temperatures: Any = None, dihedral: str | None = None
    ) -> Thermodynamics:
        """⟨U⟩, C_V and ΔF of a dihedral as functions of temperature by MBAR over all rungs.

        Parameters
        ----------
        temperatures
            One or several between the lowest and the highest rung, in K (or Quantities); 13 of
            them and the rungs when left out.
        dihedral
            Whose ΔF; the first φ (``phi``, or the lowest residue's) where there is one.

        Raises
        ------
        ValueError
            If a temperature is outside the ladder, there is none, or the run did not record the
            dihedral.
        """
        self._require_data()
        if temperatures is None:
            grid = np.linspace(self.temperatures[0], self.temperatures[-1], _GRID_POINTS)
            temperatures = np.union1d(grid, self.temperatures)
        plain: Any = in_unit(temperatures, KELVIN, "temperatures")
        if np.ndim(plain) == 0 or not isinstance(plain, Iterable):
            plain = [plain]
        kelvins = [1.0 / (self.boltzmann_constant * self._beta(t)) for t in plain]
        if not kelvins:
            raise ValueError("temperatures: expected at least one, got none")
        name = dihedral if dihedral is not None else self.first_phi()
        inside = None if name is None else self._dihedrals(name) > 0
        return thermodynamics(self.mbar(), kelvins, self.boltzmann_constant, name, inside)

    def profile(self, name: str, temperature: Any, bins: int = PROFILE_BINS) -> Profile:
        """Free-energy profile along a dihedral by MBAR over all rungs, with its error band.

        Parameters
        ----------
        name
            A recorded dihedral.
        temperature
            Any between the lowest and the highest rung, in K.
        bins
            Equal bins over [-π, π].
        """
        self._require_data()
        kelvin = 1.0 / (self.boltzmann_constant * self._beta(temperature))
        return dihedral_profile(
            self.mbar(), self._dihedrals(name), kelvin, self.boltzmann_constant, bins
        )

    def phi_profile(self, temperature: Any, bins: int = PROFILE_BINS) -> Profile:
        """`profile` of the first φ.

        Raises
        ------
        ValueError
            If the run recorded no φ.
        """
        name = self.first_phi()
        if name is None:
            raise ValueError(f"phi: this run recorded {list(self.dihedral_atoms)}, no phi")
        return self.profile(name, temperature, bins)

    def first_phi(self) -> str | None:
        """Name of the first recorded φ; None where there is none."""
        return next((n for n in self.dihedral_atoms if n.startswith("phi")), None)

    def _dihedrals(self, name: str) -> Array:
        """One dihedral [n, W, R] at all rungs."""
        self.dihedral(name, self.temperatures[0])  # raises where there is none
        angles = self.segments.dihedrals[..., list(self.dihedral_atoms).index(name)]
        return angles.astype(np.float64)

    # ----------------------------------------------------------------- checks

    def heat_capacity(self, temperature: Any) -> MeanEstimate:
        """Configurational C_V of one rung in kJ/(mol K), from its own fluctuations of U.

        Below some 100 effective samples (``n_independent``) neither it nor its error is known.
        """
        kelvin = float(self.temperatures[self.rung(temperature)])
        return self._estimate(
            "heat capacity",
            temperature,
            lambda: heat_capacity(self.energies(temperature), kelvin, self.boltzmann_constant),
        )

    def energy_ratios(self) -> list[Check]:
        """Per pair of neighbouring rungs: slope of ln[P(U)/P(U)] beside β - β, in mol/kJ."""
        self._require_data()
        return [
            energy_ratio(
                self.energies(a),
                self.energies(b),
                (1.0 / (self.boltzmann_constant * a), 1.0 / (self.boltzmann_constant * b)),
            )
            for a, b in pairwise(map(float, self.temperatures))
        ]

    def heat_capacity_differences(self) -> list[Check]:
        """Per pair of neighbouring rungs: Δ⟨U⟩/ΔT beside C_V from fluctuations, in kJ/(mol K)."""
        self._require_data()
        return [
            heat_capacity_difference(
                self.energies(a), self.energies(b), (a, b), self.boltzmann_constant
            )
            for a, b in pairwise(map(float, self.temperatures))
        ]

    def r_hat(self, name: str, temperature: Any) -> float:
        """Rank-normalised split-R̂ over walkers of 1[dihedral > 0], or of U for ``"energy"``."""
        self._require_data()
        if name == "energy":
            return split_r_hat(self.energies(temperature))
        return split_r_hat(self.dihedral(name, temperature) > 0)

    # ------------------------------------------------------------- exchanges

    def acceptance(self) -> dict[str, Array]:
        """Accepted over proposed moves per kernel: [R], [R-1] (swaps of neighbours) or [R, R].

        NaN where a move was never proposed.
        """
        table = {}
        for name, proposed in self.segments.proposed.items():
            accepted = self.segments.accepted[name].astype(np.float64)
            table[name] = np.divide(
                accepted, proposed, out=np.full(proposed.shape, np.nan), where=proposed > 0
            )
        return table

    def round_trips(self) -> npt.NDArray[np.int64]:
        """Trips lowest → highest → lowest rung of each replica [W, R]."""
        return round_trips(self.segments.replica)

    def mixing_matrix(self) -> Array:
        """Probability [R, R] that the replica at rung i sits at rung j one saved iteration on."""
        return mixing_matrix(self.segments.replica)

    def relaxation(self) -> Relaxation:
        """Second eigenvalue of the mixing matrix and 1/(1 - λ₂) in saved iterations."""
        return relaxation(self.mixing_matrix())
