"""Phi and psi of any peptide: found by bonds, not by the order of residues in a chain."""

import mdtraj
import numpy as np
import openmm.app as app
import pytest

from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.topology import backbone_dihedrals
from tests.support.molecules import alanine, capped, dihydrofolate_reductase, disulfide
from tests.support.peptides import ALANINE, CAPS, CYSTEINE, molecule_of, ring, strand, topology_of

ALA = ("ALA", ALANINE)


def names_of(topology, quartet):
    """Return e.g. ``1C 2N 2CA 2C``: residues counted from 1."""
    atoms = list(topology.atoms())
    return " ".join(f"{atoms[i].residue.index + 1}{atoms[i].name}" for i in quartet)


def named(topology):
    return {name: names_of(topology, q) for name, q in backbone_dihedrals(topology).items()}


def by_mdtraj(topology):
    """Return the quartets of mdtraj, which takes neighbours in a chain."""
    converted = mdtraj.Topology.from_openmm(topology)
    frames = mdtraj.Trajectory(np.zeros((1, converted.n_atoms, 3)), converted)
    phi, psi = mdtraj.compute_phi(frames)[0], mdtraj.compute_psi(frames)[0]
    return [tuple(map(int, quartet)) for quartet in (*phi, *psi)]


@pytest.mark.parametrize(
    "topology",
    [
        lambda: alanine()[0],
        lambda: dihydrofolate_reductase().topology,  # 159 residues, with all 20 amino acids
        lambda: capped("PRO")[0],
        lambda: disulfide()[0],  # two chains
    ],
)
def test_ordinary_peptides_are_as_in_mdtraj(topology):
    topology = topology()
    assert list(backbone_dihedrals(topology).values()) == by_mdtraj(topology)


def test_no_dihedral_across_a_gap_in_a_chain():
    """Two strands joined by a disulfide, in one chain as in files of AMBER."""
    strands = [ALA, ("CYX", CYSTEINE), ALA] * 2
    links = [*strand(0, 2), *strand(3, 5), ((1, "SG"), (4, "SG"))]
    topology = topology_of(strands, links)
    assert list(backbone_dihedrals(topology)) == [
        "phi2", "phi3", "phi5", "phi6", "psi1", "psi2", "psi4", "psi5",
    ]  # fmt: skip
    assert len(by_mdtraj(topology)) == 10  # also phi4 and psi3
    in_two_chains = topology_of(strands, links, new_chains=(3,))
    assert backbone_dihedrals(in_two_chains) == backbone_dihedrals(topology)


@pytest.mark.parametrize("n_residues", [2, 3, 6])
def test_rings_are_closed(n_residues):
    topology = ring(n_residues)
    numbers = range(1, n_residues + 1)
    dihedrals = named(topology)
    assert list(dihedrals) == [f"{name}{n}" for name in ("phi", "psi") for n in numbers]
    assert dihedrals["phi1"] == f"{n_residues}C 1N 1CA 1C"
    assert dihedrals[f"psi{n_residues}"] == f"{n_residues}N {n_residues}CA {n_residues}C 1N"
    assert molecule_of(topology).dihedrals == backbone_dihedrals(topology)


def test_residues_in_another_order_than_that_of_the_bonds():
    """Residue 3 comes first in the peptide, then 1, then 2."""
    topology = topology_of([ALA] * 3, [((2, "C"), (0, "N")), ((0, "C"), (1, "N"))])
    assert named(topology) == {
        "phi1": "3C 1N 1CA 1C", "phi2": "1C 2N 2CA 2C",
        "psi1": "1N 1CA 1C 2N", "psi3": "3N 3CA 3C 1N",
    }  # fmt: skip


