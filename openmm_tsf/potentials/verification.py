"""The comparison of a potential with OpenMM's Reference platform, Force by Force."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray

from openmm_tsf.units import NANOMETER, as_array
from openmm_tsf.utils.validation import check_int

Array = NDArray[np.float64]
#: Energies [n] and forces [n, N, 3].
EnergiesAndForces = tuple[Array, Array]
#: From the index of a Force, conformations [n, N, 3] and global parameters.
Evaluate = Callable[[int, Array, Mapping[str, float]], EnergiesAndForces]

#: Number of force groups that a Context can evaluate separately.
_N_GROUPS = 32


@dataclass(frozen=True)
class ForceAgreement:
    """The errors of one Force's term against OpenMM, over the `n_finite` conformations compared.

    `energy_error` is the largest, relative to the energy's size or to that of the largest force
    over 0.1 nm, whichever is greater; `force_error` is the largest of a component, relative to the
    largest component.
    """

    index: int
    name: str
    n_finite: int
    energy_error: float
    force_error: float


class Disagreement(ValueError):
    """A potential differs from OpenMM's."""


def choose_conformations(n_atoms: int, positions: Any, n: Any, seed: Any) -> Array:
    """Return conformations [n, N, 3] in nm to compare on.

    With `positions` [n, N, 3] these themselves. Otherwise half of them are `positions` [N, 3] with
    noise; the others (all without positions) are atoms on the sites of a perturbed lattice, where
    angles and torsions take values that they do not have in a molecule at rest.
    """
    n, seed = check_int(n, "n_conformations"), check_int(seed, "seed", least=0)
    if positions is None:
        return _perturbed(n_atoms, None, n, seed)
    try:
        given = as_array(positions, NANOMETER, "positions")
    except TypeError as error:
        raise ValueError(str(error)) from error
    if given.shape[-2:] != (n_atoms, 3) or given.ndim not in (2, 3) or not len(given):
        shapes = f"({n_atoms}, 3) or (n, {n_atoms}, 3)"
        raise ValueError(f"positions: expected shape {shapes} in nm, got {given.shape}")
    if not np.isfinite(given).all():
        raise ValueError("positions: expected finite numbers, got NaN or infinity")
    return given if given.ndim == 3 else _perturbed(n_atoms, given, n, seed)


def _perturbed(n_atoms: int, positions: Array | None, n: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    side = int(np.ceil(n_atoms ** (1 / 3)))
    lattice = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    result = np.empty((n, n_atoms, 3))
    for row in range(n):
        if positions is not None and row < (n + 1) // 2:
            result[row] = positions + 0.01 * rng.standard_normal((n_atoms, 3))
        else:
            sites = lattice[rng.permutation(len(lattice))[:n_atoms]] - (side - 1) / 2
            result[row] = 0.25 * (sites + rng.uniform(-0.2, 0.2, (n_atoms, 3)))
    return result


def check_tolerance(tolerance: Any) -> tuple[float, float]:
    """Return two finite, positive numbers."""
    try:
        energy, force = (float(limit) for limit in tolerance)
    except (TypeError, ValueError):
        energy = force = float("nan")
    if not (0 < energy < float("inf") and 0 < force < float("inf")):
        text = f"two positive numbers (energy, forces), got {tolerance!r}"
        raise ValueError(f"tolerance: expected {text}")
    return energy, force


def require_agreement(
    agreement: Sequence[ForceAgreement],
    limits: tuple[float, float],
    n: int,
    parameters: Mapping[str, float] | None = None,
) -> None:
    """Raise unless every Force agrees on `n` conformations within `limits` (energy, forces).

    `parameters` are global parameters other than the present ones: a Force without a finite energy
    at these is ignored.
    """
    values = ", ".join(f"{name}={value:.3g}" for name, value in (parameters or {}).items())
    at = f" at {values}" if values else ""
    for item in agreement:
        force = f"system: {item.name} (Force {item.index})"
        if item.n_finite == 0:
            if parameters is not None:
                continue
            raise Disagreement(
                f"{force} could not be compared with OpenMM, whose energy is finite at none of {n} "
                "conformations; give positions of the molecule"
            )
        if not (item.energy_error <= limits[0] and item.force_error <= limits[1]):
            raise Disagreement(
                f"{force} differs from OpenMM's Reference platform by {item.energy_error:.2g} in "
                f"energy and {item.force_error:.2g} in forces{at} (relative; tolerance "
                f"{limits[0]:.2g} and {limits[1]:.2g}); OpenMMPotential runs OpenMM itself"
            )


def compare_forces(
    system: openmm.System,
    indices: Sequence[int],
    parameters: Mapping[str, float],
    evaluate: Evaluate,
    x: Array,
) -> list[ForceAgreement]:
    """Compare the Forces `indices` of a System, one by one, with OpenMM's Reference platform.

    `evaluate` computes energies and forces of one Force at `x` [n, N, 3] and `parameters`.
    """
    agreement = []
    copy = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    # One force group for each compared Force, the last for all others.
    for start in range(0, len(indices), _N_GROUPS - 1):
        part = list(indices[start : start + _N_GROUPS - 1])
        for index, force in enumerate(copy.getForces()):
            force.setForceGroup(part.index(index) if index in part else _N_GROUPS - 1)
        platform = openmm.Platform.getPlatform("Reference")
        context = openmm.Context(copy, openmm.VerletIntegrator(0.001), platform)
        for name, value in parameters.items():
            context.setParameter(name, value)
        for group, index in enumerate(part):
            errors = _errors(evaluate(index, x, parameters), _reference(context, x, group))
            agreement.append(ForceAgreement(index, copy.getForce(index).getName(), *errors))
    return agreement


def _errors(got: EnergiesAndForces, expected: EnergiesAndForces) -> tuple[int, float, float]:
    """Return the number of finite conformations, and the largest errors of energy and force."""
    finite = np.isfinite(expected[0]) & np.isfinite(expected[1]).all(axis=(1, 2))
    energies, forces, exact, exact_forces = (values[finite] for values in (*got, *expected))
    largest = np.abs(exact_forces).max(axis=(1, 2), initial=0.0)
    energy_errors = np.abs(energies - exact) / np.maximum(np.abs(exact), 0.1 * largest).clip(1e-6)
    deviations = np.abs(forces - exact_forces).max(axis=(1, 2), initial=0.0)
    worst = [
        float(np.nan_to_num(errors, nan=np.inf, posinf=np.inf).max(initial=0.0))
        for errors in (energy_errors, deviations / largest.clip(1e-5))
    ]
    return int(finite.sum()), worst[0], worst[1]


def _reference(context: openmm.Context, x: Array, group: int) -> EnergiesAndForces:
    """Return energies [n] and forces [n, N, 3] of a force group; NaN where OpenMM raises."""
    energies, forces = np.full(len(x), np.nan), np.full_like(x, np.nan)
    for row, positions in enumerate(x):
        context.setPositions(positions)
        try:
            state = context.getState(energy=True, forces=True, groups={group})
        except openmm.OpenMMException:
            continue
        energies[row] = state.getPotentialEnergy()._value
        forces[row] = state.getForces(asNumpy=True)._value
    return energies, forces
