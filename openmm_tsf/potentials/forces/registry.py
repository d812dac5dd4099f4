"""The Forces that are covered, and the term of each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import openmm

from openmm_tsf.potentials.forces.base import NotCovered, Term
from openmm_tsf.potentials.forces.bonded import (
    CMAPTorsionTerm,
    HarmonicAngleTerm,
    HarmonicBondTerm,
    PeriodicTorsionTerm,
    RBTorsionTerm,
)
from openmm_tsf.potentials.forces.custom_bonded import (
    CustomAngleTerm,
    CustomBondTerm,
    CustomExternalTerm,
    CustomTorsionTerm,
)
from openmm_tsf.potentials.forces.custom_gb import CustomGBTerm
from openmm_tsf.potentials.forces.custom_nonbonded import CustomNonbondedTerm
from openmm_tsf.potentials.forces.cutoff import gbsa_obc_term, nonbonded_term
from openmm_tsf.potentials.forces.pairs import AllPairs

#: The term of each Force that is covered.
TERMS: dict[type, Callable[[Any, AllPairs], Term]] = {
    openmm.HarmonicBondForce: HarmonicBondTerm,
    openmm.HarmonicAngleForce: HarmonicAngleTerm,
    openmm.PeriodicTorsionForce: PeriodicTorsionTerm,
    openmm.RBTorsionForce: RBTorsionTerm,
    openmm.CMAPTorsionForce: CMAPTorsionTerm,
    openmm.NonbondedForce: nonbonded_term,
    openmm.GBSAOBCForce: gbsa_obc_term,
    openmm.CustomBondForce: CustomBondTerm,
    openmm.CustomAngleForce: CustomAngleTerm,
    openmm.CustomTorsionForce: CustomTorsionTerm,
    openmm.CustomExternalForce: CustomExternalTerm,
    openmm.CustomNonbondedForce: CustomNonbondedTerm,
    openmm.CustomGBForce: CustomGBTerm,
}


@dataclass(frozen=True)
class CoveredForce:
    """A Force of the System, by its index and name there, and its term."""

    index: int
    name: str
    term: Term


def read_forces(
    system: openmm.System, pairs: AllPairs, groups: Iterable[int] | None = None
) -> list[CoveredForce]:
    """Return a System's Forces in the given force groups (all by default), with their terms.

    A CMMotionRemover has no energy and is ignored; what has no counterpart in torch is NotCovered.
    """
    included = None if groups is None else set(groups)
    forces = []
    for index, force in enumerate(system.getForces()):
        if isinstance(force, openmm.CMMotionRemover):
            continue
        if included is not None and force.getForceGroup() not in included:
            continue
        build = TERMS.get(type(force))
        if build is None:
            raise NotCovered(force, None)
        if force.usesPeriodicBoundaryConditions():
            raise NotCovered(force, "periodic boundary conditions")
        try:
            term = build(force, pairs)
        except NotCovered:
            raise
        except ValueError as error:  # of an expression or a tabulated function
            raise NotCovered(force, f"something ({error})") from error
        forces.append(CoveredForce(index, force.getName(), term))
    return forces


def global_parameters(system: openmm.System) -> dict[str, float]:
    """Return the names and default values of the global parameters of all Forces."""
    defaults: dict[str, float] = {}
    for force in system.getForces():
        for index in range(getattr(force, "getNumGlobalParameters", lambda: 0)()):
            name = force.getGlobalParameterName(index)
            value = float(force.getGlobalParameterDefaultValue(index))
            if defaults.setdefault(name, value) != value:
                got = f"{defaults[name]} and {value} (in {force.getName()})"
                expected = f"one default of the global parameter {name!r}"
                raise ValueError(f"system: expected {expected}, got {got}")
    return defaults
