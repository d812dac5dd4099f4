"""Comparison of a run with the reference: z per rung, χ² over rungs, Ramachandran distance."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import gammaincc  # type: ignore[import-untyped]

from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.ramachandran import RamachandranDistance, ramachandran_distance
from openmm_tsf.analysis.reference import Reference
from openmm_tsf.analysis.run_data import TOLERANCE_K
from openmm_tsf.analysis.uncertainty import MeanEstimate, covariance_of_means

_THERMODYNAMIC_FIELDS = {
    "energy_kJ_mol": "energy",
    "heat_capacity_kJ_mol_K": "heat_capacity",
    "delta_F_phi_kT": "delta_f",
}


@dataclass(frozen=True)
class MeanComparison:
    """The mean of one observable in run and reference, at the rungs that both have.

    ``chi2`` is d·C⁻¹·d of the differences d with their covariance C over rungs, ``p_value`` the
    probability of a larger one. Numbers are NaN where an error is not known.
    """

    run: tuple[MeanEstimate, ...]
    reference: tuple[MeanEstimate, ...]
    z: tuple[float, ...]  # difference over its standard error
    chi2: float
    p_value: float


@dataclass(frozen=True)
class ReferenceComparison:
    """P(φ > 0), ⟨U⟩ and the Ramachandran distance of a run beside its reference."""

    temperatures: tuple[float, ...]  # of the rungs compared, in K
    not_compared: tuple[float, ...]  # rungs that the reference does not have
    phi_positive: MeanComparison
    energy: MeanComparison
    ramachandran: tuple[RamachandranDistance, ...]


def compare(run: RunEstimates, reference: Reference) -> ReferenceComparison:
    """Compare a run with the reference at the rungs that both have.

    The run must have φ and ψ, samples, and a rung in common with the reference.
    """
    pairs = [(r, reference.rung(t)) for r, t in enumerate(run.temperatures)]
    common = [(r, k) for r, k in pairs if k is not None]
    if not common:
        raise ValueError(
            f"reference: has rungs at {reference.temperatures.tolist()} K, none of the run's at "
            f"{run.temperatures.tolist()} K"
        )
    run_rungs, rungs = [r for r, _ in common], [k for _, k in common]
    temperatures = tuple(float(run.temperatures[r]) for r in run_rungs)
    run_phi = run.dihedral_at_all_rungs("phi")[:, :, run_rungs]
    run.dihedral("psi", temperatures[0])  # raises if it was not recorded
    return ReferenceComparison(
        temperatures=temperatures,
        not_compared=tuple(float(run.temperatures[r]) for r, k in pairs if k is None),
        phi_positive=_compare_means(
            [run.positive("phi", t) for t in temperatures],
            [reference.phi_positive(k) for k in rungs],
            run_phi > 0,
            reference.phi[:, None, rungs] > 0,
        ),
        energy=_compare_means(
            [run.mean_energy(t) for t in temperatures],
            [reference.mean_energy(k) for k in rungs],
            run.segments.energy[:, :, run_rungs],
            reference.energy[:, None, rungs],
        ),
        ramachandran=tuple(
            ramachandran_distance(
                run.dihedral("phi", t),
                run.dihedral("psi", t),
                reference.phi[:, k, None],
                reference.psi[:, k, None],
            )
            for t, k in zip(temperatures, rungs, strict=True)
        ),
    )


def _compare_means(
    run: list[MeanEstimate],
    reference: list[MeanEstimate],
    run_series: npt.ArrayLike,
    reference_series: npt.ArrayLike,
) -> MeanComparison:
    """Compare estimates per rung; the series [n, W, R] give the covariance between rungs."""
    difference = np.array([a.value - b.value for a, b in zip(run, reference, strict=True)])
    run_errors = np.array([a.stderr for a in run])
    reference_errors = np.array([b.stderr for b in reference])
    z = difference / np.sqrt(run_errors**2 + reference_errors**2)
    covariance = covariance_of_means(run_series, run_errors) + covariance_of_means(
        reference_series, reference_errors
    )
    chi2 = p_value = np.nan
    if np.isfinite(covariance).all():
        chi2 = float(difference @ np.linalg.solve(covariance, difference))
        # The survival function of the χ² distribution.
        p_value = float(gammaincc(len(difference) / 2, chi2 / 2))
    return MeanComparison(tuple(run), tuple(reference), tuple(map(float, z)), chi2, p_value)


def compare_thermodynamics(run: RunEstimates, reference: Reference) -> dict[str, dict[str, float]]:
    """Return z of MBAR estimates against the reference, by quantity and by temperature in K.

    At each rung of the reference inside the run's ladder: most of them are not rungs of the run, so
    that the reweighting is tested. ``delta_F_phi_kT`` is there if the run recorded ``phi``.
    """
    table = reference.thermodynamics(run.boltzmann_constant)
    low, high = run.temperatures[0] - TOLERANCE_K, run.temperatures[-1] + TOLERANCE_K
    inside = (table.temperatures >= low) & (table.temperatures <= high)
    dihedral = "phi" if "phi" in run.dihedral_atoms else None
    run_table = run.thermodynamics(table.temperatures[inside], dihedral)
    keys = [f"{t:.2f}" for t in run_table.temperatures]
    result = {}
    for label, field in _THERMODYNAMIC_FIELDS.items():
        if field == "delta_f" and dihedral is None:
            continue
        difference = getattr(run_table, field) - getattr(table, field)[inside]
        error = np.hypot(
            getattr(run_table, f"{field}_stderr"), getattr(table, f"{field}_stderr")[inside]
        )
        result[label] = dict(zip(keys, map(float, difference / error), strict=True))
    return result
