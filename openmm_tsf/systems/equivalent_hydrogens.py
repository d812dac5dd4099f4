"""Hydrogens of a molecule that its System does not distinguish."""

import logging

import numpy as np
import openmm
import openmm.app as app

from openmm_tsf.coordinates.bond_graph import Triple
from openmm_tsf.systems.molecule import MolecularSystem

logger = logging.getLogger(__name__)

#: Perturbation (nm) and number of conformations on which the energy's invariance is checked.
_PERTURBATION, _N_CHECKS = 0.004, 3
#: Largest change of the energy, relative to its size, that still is rounding.
_TOLERANCE = 1e-9


def methyl_hydrogens(topology: app.Topology) -> list[Triple]:
    """Return the three hydrogens of each carbon that has exactly three, and four neighbours."""
    neighbours: dict[int, list[app.topology.Atom]] = {a.index: [] for a in topology.atoms()}
    for first, second in topology.bonds():
        neighbours[first.index].append(second)
        neighbours[second.index].append(first)
    triples: list[Triple] = []
    for atom in topology.atoms():
        bonded = neighbours[atom.index]
        hydrogens = [a.index for a in bonded if a.element is app.element.hydrogen]
        if atom.element is app.element.carbon and len(bonded) == 4 and len(hydrogens) == 3:
            triples.append((hydrogens[0], hydrogens[1], hydrogens[2]))
    return triples


def equivalent_hydrogens(molecule: MolecularSystem) -> list[Triple]:
    """Return the methyl groups whose hydrogens the System does not distinguish.

    Each group is rotated by a third on perturbed conformations; where the energy changes by more
    than rounding, or masses or constraints differ, the group is left out, with a warning.
    """
    integrator = openmm.VerletIntegrator(0.001)
    platform = openmm.Platform.getPlatformByName("Reference")
    system = openmm.XmlSerializer.clone(molecule.system)
    context = openmm.Context(system, integrator, platform)

    def energy(x: np.ndarray) -> float:
        context.setPositions(x)
        return float(context.getState(getEnergy=True).getPotentialEnergy()._value)

    rng = np.random.default_rng(0)
    shape = (_N_CHECKS, molecule.n_atoms, 3)
    x = molecule.positions + _PERTURBATION * rng.standard_normal(shape)
    before = [energy(frame) for frame in x]
    fixed: list[list[float]] = [[] for _ in range(molecule.n_atoms)]
    if molecule.constraints is not None:
        lengths = molecule.constraints.lengths.tolist()
        for pair, length in zip(molecule.constraints.pairs.tolist(), lengths, strict=True):
            for atom in pair:
                fixed[atom].append(length)
    equivalent: list[Triple] = []
    for triple in methyl_hydrogens(molecule.topology):
        rotated = x.copy()
        rotated[:, list(triple)] = x[:, list(np.roll(triple, 1))]
        after = [energy(frame) for frame in rotated]
        is_invariant = np.allclose(after, before, rtol=_TOLERANCE, atol=1e-6)
        if is_invariant and len({(float(molecule.masses[i]), *fixed[i]) for i in triple}) == 1:
            equivalent.append(triple)
        else:
            logger.warning("hydrogens %s are not equivalent in this System", triple)
    return equivalent
