"""The slow torsions of molecules: backbone, side chains by their usual names, single bonds."""

from itertools import pairwise

import numpy as np
import openmm.app as app
import pytest

from openmm_tsf.systems.slow_torsions import slow_torsions, torsion_angles
from openmm_tsf.utils.topology import backbone_dihedrals, is_backbone, neighbours_of, residue_of
from tests.support import zoo
from tests.support.molecules import capped, dihydrofolate_reductase, graph_molecule
from tests.support.peptides import CAPS, CYSTEINE, strand, topology_of

PEPTIDES = {
    "GLY": ["phi", "psi"],
    "PRO": ["phi", "psi"],  # its side chain is a ring
    "TRP": ["phi", "psi", "chi1", "chi2"],
    "PHE": ["phi", "psi", "chi1"],  # the two faces of the ring are the same
    "ASP": ["phi", "psi", "chi1"],
    "ILE": ["phi", "psi", "chi1", "chi2"],
    "LYS": ["phi", "psi", "chi1", "chi2", "chi3", "chi4"],
    "ARG": ["phi", "psi", "chi1", "chi2", "chi3", "chi4"],
}


@pytest.mark.parametrize(("name", "expected"), PEPTIDES.items())
def test_capped_amino_acids(name, expected):
    topology, _ = capped(name)
    torsions = slow_torsions(topology)
    assert list(torsions) == expected
    bonds = {frozenset(a.index for a in bond) for bond in topology.bonds()}
    for quartet in torsions.values():
        assert all(frozenset(pair) in bonds for pair in pairwise(quartet))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("butane", ["C1-C2"]),
        ("ethane", []),
        ("isobutane", []),
        ("butyne", []),  # no dihedral about a line
        ("benzonitrile", []),
        ("methyl_azide", []),
        ("cyclohexane", []),
        ("acetic_acid", ["C1-O3"]),  # syn and anti
        ("formamide", []),
        ("nitromethane", []),
        ("dimethyl_disulfide", ["S1-S2"]),
        ("bifuran", ["C4-C5"]),
        ("beta_alanine", ["N-CB", "CB-CA", "CA-C"]),
        ("cyclo_ala_gly", ["phi1", "phi2", "psi1", "psi2"]),
    ],
)
def test_other_molecules(name, expected):
    assert list(slow_torsions(zoo.specimen(name).topology)) == expected


def test_every_residue_of_a_protein_is_as_in_mdtraj():
    """All chi of DHFR but those of rings and equivalent ends, under the residues' numbers."""
    topology = dihydrofolate_reductase().topology
    torsions = slow_torsions(topology)
    assert torsions.items() >= backbone_dihedrals(topology).items()
    residues = list(topology.residues())
    with_chi1 = {k for k, residue in enumerate(residues, 1) if residue.name not in "ALA GLY PRO"}
    assert {residue_of(name) for name in torsions if name.startswith("chi1_")} == with_chi1
    others = [name for name in torsions if not name.startswith("chi") and not is_backbone(name)]
    assert others == []


def test_torsions_of_a_disulfide_belong_to_one_residue_each():
    """And two bonds between atoms of the same names have different names."""
    pair = [("ACE", CAPS["ACE"]), ("CYX", CYSTEINE), ("NME", CAPS["NME"])] * 2
    links = [*strand(0, 2), *strand(3, 5), ((1, "SG"), (4, "SG"))]
    torsions = slow_torsions(topology_of(pair, links))
    assert list(torsions) == [
        "phi2", "phi5", "psi2", "psi5",
        "chi1_2", "CB-SG_2", "SG-SG_2", "chi1_5", "CB-SG_5",
    ]  # fmt: skip
    ligand = topology_of([("LIG", "C1-C2 C2-C3 C3-C4 C4-C5 C5-C6")], [])
    for atom in ligand.atoms():
        atom.name = "C"
    assert list(slow_torsions(ligand)) == ["C-C", "C-C.2.3", "C-C.3.4"]


def test_small_rings_are_closed_and_large_ones_rotate():
    """By the number of members alone."""
    for size, expected in ((5, 0), (7, 0), (8, 8), (12, 12)):
        angle = 2 * np.pi * np.arange(size) / size
        positions = 0.04 * size * np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)
        # A ring of CO units: the oxygens are not equivalent to the ring's bonds.
        bonds = [(k, (k + 1) % size) for k in range(size)] + [(k, size + k) for k in range(size)]
        elements = ["C"] * size + ["O"] * size
        topology, _ = graph_molecule(bonds, np.vstack([positions, 1.5 * positions]), elements)
        assert len(slow_torsions(topology)) == expected


def test_names_fit_the_configuration_file():
    """Letters, digits and few signs, whatever the atoms are called."""
    topology = topology_of([("LIG", "C1-C2 C2-C3 C3-C4")], [])
    for atom, name in zip(topology.atoms(), ("O5'", "C5'", "C 4*", "Cα"), strict=True):
        atom.name = name
    assert list(slow_torsions(topology)) == ["C5-C4"]


def test_angles_by_name():
    topology, positions = capped("TRP")
    frames = np.stack([positions, -positions])  # a mirror image
    angles = torsion_angles(frames, slow_torsions(topology))
    assert angles.keys() == {"phi", "psi", "chi1", "chi2"}
    for values in angles.values():
        assert values.shape == (2,)
        assert values[0] == pytest.approx(-values[1])
    assert torsion_angles(frames, {}) == {}


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"topology: expected an .*Topology, got int"):
        slow_torsions(3)
    assert slow_torsions(app.Topology()) == {}
    assert neighbours_of(app.Topology()) == []
    assert residue_of("phi12") == residue_of("chi1_12") == residue_of("CA-C5_12") == 12
    assert residue_of("phi") is residue_of("chi1") is residue_of("C3-C4") is None


def test_names_of_side_chains_do_not_tell_what_is_bonded():
    topology = topology_of([("VAL", "N-CA CA-CB CB-C2 C2-CG1")], [])
    torsions = slow_torsions(topology)
    names = {atom.index: atom.name for atom in topology.atoms()}
    found = [[names[k] for k in quartet] for quartet in torsions.values()]
    assert found == [["N", "CA", "CB", "C2"], ["CA", "CB", "C2", "CG1"]]
    assert list(torsions) == ["CA-CB", "CB-C2"]
