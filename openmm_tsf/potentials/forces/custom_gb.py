"""CustomGBForce: values of atoms, computed in stages, and energies of atoms and pairs."""

from collections.abc import Mapping
from dataclasses import dataclass

import openmm
from torch import Tensor, nn

from openmm_tsf.potentials.expressions.parser import Expression
from openmm_tsf.potentials.forces.base import NotCovered
from openmm_tsf.potentials.forces.custom import CustomTerm, evaluate, total
from openmm_tsf.potentials.forces.custom_nonbonded import (
    exclusions,
    pair_values,
    particle_parameters,
    refuse_cutoff,
)
from openmm_tsf.potentials.forces.pairs import (
    AllPairs,
    Batch,
    OrderedPairs,
    PairList,
    included_pairs,
)

_SINGLE = openmm.CustomGBForce.SingleParticle
_PAIR = openmm.CustomGBForce.ParticlePair
_PAIR_NO_EXCLUSIONS = openmm.CustomGBForce.ParticlePairNoExclusions


@dataclass(frozen=True)
class _ComputedValue:
    """A computed value; `pairs` is None for one of single atoms."""

    name: str
    expression: Expression
    pairs: OrderedPairs | None


@dataclass(frozen=True)
class _EnergyTerm:
    """An energy term; `pairs` is None for one of single atoms."""

    expression: Expression
    pairs: PairList | None


class CustomGBTerm(CustomTerm):
    """Generalised Born models: computed values of atoms, then energies of atoms and pairs.

    A pair value of atom i is the sum over j != i of its expression with i as particle 1 and j as
    particle 2. A pair energy counts once for each pair, particle 1 being the atom of lower number.
    Values may depend on all values before them. (OpenMM's own platforms demand that the first
    value, and no other, is one of pairs.)
    """

    def __init__(self, force: openmm.CustomGBForce, pairs: AllPairs) -> None:
        refuse_cutoff(force)
        if force.getNumComputedValues() == 0:  # OpenMM's Reference platform crashes
            raise NotCovered(force, "the absence of computed values")
        names, rows = particle_parameters(force)
        super().__init__(force, names, rows)
        self.n_atoms = pairs.n_atoms
        values = [force.getComputedValueParameters(i) for i in range(force.getNumComputedValues())]
        energies = [force.getEnergyTermParameters(i) for i in range(force.getNumEnergyTerms())]
        excluded = {_PAIR: exclusions(force), _PAIR_NO_EXCLUSIONS: set[tuple[int, int]]()}
        ordered = {
            kind: OrderedPairs(excluded[kind], pairs)
            for kind in {kind for _, _, kind in values} - {_SINGLE}
        }
        unordered = {
            kind: PairList(*included_pairs(excluded[kind], pairs.n_atoms), pairs)
            for kind in {kind for _, kind in energies} - {_SINGLE}
        }
        self.lists = nn.ModuleList([*ordered.values(), *unordered.values()])
        self.computed: list[_ComputedValue] = []
        per_atom = list(names)
        for name, text, kind in values:
            expression = self.parse(force, text, _variables(per_atom, kind))
            self.computed.append(_ComputedValue(name, expression, ordered.get(kind)))
            per_atom.append(name)
        self.terms = [
            _EnergyTerm(self.parse(force, text, _variables(per_atom, kind)), unordered.get(kind))
            for text, kind in energies
        ]

    def energy(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        x = batch.x
        atoms = self.named_values()
        position = dict(zip("xyz", x.unbind(0), strict=True))
        for value in self.computed:
            if value.pairs is None:
                result = evaluate(value.expression, x, parameters, position, atoms)
                result = result.expand(self.n_atoms, result.shape[-1] if result.ndim else 1)
            else:
                local = pair_values(value.expression, value.pairs, atoms, batch)
                terms = evaluate(value.expression, x, parameters, local)
                result = value.pairs.sum_over_partners(terms)
            atoms[value.name] = result
        energy = x.new_zeros(x.shape[-1])
        for term in self.terms:
            if term.pairs is None:
                terms = evaluate(term.expression, x, parameters, position, atoms)
                energy = energy + total(terms, self.n_atoms, x)
            else:
                local = pair_values(term.expression, term.pairs, atoms, batch)
                terms = evaluate(term.expression, x, parameters, local)
                energy = energy + total(terms, term.pairs.shape[0], x)
        return energy


def _variables(per_atom: list[str], kind: int) -> list[str]:
    """Return the variables that an expression of this kind may use."""
    if kind == _SINGLE:
        return ["x", "y", "z", *per_atom]
    return ["r", *(f"{name}{particle}" for name in per_atom for particle in (1, 2))]
