"""Comparison of a run with the reference: z and χ² of means, Ramachandran distance."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import fdtrc  # type: ignore[import-untyped]

from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.ramachandran import RamachandranDistance, ramachandran_distance
from openmm_tsf.analysis.reference import Reference
from openmm_tsf.analysis.run_data import TOLERANCE_K
from openmm_tsf.analysis.statistics import group_means
from openmm_tsf.analysis.uncertainty import MeanEstimate, covariance_of_means

_THERMODYNAMIC_FIELDS = {
    "energy_kJ_mol": "energy",
    "heat_capacity_kJ_mol_K": "heat_capacity",
    "delta_F_phi_kT": "delta_f",
}


@dataclass(frozen=True)
class MeanComparison:
    """The mean of one observable in run and reference, at several temperatures.

    ``chi2`` is d·C⁻¹·d of the differences d with their covariance C over rungs, ``p_value`` the
    probability of a larger one (Hotelling's, as C is estimated from groups of samples). Numbers are
    NaN where an error is not known, or the run's rests on too few samples for
    `MeanEstimate.can_be_tested`.
    """

    run: tuple[MeanEstimate, ...]
    reference: tuple[MeanEstimate, ...]
    z: tuple[float, ...]  # difference over its standard error
    chi2: float
    p_value: float


@dataclass(frozen=True)
class ReferenceComparison:
    """P(φ > 0), ⟨U⟩ and the Ramachandran distance of a run beside its reference.

    At common rungs; without one (``by_mbar``) the two means at the reference's temperatures within
    the run's ladder, by MBAR, and no distances.
    """

    temperatures: tuple[float, ...]  # that are compared, in K
    not_compared: tuple[float, ...]  # rungs of the run that the reference does not have
    phi_positive: MeanComparison
    energy: MeanComparison
    ramachandran: tuple[RamachandranDistance, ...]
    by_mbar: bool = False


def comparable_temperatures(run: RunEstimates, reference: Reference) -> tuple[float, ...]:
    """Return the temperatures in K at which a run can be compared with the reference.

    They are the rungs that both have, else those of the reference within the run's ladder, else
    none.
    """
    common = [float(t) for t in run.temperatures if reference.rung(t) is not None]
    return tuple(common or map(float, reference.temperatures[_within_ladder(run, reference)]))


def _within_ladder(run: RunEstimates, reference: Reference) -> npt.NDArray[np.bool_]:
    """Return for each temperature of the reference whether the run can be reweighted to it."""
    low, high = run.temperatures[0] - TOLERANCE_K, run.temperatures[-1] + TOLERANCE_K
    return (reference.temperatures >= low) & (reference.temperatures <= high)


def compare(run: RunEstimates, reference: Reference) -> ReferenceComparison:
    """Compare a run with the reference at the `comparable_temperatures`, which must be some.

    The run must have φ and ψ, and samples.
    """
    temperatures = comparable_temperatures(run, reference)
    if not temperatures:
        raise ValueError(
            f"reference: has rungs at {reference.temperatures.tolist()} K, none of the run's at "
            f"{run.temperatures.tolist()} K, and none between them"
        )
    rungs = [k for k in map(reference.rung, temperatures) if k is not None]
    not_compared = [float(t) for t in run.temperatures if reference.rung(t) is None]
    by_mbar = len(not_compared) == run.n_rungs
    phi, energy = run.dihedral_at_all_rungs("phi") > 0, run.energy
    run.dihedral("psi", run.temperatures[0])  # raises if it was not recorded
    distances: tuple[RamachandranDistance, ...] = ()
    series: list[npt.NDArray[Any]]
    if by_mbar:
        samples = [run.mbar().reweight(run.beta(t)) for t in temperatures]
        positive = [each.mean(phi) for each in samples]
        energies = [each.mean(energy) for each in samples]
        series = [
            np.stack([each.influence(values) for each in samples], axis=2)
            for values in (phi, energy)
        ]
    else:
        own = [run.rung(t) for t in temperatures]
        positive = [run.positive("phi", t) for t in temperatures]
        energies = [run.mean_energy(t) for t in temperatures]
        series = [phi[:, :, own], energy[:, :, own]]
        distances = tuple(
            ramachandran_distance(
                run.dihedral("phi", t),
                run.dihedral("psi", t),
                reference.phi[:, k, None],
                reference.psi[:, k, None],
            )
            for t, k in zip(temperatures, rungs, strict=True)
        )
    return ReferenceComparison(
        temperatures=temperatures,
        not_compared=tuple(not_compared),
        phi_positive=_compare_means(
            positive,
            [reference.phi_positive(k) for k in rungs],
            series[0],
            reference.phi[:, None, rungs] > 0,
        ),
        energy=_compare_means(
            energies,
            [reference.mean_energy(k) for k in rungs],
            series[1],
            reference.energy[:, None, rungs],
        ),
        ramachandran=distances,
        by_mbar=by_mbar,
    )


def _compare_means(
    run: list[MeanEstimate],
    reference: list[MeanEstimate],
    run_series: npt.ArrayLike,
    reference_series: npt.ArrayLike,
) -> MeanComparison:
    """Compare estimates; their series [n, W, T] give the covariance between temperatures."""
    difference = np.array([a.value - b.value for a, b in zip(run, reference, strict=True)])
    run_errors = np.array([a.stderr for a in run])
    reference_errors = np.array([b.stderr for b in reference])
    z = difference / np.sqrt(run_errors**2 + reference_errors**2)
    n_iterations = np.shape(run_series)[0]
    tested = np.array([estimate.can_be_tested(n_iterations) for estimate in run])
    z[~tested] = np.nan
    covariance = covariance_of_means(run_series, run_errors) + covariance_of_means(
        reference_series, reference_errors
    )
    chi2 = p_value = np.nan
    if np.isfinite(covariance).all() and tested.all():
        chi2 = float(difference @ np.linalg.solve(covariance, difference))
        p_value = hotelling(chi2, len(difference), len(group_means(run_series)))
    return MeanComparison(tuple(run), tuple(reference), tuple(map(float, z)), chi2, p_value)


def hotelling(t2: float, size: int, n_groups: int) -> float:
    """Return the probability of a larger T², whose covariance was estimated from groups.

    It is that of χ² for many groups, and larger for few.
    """
    free = n_groups - size
    return float(fdtrc(size, free, t2 * free / (size * (n_groups - 1)))) if free > 0 else np.nan


def compare_thermodynamics(run: RunEstimates, reference: Reference) -> dict[str, dict[str, float]]:
    """Return z of MBAR estimates against the reference, by quantity and by temperature in K.

    At each rung of the reference inside the run's ladder: most of them are not rungs of the run, so
    that the reweighting is tested. ``delta_F_phi_kT`` is there if the run recorded ``phi``. Empty
    if no rung of the reference lies inside.
    """
    inside = _within_ladder(run, reference)
    if not inside.any():
        return {}
    table = reference.thermodynamics(run.boltzmann_constant)
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
