"""Agreement of a run with the shipped reference: z per rung, χ² over rungs, Ramachandran distance.

The reference is one long molecular-dynamics replica exchange without any flow: a single walker.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files

import numpy as np
import numpy.typing as npt
from scipy.special import gammaincc  # type: ignore[import-untyped]

from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.ramachandran import RamachandranDistance, ramachandran_distance
from openmm_tsf.analysis.uncertainty import MeanEstimate, covariance_of_means, estimate_mean
from openmm_tsf.io.run_config import check_reference_name

Array = npt.NDArray[np.float64]

REFERENCE_FILE = "ala2_reference.npz"
_TOLERANCE_K = 0.01


class Reference:
    """Reference samples per temperature.

    Attributes
    ----------
    temperatures
        [R] in K.
    phi, psi
        [F, R] in rad.
    energy
        [F, R] in kJ/mol.
    interval_ps
        Time between frames.
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
        self.phi: Array = np.asarray(phi, dtype=np.float64)
        self.psi: Array = np.asarray(psi, dtype=np.float64)
        self.energy: Array = np.asarray(energy, dtype=np.float64)
        self.interval_ps = float(interval_ps)
        for name, values in (("phi", self.phi), ("psi", self.psi), ("energy", self.energy)):
            if values.ndim != 2 or values.shape != (len(self.phi), len(self.temperatures)):
                raise ValueError(
                    f"{name}: expected shape [F, {len(self.temperatures)}], got {values.shape}"
                )
        self._estimates: dict[tuple[str, int], MeanEstimate] = {}

    def rung(self, temperature: float) -> int | None:
        """Index of the rung at this temperature within 0.01 K; None where there is none."""
        nearest = int(np.argmin(np.abs(self.temperatures - temperature)))
        within = abs(self.temperatures[nearest] - temperature) <= _TOLERANCE_K
        return nearest if within else None

    def phi_positive(self, rung: int) -> MeanEstimate:
        """P(φ > 0) at a rung."""
        return self._estimate("phi", rung, self.phi > 0)

    def mean_energy(self, rung: int) -> MeanEstimate:
        """⟨U⟩ at a rung in kJ/mol."""
        return self._estimate("energy", rung, self.energy)

    def _estimate(self, name: str, rung: int, series: npt.NDArray[np.generic]) -> MeanEstimate:
        key = (name, rung)
        if key not in self._estimates:
            self._estimates[key] = estimate_mean(series[:, rung, None])
        return self._estimates[key]


def load_reference(name: str = REFERENCE_FILE) -> Reference:
    """Read reference data from the package ``openmm_tsf.data``.

    Raises
    ------
    FileNotFoundError
        If there is no such file in it.
    ValueError
        If it lacks an array, or the name is none.
    """
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


@dataclass(frozen=True)
class Agreement:
    """One observable in run and reference, over the rungs that both have.

    Attributes
    ----------
    run, reference
        Estimates per compared rung.
    z
        (run - reference) / sqrt(SE² + SE²) per rung; NaN where an error is not known.
    chi2, p_value
        d·C⁻¹·d with the rungs' covariance C of both, and the chance of a larger one; NaN where an
        error is not known.
    """

    run: tuple[MeanEstimate, ...]
    reference: tuple[MeanEstimate, ...]
    z: tuple[float, ...]
    chi2: float
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """A run beside its reference.

    Attributes
    ----------
    temperatures
        Rungs compared, in K.
    not_compared
        Rungs of the run that the reference does not have.
    phi_positive, energy
        P(φ > 0) and ⟨U⟩.
    ramachandran
        Distance per compared rung.
    """

    temperatures: tuple[float, ...]
    not_compared: tuple[float, ...]
    phi_positive: Agreement
    energy: Agreement
    ramachandran: tuple[RamachandranDistance, ...]


def compare(run: RunEstimates, reference: Reference) -> Comparison:
    """Compare a run with the reference at the rungs that both have.

    Raises
    ------
    ValueError
        If the run has no φ and ψ, no data yet, or no rung in common with the reference.
    """
    pairs = [(r, reference.rung(t)) for r, t in enumerate(run.temperatures)]
    common = [(ours, theirs) for ours, theirs in pairs if theirs is not None]
    if not common:
        raise ValueError(
            f"reference: has rungs at {reference.temperatures.tolist()} K, none of the run's at "
            f"{run.temperatures.tolist()} K"
        )
    ours, theirs = [pair[0] for pair in common], [pair[1] for pair in common]
    temperatures = tuple(float(run.temperatures[r]) for r in ours)
    names = list(run.dihedral_atoms)
    for name in ("phi", "psi"):
        run.dihedral(name, temperatures[0])  # raises where there is none
    run_phi = run.segments.dihedrals[..., names.index("phi")][:, :, ours]
    phi_positive = _agree(
        [run.positive("phi", t) for t in temperatures],
        [reference.phi_positive(k) for k in theirs],
        lambda: run_phi > 0,
        lambda: reference.phi[:, None, theirs] > 0,
    )
    energy = _agree(
        [run.mean_energy(t) for t in temperatures],
        [reference.mean_energy(k) for k in theirs],
        lambda: run.segments.energy[:, :, ours],
        lambda: reference.energy[:, None, theirs],
    )
    return Comparison(
        temperatures=temperatures,
        not_compared=tuple(float(run.temperatures[r]) for r, k in pairs if k is None),
        phi_positive=phi_positive,
        energy=energy,
        ramachandran=tuple(
            ramachandran_distance(
                run.dihedral("phi", t),
                run.dihedral("psi", t),
                reference.phi[:, k, None],
                reference.psi[:, k, None],
            )
            for t, k in zip(temperatures, theirs, strict=True)
        ),
    )


def _agree(
    run: list[MeanEstimate],
    reference: list[MeanEstimate],
    run_series: Callable[[], npt.ArrayLike],
    reference_series: Callable[[], npt.ArrayLike],
) -> Agreement:
    difference = np.array([a.value - b.value for a, b in zip(run, reference, strict=True)])
    run_errors = np.array([a.stderr for a in run])
    reference_errors = np.array([b.stderr for b in reference])
    z = difference / np.sqrt(run_errors**2 + reference_errors**2)
    covariance = covariance_of_means(run_series(), run_errors) + covariance_of_means(
        reference_series(), reference_errors
    )
    chi2 = p_value = np.nan
    if np.isfinite(covariance).all():
        chi2 = float(difference @ np.linalg.solve(covariance, difference))
        # The χ² distribution's survival function.
        p_value = float(gammaincc(len(difference) / 2, chi2 / 2))
    return Agreement(tuple(run), tuple(reference), tuple(map(float, z)), chi2, p_value)


REFERENCE = "ala2_reference.npz"


def has_reference(fingerprint: str | None) -> bool:
    """Whether reference data of the System with this fingerprint are shipped."""
    from openmm_tsf.systems.library import alanine_dipeptide  # imports torch and OpenMM: seconds

    is_shipped = (files("openmm_tsf.data") / REFERENCE).is_file()
    return is_shipped and fingerprint == alanine_dipeptide().fingerprint


def recorded_reference(run: RunEstimates) -> Reference | None:
    """The shipped reference data that the configuration of a run names; None if it names none."""
    name = run.config.get("reference")
    return None if name is None else load_reference(name)
