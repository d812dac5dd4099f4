"""CustomBondForce, CustomAngleForce, CustomTorsionForce and CustomExternalForce."""

from collections.abc import Mapping, Sequence
from typing import Any

import openmm
import torch
from torch import Tensor, nn

from openmm_tsf.potentials.forces.custom import CustomTerm, evaluate, read_groups, total
from openmm_tsf.potentials.forces.geometry import Angle, Difference, Dihedral, Gather, norm
from openmm_tsf.potentials.forces.pairs import AllPairs, Batch


class _GroupTerm(CustomTerm):
    """An expression of the coordinates `variables` of groups of atoms, summed over the groups.

    `group` is OpenMM's name of such a group (Bond, Angle, Torsion or Particle), part of the names
    of the Force's methods.
    """

    geometry: nn.Module

    def __init__(self, force: Any, group: str, *variables: str) -> None:
        names, rows = read_groups(force, group)
        super().__init__(force, names, [list(row[-1]) for row in rows])
        self.n_terms = len(rows)
        self.variables = variables
        self.expression = self.parse(force, force.getEnergyFunction(), [*variables, *names])
        self._atoms = [list(row[:-1]) for row in rows]

    def atoms(self, size: int) -> Tensor:
        """Return the atoms [M, size] of the groups."""
        return torch.tensor(self._atoms, dtype=torch.int64, device="cpu").reshape(-1, size)

    def coordinates(self, x: Tensor) -> Sequence[Tensor]:
        """Return the coordinates, each [M, B], at positions [3, N, B]."""
        return (self.geometry(x),)

    def energy(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        if self.n_terms == 0:
            return batch.x.new_zeros(batch.x.shape[-1])
        local = self.named_values()
        if not self.expression.variables.isdisjoint(self.variables):
            local |= zip(self.variables, self.coordinates(batch.x), strict=True)
        return total(evaluate(self.expression, batch.x, parameters, local), self.n_terms, batch.x)


class CustomBondTerm(_GroupTerm):
    """An expression of the distance r of two atoms, for each bond."""

    def __init__(self, force: openmm.CustomBondForce, pairs: AllPairs) -> None:
        super().__init__(force, "Bond", "r")
        first, second = self.atoms(2).T
        self.geometry = Difference(first, second, pairs.n_atoms)

    def coordinates(self, x: Tensor) -> Sequence[Tensor]:
        return (norm(self.geometry(x)),)


class CustomAngleTerm(_GroupTerm):
    """An expression of the angle theta of three atoms, 0 to pi, for each angle."""

    def __init__(self, force: openmm.CustomAngleForce, pairs: AllPairs) -> None:
        super().__init__(force, "Angle", "theta")
        self.geometry = Angle(self.atoms(3), pairs.n_atoms)


class CustomTorsionTerm(_GroupTerm):
    """An expression of the dihedral theta of four atoms, -pi to pi, for each torsion."""

    def __init__(self, force: openmm.CustomTorsionForce, pairs: AllPairs) -> None:
        super().__init__(force, "Torsion", "theta")
        self.geometry = Dihedral(self.atoms(4), pairs.n_atoms)


class CustomExternalTerm(_GroupTerm):
    """An expression of the position x, y, z of an atom, for each atom that was added."""

    def __init__(self, force: openmm.CustomExternalForce, pairs: AllPairs) -> None:
        super().__init__(force, "Particle", "x", "y", "z")
        atoms = self.atoms(1).flatten()
        is_all = torch.equal(atoms, torch.arange(pairs.n_atoms, dtype=torch.int64, device="cpu"))
        self.geometry = nn.Identity() if is_all else Gather(atoms, pairs.n_atoms)

    def coordinates(self, x: Tensor) -> Sequence[Tensor]:
        return tuple(self.geometry(x).unbind(0))
