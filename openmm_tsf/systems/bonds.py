"""Bonds that a structure file lacks, from the terms of the System."""

import logging
from collections import Counter
from collections.abc import Iterator

import numpy as np
import openmm
import openmm.app as app

from openmm_tsf.systems.consistency import MAX_BOND, Pair, pair_label
from openmm_tsf.utils.topology import bonds_of

logger = logging.getLogger(__name__)

#: Atoms closer than this (nm) are bonded, whatever other terms they have.
_MIN_UNBONDED = 0.16


def add_bonds_of_system(
    topology: app.Topology, system: openmm.System, positions: np.ndarray
) -> None:
    """Add the System's bonds that a Topology lacks, as a PDB file without CONECT records leaves it.

    Two atoms with a bond term or a constraint are bonded if an angle term has them side by side.
    Terms that no angle confirms (Urey-Bradley and 1-4 terms, restraints; bonds where angles are
    terms of another kind) are bonds only where they join two fragments, shortest first, or are too
    short for anything else; in a System without angles, always. `positions` [N, 3] are in nm.
    """
    known = {_pair(int(i), int(j)) for i, j in bonds_of(topology)}
    terms = set(_two_atom_terms(system)) - known
    sides = set(_sides_of_angles(system))
    fragment = list(range(topology.getNumAtoms()))

    def root(atom: int) -> int:
        while fragment[atom] != atom:
            atom = fragment[atom]
        return atom

    def length(pair: Pair) -> float:
        return float(np.linalg.norm(positions[pair[0]] - positions[pair[1]]))

    new = sorted(terms & sides)
    for first, second in (*known, *new):
        fragment[root(first)] = root(second)
    for first, second in sorted(terms - sides, key=lambda pair: (length(pair), pair)):
        joins, distance = root(first) != root(second), length((first, second))
        if distance <= (MAX_BOND if joins or not sides else _MIN_UNBONDED):
            fragment[root(first)] = root(second)
            new.append((first, second))
    atoms = list(topology.atoms())
    for first, second in sorted(new):
        topology.addBond(atoms[first], atoms[second])
    if new:
        logger.info(
            "%d bonds that the structure file lacks are taken from the System, e.g. between %s",
            len(new), pair_label(topology, min(new)),
        )  # fmt: skip


def unbonded_residue(topology: app.Topology) -> str | None:
    """Return the name of the first residue of several atoms of which one has no bond, if any."""
    n_bonds = Counter(int(atom) for atom in bonds_of(topology).flat)
    for residue in topology.residues():
        atoms = list(residue.atoms())
        if len(atoms) > 1 and any(not n_bonds[a.index] and a.element is not None for a in atoms):
            return f"{residue.name}{residue.id}"
    return None


def _pair(first: int, second: int) -> Pair:
    return (first, second) if first < second else (second, first)


def _two_atom_terms(system: openmm.System) -> Iterator[Pair]:
    """Yield the pairs with a constraint or a bond term."""
    for index in range(system.getNumConstraints()):
        first, second, _ = system.getConstraintParameters(index)
        yield _pair(first, second)
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce | openmm.CustomBondForce):
            for index in range(force.getNumBonds()):
                first, second, *_ = force.getBondParameters(index)
                yield _pair(first, second)


def _sides_of_angles(system: openmm.System) -> Iterator[Pair]:
    """Yield the two pairs of neighbours in each angle term."""
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicAngleForce | openmm.CustomAngleForce):
            for index in range(force.getNumAngles()):
                first, vertex, last, *_ = force.getAngleParameters(index)
                yield _pair(first, vertex)
                yield _pair(vertex, last)
