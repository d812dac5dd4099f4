"""Molecules for the tests, built offline from what OpenMM and openmmtools ship."""

import random
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit

from openmm_tsf.systems.library import alanine_dipeptide

Molecule = tuple[app.Topology, np.ndarray]


@cache
def dihydrofolate_reductase() -> app.PDBFile:
    """Return the protein of the JAC benchmark, without its water."""
    spec = find_spec("openmmtools")  # importing it would take seconds
    path = Path(spec.origin).parent / "data" / "dhfr" / "system.pdb"
    protein, _, _ = path.read_text().partition("\nTER")
    return app.PDBFile(StringIO(protein + "\nTER\nEND\n"))


@cache
def alanine() -> Molecule:
    """Return alanine dipeptide: topology and positions in nm."""
    molecule = alanine_dipeptide()
    return molecule.topology, molecule.positions


@cache
def force_field(*names: str) -> app.ForceField:
    """Return a force field of OpenMM, read once."""
    return app.ForceField(*names)


def with_hydrogens(
    topology: app.Topology, positions: np.ndarray, forces: app.ForceField
) -> Molecule:
    """Return the heavy atoms of a molecule with the hydrogens of a force field, relaxed."""
    modeller = app.Modeller(topology, positions * unit.nanometer)
    modeller.delete([a for a in topology.atoms() if a.element is app.element.hydrogen])
    state = random.getstate()
    random.seed(1)  # of the positions from which addHydrogens starts
    modeller.addHydrogens(forces, platform=openmm.Platform.getPlatform("Reference"))
    random.setstate(state)
    return modeller.topology, np.array(modeller.positions.value_in_unit(unit.nanometer))


@cache
def capped_stretch(first: int, n_residues: int) -> Molecule:
    """Return residues of the protein from number `first`, capped with ACE and NME.

    CA, C, O of the residue before become ACE, N and CA of the one after NME.
    """
    pdb = dihydrofolate_reductase()
    residues = list(pdb.topology.residues())[first - 1 : first + n_residues + 1]
    caps = {
        0: ("ACE", {"CA": "CH3", "C": "C", "O": "O"}),
        n_residues + 1: ("NME", {"N": "N", "CA": "C"}),
    }
    xyz = np.array(pdb.positions.value_in_unit(unit.nanometer))
    topology, positions = app.Topology(), []
    chain = topology.addChain()
    for k, residue in enumerate(residues):
        name, labels = caps.get(k, (residue.name, None))
        new = topology.addResidue(name, chain)
        for atom in residue.atoms():
            label = atom.name if labels is None else labels.get(atom.name)
            if label is not None and atom.element is not app.element.hydrogen:
                topology.addAtom(label, atom.element, new)
                positions.append(xyz[atom.index])
    topology.createStandardBonds()
    return with_hydrogens(topology, np.array(positions), force_field("amber14/protein.ff14SB.xml"))


def capped(residue_name: str) -> Molecule:
    """Return ACE-X-NME with X cut out of a protein: topology and positions in nm."""
    residues = dihydrofolate_reductase().topology.residues()
    index = next(i for i, r in enumerate(residues) if r.name == residue_name and i > 0)
    return capped_stretch(index, 1)


@cache
def protein_piece(first: int = 20, last: int = 44) -> Molecule:
    """Return residues `first` to `last` of the protein: uncapped, connected, not relaxed."""
    pdb = dihydrofolate_reductase()
    modeller = app.Modeller(pdb.topology, pdb.positions)
    residues = list(pdb.topology.residues())
    modeller.delete([r for r in residues if not first <= r.index < last])
    return modeller.topology, np.array(modeller.positions.value_in_unit(unit.nanometer))


def graph_molecule(
    bonds: list[tuple[int, int]], positions: np.ndarray, elements: Sequence[str] | None = None
) -> Molecule:
    """Return a molecule of given bonds; a symbol per atom (* for no element), carbon by default."""
    symbols = elements or "C" * len(positions)
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    atoms = [
        topology.addAtom(f"{symbol}{i}", _element(symbol), residue)
        for i, symbol in enumerate(symbols)
    ]
    for i, j in bonds:
        topology.addBond(atoms[i], atoms[j])
    return topology, positions


def _element(symbol: str) -> app.Element | None:
    return None if symbol == "*" else app.element.get_by_symbol(symbol)


def random_tree(n_atoms: int, seed: int, n_rings: int = 0) -> Molecule:
    """Return a random tree of at most four bonds per atom in about tetrahedral directions.

    `n_rings` further bonds close rings of any length (of bonds of any length).
    """
    rng = np.random.default_rng(seed)
    tetrahedron = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3)
    slots = [list(tetrahedron @ random_rotation(rng))]
    xyz, bonds, degree = [np.zeros(3)], [], [0]
    while len(xyz) < n_atoms:
        parent = int(rng.choice([atom for atom, free in enumerate(slots) if free]))
        direction = slots[parent].pop() + rng.normal(scale=0.08, size=3)
        direction /= np.linalg.norm(direction)
        bonds.append((parent, len(xyz)))
        xyz.append(xyz[parent] + rng.uniform(0.1, 0.16) * direction)
        slots.append(list(_without_one_towards(tetrahedron @ random_rotation(rng), -direction)))
        degree[parent] += 1
        degree.append(1)
    for _ in range(n_rings):
        i, j = (int(atom) for atom in rng.choice(n_atoms, size=2, replace=False))
        if max(degree[i], degree[j]) < 4 and (i, j) not in bonds and (j, i) not in bonds:
            bonds.append((i, j))
            degree[i] += 1
            degree[j] += 1
    return graph_molecule(bonds, np.array(xyz))


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """Return a uniformly random proper rotation [3, 3]."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diagonal(r))
    return q * np.sign(np.linalg.det(q))


def _without_one_towards(directions: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return three of a tetrahedron's directions, rotated so that the other is `target`."""
    one = directions[0]
    axis, cosine = np.cross(one, target), one @ target
    matrix = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    rotation = np.eye(3) + matrix + matrix @ matrix / (1.0 + cosine)
    return directions[1:] @ rotation.T


@cache
def disulfide() -> Molecule:
    """Return two capped cysteines joined by a disulfide: two chains, one molecule."""
    topology, xyz = capped("CYS")
    modeller = app.Modeller(topology, xyz * unit.nanometer)
    modeller.delete([atom for atom in topology.atoms() if atom.name == "HG"])
    half, xyz = modeller.topology, modeller.positions.value_in_unit(unit.nanometer)
    xyz = np.array(xyz)
    sulphur = next(a.index for a in half.atoms() if a.name == "SG")
    rotated = (xyz - xyz[sulphur]) @ random_rotation(np.random.default_rng(1)).T
    outward = xyz[sulphur] - xyz.mean(axis=0)
    rotated += xyz[sulphur] + 0.205 * outward / np.linalg.norm(outward)
    modeller.add(half, rotated * unit.nanometer)
    first, second = (a for a in modeller.topology.atoms() if a.name == "SG")
    modeller.topology.addBond(first, second)
    return modeller.topology, np.array(modeller.positions.value_in_unit(unit.nanometer))
