"""The topology of a run is that of its System: for analysis, monitor and users of mdtraj."""

import mdtraj
import numpy as np
import openmm.app as app
import pytest
import torch

from openmm_tsf.analysis import load_run
from openmm_tsf.analysis.frame_checks import peptide_bonds, tetrahedral_centres
from openmm_tsf.analysis.monitor import monitor
from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import KB
from openmm_tsf.utils.topology import bonds_of, neighbours_of
from tests.support.molecules import graph_molecule
from tests.support.peptides import ALANINE, CAPS, molecule_of, ring, strand, topology_of

LADDER, W = (300.0, 424.26), 3


def write(path, molecule, positions):
    """Write a run with given frames [n, W, 2, N, 3]."""
    n = len(positions)
    numbers = {
        "energy": np.random.default_rng(1).normal(size=(n, W, 2)),
        "replica": np.tile(np.arange(2, dtype=np.int16), (n, W, 1)),
        "iteration": np.arange(1, n + 1),
        "accepted_flow_walk": np.array([1, 2]),
        "proposed_flow_walk": np.array([5, 5]),
        "wall_seconds": np.array(0.5),
        **dict.fromkeys(
            ("rejected_non_finite", "outside_domain", "mirror_images", "n_evaluations"), np.array(0)
        ),
    }
    writer = RunWriter(path, molecule, LADDER, W)
    writer.create(7, KB, {})
    writer.write(numbers, positions, {"seed": 7})
    return load_run(path)


def frames_near(molecule, n=4):
    noise = np.random.default_rng(2).normal(size=(n, W, 2, molecule.n_atoms, 3))
    return molecule.positions + 0.003 * noise


def renamed(molecule, hydrogens, residue_name=None):
    """The molecule with other names of hydrogens, from their number, and of residues."""
    topology, atoms = app.Topology(), []
    chain = topology.addChain()
    for residue in molecule.topology.residues():
        new = topology.addResidue(residue_name or residue.name, chain)
        for atom in residue.atoms():
            is_hydrogen = atom.element is app.element.hydrogen
            name = hydrogens(atom.index) if is_hydrogen else atom.name
            atoms.append(topology.addAtom(name, atom.element, new))
    for first, second in molecule.topology.bonds():
        topology.addBond(atoms[first.index], atoms[second.index])
    return MolecularSystem(molecule.system, topology, molecule.positions)


def in_one_residue(molecule):
    """The molecule in one residue named ALA, with the names of a generator."""
    topology, atoms = app.Topology(), []
    residue = topology.addResidue("ALA", topology.addChain())
    for atom in molecule.topology.atoms():
        name = f"{atom.element.symbol}{atom.index + 1}"
        atoms.append(topology.addAtom(name, atom.element, residue))
    for first, second in molecule.topology.bonds():
        topology.addBond(atoms[first.index], atoms[second.index])
    return MolecularSystem(molecule.system, topology, molecule.positions)


def odd_names():
    """Long and empty names, an atom without element, two chains joined by a bond."""
    sulphur = f"{ALANINE} CB-SG"
    topology = topology_of(
        [("LIGAND", sulphur), ("", sulphur)], [((0, "SG"), (1, "SG"))], new_chains=(1,)
    )
    first, *_, last = topology.atoms()
    first.name, last.name, last.element = "a long name", "", None
    return molecule_of(topology)


#: Of alanine dipeptide; templates bond H1 and H3 of ALA to N, here they are on carbons.
VARIANTS = {
    "H01, H02 ...": lambda m: renamed(m, lambda index: f"H{index:02d}"),
    "H1, H2 ...": lambda m: renamed(m, lambda index: f"H{1 + index % 9}"),
    "another residue": lambda m: renamed(m, lambda index: f"HX{index}", "LIG"),
    "one residue ALA": in_one_residue,
}


@pytest.mark.parametrize(
    "make",
    [*VARIANTS.values(), lambda _: molecule_of(ring(2)), lambda _: odd_names()],
    ids=[*VARIANTS, "ring", "odd names"],
)
def test_topology_and_structure_are_those_of_the_molecule(make, molecule, tmp_path):
    molecule = make(molecule)
    run = write(tmp_path / "run", molecule, frames_near(molecule))
    given = molecule.topology
    for topology in (run.topology, run.trajectory(300).topology):
        pairs = [sorted(pair) for pair in bonds_of(given).tolist()]
        assert bonds_of(topology).tolist() == pairs
        assert [a.name for a in topology.atoms] == [a.name for a in given.atoms()]
        assert [r.name for r in topology.residues] == [r.name for r in given.residues()]
        assert topology == molecule.mdtraj_topology
    np.testing.assert_array_equal(run.structure.xyz[0], molecule.positions.astype(np.float32))
    run.trajectory(300)[:2].save_pdb(str(tmp_path / "user.pdb"))
    assert mdtraj.load_pdb(str(tmp_path / "user.pdb")).xyz.shape == (2, molecule.n_atoms, 3)


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
def test_the_monitor_sees_all_centres_and_peptide_bonds(make, molecule, tmp_path):
    centres = tetrahedral_centres(molecule.mdtraj_topology, molecule.positions)
    molecule = make(molecule)
    frames = frames_near(molecule)
    frames[1, 2, 1] *= [1, 1, -1]
    run = write(tmp_path / "run", molecule, frames)
    seen = tetrahedral_centres(run.topology, run.structure.xyz[0])
    assert torch.equal(seen.chirality.centres, centres.chirality.centres)
    torch.testing.assert_close(
        seen.chirality.weights, centres.chirality.weights, rtol=1e-4, atol=0.0
    )
    result = monitor(run)
    assert result["wrong_handedness"]["frames"] == {"300.00": 0, "424.26": 1}
    assert len(result["wrong_handedness"]["centres"]) == len(centres.names)
    assert [list(counts.values()) for counts in result["cis_peptide_bonds"].values()] == [
        [0, 0]
    ] * 2


