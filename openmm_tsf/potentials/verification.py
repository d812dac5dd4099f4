"""Whether a potential equals OpenMM's Reference platform, Force by Force."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray

from openmm_tsf.units import NANOMETER, in_unit

Evaluate = Callable[
    [int, NDArray[np.float64], Mapping[str, float]],
    tuple[NDArray[np.float64], NDArray[np.float64]],
]


@dataclass(frozen=True)
class ForceAgreement:
    """How far one Force's term is from OpenMM.

    Attributes
    ----------
    index, name
        The Force.
    n_finite
        Conformations with a finite energy that were compared.
    energy_error
        Largest error of the energy, relative to its size or to that of the largest force over
        0.1 nm, whichever is greater.
    force_error
        Largest error of a force's component, relative to the largest component.
    """

    index: int
    name: str
    n_finite: int
    energy_error: float
    force_error: float


class Disagreement(ValueError):
    """A potential is not what OpenMM computes."""


def conformations(
    n_atoms: int, positions: Any, n: int, seed: int, perturbation: float = 0.01
) -> NDArray[np.float64]:
    """Conformations [n, N, 3] in nm to compare on.

    Half of them are `positions` [N, 3] with Gaussian noise of width `perturbation`; the others (all
    without positions) are atoms scattered over a jittered lattice, where every angle and torsion
    takes values that a molecule at rest does not show.
    """
    rng = np.random.default_rng(seed)
    side = int(np.ceil(n_atoms ** (1 / 3)))
    lattice = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    result = np.empty((n, n_atoms, 3))
    for row in range(n):
        if positions is not None and row < (n + 1) // 2:
            result[row] = positions + perturbation * rng.standard_normal((n_atoms, 3))
        else:
            sites = lattice[rng.permutation(len(lattice))[:n_atoms]] - (side - 1) / 2
            result[row] = 0.25 * (sites + rng.uniform(-0.2, 0.2, (n_atoms, 3)))
    return result


def choose_conformations(n_atoms: int, positions: Any, n: Any, seed: Any) -> NDArray[np.float64]:
    """Conformations [n, N, 3] to compare on, from what a user gave.

    Raises
    ------
    ValueError
        If an argument is out of range; the message names it.
    """
    for name, value, least in (("n_conformations", n, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if positions is None:
        return conformations(n_atoms, None, n, seed)
    try:
        given = np.asarray(in_unit(positions, NANOMETER, "positions"), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"positions: expected numbers in nm ({error})") from error
    if given.shape[-2:] != (n_atoms, 3) or given.ndim not in (2, 3) or not len(given):
        raise ValueError(
            f"positions: expected shape ({n_atoms}, 3) or (n, {n_atoms}, 3) in nm, got "
            f"{given.shape}"
        )
    if not np.isfinite(given).all():
        raise ValueError("positions: expected finite numbers, got NaN or infinity")
    return given if given.ndim == 3 else conformations(n_atoms, given, n, seed)


def check_tolerance(tolerance: Any) -> tuple[float, float]:
    """Two finite, positive numbers.

    Raises
    ------
    ValueError
        If they are not.
    """
    try:
        energy, force = (float(limit) for limit in tolerance)
    except (TypeError, ValueError):
        energy = force = float("nan")
    if not (0 < energy < float("inf") and 0 < force < float("inf")):
        raise ValueError(
            f"tolerance: expected two positive numbers (energy, forces), got {tolerance!r}"
        )
    return energy, force


def judge(
    found: Sequence[ForceAgreement],
    limits: tuple[float, float],
    n: int,
    parameters: Mapping[str, float] | None,
) -> None:
    """Raise unless every Force agrees within the limits.

    Parameters
    ----------
    found
        What :func:`compare` found on n conformations.
    limits
        Largest relative errors of energies and forces.
    n
        Number of conformations.
    parameters
        Global parameters other than the present ones: a Force without a finite energy there is
        passed over.

    Raises
    ------
    Disagreement
        If one does not.
    """
    at = "" if not parameters else f" at {', '.join(f'{k}={v:.3g}' for k, v in parameters.items())}"
    for item in found:
        where = f"system: {item.name} (Force {item.index})"
        if item.n_finite == 0:
            if parameters is not None:
                continue
            raise Disagreement(
                f"{where} could not be compared with OpenMM, whose energy is finite at none of {n} "
                "conformations; give positions of the molecule"
            )
        if not (item.energy_error <= limits[0] and item.force_error <= limits[1]):
            raise Disagreement(
                f"{where} differs from OpenMM's Reference platform by {item.energy_error:.2g} in "
                f"energy and {item.force_error:.2g} in forces{at} (relative; tolerance "
                f"{limits[0]:.2g} and {limits[1]:.2g}); OpenMMPotential runs OpenMM itself"
            )


def compare(
    system: openmm.System,
    indices: Sequence[int],
    parameters: Mapping[str, float],
    evaluate: Evaluate,
    x: NDArray[np.float64],
) -> list[ForceAgreement]:
    """Compare some Forces of a System, one by one, with OpenMM's Reference platform.

    Parameters
    ----------
    system
        The System.
    indices
        Which Forces.
    parameters
        Values of the global parameters.
    evaluate
        From the index of a Force, x and `parameters` to energies [n] and forces [n, N, 3].
    x
        Conformations [n, N, 3] in nm.
    """
    found = []
    copy = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    # 32 force groups: one for each of 31 Forces, the last for all others.
    for start in range(0, len(indices), 31):
        part = list(indices[start : start + 31])
        for index, force in enumerate(copy.getForces()):
            force.setForceGroup(part.index(index) if index in part else 31)
        integrator = openmm.VerletIntegrator(0.001)
        platform = openmm.Platform.getPlatformByName("Reference")
        context = openmm.Context(copy, integrator, platform)
        for name, value in parameters.items():
            context.setParameter(name, value)
        for group, index in enumerate(part):
            energies, forces = evaluate(index, x, parameters)
            name = copy.getForce(index).getName()
            found.append(_compare_one(context, group, index, name, x, energies, forces))
    return found


def _compare_one(
    context: openmm.Context,
    group: int,
    index: int,
    name: str,
    x: NDArray[np.float64],
    energies: NDArray[np.float64],
    forces: NDArray[np.float64],
) -> ForceAgreement:
    n_finite, energy_error, force_error = 0, 0.0, 0.0
    for row, energy, force in zip(x, energies, forces, strict=True):
        expected, expected_force = _reference(context, row, group)
        finite = bool(np.isfinite(expected) and np.isfinite(expected_force).all())
        if not finite:
            continue  # OpenMM itself has nothing to compare with
        n_finite += 1
        largest = np.abs(expected_force).max(initial=0.0)
        scale = max(abs(expected), 0.1 * largest, 1e-6)
        # Not max(): a NaN here must come out as one.
        energy_error = float(np.fmax(energy_error, _error(energy - expected) / scale))
        deviation = np.abs(force - expected_force).max(initial=0.0)
        force_error = float(np.fmax(force_error, _error(deviation) / max(largest, 1e-5)))
    return ForceAgreement(index, name, n_finite, energy_error, force_error)


def _error(deviation: float) -> float:
    """Its size; infinite where the deviation is not a number."""
    return float("inf") if np.isnan(deviation) else abs(float(deviation))


def _reference(
    context: openmm.Context, x: NDArray[np.float64], group: int
) -> tuple[float, NDArray[np.float64]]:
    context.setPositions(x)
    try:
        state = context.getState(energy=True, forces=True, groups={group})
    except openmm.OpenMMException:
        return float("nan"), np.full_like(x, np.nan)
    return (
        float(state.getPotentialEnergy()._value),
        np.asarray(state.getForces(asNumpy=True)._value),
    )
