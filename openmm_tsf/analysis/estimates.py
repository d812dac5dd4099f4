"""Estimates from the data of a run, with their standard errors."""

import re
import warnings
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.convergence import count_pieces
from openmm_tsf.analysis.curve import Curve, compute_curve
from openmm_tsf.analysis.ensemble_checks import (
    EnsembleCheck,
    energy_ratio,
    heat_capacity,
    heat_capacity_difference,
)
from openmm_tsf.analysis.mbar import Mbar, Reweighted
from openmm_tsf.analysis.mixing import (
    Relaxation,
    mixing_matrix,
    relaxation,
    round_trips,
    split_r_hat,
)
from openmm_tsf.analysis.observed import RunObservables
from openmm_tsf.analysis.reference import Reference, load_reference
from openmm_tsf.analysis.run_data import nearest_rung
from openmm_tsf.analysis.statistics import MIN_EFFECTIVE_SAMPLES, Array
from openmm_tsf.analysis.thermodynamics import (
    PROFILE_BINS,
    Profile,
    Thermodynamics,
    compute_thermodynamics,
    dihedral_profile,
)
from openmm_tsf.analysis.uncertainty import MeanEstimate, estimate_mean
from openmm_tsf.analysis.weighted_frames import WeightedTrajectory
from openmm_tsf.units import KELVIN, as_temperature, in_unit
from openmm_tsf.utils.validation import check_int

_GRID_POINTS = 13


