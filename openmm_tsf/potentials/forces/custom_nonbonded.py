"""CustomNonbondedForce: exclusions, interaction groups, computed values, cutoffs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import openmm
import torch
from torch import Tensor

from openmm_tsf.potentials.expressions.parser import Expression
from openmm_tsf.potentials.forces.base import NotCovered
from openmm_tsf.potentials.forces.custom import CustomTerm, evaluate, read_groups, total
from openmm_tsf.potentials.forces.cutoff import Cutoff, read_cutoff
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
    pair counts once in each group, even if both atoms are in both sets. Switching acts on cutoffs
    only, long-range corrections on periodic ones.
    """

    def __init__(self, force: openmm.CustomNonbondedForce, pairs: AllPairs) -> None:
        cutoff = read_cutoff(force)
        names, rows = read_groups(force, "Particle")
        super().__init__(force, names, rows)
        self.cutoff, self.n_atoms = cutoff, pairs.n_atoms
        self.computed: list[tuple[str, Expression]] = []
        for i in range(force.getNumComputedValues()):
            name, text = force.getComputedValueParameters(i)
            self.computed.append((name, self.parse(force, text, names)))
        per_atom = [*names, *(name for name, _ in self.computed)]
        known = pair_variables(per_atom)
        self.expression = self.parse(force, force.getEnergyFunction(), known)
        self.pairs = PairList(*_interactions(force, pairs.n_atoms), pairs)
        (self.n_pairs,) = self.pairs.shape
        if cutoff is not None and not force.getNumInteractionGroups():
            check_symmetric(force, self, self.expression, self.pairs, self._atoms)

    def energy(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        if self.n_pairs == 0:
            return batch.x.new_zeros(batch.x.shape[-1])
        atoms = self._atoms(batch.x, parameters)
        values = evaluate_pairs(self.expression, self.pairs, self.cutoff, batch, parameters, atoms)
        return total(values, self.n_pairs, batch.x)

    def _atoms(self, like: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values of the atoms by name, given and computed, each [N, 1]."""
        given = self.named_values()
        atoms = dict(given)
        for name, expression in self.computed:
            value = evaluate(expression, like, parameters, given)
            atoms[name] = value.expand(self.n_atoms, 1)
        return atoms


def pair_variables(per_atom: Iterable[str]) -> list[str]:
    """Return the variables that an expression of pairs may use."""
    return ["r", *(f"{name}{particle}" for name in per_atom for particle in (1, 2))]


def evaluate_pairs(
    expression: Expression,
    pairs: PairList | OrderedPairs,
    cutoff: Cutoff | None,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    atoms: Mapping[str, Tensor],
) -> Tensor:
    """Return an expression of pairs, of r and of atoms' values as name1 and name2.

    Pairs beyond a cutoff have none.
    """
    local = {}
    for name, value in atoms.items():
        for particle in (1, 2):
            if f"{name}{particle}" in expression.variables:
                local[f"{name}{particle}"] = pairs.select(value, particle)
    if cutoff is None:
        if "r" in expression.variables:
            local["r"] = pairs.distances(batch)
        return evaluate(expression, batch.x, parameters, local)
    r = pairs.distances(batch)
    inside = cutoff.contains(r)
    # An expression that is not finite beyond the cutoff would make gradients NaN.
    local["r"] = torch.where(inside, r, 0.5 * cutoff.distance)
    values = evaluate(expression, batch.x, parameters, local)
    if cutoff.switching is not None:
        values = values * cutoff.switch(local["r"])
    return torch.where(inside, values, 0.0)


def check_symmetric(
    force: Any,
    term: CustomTerm,
    expression: Expression,
    pairs: PairList,
    atoms_of: Callable[[Tensor, Mapping[str, Tensor]], Mapping[str, Tensor]],
) -> None:
    """Refuse an expression within a cutoff that changes when a pair's particles are exchanged.

    Which atom is particle 1 is decided by OpenMM's list of neighbours, which changes in dynamics.
    `atoms_of` returns the values of the atoms.
    """
    cutoff = read_cutoff(force)
    assert cutoff is not None
    fractions = torch.tensor([0.37, 0.61, 0.89], dtype=torch.float64, device="cpu")
    parameters = {name: fractions.new_tensor(v) for name, v in term.global_parameters.items()}
    atoms = atoms_of(fractions, parameters)
    values = []
    for one, two in ((1, 2), (2, 1)):
        local = {"r": cutoff.distance * fractions}
        for name, value in atoms.items():
            local[f"{name}1"], local[f"{name}2"] = (
                pairs.select(value, one),
                pairs.select(value, two),
            )
        values.append(evaluate(expression, fractions, parameters, local))
    first, second = values
    if not torch.allclose(first, second, rtol=1e-9, atol=0.0, equal_nan=True):
        raise NotCovered(
            force, "an expression that depends on the order of particles, and a cutoff,"
        )


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
