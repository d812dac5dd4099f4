"""Peptides by sequence: atoms, stereochemistry, energies, constraints, bad input."""

import random
from pathlib import Path

import mdtraj
import numpy as np
import openmm.app as app
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.coordinates.bond_graph import centres_of
from openmm_tsf.coordinates.chirality import handedness_signs
from openmm_tsf.systems.files import load_molecule
from openmm_tsf.systems.peptides import RESIDUES, capped_peptide, published_peptide

MOLECULES = Path(__file__).parents[2] / "examples" / "benchmarks" / "molecules"
#: Heavy atoms, without caps, of each residue; hydrogens at pH 7.
SEQUENCE = "".join(RESIDUES)


def energy_of(molecule, positions=None):
    x = molecule.positions if positions is None else positions
    with molecule.potential("openmm", platform="Reference") as potential:
        return float(potential.energy(torch.tensor(np.array(x))[None])[0])


def centres(molecule):
    """The signed volumes of N, C and CB about every alpha carbon."""
    x, atoms = np.array(molecule.positions), list(molecule.topology.atoms())
    for residue in molecule.topology.residues():
        index = {atom.name: atom.index for atom in residue.atoms()}
        if {"N", "CA", "C", "CB"} <= set(index):
            bonds = [x[index[name]] - x[index["CA"]] for name in ("N", "C", "CB")]
            yield atoms[index["CA"]].residue.name, float(np.linalg.det(bonds))


@pytest.mark.parametrize(
    ("name", "n_atoms"), [("ala4", 42), ("ala6", 62), ("ELIL", 75), ("chignolin", 138)]
)
def test_published_peptides_have_their_atoms(name, n_atoms):
    """Their 3 N - 6 coordinates are 120, 180, 219 of the published tables, and 408."""
    molecule = published_peptide(name)
    assert molecule.n_atoms == n_atoms
    trajectory = mdtraj.Trajectory(np.array(molecule.positions)[None], molecule.mdtraj_topology)
    omega = mdtraj.compute_omega(trajectory)[1]
    assert (np.abs(omega) > np.radians(150)).all()  # trans
    assert all(volume > 0 for _, volume in centres(molecule))  # L
    # No atom of another residue that is not bonded is nearer than a hydrogen bond.
    neighbours = {frozenset((b[0].index, b[1].index)) for b in molecule.topology.bonds()}
    residue = [atom.residue.index for atom in molecule.topology.atoms()]
    x = np.array(molecule.positions)
    distances = np.linalg.norm(x[:, None] - x[None], axis=-1)
    pairs = [
        distances[i, j]
        for i in range(n_atoms)
        for j in range(i)
        if abs(residue[i] - residue[j]) > 1 and frozenset((i, j)) not in neighbours
    ]
    assert min(pairs) > 0.17
    assert np.isfinite(energy_of(molecule))


def test_every_amino_acid_can_be_built():
    molecule = capped_peptide(SEQUENCE, "amber14-all.xml")  # vacuum: the solvent takes minutes
    names = [residue.name for residue in molecule.topology.residues()]
    assert names == ["ACE", *RESIDUES.values(), "NME"]
    signs = dict(centres(molecule))
    assert len(signs) == 19  # all but glycine
    assert all(volume > 0 for volume in signs.values())
    x, index = np.array(molecule.positions), {}
    for atom in molecule.topology.atoms():
        index[atom.residue.name, atom.name] = atom.index
    for residue, centre, around, sign in (
        ("ILE", "CB", ("CA", "CG1", "CG2"), 1),  # (2S,3S)
        ("THR", "CB", ("OG1", "CA", "CG2"), -1),  # (2S,3R)
    ):
        bonds = [x[index[residue, other]] - x[index[residue, centre]] for other in around]
        assert sign * np.linalg.det(bonds) > 0


def test_the_same_arguments_give_the_same_molecule():
    state = random.getstate()
    first, second = (capped_peptide("WA", "amber14-all.xml") for _ in range(2))
    assert random.getstate() == state
    assert first.fingerprint == second.fingerprint
    np.testing.assert_array_equal(first.positions, second.positions)


def test_it_is_the_molecule_of_the_benchmarks_file():
    """Atoms, names and order of a file that PDBFixer made, and the energy of its conformation."""
    from_file = load_molecule(
        MOLECULES / "ace_ala3_nme.pdb", force_field=["amber14-all.xml", "implicit/obc2.xml"]
    )
    built = capped_peptide("AAA", "amber14-obc2")
    names = [
        [(atom.name, atom.residue.name) for atom in each.topology.atoms()]
        for each in (built, from_file)
    ]
    assert names[0] == names[1]
    expected = energy_of(from_file)
    assert energy_of(built, from_file.positions) == pytest.approx(expected, abs=1e-6)
    assert energy_of(built) < expected + 100.0
    # The same System, atoms and bonds; only labels of methyl hydrogens are permuted.
    assert built.fingerprint[:32] == from_file.fingerprint[:32]
    signs = [
        handedness_signs(each.positions, centres_of(each.topology)) for each in (built, from_file)
    ]
    alpha = np.isin(centres_of(built.topology)[:, 0], built.mdtraj_topology.select("name CA"))
    assert alpha.sum() == 3
    np.testing.assert_array_equal(signs[0][alpha], signs[1][alpha])


def test_constrained_bonds_have_their_lengths():
    molecule = tsf.systems.capped_peptide("A", constraints="hbonds")
    free = tsf.systems.capped_peptide("A")
    assert (molecule.constraints is None, free.constraints is None) == (False, True)
    assert molecule.system.getNumConstraints() == 12
    for k in range(12):
        i, j, length = molecule.system.getConstraintParameters(k)
        distance = np.linalg.norm(molecule.positions[i] - molecule.positions[j])
        assert distance == pytest.approx(length._value, rel=1e-6)


def test_other_force_fields_by_files_or_objects():
    names = ["amber14-all.xml", "implicit/obc2.xml"]
    by_name = capped_peptide("G", "amber14-obc2")
    for given in (names, app.ForceField(*names)):
        assert capped_peptide("G", given).fingerprint == by_name.fingerprint


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("AXA",), ValueError, "sequence: expected one-letter codes .*, got 'AXA'"),
        (("",), ValueError, "sequence: expected one-letter codes"),
        ((["A"],), TypeError, "sequence: expected one-letter codes, got list"),
        (("A", "amber"), ValueError, "force_field: expected"),
        (("A", "amber14-obc2", "angles"), ValueError, "constraints: expected one of"),
        (("A", "tip3p.xml"), ValueError, "force_field: tip3p.xml cannot describe A"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        capped_peptide(*arguments)
    with pytest.raises(ValueError, match="name: expected"):
        published_peptide("ala5")
