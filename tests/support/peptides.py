"""Molecules of residues with any atoms and bonds, without a force field."""

import numpy as np
import openmm
import openmm.app as app

from openmm_tsf.systems.molecule import MolecularSystem

ALANINE = "N-H N-CA CA-HA CA-C C-O CA-CB"
CYSTEINE = f"{ALANINE} CB-SG"
CAPS = {"ACE": "CH3-C C-O", "FOR": "C-O", "NME": "N-H N-C", "NH2": "N-H1 N-H2"}

Residue = tuple[str, str]
Site = tuple[int, str]


def topology_of(
    residues: list[Residue], links: list[tuple[Site, Site]], new_chains: tuple[int, ...] = ()
) -> app.Topology:
    """Return residues, a name and the bonds ``A-B`` of each, and bonds between them.

    A link is between two atoms, each a residue's index and a name. A chain begins at the residues
    `new_chains`. Atoms are listed in the order in which their bonds mention them.
    """
    topology, sites = app.Topology(), {}
    chain = topology.addChain()
    for index, (name, bonds) in enumerate(residues):
        if index in new_chains:
            chain = topology.addChain()
        residue = topology.addResidue(name, chain)
        pairs = [bond.split("-") for bond in bonds.split()]
        for label in dict.fromkeys(label for pair in pairs for label in pair):
            element = app.Element.getBySymbol(label[0])
            sites[index, label] = topology.addAtom(label, element, residue)
        for first, second in pairs:
            topology.addBond(sites[index, first], sites[index, second])
    for first, second in links:
        topology.addBond(sites[first], sites[second])
    return topology


def strand(first: int, last: int) -> list[tuple[Site, Site]]:
    """Return the peptide bonds of residues `first` to `last`."""
    return [((k, "C"), (k + 1, "N")) for k in range(first, last)]


def ring(n_residues: int) -> app.Topology:
    """Return a head-to-tail cyclic peptide of alanines."""
    closing = ((n_residues - 1, "C"), (0, "N"))
    return topology_of([("ALA", ALANINE)] * n_residues, [*strand(0, n_residues - 1), closing])


def molecule_of(topology: app.Topology, seed: int = 0) -> MolecularSystem:
    """Return a molecule with the masses of its elements, no Forces and random positions."""
    rng, system, positions = np.random.default_rng(seed), openmm.System(), []
    for atom in topology.atoms():
        system.addParticle(12.0 if atom.element is None else atom.element.mass)
        while True:  # all bonds are shorter than 0.5 nm
            x = rng.uniform(-0.14, 0.14, 3)
            if all(np.linalg.norm(x - other) > 0.04 for other in positions):
                break
        positions.append(x)
    return MolecularSystem(system, topology, np.array(positions))
