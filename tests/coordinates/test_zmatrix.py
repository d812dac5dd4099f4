"""The Z-matrix: which atoms, in which order, relative to which."""

import json
from collections import Counter

import mdtraj
import numpy as np
import openmm.app as app
import openmm.unit as unit
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from openmm_tsf.coordinates import ZMatrix
from tests.support import molecules
from tests.support.molecules import alanine, capped, graph_molecule, random_tree

PEPTIDES = {
    "alanine": alanine,
    "proline": lambda: capped("PRO"),
    "tryptophan": lambda: capped("TRP"),
    "disulfide": molecules.disulfide,
    "protein": molecules.protein_piece,
}


def check_structure(zmatrix: ZMatrix, topology: app.Topology) -> None:
    """What every Z-matrix must satisfy."""
    rows, n_atoms = zmatrix.rows, topology.getNumAtoms()
    bonded: set[frozenset[int]] = {frozenset((a.index, b.index)) for a, b in topology.bonds()}
    assert sorted(rows[:, 0]) == list(range(n_atoms))
    assert (rows[:3] == -1).sum() == 6
    level_of = {int(row[0]): int(level) for row, level in zip(rows, zmatrix.levels, strict=True)}
    for row, sibling, level in zip(rows, zmatrix.siblings, zmatrix.levels, strict=True):
        partners = [int(atom) for atom in row[1:] if atom >= 0]
        assert len({int(row[0]), *partners}) == len(partners) + 1
        if partners:
            assert frozenset((int(row[0]), partners[0])) in bonded
        if len(partners) > 1:
            assert frozenset(partners[:2]) in bonded
        if len(partners) > 2:
            attached_to = partners[0] if sibling else partners[1]
            assert frozenset((partners[2], attached_to)) in bonded
        # The same level only for siblings, which rotate with a primary torsion of it.
        assert all(level_of[atom] <= level for atom in partners)
    # Every tree bond with substituents at both ends has exactly one primary torsion.
    tree = [tuple(int(atom) for atom in row[:2]) for row in rows[1:]]
    degree = Counter(atom for bond in tree for atom in bond)
    inner = {frozenset(bond) for bond in tree if degree[bond[0]] > 1 and degree[bond[1]] > 1}
    primary = Counter(frozenset((int(r[1]), int(r[2]))) for r in rows[3:][~zmatrix.siblings[3:]])
    assert set(primary) == inner
    assert set(primary.values()) <= {1}


def primary_quartets(zmatrix: ZMatrix) -> set[tuple[int, ...]]:
    quartets = {tuple(map(int, row)) for row in zmatrix.rows[3:][~zmatrix.siblings[3:]]}
    return quartets | {quartet[::-1] for quartet in quartets}


@pytest.mark.parametrize("name", PEPTIDES)
def test_phi_psi_and_omega_are_primary_torsions(name):
    topology, positions = PEPTIDES[name]()
    zmatrix = ZMatrix.from_topology(topology, positions)
    check_structure(zmatrix, topology)
    n_rings = topology.getNumBonds() - topology.getNumAtoms() + 1
    assert n_rings == {"proline": 1, "tryptophan": 2}.get(name, n_rings)
    frame = mdtraj.Trajectory(positions[None], mdtraj.Topology.from_openmm(topology))
    dihedrals = [mdtraj.compute_phi(frame)[0], mdtraj.compute_psi(frame)[0]]
    if name in ("alanine", "protein"):  # mdtraj has no omega of caps
        dihedrals.append(mdtraj.compute_omega(frame)[0])
    expected = {tuple(quartet) for quartet in np.concatenate(dihedrals).tolist()}
    assert len(expected) >= 2
    assert expected <= primary_quartets(zmatrix)


