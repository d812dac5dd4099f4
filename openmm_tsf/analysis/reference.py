"""The shipped reference data: one long replica exchange by dynamics alone, without any flow."""

from importlib.resources import as_file, files

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.ensemble_checks import heat_capacity
from openmm_tsf.analysis.run_data import nearest_rung
from openmm_tsf.analysis.statistics import Array
from openmm_tsf.analysis.thermodynamics import PROFILE_BINS, Profile, Thermodynamics, make_profile
from openmm_tsf.analysis.uncertainty import MeanEstimate, estimate_mean
from openmm_tsf.io.run_config import check_reference_name

REFERENCE_FILE = "ala2_reference.npz"


class Reference:
    """Reference samples of W walkers at several temperatures, and estimates from them.

    Attributes
    ----------
    temperatures, interval_ps
        [R] in K; the time between frames.
    phi, psi, energy
        [F, W, R] in rad and kJ/mol; [F, R] of a single walker are taken as [F, 1, R].

    Examples
    --------
    >>> from openmm_tsf.analysis import load_reference
    >>> reference = load_reference()
    >>> rung = reference.rung(300.0)
    >>> reference.mean_energy(rung).value  # in kJ/mol
    -59...
    >>> reference.phi_positive(rung).value
    0.02...
    """

    def __init__(
        self,
        temperatures: npt.ArrayLike,
        phi: npt.ArrayLike,
        psi: npt.ArrayLike,
        energy: npt.ArrayLike,
        interval_ps: float,
    ) -> None:
        self.temperatures: Array = np.asarray(temperatures, dtype=np.float64)
        self.phi, self.psi, self.energy = (
            np.asarray(values, dtype=np.float64) for values in (phi, psi, energy)
        )
        self.interval_ps = float(interval_ps)
        expected = (*self.phi.shape[:-1], len(self.temperatures))
        for name, values in (("phi", self.phi), ("psi", self.psi), ("energy", self.energy)):
            if values.ndim not in (2, 3) or values.shape != expected:
                shape = f"[F, W, {len(self.temperatures)}]"
                raise ValueError(f"{name}: expected shape {shape}, got {values.shape}")
            setattr(self, name, values.reshape(len(values), -1, len(self.temperatures)))
        self._estimates: dict[tuple[str, int], MeanEstimate] = {}

    def rung(self, temperature: float) -> int | None:
        """Return the index of the rung at this temperature within 0.01 K; None without one."""
        return nearest_rung(self.temperatures, temperature)

    def phi_positive(self, rung: int) -> MeanEstimate:
        """Return P(φ > 0) at a rung."""
        return self._estimate("phi", rung, self.phi > 0)

    def mean_energy(self, rung: int) -> MeanEstimate:
        """Return ⟨U⟩ at a rung in kJ/mol."""
        return self._estimate("energy", rung, self.energy)

    def _estimate(self, name: str, rung: int, series: npt.NDArray[np.generic]) -> MeanEstimate:
        key = (name, rung)
        if key not in self._estimates:
            self._estimates[key] = estimate_mean(series[:, :, rung])
        return self._estimates[key]

    def thermodynamics(self, boltzmann_constant: float) -> Thermodynamics:
        """Return ⟨U⟩, C_V and ΔF_φ at every rung, each from the samples of that rung alone."""
        rungs = range(len(self.temperatures))
        energy = np.array([self.mean_energy(k).pair for k in rungs])
        capacities = [
            heat_capacity(self.energy[:, :, k], float(t), boltzmann_constant)
            for k, t in enumerate(self.temperatures)
        ]
        capacity = np.array([estimate.pair for estimate in capacities])
        delta_f = np.array([self.phi_positive(k).free_energy for k in rungs])
        kish = np.full(len(delta_f), float(self.phi[:, :, 0].size))
        (u, u_error), (c, c_error), (f, f_error) = energy.T, capacity.T, delta_f.T
        return Thermodynamics(self.temperatures, u, u_error, c, c_error, "phi", f, f_error, kish)

    def phi_profile(self, rung: int) -> Profile:
        """Return the free-energy profile along φ at a rung."""
        phi, temperature = self.phi[:, :, rung], float(self.temperatures[rung])
        return make_profile(
            temperature, phi, PROFILE_BINS, np.ones(phi.shape), lambda x: estimate_mean(x).pair
        )


def load_reference(name: str = REFERENCE_FILE) -> Reference:
    """Read reference data from the package ``openmm_tsf.data``."""
    check_reference_name(name)
    resource = files("openmm_tsf.data") / name
    if not resource.is_file():
        raise FileNotFoundError(f"openmm_tsf.data has no reference data {name!r}")
    with as_file(resource) as path, np.load(path, allow_pickle=False) as data:
        for key in ("temperatures_K", "phi", "psi", "energy", "interval_ps"):
            if key not in data.files:
                raise ValueError(f"{name}: has no array {key!r}")
        return Reference(
            temperatures=data["temperatures_K"],
            phi=data["phi"],
            psi=data["psi"],
            energy=data["energy"],
            interval_ps=float(data["interval_ps"]),
        )


def has_reference(fingerprint: str | None) -> bool:
    """Return whether reference data of the System with this fingerprint are shipped."""
    from openmm_tsf.systems.library import alanine_dipeptide  # imports torch and OpenMM: seconds

    is_shipped = (files("openmm_tsf.data") / REFERENCE_FILE).is_file()
    return is_shipped and fingerprint == alanine_dipeptide().fingerprint
