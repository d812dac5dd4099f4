"""Labels, bonds and backbone dihedrals of the atoms of a Topology."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import openmm.app as app

if TYPE_CHECKING:
    import mdtraj

Quartet = tuple[int, int, int, int]

_BACKBONE = re.compile(r"(?:phi|psi)(\d*)")
_OTHER = re.compile(r".*?(?:_(\d+))?")


def atom_label(atom: app.topology.Atom) -> str:
    """Return the label of an atom for messages, e.g. ``ALA2-CA``."""
    return f"{atom.residue.name}{atom.residue.id}-{atom.name}"


def bonds_of(topology: app.Topology | mdtraj.Topology) -> np.ndarray:
    """Return the indices [n, 2] of bonded atoms."""
    bonds = topology.bonds() if isinstance(topology, app.Topology) else topology.bonds
    pairs = [(first.index, second.index) for first, second in bonds]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def neighbours_of(topology: app.Topology | mdtraj.Topology) -> list[list[int]]:
    """Return the indices of the atoms bonded to each atom, ascending, each once."""
    is_openmm = isinstance(topology, app.Topology)
    n_atoms = topology.getNumAtoms() if is_openmm else topology.n_atoms
    neighbours: list[set[int]] = [set() for _ in range(n_atoms)]
    for first, second in bonds_of(topology).tolist():
        neighbours[first].add(second)
        neighbours[second].add(first)
    return [sorted(bonded) for bonded in neighbours]


def backbone_dihedrals(topology: app.Topology) -> dict[str, Quartet]:
    """Return phi and psi of the residues with atoms N, CA and C that are bonded in a row.

    phi begins at the C of another residue that is bonded to N, psi ends at the N of another that is
    bonded to C. Bonds alone decide: neighbours in a chain need not be bonded, and in a ring the
    last residue is bonded to the first. All phi come first, then all psi, by residue.

    If both belong to the same, only residue, the names are ``phi`` and ``psi``; otherwise each ends
    with its residue's number in the Topology, counted from 1: ``phi2``, ``psi2``, ...
    """
    atoms, neighbours = list(topology.atoms()), neighbours_of(topology)

    def bonded(atom: int, name: str, same_residue: bool) -> int | None:
        """Return the bonded atom of a name; of several that with fewest bonds (not a methyl)."""
        candidates = [
            other
            for other in neighbours[atom]
            if atoms[other].name == name
            and (atoms[other].residue is atoms[atom].residue) == same_residue
        ]
        return min(candidates, key=lambda other: (len(neighbours[other]), other), default=None)

    phi: dict[int, Quartet] = {}
    psi: dict[int, Quartet] = {}
    for alpha in (atom for atom in atoms if atom.name == "CA"):
        n, c = bonded(alpha.index, "N", True), bonded(alpha.index, "C", True)
        if n is None or c is None:
            continue
        before, after = bonded(n, "C", False), bonded(c, "N", False)
        number = alpha.residue.index + 1
        if before is not None:
            phi.setdefault(number, (before, n, alpha.index, c))
        if after is not None:
            psi.setdefault(number, (n, alpha.index, c, after))
    is_single = len(phi) == len(psi) == 1 and phi.keys() == psi.keys()
    return {
        name if is_single else f"{name}{number}": quartets[number]
        for name, quartets in (("phi", phi), ("psi", psi))
        for number in sorted(quartets)
    }


def residue_of(name: str) -> int | None:
    """Return the number of the residue in a torsion's name; None for a name without one."""
    match = _BACKBONE.fullmatch(name) or _OTHER.fullmatch(name)
    return int(match[1]) if match and match[1] else None


def is_backbone(name: str) -> bool:
    """Return whether a torsion's name is that of a phi or psi."""
    return _BACKBONE.fullmatch(name) is not None