class RunEstimates(RunObservables):
    """The data of a run and estimates from them, with their standard errors."""

    def __init__(self, path: str | Path, start: int | None = None) -> None:
        super().__init__(path, start)
        self._estimates: dict[tuple[str, int], MeanEstimate] = {}
        self._mbar: dict[int | str, Mbar] = {}
        self._mbar_without: dict[tuple[int, int], Mbar] = {}

    def reference(self) -> Reference | None:
        """Return the shipped reference data that the configuration names, if any."""
        name = self.config.get("reference")
        return None if name is None else load_reference(name)

    def mean_energy(self, temperature: Any) -> MeanEstimate:
        """Return ⟨U⟩ at one rung in kJ/mol."""
        return self._estimate(
            "energy", temperature, lambda: estimate_mean(self.energies(temperature))
        )

    def positive(self, name: str, temperature: Any) -> MeanEstimate:
        """Return P(dihedral > 0) at one rung, from the samples of that rung alone."""
        return self._estimate(
            f"{name} > 0", temperature, lambda: estimate_mean(self.dihedral(name, temperature) > 0)
        )

    def _estimate(
        self, name: str, temperature: Any, estimate: Callable[[], MeanEstimate]
    ) -> MeanEstimate:
        self.require_samples()
        key = (name, self.rung(temperature))
        if key not in self._estimates:
            self._estimates[key] = estimate()
        return self._estimates[key]

    def free_energy_difference(
        self, indicator: Callable[[mdtraj.Trajectory], npt.ArrayLike], temperature: Any
    ) -> tuple[float, float]:
        """Return -ln[P(true)/P(false)] in kT by MBAR over all rungs, and its standard error.

        (±inf, NaN) where one of the two states was never visited.

        The indicator maps a trajectory of F frames to F truth values, and is called once per rung.
        The temperature is any of the ladder, or near it (see `at`), in K.
        """
        self.require_samples()
        kelvin = self._target(temperature)
        return self._reweight(kelvin, self.mbar_of_frames()).free_energy(self.evaluate(indicator))

    def at(self, temperature: Any, stride: int = 1) -> WeightedTrajectory:
        """Return the frames of all rungs, weighted to any temperature of the ladder by MBAR.

        Only every `stride`-th iteration with frames is read: a frame takes 12 bytes per atom. They
        are sorted by their rung, then by iteration, then by walker; ``time`` is the iteration.

        Outside the ladder, which was not sampled, it warns, and says how many effective samples are
        left there; fewer than 100 are a ValueError. Frames of equal weight, drawn anew, are those
        of ``openmm-tsf at`` (`openmm_tsf.sample_at`).
        """
        self.require_samples()
        stride, n = check_int(stride, "stride"), self.n_iterations_with_frames
        kelvin = self._target(temperature)
        weights = self._reweight(kelvin, self.mbar_of_frames()).weights[::stride]
        parts = [self._frames(rung, n, stride=stride) for rung in range(self.n_rungs)]
        frames = mdtraj.Trajectory(
            np.concatenate([part.xyz for part in parts]),
            self.topology,
            time=np.concatenate([part.time for part in parts]),
        )
        return WeightedTrajectory(frames, np.moveaxis(weights, 2, 0).ravel(), kelvin)

    def curve(
        self,
        observable: str | npt.ArrayLike | Callable[[mdtraj.Trajectory], npt.ArrayLike],
        temperatures: Any,
    ) -> Curve:
        """Return the mean of an observable as a function of temperature by MBAR over all rungs.

        Parameters
        ----------
        observable
            A map from a trajectory of F frames to F numbers or arrays [F, ...], called once per
            rung; ``"energy"``; the name of an observable or a definition (see `observable`); or
            numbers [n, W, R, ...] of all samples, such as ``run.observable("phi") > 0``, or
            [m, W, R, ...] of those with frames (see `frame_index`).
        temperatures
            One or several of the ladder, or near it (see `at`), in K.
        """
        self.require_samples()
        values: Any = observable
        if isinstance(observable, str):
            values = self.energy if observable == "energy" else self.observable(observable)
        elif callable(observable):
            values = self.evaluate_frames(observable, "observable")
        values = np.asarray(values)
        if values.dtype.kind not in "biuf":
            raise TypeError(f"observable: expected numbers, got {values.dtype}")
        if not np.isfinite(values).all():
            raise ValueError("observable: expected finite numbers, got NaN or infinity")
        known = (self.n_used, self.n_walkers, self.n_rungs)
        if values.shape[1:3] != known[1:] or not 0 < len(values) <= known[0]:
            raise ValueError(f"observable: expected shape {known}, got {values.shape}")
        kelvins = self._target_temperatures(temperatures)
        samples = self._samples_of(len(values), of_frames=callable(observable))
        return compute_curve(samples, kelvins, self.boltzmann_constant, values)

    def _samples_of(self, n: int, of_frames: bool) -> Mbar:
        """Return the samples that n values are of: of frames, or all, or (unless thinned) first."""
        is_thinned = self.n_framed < self.n_used
        if not is_thinned or n == self.n_used:
            return self.mbar(n)
        m = self.n_iterations_with_frames
        if not of_frames and n != m:
            raise ValueError(
                f"observable: expected values of {self.n_used} iterations, or of the {m} with "
                f"frames, got {n}"
            )
        return self.mbar_of_frames()

    def _reweight(self, kelvin: float, samples: Mbar | None = None) -> Reweighted:
        beta = 1.0 / (self.boltzmann_constant * kelvin)
        return (self.mbar() if samples is None else samples).reweight(beta)

    def _target(self, temperature: Any) -> float:
        """Return a temperature in K; outside the ladder warn or refuse, by what is left there."""
        kelvin = as_temperature(temperature)
        inside = self.temperatures[0] <= kelvin <= self.temperatures[-1]
        if inside or nearest_rung(self.temperatures, kelvin) is not None:
            return kelvin
        n_eff = self._reweight(kelvin).kish
        ladder = f"{self.temperatures[0]:.2f} to {self.temperatures[-1]:.2f} K"
        left = f"{n_eff:.0f} effective samples of {self.energy.size:,} are left there"
        if n_eff < MIN_EFFECTIVE_SAMPLES:
            raise ValueError(f"temperature: expected {ladder}, got {kelvin:g} K: only {left}")
        warnings.warn(
            f"temperature: {kelvin:g} K is outside the ladder, {ladder}: {left}, and what is "
            "typical there may never have been sampled",
            stacklevel=3,
        )
        return kelvin

    def _target_temperatures(self, temperatures: Any) -> list[float]:
        """Return one or several target temperatures as a list in K."""
        targets: Any = in_unit(temperatures, KELVIN, "temperatures")
        if np.ndim(targets) == 0 or not isinstance(targets, Iterable):
            targets = [targets]
        kelvins = [self._target(t) for t in targets]
        if not kelvins:
            raise ValueError("temperatures: expected at least one, got none")
        return kelvins

    def free_energy_positive(self, name: str, temperature: Any) -> tuple[float, float]:
        """Return -ln[P(dihedral > 0)/P(dihedral < 0)] in kT by MBAR, and its standard error.

        As `free_energy_difference`, but from the recorded dihedrals: no trajectory is read.
        """
        self.require_samples()
        inside = self.dihedral_at_all_rungs(name) > 0
        return self._reweight(self._target(temperature)).free_energy(inside)

    @cached_property
    def n_pieces(self) -> float:
        """The independent samples of the run by its slowest torsion or basin, or by U.

        Of the rung where they are fewest: rungs exchange their replicas, and what is slow at one of
        them is slow at all.
        """
        self.require_samples()
        series = [self.energy, *(self.in_basin(name) for name in self.basins.names)]
        angles = np.moveaxis(self.dihedrals, 3, 0)
        return min(
            count_pieces(*(each[..., rung] for each in series), angles=angles[..., rung])
            for rung in range(self.n_rungs)
        )

    def mbar(self, n_iterations: int | None = None) -> Mbar:
        """Return all samples with their free energies, or those of the first iterations used."""
        self.require_samples()
        n = self.n_used if n_iterations is None else n_iterations
        if n not in self._mbar:  # solved once for every observable and temperature
            self._mbar[n] = Mbar(self.energy[:n], self.betas)
        return self._mbar[n]

    def mbar_of_frames(self) -> Mbar:
        """Return the samples with frames, see `frame_index`, with free energies from them."""
        index = self.frame_index()
        if np.array_equal(index, np.arange(len(index))):
            return self.mbar(len(index))
        key = f"{len(index)} frames"
        if key not in self._mbar:
            self._mbar[key] = Mbar(self.energy[index], self.betas)
        return self._mbar[key]

    def mbar_without(self, rung: int, n_iterations: int | None = None) -> Mbar:
        """Return the samples of all rungs but one, which must not be the only one.

        Of all iterations, or of those with frames if `n_iterations` is their number.
        """
        self.require_samples()
        n = self.n_used if n_iterations is None else n_iterations
        if (rung, n) not in self._mbar_without:
            energy = np.delete(self.match_frames(self.energy, n), rung, axis=2)
            self._mbar_without[rung, n] = Mbar(energy, np.delete(self.betas, rung))
        return self._mbar_without[rung, n]

    def thermodynamics(
        self, temperatures: Any = None, dihedral: str | None = None
    ) -> Thermodynamics:
        """Return ⟨U⟩, C_V and ΔF of a dihedral as functions of temperature by MBAR over all rungs.

        The temperatures, one or several, are of the ladder, or near it (see `at`), in K (or
        Quantities); by default they are the rungs and 13 evenly spaced ones. The dihedral is by
        default the first φ, if the run recorded one.
        """
        self.require_samples()
        if temperatures is None:
            grid = np.linspace(self.temperatures[0], self.temperatures[-1], _GRID_POINTS)
            temperatures = np.union1d(grid, self.temperatures)
        kelvins = self._target_temperatures(temperatures)
        name = dihedral if dihedral is not None else self.first_phi()
        inside = None if name is None else self.dihedral_at_all_rungs(name) > 0
        return compute_thermodynamics(self.mbar(), kelvins, self.boltzmann_constant, name, inside)

    def profile(self, name: str, temperature: Any, bins: int = PROFILE_BINS) -> Profile:
        """Return the free-energy profile along a dihedral by MBAR over all rungs, with its error.

        The temperature is any of the ladder, or near it (see `at`), in K; the bins are equal, over
        [-π, π].
        """
        self.require_samples()
        kelvin = self._target(temperature)
        angles = self.dihedral_at_all_rungs(name)
        return dihedral_profile(self.mbar(), angles, kelvin, self.boltzmann_constant, bins)

    def phi_profile(self, temperature: Any, bins: int = PROFILE_BINS) -> Profile:
        """Return the `profile` along the first φ."""
        name = self.first_phi()
        if name is None:
            raise ValueError(f"phi: this run recorded {list(self.dihedral_atoms)}, no phi")
        return self.profile(name, temperature, bins)

    def first_phi(self) -> str | None:
        """Return the name of the first recorded φ; None if the run recorded none."""
        return next((n for n in self.dihedral_atoms if re.fullmatch(r"phi\d*", n)), None)

    def profile_dihedral(self) -> str | None:
        """Return the dihedral whose profile is shown: the first φ, if it is of both signs.

        Otherwise the first torsion with several wells, or the first; None if none was recorded.
        """
        phi = self.first_phi()
        if phi is not None and np.unique(self.dihedral_at_all_rungs(phi) > 0).size > 1:
            return phi
        return next(iter((*self.basins.torsions, *self.dihedral_atoms)), None)

    def heat_capacity(self, temperature: Any) -> MeanEstimate:
        """Return the configurational C_V of one rung in kJ/(mol K), from its fluctuations of U.

        Don't trust it or its error with fewer than some 100 effective samples (``n_independent``).
        """
        kelvin = float(self.temperatures[self.rung(temperature)])
        return self._estimate(
            "heat capacity",
            temperature,
            lambda: heat_capacity(self.energies(temperature), kelvin, self.boltzmann_constant),
        )

    def energy_ratios(self) -> list[EnsembleCheck]:
        """Compare the slope of ln[P_b(U)/P_a(U)] with β_a - β_b of each pair of neighbours."""
        self.require_samples()
        return [
            energy_ratio(self.energies(a), self.energies(b), (self.beta(a), self.beta(b)))
            for a, b in pairwise(map(float, self.temperatures))
        ]

    def heat_capacity_differences(self) -> list[EnsembleCheck]:
        """Compare Δ⟨U⟩/ΔT with C_V from fluctuations for each pair of neighbours."""
        self.require_samples()
        return [
            heat_capacity_difference(
                self.energies(a), self.energies(b), (a, b), self.boltzmann_constant
            )
            for a, b in pairwise(map(float, self.temperatures))
        ]

    def r_hat(self, name: str, temperature: Any) -> float:
        """Return split-R̂ over walkers of 1[dihedral > 0], or of U for ``"energy"``."""
        self.require_samples()
        if name == "energy":
            return split_r_hat(self.energies(temperature))
        return split_r_hat(self.dihedral(name, temperature) > 0)

    def acceptance(self) -> dict[str, Array]:
        """Return accepted over proposed moves per kernel; NaN where none was proposed.

        The shape is [R] for moves at a rung, [R-1] for swaps of neighbours, [R, R] of any pair.
        """
        table = {}
        for name, proposed in self.segments.proposed.items():
            accepted = self.segments.accepted[name].astype(np.float64)
            table[name] = np.divide(
                accepted, proposed, out=np.full(proposed.shape, np.nan), where=proposed > 0
            )
        return table

    def round_trips(self) -> npt.NDArray[np.int64]:
        """Count the trips lowest → highest → lowest rung [W, R] of each replica."""
        return round_trips(self.segments.replica)

    def mixing_matrix(self) -> Array:
        """Return the probability [R, R] that the replica at rung i is at j one iteration later."""
        return mixing_matrix(self.segments.replica)

    def relaxation(self) -> Relaxation:
        """Return the relaxation time of the walk of replicas over rungs."""
        return relaxation(self.mixing_matrix())
