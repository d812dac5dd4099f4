"""CustomBondForce, CustomAngleForce, CustomTorsionForce and CustomExternalForce."""

from collections.abc import Mapping
from typing import Any

import openmm
import torch
from torch import Tensor, nn

from openmm_tsf.potentials.forces.custom import CustomTerm, evaluate, total
from openmm_tsf.potentials.forces.geometry import Angle, Difference, Dihedral, Gather, norm
from openmm_tsf.potentials.forces.pairs import AllPairs, Batch


class _InternalTerm(CustomTerm):
    """An expression of one internal coordinate, summed over groups of atoms.

    `group` is OpenMM's name of such a group (Bond, Angle or Torsion), part of the names of the
    Force's methods.
    """

    geometry: nn.Module

    def __init__(self, force: Any, group: str, variable: str) -> None:
        get = getattr(force, f"get{group}Parameters")
        rows = [get(i) for i in range(getattr(force, f"getNum{group}s")())]
        count = getattr(force, f"getNumPer{group}Parameters")()
        names = [getattr(force, f"getPer{group}ParameterName")(i) for i in range(count)]
        super().__init__(force, names, [list(row[-1]) for row in rows])
        self.n_terms = len(rows)
        self.variable = variable
        self.expression = self.parse(force, force.getEnergyFunction(), [variable, *names])
        self._atoms = [list(row[:-1]) for row in rows]

    def atoms(self, size: int) -> Tensor:
        """Return the atoms [M, size] of the groups."""
        return torch.tensor(self._atoms, dtype=torch.int64).reshape(-1, size)

    def coordinate(self, x: Tensor) -> Tensor:
        """Return the internal coordinate [M, B] of positions [3, N, B]."""
        values: Tensor = self.geometry(x)
        return values

    def energy(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        if self.n_terms == 0:
            return batch.x.new_zeros(batch.x.shape[-1])
        local = self.named_values()
        if self.variable in self.expression.variables:
            local[self.variable] = self.coordinate(batch.x)
        return total(evaluate(self.expression, batch.x, parameters, local), self.n_terms, batch.x)


class CustomBondTerm(_InternalTerm):
    """An expression of the distance r of two atoms, for each bond."""

    def __init__(self, force: openmm.CustomBondForce, pairs: AllPairs) -> None:
        super().__init__(force, "Bond", "r")
        atoms = self.atoms(2)
        self.geometry = Difference(atoms[:, 0], atoms[:, 1], pairs.n_atoms)

    def coordinate(self, x: Tensor) -> Tensor:
        return norm(self.geometry(x))


class CustomAngleTerm(_InternalTerm):
    """An expression of the angle theta of three atoms, 0 to pi, for each angle."""

    def __init__(self, force: openmm.CustomAngleForce, pairs: AllPairs) -> None:
        super().__init__(force, "Angle", "theta")
        self.geometry = Angle(self.atoms(3), pairs.n_atoms)


class CustomTorsionTerm(_InternalTerm):
    """An expression of the dihedral theta of four atoms, -pi to pi, for each torsion."""

    def __init__(self, force: openmm.CustomTorsionForce, pairs: AllPairs) -> None:
        super().__init__(force, "Torsion", "theta")
        self.geometry = Dihedral(self.atoms(4), pairs.n_atoms)


class CustomExternalTerm(CustomTerm):
    """An expression of the position x, y, z of an atom, for each atom that was added."""

    def __init__(self, force: openmm.CustomExternalForce, pairs: AllPairs) -> None:
        particles = [force.getParticleParameters(i) for i in range(force.getNumParticles())]
        names = [
            force.getPerParticleParameterName(i) for i in range(force.getNumPerParticleParameters())
        ]
        super().__init__(force, names, [list(p[1]) for p in particles])
        self.n_terms = len(particles)
        self.expression = self.parse(force, force.getEnergyFunction(), ["x", "y", "z", *names])
        atoms = [p[0] for p in particles]
        self.atoms = None if atoms == list(range(pairs.n_atoms)) else Gather(atoms, pairs.n_atoms)

    def energy(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        if self.n_terms == 0:
            return batch.x.new_zeros(batch.x.shape[-1])
        positions = batch.x if self.atoms is None else self.atoms(batch.x)
        local = self.named_values() | dict(zip("xyz", positions.unbind(0), strict=True))
        return total(evaluate(self.expression, batch.x, parameters, local), self.n_terms, batch.x)
