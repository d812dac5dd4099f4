"""Checks that a System, a Topology and positions are of one molecule, in one order, in nm."""

from collections.abc import Iterable
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit
from scipy.spatial import KDTree  # type: ignore[import-untyped]

from openmm_tsf.utils.topology import atom_label, bonds_of, neighbours_of

#: Atoms closer than this (nm) overlap: the shortest bond, of H2, is 0.074 nm.
MIN_DISTANCE = 0.03
#: Longest bond (nm) where the System gives no length; those of molecules are below 0.4.
MAX_BOND = 0.5
#: Largest factor between a bond and its reference length in one conformation.
MAX_STRETCH = 2.0
#: Advice in errors about positions.
POSITIONS_HINT = (
    "lengths are in nm (not Angstrom), atoms in the Topology's order, and a molecule must not be "
    "broken across a periodic box"
)

#: Masses (amu) closer than this are of the same element.
_MASS_TOLERANCE = 0.05

#: Forces without bond terms; others may contain some, as CustomCVForce does.
_WITHOUT_BONDS = (
    openmm.CMAPTorsionForce,
    openmm.CMMotionRemover,
    openmm.CustomAngleForce,
    openmm.CustomExternalForce,
    openmm.CustomGBForce,
    openmm.CustomNonbondedForce,
    openmm.CustomTorsionForce,
    openmm.GBSAOBCForce,
    openmm.HarmonicAngleForce,
    openmm.NonbondedForce,
    openmm.PeriodicTorsionForce,
    openmm.RBTorsionForce,
)

#: Elements of ions in solutions.
_IONS = frozenset({
    "Li", "Na", "K", "Rb", "Cs", "Mg", "Ca", "Sr", "Ba", "Mn", "Fe", "Co", "Ni", "Cu", "Zn", "Cd",
    "F", "Cl", "Br", "I",
})  # fmt: skip

#: Names of water and ions in the files of Amber, CHARMM, GROMACS and the PDB, without charges.
_WATER_NAMES = frozenset({
    "HOH", "WAT", "H2O", "SOL", "DOD", "D2O", "SPC", "SPCE", "TIP", "TIP2", "TIP3", "TIP4", "TIP5",
    "TIP3P", "TIP4P", "TIP5P", "T3P", "T4P", "T4E", "TP3", "TP4", "TP5", "OPC", "OPC3", "SWM4",
    "W", "WN", "PW",
})  # fmt: skip
_ION_NAMES = frozenset({
    "NA", "NA1", "SOD", "CIO", "K", "K1", "POT", "LI", "LIT", "RB", "RUB", "CS", "CES", "MG", "MG2",
    "CA", "CA2", "CAL", "ZN", "ZN2", "MN", "MN2", "FE", "FE2", "CU", "CU2", "BA", "BA2", "BAR",
    "SR", "CD", "CD2", "CL", "CLA", "CL1", "F", "BR", "I", "IOD", "IB", "IM", "IP",
})  # fmt: skip

Pair = tuple[int, int]


def check_no_solvent(topology: app.Topology, argument: str = "topology") -> None:
    """Refuse (ValueError) a Topology with water or ions beside its molecule.

    Water and ions are known by their elements and bonds, whatever their names: a fragment of one O
    and two H (or of O alone, as in crystals), or of one metal or halogen. One that is the only
    fragment is a molecule. Atoms of a residue without any bonds count as one fragment.
    """
    fragments = _fragments(topology)
    kinds = [_solvent_kind(atoms) for atoms in fragments]
    n_water, n_ions = kinds.count("water"), kinds.count("ion")
    if len(fragments) < 2 or not n_water + n_ions:
        return
    first = next(atoms[0] for atoms, kind in zip(fragments, kinds, strict=True) if kind)
    raise ValueError(
        f"{argument}: expected one molecule without explicit solvent, got {n_water} water "
        f"molecules and {n_ions} ions among {len(fragments)} fragments (the first is "
        f"{atom_label(first)}); "
        "strip them (openmm.app.Modeller has delete and deleteWater, mdtraj's Trajectory "
        "remove_solvent; from a prmtop, cpptraj and ParmEd), and use an implicit solvent instead: "
        "implicit_solvent='OBC2' (--implicit-solvent OBC2), or implicit/obc2.xml among the files "
        "of the force field, with nonbondedMethod=NoCutoff"
    )


