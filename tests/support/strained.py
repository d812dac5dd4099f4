"""Small rings and linear groups: geometries, and Systems that are harmonic about them."""

from itertools import combinations

import numpy as np
import openmm

from openmm_tsf.systems.molecule import MolecularSystem
from tests.support.molecules import Molecule, graph_molecule

#: Carbon skeleton's bonds, hydrogens per carbon (in the order of atoms), positions in 1e-4 nm.
RINGS = {
    "cyclopropane": (
        [(0, 1), (1, 2), (2, 0)],
        [2, 2, 2],
        "-752 335 308 -17 -611 -633 770 275 325 -1250 -122 1139 -1183 1206 -144 -61 -1651 "
        "-381 6 -323 -1665 1211 -219 1167 1278 1109 -116",
    ),
    "spiropentane": (
        [(0, 1), (0, 2), (1, 2), (0, 3), (0, 4), (3, 4)],
        [0, 2, 2, 2, 2],
        "0 0 0 775 0 1292 -775 0 1292 0 775 -1292 0 -775 -1292 1255 927 1526 1255 -927 1526 "
        "-1255 927 1526 -1255 -927 1526 927 1255 -1526 -927 1255 -1526 927 -1255 -1526 -927 "
        "-1255 -1526",
    ),
    "housane": (
        [(0, 1), (0, 2), (1, 2), (0, 3), (1, 4), (3, 4)],
        [1, 1, 2, 2, 2],
        "105 -721 -607 563 708 -285 1486 -470 -31 -1125 -516 265 -671 900 584 -16 -831 -1667 "
        "658 1270 -1194 1609 -741 997 2305 -579 -712 -1126 -1167 1115 -2041 -557 -290 -1330 "
        "1657 210 -416 1046 1614",
    ),
    "quadricyclane": (
        [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5), (1, 4), (2, 5), (0, 6), (3, 6)],
        [1, 1, 1, 1, 1, 1, 2],
        "-749 -920 569 -989 577 547 -996 -222 -754 1311 91 -63 319 1220 145 312 420 -1156 765 "
        "-1128 689 -1513 -1557 964 -1926 1084 663 -1936 -93 -1251 2341 335 -218 467 2258 -71 "
        "457 1082 -1986 1072 -1113 1714 1064 -2037 210",
    ),
}


def ring(name: str) -> Molecule:
    """Return a molecule with small rings: topology and positions in nm."""
    bonds, hydrogens, numbers = RINGS[name]
    owners = [carbon for carbon, n in enumerate(hydrogens) for _ in range(n)]
    n_carbons = len(hydrogens)
    bonds = [*bonds, *((carbon, n_carbons + i) for i, carbon in enumerate(owners))]
    positions = np.array(numbers.split(), dtype=float).reshape(-1, 3) * 1e-4
    return graph_molecule(bonds, positions, "C" * n_carbons + "H" * len(owners))


#: Atoms in line, and the hydrogens at their ends: three (tetrahedral), two (trigonal), one (bent).
LINEAR = {
    "propyne": ("CCCH", 3, 0),
    "butyne": ("CCCC", 3, 3),
    "pentadiyne": ("CCCCCH", 3, 0),
    "allene": ("CCC", 2, 2),
    "butatriene": ("CCCC", 2, 2),
    "ketene": ("CCO", 2, 0),
    "diazomethane": ("CNN", 2, 0),
    "hydrazoic acid": ("NNN", 1, 0),
    "methyl isocyanide": ("CNC", 3, 0),
    "methyl isothiocyanate": ("CNCS", 3, 0),
    "nitrile oxide": ("CCNO", 3, 0),
}


def linear(name: str) -> Molecule:
    """Return a molecule with a linear group at exactly 180 degrees: topology, positions in nm."""
    line, *ends = LINEAR[name]
    bonds = [(i, i + 1) for i in range(len(line) - 1)]
    positions = [np.array([0.12 * i, 0.0, 0.0]) for i in range(len(line))]
    elements = line
    for atom, outwards, turn, n in ((0, -1, 0.0, ends[0]), (len(line) - 1, 1, 0.4, ends[1])):
        for k in range(n):
            angle = turn + 2 * np.pi * k / n
            side = np.array([0.0, np.cos(angle), np.sin(angle)])
            bonds.append((atom, len(positions)))
            positions.append(positions[atom] + [0.04 * outwards, 0.0, 0.0] + 0.1 * side)
            elements += "H"
    return graph_molecule(bonds, np.array(positions), elements)


def harmonic(molecule: Molecule, k_angle: float = 400.0) -> MolecularSystem:
    """Return a molecule with harmonic bonds and angles at those of its positions."""
    topology, positions = molecule
    system, stretch, bend = openmm.System(), openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    neighbours: list[set[int]] = [set() for _ in positions]
    for atom in topology.atoms():
        system.addParticle(atom.element.mass)
    for first, second in topology.bonds():
        i, j = first.index, second.index
        neighbours[i].add(j)
        neighbours[j].add(i)
        stretch.addBond(i, j, float(np.linalg.norm(positions[i] - positions[j])), 2.5e5)
    for vertex, bonded in enumerate(neighbours):
        for i, j in combinations(sorted(bonded), 2):
            one, other = positions[i] - positions[vertex], positions[j] - positions[vertex]
            angle = np.arctan2(np.linalg.norm(np.cross(one, other)), one @ other)
            bend.addAngle(i, vertex, j, float(angle), k_angle)
    system.addForce(stretch)
    system.addForce(bend)
    return MolecularSystem(system, topology, positions)


def dynamics(molecule: MolecularSystem, kelvin: float, n_frames: int, seed: int = 1) -> np.ndarray:
    """Return frames [F, N, 3] of Langevin dynamics in nm, 20 fs apart."""
    integrator = openmm.LangevinMiddleIntegrator(kelvin, 2, 0.0005)
    integrator.setRandomNumberSeed(seed)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(openmm.XmlSerializer.clone(molecule.system), integrator, platform)
    context.setPositions(molecule.positions)
    context.setVelocitiesToTemperature(kelvin, seed)
    integrator.step(1000)
    frames = []
    for _ in range(n_frames):
        integrator.step(40)
        frames.append(context.getState(getPositions=True).getPositions(asNumpy=True)._value)
    return np.array(frames)
