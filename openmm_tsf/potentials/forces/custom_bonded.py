"""CustomBondForce, CustomAngleForce, CustomTorsionForce and CustomExternalForce."""

from collections.abc import Mapping
from typing import Any

import openmm
import torch
from torch import Tensor, nn

from openmm_tsf.potentials.forces.custom import CustomTerm, evaluate, total
from openmm_tsf.potentials.forces.geometry import (
    AllPairs,
    Angle,
    Difference,
    Dihedral,
    Frame,
    Gather,
    norm,
)


class _InternalTerm(CustomTerm):
    """An expression of one internal coordinate, summed over groups of atoms.

    `kind` is OpenMM's word for such a group: it names the methods of the Force.
    """

    geometry: nn.Module

    def __init__(self, force: Any, kind: str, variable: str) -> None:
        get = getattr(force, f"get{kind}Parameters")
        groups = [get(i) for i in range(getattr(force, f"getNum{kind}s")())]
        count = getattr(force, f"getNumPer{kind}Parameters")()
        names = [getattr(force, f"getPer{kind}ParameterName")(i) for i in range(count)]
        super().__init__(force, names, [list(group[-1]) for group in groups])
        self.n_terms = len(groups)
        self.variable = variable
        self.expression = self.parse(force, force.getEnergyFunction(), [variable, *names])
        self.groups = [list(group[:-1]) for group in groups]

    def columns(self, width: int) -> Tensor:
        """The atoms [M, width] of the groups."""
        return torch.tensor(self.groups, dtype=torch.int64).reshape(-1, width)

    def coordinate(self, x: Tensor) -> Tensor:
        """The internal coordinate [M, B] of positions [3, N, B]."""
        values: Tensor = self.geometry(x)
        return values

    def energy(self, frame: Frame, parameters: Mapping[str, Tensor]) -> Tensor:
        """Energies [B] in kJ/mol."""
        if self.n_terms == 0:
            return frame.x.new_zeros(frame.x.shape[-1])
        local = self.own_values()
        if self.variable in self.expression.variables:
            local[self.variable] = self.coordinate(frame.x)
        return total(evaluate(self.expression, frame.x, parameters, local), self.n_terms, frame.x)


class CustomBondTerm(_InternalTerm):
    """An expression of the distance r of two atoms, for each bond."""

    def __init__(self, force: openmm.CustomBondForce, n_atoms: int, pairs: AllPairs) -> None:
        super().__init__(force, "Bond", "r")
        atoms = self.columns(2)
        self.geometry = Difference(atoms[:, 0], atoms[:, 1], n_atoms)

    def coordinate(self, x: Tensor) -> Tensor:
        """Distances [M, B] of positions [3, N, B]."""
        return norm(self.geometry(x))


class CustomAngleTerm(_InternalTerm):
    """An expression of the angle theta of three atoms, 0 to pi, for each angle."""

    def __init__(self, force: openmm.CustomAngleForce, n_atoms: int, pairs: AllPairs) -> None:
        super().__init__(force, "Angle", "theta")
        self.geometry = Angle(self.columns(3), n_atoms)


class CustomTorsionTerm(_InternalTerm):
    """An expression of the dihedral theta of four atoms, -pi to pi, for each torsion."""

    def __init__(self, force: openmm.CustomTorsionForce, n_atoms: int, pairs: AllPairs) -> None:
        super().__init__(force, "Torsion", "theta")
        self.geometry = Dihedral(self.columns(4), n_atoms)


class CustomExternalTerm(CustomTerm):
    """An expression of the position x, y, z of an atom, for each atom that was added."""

    def __init__(self, force: openmm.CustomExternalForce, n_atoms: int, pairs: AllPairs) -> None:
        particles = [force.getParticleParameters(i) for i in range(force.getNumParticles())]
        names = [
            force.getPerParticleParameterName(i) for i in range(force.getNumPerParticleParameters())
        ]
        super().__init__(force, names, [list(p[1]) for p in particles])
        self.n_terms = len(particles)
        self.expression = self.parse(force, force.getEnergyFunction(), ["x", "y", "z", *names])
        atoms = [p[0] for p in particles]
        self.atoms = None if atoms == list(range(n_atoms)) else Gather(atoms, n_atoms)

    def energy(self, frame: Frame, parameters: Mapping[str, Tensor]) -> Tensor:
        """Energies [B] in kJ/mol."""
        if self.n_terms == 0:
            return frame.x.new_zeros(frame.x.shape[-1])
        positions = frame.x if self.atoms is None else self.atoms(frame.x)
        local = self.own_values() | dict(zip("xyz", positions.unbind(0), strict=True))
        return total(evaluate(self.expression, frame.x, parameters, local), self.n_terms, frame.x)