@pytest.mark.parametrize(("before", "after"), [("ACE", "NME"), ("ACE", "NH2"), ("FOR", "NH2")])
@pytest.mark.parametrize("residue", [ALA, ("DAL", ALANINE), ("MAA", f"{ALANINE} N-C1")])
def test_one_capped_residue_has_names_without_numbers(before, after, residue):
    """Also D-alanine and N-methylalanine."""
    topology = topology_of([(before, CAPS[before]), residue, (after, CAPS[after])], strand(0, 2))
    assert named(topology) == {"phi": "1C 2N 2CA 2C", "psi": "2N 2CA 2C 3N"}


def test_a_phi_and_a_psi_of_different_residues_have_numbers():
    assert named(topology_of([ALA] * 2, strand(0, 1))).keys() == {"phi2", "psi1"}


LYSINE = f"{ALANINE} CB-CG CG-CD CD-CE CE-NZ"
ASPARTATE = f"{ALANINE} CB-CG CG-OD1"


@pytest.mark.parametrize(
    ("residues", "links", "expected"),
    [  # Gly-C to Lys-NZ, as in ubiquitin; Asp-CG to Lys-NZ; isoaspartate: Asp-CG to N
        ([ALA, ("LYS", LYSINE)], [((0, "C"), (1, "NZ"))], set()),
        ([("ASP", ASPARTATE), ALA, ("LYS", LYSINE)],
         [*strand(0, 2), ((0, "CG"), (2, "NZ"))], {"phi2", "phi3", "psi1", "psi2"}),
        ([("ASP", ASPARTATE), ALA], [((0, "CG"), (1, "N"))], set()),
    ],
    ids=["isopeptide", "lactam bridge", "isoaspartate"],
)  # fmt: skip
def test_side_chains_are_not_the_backbone(residues, links, expected):
    assert named(topology_of(residues, links)).keys() == expected


def test_a_methyl_group_that_is_a_residue_is_not_the_carbonyl():
    methyl = ("MET", "C-H1 C-H2 C-H3")
    topology = topology_of([methyl, ALA, ALA], [((0, "C"), (2, "N")), ((1, "C"), (2, "N"))])
    assert named(topology)["phi3"] == "2C 3N 3CA 3C"


@pytest.mark.parametrize(
    ("residue", "n_by_mdtraj"),
    [  # beta-alanine, an N-acyl hydrazine with other names, a whole peptide in one residue
        (("ALA", "N-CB CB-CA CA-C C-O"), 2),
        (("ALA", "N1-N2 N2-C1 C1-O1 C1-C2"), 0),
        (("ALA", "N-CA CA-CB CB-C C-O"), 2),
    ],
    ids=["beta-alanine", "other names", "N, CA and C not in a row"],
)
def test_residues_without_n_ca_c_in_a_row_have_none(residue, n_by_mdtraj):
    sites = residue[1].replace("-", " ").split()
    n, c = ("N", "C") if "N" in sites else ("N1", "C1")
    links = [((0, "C"), (1, n)), ((1, c), (2, "N"))]
    topology = topology_of([("ACE", CAPS["ACE"]), residue, ("NME", CAPS["NME"])], links)
    assert backbone_dihedrals(topology) == {}
    assert len(by_mdtraj(topology)) == n_by_mdtraj


def test_repeated_bonds_change_nothing():
    topology = ring(3)
    expected = backbone_dihedrals(topology)
    for first, second in list(topology.bonds()):
        topology.addBond(second, first)
    assert backbone_dihedrals(topology) == expected


def test_atoms_that_are_not_in_the_order_of_the_residues_are_refused(molecule):
    """OpenMM counts them as they were added, and lists them by residue."""
    topology = app.Topology()
    chain = topology.addChain()
    residues = [topology.addResidue("X", chain) for _ in range(2)]
    for index, atom in enumerate(molecule.topology.atoms()):
        topology.addAtom(atom.name, atom.element, residues[int(index < 10)])
    with pytest.raises(ValueError, match="topology: expected atoms in the order of their chains"):
        MolecularSystem(molecule.system, topology, molecule.positions)
