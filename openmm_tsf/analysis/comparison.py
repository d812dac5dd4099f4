"""Comparison of a run with the reference: z and χ² of means, Ramachandran distance."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import fdtrc  # type: ignore[import-untyped]

from openmm_tsf.analysis.convergence import (
    MIN_VISITS,
    Assessment,
    assess_mean,
    assess_probability,
    count_pieces,
)
from openmm_tsf.analysis.ensemble_checks import DECISIVE_Z
from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.ramachandran import RamachandranDistance, ramachandran_distance
from openmm_tsf.analysis.reference import Reference
from openmm_tsf.analysis.run_data import TOLERANCE_K
from openmm_tsf.analysis.statistics import MIN_EFFECTIVE_SAMPLES, Array, as_normal, group_means
from openmm_tsf.analysis.uncertainty import MeanEstimate, covariance_of_means, estimate_mean

Kind = Literal["mean", "state", "variance"]

_THERMODYNAMIC_FIELDS = {
    "energy_kJ_mol": "energy",
    "heat_capacity_kJ_mol_K": "heat_capacity",
    "delta_F_phi_kT": "delta_f",
}


@dataclass(frozen=True)
class MeanComparison:
    """The mean of one observable in run and reference, at several temperatures.

    ``z`` is the normal deviate that is as improbable as the difference over its standard error in
    Student's distribution, of states that of arcsin(√p), of C_V that of its logarithm. ``chi2``
    is d·C⁻¹·d of the differences d with their covariance C over rungs, ``p_value`` the probability
    of a larger one (Hotelling's, as C is estimated from groups of samples). Numbers are NaN where
    an error is not known, or the run's mean is not converged. Then only z from 5 on is given: of
    ⟨U⟩ where it has 100 effective samples of walkers of 4 correlation times, of states that the
    run should have visited 50 times in its independent samples (by its slowest other observable),
    of C_V never.
    """

    run: tuple[MeanEstimate, ...]
    reference: tuple[MeanEstimate, ...]
    z: tuple[float, ...]
    chi2: float
    p_value: float


@dataclass(frozen=True)
class ReferenceComparison:
    """P(φ > 0), ⟨U⟩, C_V, basins and the Ramachandran distance of a run beside its reference.

    At common rungs; without one (``by_mbar``) the means at the reference's temperatures within the
    run's ladder, by MBAR, and no distances. The basins are compared if φ and ψ tell them apart.
    """

    temperatures: tuple[float, ...]  # that are compared, in K
    not_compared: tuple[float, ...]  # rungs of the run that the reference does not have
    phi_positive: MeanComparison
    energy: MeanComparison
    heat_capacity: MeanComparison
    ramachandran: tuple[RamachandranDistance, ...]
    by_mbar: bool = False
    basins: dict[str, MeanComparison] = field(default_factory=dict)


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


def compare_with_reference(run: RunEstimates, reference: Reference) -> ReferenceComparison:
    """Compare a run with the reference at the `comparable_temperatures`, which must be some.

    The run must have φ and ψ, and samples.
    """
    temperatures = comparable_temperatures(run, reference)
    if not temperatures:
        raise ValueError(
            f"reference: has rungs at {reference.temperatures.tolist()} K, none of the run's at "
            f"{run.temperatures.tolist()} K, and none between them"
        )
    pair = _Pair(run, reference, temperatures)
    phi, psi = (run.dihedral_at_all_rungs(name) for name in ("phi", "psi"))
    energy = pair.run_energy
    basins = {}
    if set(run.basins.torsions) <= {"phi", "psi"}:
        angles = {"phi": reference.phi, "psi": reference.psi}
        basins = {
            name: pair.compare_states(run.in_basin(name), run.basins.inside(name, angles))
            for name in run.basins.names
        }
    distances: tuple[RamachandranDistance, ...] = ()
    if not pair.by_mbar:
        distances = tuple(
            ramachandran_distance(
                phi[:, :, a], psi[:, :, a], reference.phi[:, :, b], reference.psi[:, :, b]
            )
            for a, b in zip(pair.own_rungs, pair.rungs, strict=True)
        )
    return ReferenceComparison(
        temperatures=temperatures,
        not_compared=tuple(float(t) for t in run.temperatures if reference.rung(t) is None),
        phi_positive=pair.compare_states(phi > 0, reference.phi > 0),
        energy=pair.compare_means(lambda k: energy, lambda k: reference.energy[..., pair.rungs[k]]),
        heat_capacity=pair.compare_means(pair.squares, pair.reference_squares, "variance"),
        ramachandran=distances,
        by_mbar=pair.by_mbar,
        basins=basins,
    )


class _Pair:
    """A run and its reference at T temperatures: those of rungs of both, or, by MBAR, others."""

    def __init__(
        self, run: RunEstimates, reference: Reference, temperatures: tuple[float, ...]
    ) -> None:
        self.run, self.reference, self.temperatures = run, reference, temperatures
        self.rungs = [k for k in map(reference.rung, temperatures) if k is not None]
        self.by_mbar = all(reference.rung(t) is None for t in run.temperatures)
        self.run_energy = np.stack([run.energies(t) for t in run.temperatures], axis=-1)
        self.own_rungs: list[int] = []
        self._pieces: dict[int, float] = {}
        if self.by_mbar:
            self._samples = [run.mbar().reweight(run.beta(t)) for t in temperatures]
            self._means = [each.mean(self.run_energy).value for each in self._samples]
        else:
            self.own_rungs = [run.rung(t) for t in temperatures]
            self._means = [run.mean_energy(t).value for t in temperatures]

    def squares(self, k: int) -> Array:
        """Return what C_V of the run is the mean of [n, W, R]: (U - ⟨U⟩)²/(k T²)."""
        scale = self.run.boltzmann_constant * self.temperatures[k] ** 2
        squares: Array = (self.run_energy - self._means[k]) ** 2 / scale
        return squares

    def reference_squares(self, k: int) -> Array:
        """Return what C_V of the reference is the mean of [F, W]."""
        energy = self.reference.energy[..., self.rungs[k]]
        scale = self.run.boltzmann_constant * self.temperatures[k] ** 2
        squares: Array = (energy - energy.mean()) ** 2 / scale
        return squares

    def _reference_pieces(self, k: int) -> float:
        """The independent samples of the reference at a temperature, by its slowest series."""
        if k not in self._pieces:
            reference, rung = self.reference, self.rungs[k]
            angles = reference.phi[..., rung], reference.psi[..., rung]
            self._pieces[k] = count_pieces(reference.energy[..., rung], angles=angles)
        return self._pieces[k]

    def _assess_state(self, inside: npt.NDArray[np.bool_], k: int) -> Assessment:
        """Assess a state [n, W, R] of the run; by MBAR, at the rung with the most visits of it."""
        if not self.by_mbar:
            return assess_probability(inside[..., self.own_rungs[k]], self.run.n_pieces)
        at_rungs = [
            assess_probability(inside[..., r], self.run.n_pieces) for r in range(inside.shape[-1])
        ]
        return max(at_rungs, key=lambda each: each.n_visits or 0)

    def compare_states(
        self, inside: npt.NDArray[np.bool_], reference: npt.NDArray[np.bool_]
    ) -> MeanComparison:
        """Compare the probabilities of a state, truth values [n, W, R] and [F, W, all rungs]."""
        return self.compare_means(
            lambda k: inside, lambda k: reference[..., self.rungs[k]], "state"
        )

    def compare_means(
        self,
        of_run: Callable[[int], npt.NDArray[Any]],
        of_reference: Callable[[int], npt.NDArray[Any]],
        kind: Kind = "mean",
    ) -> MeanComparison:
        """Compare the means of an observable [n, W, R] and [F, W] at each of the T temperatures."""
        columns = range(len(self.temperatures))
        reference_series = np.stack([of_reference(k) for k in columns], axis=-1)
        if self.by_mbar:
            run = [each.mean(of_run(k)) for k, each in enumerate(self._samples)]
            series = np.stack(
                [each.influence(of_run(k)) for k, each in enumerate(self._samples)], axis=-1
            )
        else:
            series = np.stack([of_run(k)[..., rung] for k, rung in enumerate(self.own_rungs)], -1)
            run = [estimate_mean(series[..., k]) for k in columns]
        reference = [estimate_mean(reference_series[..., k]) for k in columns]
        z, tested = np.empty(len(columns)), np.empty(len(columns), dtype=bool)
        for k in columns:
            known_of_reference = 0.0
            if kind == "state":
                pieces = self._reference_pieces(k)
                known_of_reference = assess_probability(reference_series[..., k], pieces).n_eff
                assessed = self._assess_state(of_run(k), k)
                known = run[k].n_eff if self.by_mbar else assessed.n_eff
                lacking = 1.0 - reference[k].value if run[k].value > 0.5 else reference[k].value
                is_long = self.run.n_pieces * lacking >= MIN_VISITS
            else:
                assessed, known = assess_mean(series[..., k]), run[k].n_eff
                # The variance of walkers that hardly moved is small, and so is its error.
                is_long = kind == "mean" and run[k].can_be_tested(len(series))
            z[k] = z_of_difference(kind, (run[k], reference[k]), (known, known_of_reference))
            tested[k] = assessed.converged and run[k].n_samples >= MIN_EFFECTIVE_SAMPLES
            if not (tested[k] or (is_long and abs(z[k]) >= DECISIVE_Z)):
                z[k] = np.nan
        chi2, p_value = _chi2(run, reference, series, reference_series)
        if not tested.all():
            chi2 = p_value = np.nan
        return MeanComparison(tuple(run), tuple(reference), tuple(map(float, z)), chi2, p_value)


def z_of_difference(
    kind: Kind, pair: tuple[MeanEstimate, MeanEstimate], n_effective: tuple[float, float]
) -> float:
    """Return z of the difference between run and reference, on a scale where errors are normal.

    That is arcsin(√p) of a probability, with the error 1/√(4n) (Anscombe, Biometrika 35, 246
    (1948)), and the logarithm of a variance.
    """
    difference, variance = 0.0, 0.0
    for estimate, n, sign in zip(pair, n_effective, (1, -1), strict=True):
        value, stderr = estimate.pair
        if kind == "state":
            value = float(np.arcsin(np.sqrt(min(value, 1.0))))
            stderr = 0.5 / float(np.sqrt(n)) if n > 0 else float("nan")
        elif kind == "variance" and value > 0:
            value, stderr = float(np.log(value)), stderr / value
        difference += sign * value
        variance += stderr**2
    if not variance > 0:  # also for NaN
        return float("nan")
    return as_normal(difference / variance**0.5, _degrees_of_freedom(*pair))


def _degrees_of_freedom(run: MeanEstimate, reference: MeanEstimate) -> float:
    """Return those of the difference of two means: Welch and Satterthwaite's."""
    parts = [(e.stderr**2, e.dof) for e in (run, reference) if e.stderr > 0 and e.dof > 0]
    total = sum(variance for variance, _ in parts)
    return float(total**2 / sum(v**2 / dof for v, dof in parts)) if parts else 1.0


def _chi2(
    run: list[MeanEstimate],
    reference: list[MeanEstimate],
    run_series: npt.NDArray[Any],
    reference_series: npt.NDArray[Any],
) -> tuple[float, float]:
    """Return χ² of the differences and its p value; series [n, W, T] give the covariance."""
    difference = np.array([a.value - b.value for a, b in zip(run, reference, strict=True)])
    covariance = covariance_of_means(run_series, [a.stderr for a in run])
    covariance = covariance + covariance_of_means(reference_series, [b.stderr for b in reference])
    if not np.isfinite(covariance).all():
        return float("nan"), float("nan")
    chi2 = float(difference @ np.linalg.solve(covariance, difference))
    return chi2, hotelling(chi2, len(difference), len(group_means(run_series)))


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
    for label, name in _THERMODYNAMIC_FIELDS.items():
        if name == "delta_f" and dihedral is None:
            continue
        difference = getattr(run_table, name) - getattr(table, name)[inside]
        error = np.hypot(
            getattr(run_table, f"{name}_stderr"), getattr(table, f"{name}_stderr")[inside]
        )
        result[label] = dict(zip(keys, map(float, difference / error), strict=True))
    return result
