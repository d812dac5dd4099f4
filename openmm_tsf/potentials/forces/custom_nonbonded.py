"""CustomNonbondedForce without a cutoff: exclusions, interaction groups, computed values."""

from collections.abc import Iterable, Mapping
from typing import Any

import openmm
import torch
from torch import Tensor

from openmm_tsf.potentials.expressions.parser import Expression
from openmm_tsf.potentials.forces.base import NotCovered
from openmm_tsf.potentials.forces.custom import CustomTerm, evaluate, read_groups, total
from openmm_tsf.potentials.forces.pairs import (
    AllPairs,
    Batch,
    OrderedPairs,
    PairList,
    included_pairs,
)


class CustomNonbondedTerm(CustomTerm):
    """An expression of the distance r of two atoms and of both atoms' values, for each pair.

    Particle 1 is the atom of lower number; with interaction groups, the one in the first set. A
    pair counts once in each group, even if both atoms are in both sets. Long-range corrections and
    switching act on cutoffs only.
    """

    def __init__(self, force: openmm.CustomNonbondedForce, pairs: AllPairs) -> None:
        refuse_cutoff(force)
        names, rows = read_groups(force, "Particle")
        super().__init__(force, names, rows)
        self.n_atoms = pairs.n_atoms
        self.computed: list[tuple[str, Expression]] = []
        for i in range(force.getNumComputedValues()):
            name, text = force.getComputedValueParameters(i)
            self.computed.append((name, self.parse(force, text, names)))
        per_atom = [*names, *(name for name, _ in self.computed)]
        known = pair_variables(per_atom)
        self.expression = self.parse(force, force.getEnergyFunction(), known)
        self.pairs = PairList(*_interactions(force, pairs.n_atoms), pairs)
        (self.n_pairs,) = self.pairs.shape

    def energy(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        if self.n_pairs == 0:
            return batch.x.new_zeros(batch.x.shape[-1])
        given = self.named_values()
        atoms = dict(given)
        for name, expression in self.computed:
            value = evaluate(expression, batch.x, parameters, given)
            atoms[name] = value.expand(self.n_atoms, 1)
        local = pair_values(self.expression, self.pairs, atoms, batch)
        return total(evaluate(self.expression, batch.x, parameters, local), self.n_pairs, batch.x)


def pair_variables(per_atom: Iterable[str]) -> list[str]:
    """Return the variables that an expression of pairs may use."""
    return ["r", *(f"{name}{particle}" for name in per_atom for particle in (1, 2))]


def pair_values(
    expression: Expression,
    pairs: PairList | OrderedPairs,
    atoms: Mapping[str, Tensor],
    batch: Batch,
) -> dict[str, Tensor]:
    """Return the variables of an expression of pairs: r, and atoms' values as name1 and name2."""
    local = {}
    if "r" in expression.variables:
        local["r"] = pairs.distances(batch)
    for name, value in atoms.items():
        for particle in (1, 2):
            if f"{name}{particle}" in expression.variables:
                local[f"{name}{particle}"] = pairs.select(value, particle)
    return local


def refuse_cutoff(force: Any) -> None:
    """Raise NotCovered unless the Force has no cutoff."""
    method = force.getNonbondedMethod()
    for name in ("CutoffNonPeriodic", "CutoffPeriodic"):
        if method == getattr(force, name):
            raise NotCovered(force, f"a cutoff ({name})")


def exclusions(force: Any) -> set[tuple[int, int]]:
    """Return the excluded pairs (low, high)."""
    pairs = [force.getExclusionParticles(i) for i in range(force.getNumExclusions())]
    return {(min(i, j), max(i, j)) for i, j in pairs}


def _interactions(force: openmm.CustomNonbondedForce, n_atoms: int) -> tuple[Tensor, Tensor]:
    """Return particles 1 [M] and 2 [M] of the pairs that interact."""
    excluded = exclusions(force)
    if force.getNumInteractionGroups() == 0:
        return included_pairs(excluded, n_atoms)
    interacting = []
    for group in range(force.getNumInteractionGroups()):
        one, two = (set(atoms) for atoms in force.getInteractionGroupParameters(group))
        both = one & two
        interacting += [
            (i, j)
            for i in sorted(one)
            for j in sorted(two)
            if i != j and not (i > j and {i, j} <= both)
            if (min(i, j), max(i, j)) not in excluded
        ]
    first, second = torch.tensor(interacting, dtype=torch.int64, device="cpu").reshape(-1, 2).T
    return first, second
