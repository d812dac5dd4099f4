"""Whether a System, a Topology and positions can be of one molecule, in one order, in nm."""

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit
from scipy.spatial import KDTree  # type: ignore[import-untyped]

from openmm_tsf.utils.topology import atom_label, bonds_of

if TYPE_CHECKING:
    pass

#: Atoms closer than this (nm) overlap: the shortest bond, of H2, is 0.074 nm.
OVERLAP = 0.03
#: Longest bond (nm) where the System gives no length; those of molecules are below 0.4.
LONGEST_BOND = 0.5
#: A bond may be so many times longer or shorter than it should be, in one conformation ...
STRETCH = 2.0
#: ... and in the mean over frames, which is off wherever two atoms have changed places.
MEAN_STRETCH = 1.3
#: Atoms in one block of frames.
_BLOCK = 2**16
#: Masses (amu) closer than this are of the same element.
_MASS_TOLERANCE = 0.05

#: Forces that hold no bonds; those of further kinds may hide some, as CustomCVForce does.
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

_HINT = (
    "lengths are in nm (not Angstrom), atoms in the Topology's order, and a molecule must not be "
    "broken across a periodic box"
)

Pair = tuple[int, int]


def check_same_molecule(system: openmm.System, topology: app.Topology) -> None:
    """Refuse a Topology whose bonds or order of atoms are not the System's.

    As far as the System shows: it must have a term for every bond if it has any (and no Force that
    may hide some), and the elements' masses in the Topology's order if it has those masses at all.
    Further terms (Urey-Bradley) and other masses (hydrogen mass repartitioning) are let pass.

    Raises
    ------
    ValueError
        If they differ.
    """
    atoms = list(topology.atoms())
    terms = _bond_terms(system)
    bonds = [_pair(first.index, second.index) for first, second in topology.bonds()]
    missing = [pair for pair in bonds if pair not in terms]
    if terms and missing:
        first, second = missing[0]
        raise ValueError(
            "topology: expected the System's bonds in the System's order of atoms, but for "
            f"{len(missing)} of {len(bonds)} bonds the System has no term; the first is between "
            f"{atom_label(atoms[first])} and {atom_label(atoms[second])} (atoms {first} and "
            f"{second})"
        )
    _check_masses(system, atoms)


def _pair(first: int, second: int) -> Pair:
    return (first, second) if first < second else (second, first)


def _bond_terms(system: openmm.System) -> dict[Pair, float]:
    """Pairs in bond terms with their rest length in nm, 0 where it is not known.

    Empty as well where a Force may hide further ones.
    """
    terms: dict[Pair, float] = {}
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            for index in range(force.getNumBonds()):
                first, second, length, _ = force.getBondParameters(index)
                terms[_pair(first, second)] = length.value_in_unit(unit.nanometer)
        elif isinstance(force, openmm.CustomBondForce):
            for index in range(force.getNumBonds()):
                first, second, _ = force.getBondParameters(index)
                terms.setdefault(_pair(first, second), 0.0)
        elif isinstance(force, openmm.CustomCompoundBondForce):
            for index in range(force.getNumBonds()):
                particles, _ = force.getBondParameters(index)
                for first, second in combinations(particles, 2):
                    terms.setdefault(_pair(first, second), 0.0)
        elif not isinstance(force, _WITHOUT_BONDS):
            return {}
    return terms


def _rest_lengths(system: openmm.System, bonds: np.ndarray) -> np.ndarray:
    """Of bonds [n, 2], in nm; 0 where the System does not say."""
    terms = _bond_terms(system)
    return np.array([terms.get(_pair(int(i), int(j)), 0.0) for i, j in bonds])


def _check_masses(system: openmm.System, atoms: list[app.topology.Atom]) -> None:
    if any(atom.element is None for atom in atoms):
        return
    own = np.array([system.getParticleMass(i).value_in_unit(unit.amu) for i in range(len(atoms))])
    expected = np.array([atom.element.mass.value_in_unit(unit.amu) for atom in atoms])
    same_set = np.allclose(np.sort(own), np.sort(expected), rtol=0, atol=_MASS_TOLERANCE)
    wrong = np.flatnonzero(np.abs(own - expected) > _MASS_TOLERANCE)
    if same_set and len(wrong):
        atom = atoms[wrong[0]]
        raise ValueError(
            "topology: expected the elements in the order of the System's masses, but "
            f"{len(wrong)} atoms have another's; the first is {atom_label(atom)} (atom "
            f"{atom.index}), {atom.element.symbol} with a mass of {own[wrong[0]]:g} amu"
        )


def check_reference(system: openmm.System, topology: app.Topology, positions: np.ndarray) -> None:
    """Refuse one conformation [N, 3] (nm) with overlapping atoms or bonds far too long.

    Raises
    ------
    ValueError
        If it has some.
    """
    atoms, bonds = list(topology.atoms()), bonds_of(topology)
    rest = _rest_lengths(system, bonds)
    limits = np.where(rest > 0, STRETCH * rest, LONGEST_BOND)
    lengths = np.linalg.norm(positions[bonds[:, 0]] - positions[bonds[:, 1]], axis=1)
    long = np.flatnonzero(lengths > limits)
    if len(long):
        first, second = (atom_label(atoms[atom]) for atom in bonds[long[0]])
        raise ValueError(
            f"positions: expected bonds of at most {limits[long[0]]:.3g} nm, but "
            f"{first} and {second} are bonded at {lengths[long[0]]:.4g} nm ({len(long)} of "
            f"{len(bonds)} bonds are too long); {_HINT}"
        )
    pairs = KDTree(positions).query_pairs(OVERLAP, output_type="ndarray")
    if len(pairs):
        first, second = (atom_label(atoms[atom]) for atom in pairs[0])
        distance = np.linalg.norm(positions[pairs[0, 0]] - positions[pairs[0, 1]])
        raise ValueError(
            f"positions: expected atoms at least {OVERLAP} nm apart, but {first} and {second} "
            f"are at {distance:.4g} nm ({len(pairs)} pairs are too close); {_HINT}"
        )
