"""A zoo of small molecules and odd peptides: System, Topology, positions and hot frames of each.

Geometries are those of zoo.json (made by make_zoo.py). A small molecule's System is harmonic about
its geometry, with torsions, charges and exceptions; every third has implicit solvent. Peptides have
Amber's force field where it has templates, otherwise that of the small molecules.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit

from openmm_tsf.systems.molecule import MolecularSystem
from tests.support.molecules import Molecule, capped, disulfide, graph_molecule
from tests.support.torch_cases import build

_DATA = json.loads(Path(__file__).with_name("zoo.json").read_text())

SMALL: tuple[str, ...] = tuple(_DATA["small"])
#: Of proteins, between an acetyl and an N-methyl group.
RESIDUES = ("ARG", "ASP", "GLY", "ILE", "LYS", "MET", "PHE", "PRO", "THR", "TRP")
#: Names of the backbone dihedrals of each peptide.
PEPTIDES: dict[str, str] = {
    **{f"capped_{name}": "phi psi" for name in (*RESIDUES, "D_SER")},
    **{name: "phi psi" for name in ("hid", "hie", "hip", "primary_amide", "n_methylated")},
    "cystine_ring": "phi2 phi3 psi2 psi3",
    "two_chains": "phi2 phi5 psi2 psi5",
    "zwitterion": "phi2 psi1",
    "amino_acid": "",
    "beta_alanine": "",  # its N and CA are not bonded to each other
    "pyroglutamate": "psi1",
    "lactam": "phi2 phi3 psi2 psi3",
    "cyclo_ala_gly": "phi1 phi2 psi1 psi2",
    "cyclo_pro_gly": "phi1 phi2 psi1 psi2",
    "cyclo_gly3": "phi1 phi2 phi3 psi1 psi2 psi3",
}
#: Residues that Amber's force field does not have.
_WITHOUT_TEMPLATE = {"n_methylated", "amino_acid", "beta_alanine", "pyroglutamate", "lactam"}

_ELECTRONEGATIVITY = {
    "H": 2.2, "D": 2.2, "B": 2.04, "C": 2.55, "N": 3.04, "O": 3.44, "F": 3.98, "Si": 1.9, "P": 2.19,
    "S": 2.58, "Cl": 3.16, "Se": 2.55, "Br": 2.96, "Xe": 2.6, None: 2.5,
}  # fmt: skip
_LINEAR = np.deg2rad(175.0)
#: Elements that have a handedness with four neighbours.
_TETRAHEDRAL = ("B", "C", "N", "Si", "P", "S", None)


@dataclass(frozen=True)
class Specimen:
    """A System, its Topology, positions [N, 3] in nm, and names of its backbone dihedrals."""

    system: openmm.System
    topology: app.Topology
    positions: np.ndarray
    dihedrals: str = ""

    def molecule(self) -> MolecularSystem:
        """Return it as the package takes it."""
        return MolecularSystem(self.system, self.topology, self.positions)


@cache
def specimen(name: str) -> Specimen:
    """Return a molecule of `SMALL` or `PEPTIDES`."""
    if name in SMALL:
        return _small(name)
    topology, positions = _peptide(name)
    if name in _WITHOUT_TEMPLATE:
        system = harmonic_system(topology, positions)
    else:
        system = build(topology, "amber14", "obc2")
    return Specimen(system, topology, positions, PEPTIDES[name])


@cache
def hot_frames(name: str) -> np.ndarray:
    """Return 50 frames [50, N, 3] of Langevin dynamics of a molecule at 600 K.

    A CustomGBForce, a hundred times as slow as the rest, is left out.
    """
    molecule = specimen(name)
    system = openmm.XmlSerializer.clone(molecule.system)
    for index in reversed(range(system.getNumForces())):
        if isinstance(system.getForce(index), openmm.CustomGBForce):
            system.removeForce(index)
    integrator = openmm.LangevinMiddleIntegrator(600.0, 10.0, 0.0005)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPositions(molecule.positions)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0, 50)
    context.setVelocitiesToTemperature(600.0, 1)
    integrator.step(200)
    frames = []
    for _ in range(50):
        integrator.step(20)
        frames.append(context.getState(positions=True).getPositions(asNumpy=True)._value)
    return np.array(frames)


def neighbours_of(topology: app.Topology) -> list[list[int]]:
    """Return the atoms that each atom is bonded to."""
    neighbours: list[list[int]] = [[] for _ in topology.atoms()]
    for first, second in topology.bonds():
        neighbours[first.index].append(second.index)
        neighbours[second.index].append(first.index)
    return neighbours


def volumes(x: np.ndarray, specimen: Specimen) -> np.ndarray:
    """Return the volumes [F, C, 4] that unit bonds span, of all four triples at each centre."""
    neighbours = neighbours_of(specimen.topology)
    triples = [
        [(atom.index, *triple) for triple in combinations(neighbours[atom.index], 3)]
        for atom in specimen.topology.atoms()
        if len(neighbours[atom.index]) == 4
        and (atom.element and atom.element.symbol) in _TETRAHEDRAL
    ]
    atoms = np.array(triples, dtype=int).reshape(-1, 4, 4)
    bonds = x[:, atoms[..., 1:]] - x[:, atoms[..., :1]]
    return np.linalg.det(bonds / np.linalg.norm(bonds, axis=-1, keepdims=True))


def has_inverted_centre(x: np.ndarray, specimen: Specimen) -> np.ndarray:
    """Return whether all four triples of any centre have turned their sign, [F]."""
    signs = np.sign(volumes(specimen.positions[None], specimen))
    return (volumes(x, specimen) * signs < 0).all(axis=-1).any(axis=-1)


def _bonds(entry: Mapping[str, Any]) -> list[tuple[int, int]]:
    pairs = (pair.split("-") for pair in entry["bonds"].split())
    return [(int(i), int(j)) for i, j in pairs]


def _positions(entry: Mapping[str, Any]) -> np.ndarray:
    return np.array(entry["positions"]).reshape(-1, 3) / 10_000


def _small(name: str) -> Specimen:
    entry = _DATA["small"][name]
    molecule = graph_molecule(_bonds(entry), _positions(entry), entry["elements"].split())
    system = harmonic_system(*molecule)
    if SMALL.index(name) % 3 == 0:
        system.addForce(implicit_solvent(molecule[0]))
    return Specimen(system, *molecule)


def _peptide(name: str) -> Molecule:
    if name == "two_chains":
        return disulfide()
    if name.startswith("capped_D_"):
        topology, positions = capped(name.removeprefix("capped_D_"))
        return topology, positions * [1.0, 1.0, -1.0]
    if name.startswith("capped_"):
        return capped(name.removeprefix("capped_"))
    entry = _DATA["peptides"][name]
    topology = app.Topology()
    chain = topology.addChain()
    residues: dict[str, app.topology.Residue] = {}
    atoms = []
    labels = zip(entry["atoms"].split(), entry["elements"].split(), strict=True)
    for label, symbol in labels:
        residue, atom = label.split(":")
        if residue not in residues:
            residues[residue] = topology.addResidue(residue.rstrip("0123456789"), chain)
        element = app.element.get_by_symbol(symbol)
        atoms.append(topology.addAtom(atom, element, residues[residue]))
    for i, j in _bonds(entry):
        topology.addBond(atoms[i], atoms[j])
    return topology, _positions(entry)


def harmonic_system(topology: app.Topology, positions: np.ndarray) -> openmm.System:
    """Return a System of bonds, angles, torsions and charges that keeps a geometry."""
    neighbours = neighbours_of(topology)
    system = openmm.System()
    for atom in topology.atoms():
        system.addParticle(15.0 if atom.element is None else atom.element.mass)
    for force in (
        _bond_force(topology, positions),
        _angle_force(neighbours, positions),
        _torsion_force(topology, neighbours, positions),
        charges_and_sizes(topology),
    ):
        system.addForce(force)
    return system


def _bond_force(topology: app.Topology, x: np.ndarray) -> openmm.Force:
    force = openmm.HarmonicBondForce()
    for i, j in ((first.index, second.index) for first, second in topology.bonds()):
        force.addBond(i, j, float(np.linalg.norm(x[i] - x[j])), 2.5e5)
    return force


def _angle_force(neighbours: Sequence[Sequence[int]], x: np.ndarray) -> openmm.Force:
    force = openmm.HarmonicAngleForce()
    for vertex, bonded in enumerate(neighbours):
        for i, j in combinations(bonded, 2):
            angle = angle_of(x, i, vertex, j)
            force.addAngle(i, vertex, j, np.pi if angle > _LINEAR else angle, 400.0)
    return force


def _torsion_force(
    topology: app.Topology, neighbours: Sequence[Sequence[int]], x: np.ndarray
) -> openmm.Force:
    """Threefold about single bonds, stiff where the geometry is planar; planar centres too."""
    force = openmm.PeriodicTorsionForce()
    for i, j in ((first.index, second.index) for first, second in topology.bonds()):
        for a, b in ((a, b) for a in neighbours[i] for b in neighbours[j]):
            if len({a, i, j, b}) < 4 or max(angle_of(x, a, i, j), angle_of(x, i, j, b)) > _LINEAR:
                continue
            is_planar = max(len(neighbours[i]), len(neighbours[j])) < 4 and (
                abs(np.sin(dihedral_of(x, a, i, j, b))) < 0.1
            )
            force.addTorsion(a, i, j, b, *((2, np.pi, 10.0) if is_planar else (3, 0.0, 0.6)))
    for centre, bonded in enumerate(neighbours):
        if len(bonded) == 3:
            i, j, k = bonded
            if abs(np.sin(dihedral_of(x, i, j, centre, k))) < 0.1:
                force.addTorsion(i, j, centre, k, 2, np.pi, 10.0)
    return force


def charges_and_sizes(topology: app.Topology) -> openmm.NonbondedForce:
    """Return charges by differences of electronegativity, with 1-4 exceptions as in Amber."""
    symbols = [None if a.element is None else a.element.symbol for a in topology.atoms()]
    force = openmm.NonbondedForce()
    charges = np.zeros(len(symbols))
    bonds = [(first.index, second.index) for first, second in topology.bonds()]
    for i, j in bonds:
        difference = _ELECTRONEGATIVITY[symbols[i]] - _ELECTRONEGATIVITY[symbols[j]]
        charges[[i, j]] += -0.12 * difference, 0.12 * difference
    for symbol, charge in zip(symbols, charges, strict=True):
        size = (0.11, 0.06) if symbol in ("H", "D") else (0.32, 0.4)
        force.addParticle(float(charge), *size)
    force.createExceptionsFromBonds(bonds, 1 / 1.2, 0.5)
    return force


def implicit_solvent(topology: app.Topology) -> openmm.GBSAOBCForce:
    """Return implicit solvent for the charges of `charges_and_sizes`."""
    pairs, force = charges_and_sizes(topology), openmm.GBSAOBCForce()
    for index in range(pairs.getNumParticles()):
        charge, size, _ = pairs.getParticleParameters(index)
        is_hydrogen = size < 0.2 * unit.nanometer
        force.addParticle(charge, *((0.12, 0.85) if is_hydrogen else (0.17, 0.75)))
    return force


def angle_of(x: np.ndarray, i: int, vertex: int, j: int) -> float:
    """Return an angle of x [N, 3] in radians."""
    one, two = x[i] - x[vertex], x[j] - x[vertex]
    return float(np.arctan2(np.linalg.norm(np.cross(one, two)), one @ two))


def dihedral_of(x: np.ndarray, a: int, b: int, c: int, d: int) -> float:
    """Return a dihedral angle of x [N, 3] in radians."""
    first, axis, last = x[b] - x[a], x[c] - x[b], x[d] - x[c]
    normals = np.cross(first, axis), np.cross(axis, last)
    sine = np.linalg.norm(axis) * (first @ normals[1])
    return float(np.arctan2(sine, normals[0] @ normals[1]))
