"""CustomNonbondedForce without a cutoff: exclusions, interaction groups, computed values."""

from collections.abc import Mapping
from typing import Any

import openmm
import torch
from torch import Tensor

from openmm_tsf.potentials.expressions.parser import Expression
from openmm_tsf.potentials.forces.base import NotCovered
from openmm_tsf.potentials.forces.custom import CustomTerm, evaluate, total
from openmm_tsf.potentials.forces.geometry import AllPairs, Frame
from openmm_tsf.potentials.forces.pairs import OrderedPairs, PairList, all_but


class CustomNonbondedTerm(CustomTerm):
    """An expression of the distance r of two atoms and of both atoms' values, for each pair.

    Particle 1 is the atom of lower number; with interaction groups, the one in the first set. A
    pair counts once in each group, even if both atoms are in both sets. Long-range corrections and
    switching act on cutoffs only.

    Raises
    ------
    NotCovered
        If there is a cutoff.
    """

    def __init__(self, force: openmm.CustomNonbondedForce, n_atoms: int, pairs: AllPairs) -> None:
        refuse_cutoff(force)
        names, rows = particle_parameters(force)
        super().__init__(force, names, rows)
        self.n_atoms = n_atoms
        self.values: list[tuple[str, Expression]] = []
        for i in range(force.getNumComputedValues()):
            name, text = force.getComputedValueParameters(i)
            self.values.append((name, self.parse(force, text, names)))
        per_atom = [*names, *(name for name, _ in self.values)]
        known = ["r", *(f"{name}{k}" for name in per_atom for k in (1, 2))]
        self.expression = self.parse(force, force.getEnergyFunction(), known)
        self.pairs = PairList(*_interactions(force, n_atoms), pairs)
        (self.n_pairs,) = self.pairs.shape

    def energy(self, frame: Frame, parameters: Mapping[str, Tensor]) -> Tensor:
        """Energies [B] in kJ/mol."""
        if self.n_pairs == 0:
            return frame.x.new_zeros(frame.x.shape[-1])
        own = self.own_values()
        atoms = dict(own)
        for name, expression in self.values:
            value = evaluate(expression, frame.x, parameters, own)
            atoms[name] = value.expand(self.n_atoms, 1)
        local = pair_values(self.expression, self.pairs, atoms, frame)
        return total(evaluate(self.expression, frame.x, parameters, local), self.n_pairs, frame.x)


def pair_values(
    expression: Expression,
    pairs: PairList | OrderedPairs,
    atoms: Mapping[str, Tensor],
    frame: Frame,
) -> dict[str, Tensor]:
    """What an expression needs of pairs: r, and the atoms' values [N, B] as name1 and name2."""
    local = {}
    if "r" in expression.variables:
        local["r"] = pairs.distances(frame)
    for name, value in atoms.items():
        for particle in (1, 2):
            if f"{name}{particle}" in expression.variables:
                local[f"{name}{particle}"] = pairs.select(value, particle)
    return local


def particle_parameters(force: Any) -> tuple[list[str], list[list[float]]]:
    """Names of the parameters per particle, and their values, a row for each particle."""
    names = [
        force.getPerParticleParameterName(i) for i in range(force.getNumPerParticleParameters())
    ]
    rows = [list(force.getParticleParameters(i)) for i in range(force.getNumParticles())]
    return names, rows


def refuse_cutoff(force: Any) -> None:
    """Raise NotCovered unless the Force has no cutoff."""
    method = force.getNonbondedMethod()
    for name in ("CutoffNonPeriodic", "CutoffPeriodic"):
        if method == getattr(force, name):
            raise NotCovered(force, f"a cutoff ({name})")


def exclusions(force: Any) -> set[tuple[int, int]]:
    """Excluded pairs (low, high)."""
    pairs = [force.getExclusionParticles(i) for i in range(force.getNumExclusions())]
    return {(min(i, j), max(i, j)) for i, j in pairs}


def _interactions(force: openmm.CustomNonbondedForce, n_atoms: int) -> tuple[Tensor, Tensor]:
    """Particles 1 [M] and 2 [M] of the pairs that interact."""
    excluded = exclusions(force)
    if force.getNumInteractionGroups() == 0:
        return all_but(excluded, n_atoms)
    chosen = []
    for group in range(force.getNumInteractionGroups()):
        one, two = (set(atoms) for atoms in force.getInteractionGroupParameters(group))
        both = one & two
        chosen += [
            (i, j)
            for i in sorted(one)
            for j in sorted(two)
            if i != j
            and not (i > j and i in both and j in both)
            and (min(i, j), max(i, j)) not in excluded
        ]
    first, second = torch.tensor(chosen, dtype=torch.int64).reshape(-1, 2).T
    return first, second
