"""The structure files of a run directory: topology.json, positions.npz, topology.pdb."""

import datetime
import json
from copy import deepcopy

import mdtraj
import numpy as np
import openmm.app as app
import pytest

from openmm_tsf.io.topology import read_structure, read_topology, write_structure
from openmm_tsf.utils.topology import bonds_of
from tests.support.molecules import capped, disulfide, graph_molecule
from tests.support.peptides import ALANINE, CAPS, CYSTEINE, molecule_of, ring, strand, topology_of


def test_equal_structures_are_equal_files_on_any_day(tmp_path, monkeypatch):
    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return cls(2099, 1, 1)

    molecule = capped("SER")
    for name in ("today", "tomorrow"):
        (tmp_path / name).mkdir()
        write_structure(*molecule, tmp_path / name)
        monkeypatch.setattr("openmm.app.pdbfile.date", Tomorrow)
    today, tomorrow = ((tmp_path / n / "topology.pdb").read_bytes() for n in ("today", "tomorrow"))
    assert today == tomorrow


def pairs_of(topology):
    return {tuple(sorted(pair)) for pair in bonds_of(topology).tolist()}


def two_strands():
    """Residues 2 and 3 are neighbours in the chain, and not bonded."""
    cysteine = [("ALA", ALANINE), ("CYX", CYSTEINE)]
    links = [*strand(0, 1), *strand(2, 3), ((1, "SG"), (3, "SG"))]
    return topology_of(cysteine * 2, links)


def with_hydrogens_named_otherwise():
    """H1, H2 ... over the molecule, without H2, which templates bond to the first N."""
    topology = deepcopy(capped("SER")[0])  # which is cached
    for atom in topology.atoms():
        if atom.element is app.element.hydrogen:
            atom.name = f"H{10 + atom.index}"
    return topology


def lactam():
    """Caprolactam with names of a generator, in a residue named ALA."""
    bonds = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 0), (1, 7), (0, 8)]
    topology, _ = graph_molecule(bonds, np.zeros((9, 3)), "NCCCCCCOH")
    next(topology.residues()).name = "ALA"
    return topology


def hexafluoride():
    """An atom of six bonds: OpenMM's writer leaves out its fourth."""
    topology, _ = graph_molecule([(0, k) for k in range(1, 7)], np.zeros((7, 3)), "NCCCCCC")
    return topology


TOPOLOGIES = {
    "ring of two": lambda: ring(2),
    "ring of four": lambda: ring(4),
    "hydrogens named otherwise": with_hydrogens_named_otherwise,
    "lactam": lactam,
    "cysteines of two chains": lambda: disulfide()[0],
    "gap in a chain": two_strands,
    "six bonds": hexafluoride,
    "isopeptide": lambda: topology_of(
        [("ACE", CAPS["ACE"]), ("LYS", f"{ALANINE} CB-CG CG-CD CD-CE CE-NZ"), ("ALA", ALANINE)],
        [*strand(0, 1), ((2, "C"), (1, "NZ"))],
    ),
}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_mdtraj_finds_exactly_the_bonds_in_topology_pdb(tmp_path, name):
    topology = TOPOLOGIES[name]()
    positions = molecule_of(topology).positions
    write_structure(topology, positions, tmp_path)
    read = mdtraj.load_pdb(str(tmp_path / "topology.pdb"))
    assert pairs_of(read.topology) == pairs_of(topology)
    assert [atom.name for atom in read.topology.atoms] == [a.name for a in topology.atoms()]
    np.testing.assert_allclose(read.xyz[0], positions, atol=1e-4)
    by_openmm = app.PDBFile(str(tmp_path / "topology.pdb")).topology
    assert pairs_of(by_openmm) == pairs_of(topology)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_all_of_a_topology_is_read_again(tmp_path, name):
    topology = deepcopy(TOPOLOGIES[name]())  # some are cached
    topology.addAtom("a long name of no element", None, list(topology.residues())[-1])
    next(topology.residues()).id = -7  # some programs give numbers
    positions = np.random.default_rng(1).normal(size=(topology.getNumAtoms(), 3))
    write_structure(topology, positions, tmp_path)
    read, again = read_structure(tmp_path)
    np.testing.assert_array_equal(again, positions)
    assert bonds_of(read).tolist() == bonds_of(topology).tolist()
    assert [(a.name, a.element, a.residue.name, a.residue.chain.index) for a in read.atoms()] == [
        (a.name, a.element, a.residue.name, a.residue.chain.index) for a in topology.atoms()
    ]
    assert [r.id for r in read.residues()] == [str(r.id) for r in topology.residues()]


@pytest.mark.parametrize(
    "bond", [[0, 0], [0, 99], [-1, 0], [0], [0, 1, 2], [0.0, 1.0], ["0", "1"], None, {"0": 1}]
)
def test_bonds_that_are_not_two_atoms_are_refused(tmp_path, bond):
    write_structure(ring(2), np.zeros((14, 3)), tmp_path)
    path = tmp_path / "topology.json"
    content = json.loads(path.read_text())
    content["bonds"].append(bond)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"topology\.json: not a readable topology"):
        read_topology(path)