def _fragments(topology: app.Topology) -> list[list[app.topology.Atom]]:
    """Return atoms that bonds connect, or a residue without bonds."""
    neighbours = neighbours_of(topology)
    for residue in topology.residues():
        members = [atom.index for atom in residue.atoms()]
        if not any(neighbours[atom] for atom in members):
            for first, second in pairwise(members):
                neighbours[first].append(second)
                neighbours[second].append(first)
    atoms, fragments, seen = list(topology.atoms()), [], set()
    for start in range(len(atoms)):
        fragment, stack = [], [start]
        while stack:
            atom = stack.pop()
            if atom not in seen:
                seen.add(atom)
                fragment.append(atoms[atom])
                stack.extend(neighbours[atom])
        if fragment:
            fragments.append(fragment)
    return fragments


def _solvent_kind(atoms: list[app.topology.Atom]) -> str | None:
    """Return whether a fragment is "water" or an "ion"; virtual sites have no element.

    Names decide where no atom has an element, and for single atoms, whose elements are guessed from
    their names in some formats (SOD as sulfur).
    """
    symbols = sorted(atom.element.symbol for atom in atoms if atom.element is not None)
    name = atoms[0].residue.name.upper()
    if not symbols and name in _WATER_NAMES:
        return "water"
    if len(atoms) == 1 and name.rstrip("+-") in _ION_NAMES:
        return "ion"
    if symbols == ["O"] or [s.replace("D", "H") for s in symbols] == ["H", "H", "O"]:
        return "water"
    return "ion" if len(symbols) == 1 and symbols[0] in _IONS else None


def check_same_molecule(system: openmm.System, topology: app.Topology) -> None:
    """Refuse (ValueError) a Topology whose bonds or order of atoms are not the System's.

    A System with bond terms (and no Force that may contain others) must have one for every bond,
    or a constraint;
    a System with the masses of the Topology's elements must have them in the same order.
    Additional terms (Urey-Bradley) and other masses (hydrogen mass repartitioning) are accepted.
    """
    terms = _bond_terms(system)
    bonds = [_pair(first.index, second.index) for first, second in topology.bonds()]
    missing = [pair for pair in bonds if pair not in terms]
    if terms and missing:
        first, second = missing[0]
        raise ValueError(
            "topology: expected the System's bonds in the System's order of atoms, but for "
            f"{len(missing)} of {len(bonds)} bonds the System has no term; the first is between "
            f"{pair_label(topology, missing[0])} (atoms {first} and {second})"
        )
    _check_masses(system, list(topology.atoms()))


def pair_label(topology: app.Topology, pair: Iterable[Any]) -> str:
    """Return the names of two atoms for messages, e.g. ``ALA2-N and ALA2-CA``."""
    atoms = list(topology.atoms())
    return " and ".join(atom_label(atoms[int(atom)]) for atom in pair)


def _pair(first: int, second: int) -> Pair:
    return (first, second) if first < second else (second, first)


