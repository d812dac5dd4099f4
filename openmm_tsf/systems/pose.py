"""Whether the energy of a System depends on the position or orientation of its molecule."""

import re

import numpy as np
import openmm
from scipy.spatial.transform import Rotation  # type: ignore[import-untyped]

#: Forces whose energy is a function of distances, angles and dihedrals between particles.
_INTERNAL = (
    openmm.CMAPTorsionForce,
    openmm.CMMotionRemover,
    openmm.CustomAngleForce,
    openmm.CustomBondForce,
    openmm.CustomNonbondedForce,
    openmm.CustomTorsionForce,
    openmm.GBSAOBCForce,
    openmm.HarmonicAngleForce,
    openmm.HarmonicBondForce,
    openmm.NonbondedForce,
    openmm.PeriodicTorsionForce,
    openmm.RBTorsionForce,
)
#: Lengths in nm of the translations, each after a random rotation: a wall may be far away.
_TRANSLATIONS = (0.1, 1.0, 10.0, 100.0)
#: Changes of the energy below this (kJ/mol, and relative) are rounding: a Force may compute in
#: single precision, of which positions far from the origin have less.
_TOLERANCE, _PRECISE_LENGTH = (0.05, 1e-6), 10.0
_N_GROUPS = 32


def pose_dependent_force(system: openmm.System, positions: np.ndarray) -> tuple[str, float] | None:
    """Return the Force whose energy changes most under rigid motions, and the change in kJ/mol.

    None if no energy changes. The Forces that can depend on the pose are evaluated on OpenMM's
    Reference platform, at conformations near `positions` [N, 3] (nm).
    """
    copy = openmm.XmlSerializer.clone(system)
    for index in reversed(range(copy.getNumForces())):
        if _is_internal(copy.getForce(index)):
            copy.removeForce(index)
    if not copy.getNumForces():
        return None
    names: dict[int, list[str]] = {}
    for index, force in enumerate(copy.getForces()):
        force.setForceGroup(index % _N_GROUPS)
        name, kind = force.getName(), type(force).__name__
        label = name if name == kind else f"{name} ({kind})"
        names.setdefault(index % _N_GROUPS, []).append(label)
    platform = openmm.Platform.getPlatform("Reference")
    context = openmm.Context(copy, openmm.VerletIntegrator(0.001), platform)
    changes = _changes(context, positions, list(names))
    group = max(changes, key=lambda name: changes[name])
    return (", ".join(names[group]), changes[group]) if changes[group] > 0 else None


def _is_internal(force: openmm.Force) -> bool:
    """Whether the energy cannot depend on the pose, whatever the parameters."""
    if not isinstance(force, openmm.CustomGBForce):
        return isinstance(force, _INTERNAL)
    # The Reference platform is slow for this Force, and implicit solvents do not use x, y and z.
    terms = [force.getComputedValueParameters(i)[1] for i in range(force.getNumComputedValues())]
    terms += [force.getEnergyTermParameters(i)[0] for i in range(force.getNumEnergyTerms())]
    return not any(re.search(r"\b[xyz]\b", term) for term in terms)


def _changes(context: openmm.Context, positions: np.ndarray, groups: list[int]) -> dict[int, float]:
    """Return the change of each force group's energy by a motion that changes it, or 0."""
    rng = np.random.default_rng(0)
    changes = dict.fromkeys(groups, 0.0)
    # Not `positions` themselves, where restraints to the reference have a singular minimum.
    for conformation in positions + 0.01 * rng.standard_normal((2, *positions.shape)):
        before = _energies(context, conformation, groups)
        centre = conformation.mean(axis=0)
        for length in _TRANSLATIONS:
            shift = rng.standard_normal(3)
            shift *= length / np.linalg.norm(shift)
            turned = (conformation - centre) @ Rotation.random(None, rng).as_matrix().T
            after = _energies(context, turned + centre + shift, groups)
            scale = max(1.0, length / _PRECISE_LENGTH)
            for group in groups:
                changes[group] = changes[group] or _change(before[group], after[group], scale)
    return changes


def _energies(context: openmm.Context, x: np.ndarray, groups: list[int]) -> dict[int, float]:
    """Return the energy of each force group in kJ/mol; NaN where OpenMM raises."""
    context.setPositions(x)
    energies = {}
    for group in groups:
        try:
            state = context.getState(energy=True, groups={group})
            energies[group] = float(state.getPotentialEnergy()._value)
        except openmm.OpenMMException:
            energies[group] = float("nan")
    return energies


def _change(before: float, after: float, scale: float) -> float:
    """Return the size of a change that is not rounding, else 0; `scale` is of the tolerance."""
    if not (np.isfinite(before) and np.isfinite(after)):
        return 0.0 if np.isfinite(before) == np.isfinite(after) else float("inf")
    absolute, relative = _TOLERANCE
    change = abs(after - before)
    return change if change > scale * absolute + relative * abs(before) else 0.0