@pytest.mark.parametrize("n_residues", [2, 4])
def test_a_ring_has_its_closing_dihedrals(n_residues, tmp_path):
    molecule = molecule_of(ring(n_residues))
    run = write(tmp_path / "run", molecule, frames_near(molecule))
    frames = run.trajectory(424.26)
    for residue in range(1, n_residues + 1):
        quartets = [molecule.dihedrals[f"{name}{residue}"] for name in ("phi", "psi")]
        expected = mdtraj.compute_dihedrals(frames, quartets)
        angles = np.stack(run.ramachandran(424.26, residue), axis=1)
        np.testing.assert_allclose(np.cos(angles - expected), 1.0, atol=1e-3)
    result = monitor(run)
    assert f"ALA{n_residues}-ALA1" in result["cis_peptide_bonds"]
    assert len(result["cis_peptide_bonds"]) == n_residues


def test_topology_pdb_is_not_needed_and_other_files_must_agree(tmp_path):
    molecule = molecule_of(ring(3))
    run = write(tmp_path / "run", molecule, frames_near(molecule))
    (run.path / "topology.pdb").unlink()
    assert len(monitor(load_run(run.path))["cis_peptide_bonds"]) == 3
    np.savez(run.path / "positions.npz", positions=molecule.positions[1:])
    with pytest.raises(ValueError, match=r"positions\.npz: not a readable file of positions"):
        load_run(run.path).trajectory(300)
    (run.path / "positions.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"positions\.npz"):
        load_run(run.path).topology  # noqa: B018
    (run.path / "topology.json").write_text('{"chains": [], "bonds": []}')
    with pytest.raises((ValueError, FileNotFoundError)):
        load_run(run.path).topology  # noqa: B018


def test_a_directory_without_topology_json_has_the_bonds_of_its_pdb_file(tmp_path):
    molecule = molecule_of(ring(3))
    run = write(tmp_path / "run", molecule, frames_near(molecule))
    (run.path / "topology.json").unlink()
    assert load_run(run.path).topology.n_bonds == molecule.topology.getNumBonds()
    (run.path / "topology.pdb").unlink()
    with pytest.raises(FileNotFoundError, match=r"topology\.pdb is missing"):
        load_run(run.path).topology  # noqa: B018
    assert monitor(load_run(run.path))["cis_peptide_bonds"] is None


def test_peptide_bonds_between_the_same_residues_have_names_of_their_own():
    """Two amides of a ligand, and strands that are numbered alike."""
    bonds = [(0, 1), (1, 2), (1, 3), (3, 4), (4, 5), (5, 6), (5, 7), (7, 8)]
    ligand, _ = graph_molecule(bonds, np.zeros((9, 3)), "CCONCCONC")
    names, atoms = peptide_bonds(mdtraj.Topology.from_openmm(ligand))
    assert names == ("MOL1-MOL1 (atoms 1 3)", "MOL1-MOL1 (atoms 5 7)")
    assert atoms.tolist() == [[0, 1, 3, 4], [4, 5, 7, 8]]
    strands = topology_of(
        [("ACE", CAPS["ACE"]), ("CYX", f"{ALANINE} CB-SG"), ("NME", CAPS["NME"])] * 2,
        [*strand(0, 2), *strand(3, 5), ((1, "SG"), (4, "SG"))],
        new_chains=(3,),
    )
    for residue in strands.residues():
        residue.id = str(residue.index % 3 + 1)
    names, _ = peptide_bonds(mdtraj.Topology.from_openmm(strands))
    assert len(set(names)) == 4
    assert names[0].startswith("ACE1-CYX2 (atoms ")


def test_a_lactam_has_a_peptide_bond():
    """Caprolactam with two hydrogens, in a residue named ALA."""
    bonds = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 0), (1, 7), (0, 8), (2, 9)]
    topology, _ = graph_molecule(bonds, np.zeros((10, 3)), "NCCCCCCOHH")
    next(topology.residues()).name = "ALA"
    names, atoms = peptide_bonds(mdtraj.Topology.from_openmm(topology))
    assert (names, atoms.tolist()) == (("ALA1-ALA1",), [[2, 1, 0, 6]])


def test_repeated_bonds_are_one():
    topology = ring(2)
    expected = neighbours_of(topology), peptide_bonds(mdtraj.Topology.from_openmm(topology))[0]
    for first, second in list(topology.bonds()):
        topology.addBond(second, first)
    again = mdtraj.Topology.from_openmm(topology)
    assert (neighbours_of(again), peptide_bonds(again)[0]) == expected