def _bond_terms(system: openmm.System) -> dict[Pair, float]:
    """Return pairs in bond terms or constraints with their length in nm, 0 where it is not known.

    Empty also if a Force may contain bonds that cannot be listed.
    """
    terms: dict[Pair, float] = {}
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            for index in range(force.getNumBonds()):
                first, second, length, _ = force.getBondParameters(index)
                terms[_pair(first, second)] = length.value_in_unit(unit.nanometer)
        elif isinstance(force, (openmm.CustomBondForce, openmm.CustomCompoundBondForce)):
            for index in range(force.getNumBonds()):
                *atoms, _ = force.getBondParameters(index)  # two numbers, or one list of them
                particles = atoms[0] if len(atoms) == 1 else atoms
                for first, second in combinations(particles, 2):
                    terms.setdefault(_pair(first, second), 0.0)
        elif not isinstance(force, _WITHOUT_BONDS):
            return {}
    for index in range(system.getNumConstraints()):
        first, second, length = system.getConstraintParameters(index)
        terms[_pair(first, second)] = length.value_in_unit(unit.nanometer)
    return terms


def rest_lengths(system: openmm.System, bonds: np.ndarray) -> np.ndarray:
    """Rest lengths of bonds [n, 2] in nm; 0 where the System has none."""
    terms = _bond_terms(system)
    return np.array([terms.get(_pair(int(i), int(j)), 0.0) for i, j in bonds])


def force_constants(system: openmm.System, bonds: np.ndarray) -> np.ndarray:
    """Force constants of bonds [n, 2] in kJ/(mol nm^2), summed over harmonic terms; 0 without."""
    known: dict[Pair, float] = {}
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            for index in range(force.getNumBonds()):
                first, second, _, constant = force.getBondParameters(index)
                value = constant.value_in_unit(unit.kilojoule_per_mole / unit.nanometer**2)
                pair = _pair(first, second)
                known[pair] = known.get(pair, 0.0) + value
    return np.array([known.get(_pair(int(i), int(j)), 0.0) for i, j in bonds])


def _check_masses(system: openmm.System, atoms: list[app.topology.Atom]) -> None:
    if any(atom.element is None for atom in atoms):
        return
    masses = [system.getParticleMass(i).value_in_unit(unit.amu) for i in range(len(atoms))]
    expected = np.array([atom.element.mass.value_in_unit(unit.amu) for atom in atoms])
    is_permuted = np.allclose(np.sort(masses), np.sort(expected), rtol=0, atol=_MASS_TOLERANCE)
    wrong = np.flatnonzero(np.abs(masses - expected) > _MASS_TOLERANCE)
    if is_permuted and len(wrong):
        atom = atoms[wrong[0]]
        raise ValueError(
            "topology: expected the elements in the order of the System's masses, but "
            f"{len(wrong)} atoms have another's; the first is {atom_label(atom)} (atom "
            f"{atom.index}), {atom.element.symbol} with a mass of {masses[wrong[0]]:g} amu"
        )


def check_reference(system: openmm.System, topology: app.Topology, positions: np.ndarray) -> None:
    """Refuse (ValueError) a conformation [N, 3] (nm) with overlapping atoms or too long bonds."""
    bonds = bonds_of(topology)
    rest = rest_lengths(system, bonds)
    limits = np.where(rest > 0, MAX_STRETCH * rest, MAX_BOND)
    lengths = np.linalg.norm(positions[bonds[:, 0]] - positions[bonds[:, 1]], axis=1)
    long = np.flatnonzero(lengths > limits)
    if len(long):
        raise ValueError(
            f"positions: expected bonds of at most {limits[long[0]]:.3g} nm, but "
            f"{pair_label(topology, bonds[long[0]])} are bonded at {lengths[long[0]]:.4g} nm "
            f"({len(long)} of {len(bonds)} bonds are too long); {POSITIONS_HINT}"
        )
    pairs = KDTree(positions).query_pairs(MIN_DISTANCE, output_type="ndarray")
    if len(pairs):
        distance = np.linalg.norm(positions[pairs[0, 0]] - positions[pairs[0, 1]])
        raise ValueError(
            f"positions: expected atoms at least {MIN_DISTANCE} nm apart, but "
            f"{pair_label(topology, pairs[0])} are at {distance:.4g} nm ({len(pairs)} pairs are "
            f"too close); {POSITIONS_HINT}"
        )