def test_alanine_in_detail():
    topology, positions = alanine()
    atoms = {f"{a.residue.name} {a.name}": a.index for a in topology.atoms()}
    zmatrix = ZMatrix.from_topology(topology, positions)
    first = [atoms[k] for k in ("ACE CH3", "ACE C", "ALA N", "ALA CA")]
    second = [atoms[k] for k in ("ALA CA", "ALA C", "NME N", "NME C")]
    assert {tuple(first), tuple(second)} <= primary_quartets(zmatrix)  # omegas of the caps
    root = [zmatrix.atom_names[row[0]].split("-")[1] for row in zmatrix.rows[:3]]
    assert root == ["N", "CA", "C"]
    assert (~zmatrix.siblings[3:]).sum() == 7  # phi, psi, two omegas, three methyls
    assert zmatrix.levels.max() == 3
    # CA has two offsets, each methyl two; planar N and C have none.
    assert zmatrix.tetrahedral.sum() == 8
    hydrogens = {a.index for a in topology.atoms() if a.element.symbol == "H"}
    assert not hydrogens & set(zmatrix.rows[:, 1:3].ravel().tolist())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(n_atoms=st.integers(4, 30), seed=st.integers(0, 10**6), n_rings=st.integers(0, 3))
def test_random_graphs(n_atoms, seed, n_rings):
    topology, positions = random_tree(n_atoms, seed, n_rings)
    try:
        zmatrix = ZMatrix.from_topology(topology, positions)
    except ValueError:
        if n_rings == 0:
            raise
        assume(False)  # bonds across the tree may lie in line with others
    check_structure(zmatrix, topology)


@pytest.mark.parametrize(
    ("bonds", "elements"),
    [
        ([(0, 1), (0, 2), (0, 3), (0, 4)], "CHHHH"),
        ([(0, 1), (1, 2), (2, 3)], "HOOH"),
        ([(0, 1), (0, 2), (0, 3)], "NHHH"),
    ],
)
def test_small_molecules(bonds, elements):
    rng = np.random.default_rng(0)
    topology, positions = graph_molecule(bonds, rng.normal(size=(len(elements), 3)), elements)
    check_structure(ZMatrix.from_topology(topology, positions), topology)


def test_config_survives_json():
    topology, positions = capped("PRO")
    zmatrix = ZMatrix.from_topology(topology, positions)
    again = ZMatrix.from_config(json.loads(json.dumps(zmatrix.to_config())))
    for name in ("rows", "siblings", "tetrahedral", "linear", "levels"):
        np.testing.assert_array_equal(getattr(again, name), getattr(zmatrix, name))
    assert again.atom_names == zmatrix.atom_names


def test_quantities_are_understood():
    topology, positions = alanine()
    other = ZMatrix.from_topology(topology, 10 * positions * unit.angstrom)
    np.testing.assert_array_equal(other.rows, ZMatrix.from_topology(topology, positions).rows)


ZIGZAG = np.array([[0, 0, 0], [0.1, 0, 0], [0.1, 0.1, 0], [0.2, 0.1, 0.05], [0.3, 0.2, 0.1]])
LINE = np.arange(5)[:, None] * np.array([[0.1, 0.0, 0.0]])
IN_LINE, SAME = ZIGZAG.copy(), ZIGZAG.copy()
IN_LINE[3], SAME[4] = (0.1, 0.3, 0.0), (0.2, 0.1, 0.05)  # of 3 with 1 and 2; 4 and 3
CHAIN = [(0, 1), (1, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize(
    ("bonds", "positions", "message"),
    [
        ([], ZIGZAG, "expected bonds, got none"),
        ([(0, 1), (1, 2), (3, 4)], ZIGZAG, r"2 fragments .*C3"),
        (CHAIN, IN_LINE, r"linear angle.*MOL1-C1.*180\.00 degrees"),
        (CHAIN, SAME, "coincide"),
        (CHAIN, LINE, "linear angle"),
        ([(0, 1), (1, 2)], ZIGZAG[:3], "at least 4 atoms, got 3"),
        (CHAIN, ZIGZAG * np.nan, "finite"),
    ],
)
def test_molecules_that_are_refused(bonds, positions, message):
    with pytest.raises(ValueError, match=message):
        ZMatrix.from_topology(*graph_molecule(bonds, positions))


def test_wrong_arguments():
    topology, positions = alanine()
    with pytest.raises(ValueError, match=r"expected shape \(22, 3\)"):
        ZMatrix.from_topology(topology, positions[:4])
    with pytest.raises(TypeError, match=r"openmm\.app\.Topology"):
        ZMatrix.from_topology(mdtraj.Topology.from_openmm(topology), positions)
