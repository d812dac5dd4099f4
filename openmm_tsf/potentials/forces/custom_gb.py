"""CustomGBForce: values of atoms, computed in stages, and energies of atoms and pairs."""

from collections.abc import Mapping

import openmm
import torch
from torch import Tensor, nn

from openmm_tsf.potentials.expressions.parser import Expression
from openmm_tsf.potentials.forces.base import NotCovered
from openmm_tsf.potentials.forces.custom import CustomTerm, evaluate, read_groups, total
from openmm_tsf.potentials.forces.custom_nonbonded import (
    check_symmetric,
    evaluate_pairs,
    exclusions,
    pair_variables,
)
from openmm_tsf.potentials.forces.cutoff import read_cutoff
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


class CustomGBTerm(CustomTerm):
    """Generalised Born models: computed values of atoms, then energies of atoms and pairs.

    A pair value of atom i is the sum over j != i of its expression with i as particle 1 and j as
    particle 2. A pair energy counts once for each pair, particle 1 being the atom of lower number.
    Values may depend on all values before them. (OpenMM's own platforms demand that the first
    value, and no other, is one of pairs.)
    """

    def __init__(self, force: openmm.CustomGBForce, pairs: AllPairs) -> None:
        cutoff = read_cutoff(force)
        if force.getNumComputedValues() == 0:  # OpenMM's Reference platform crashes
            raise NotCovered(force, "the absence of computed values")
        names, rows = read_groups(force, "Particle")
        super().__init__(force, names, rows)
        self.cutoff, self.n_atoms = cutoff, pairs.n_atoms
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
        # Of single atoms where there are no pairs.
        self.computed: list[tuple[str, Expression, OrderedPairs | None]] = []
        per_atom = list(names)

        def known(kind: int) -> list[str]:
            return ["x", "y", "z", *per_atom] if kind == _SINGLE else pair_variables(per_atom)

        for name, text, kind in values:
            expression = self.parse(force, text, known(kind))
            self.computed.append((name, expression, ordered.get(kind)))
            per_atom.append(name)
        self.terms = [
            (self.parse(force, text, known(kind)), unordered.get(kind)) for text, kind in energies
        ]
        for expression, of_pairs in self.terms:
            if cutoff is not None and of_pairs is not None:
                check_symmetric(force, self, expression, of_pairs, self._some_values)

    def _some_values(self, like: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the atoms' values, with different numbers for those that are computed."""
        number = 0.5 + torch.arange(self.n_atoms, dtype=like.dtype, device=like.device)[:, None]
        return self.named_values() | {name: number for name, *_ in self.computed}

    def energy(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        x = batch.x
        atoms = self.named_values()
        position = dict(zip("xyz", x.unbind(0), strict=True))

        def values(expression: Expression, pairs: OrderedPairs | PairList | None) -> Tensor:
            if pairs is None:
                return evaluate(expression, x, parameters, position, atoms)
            return evaluate_pairs(expression, pairs, self.cutoff, batch, parameters, atoms)

        for name, expression, ordered in self.computed:
            result = values(expression, ordered)
            if ordered is None:
                result = result.expand(self.n_atoms, result.shape[-1] if result.ndim else 1)
            else:
                result = ordered.sum_over_partners(result)
            atoms[name] = result
        energy = x.new_zeros(x.shape[-1])
        for expression, pairs in self.terms:
            n_terms = self.n_atoms if pairs is None else pairs.shape[0]
            energy = energy + total(values(expression, pairs), n_terms, x)
        return energy
