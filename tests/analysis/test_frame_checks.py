"""The monitor's checks of frames: branch cuts, handedness, cis peptide bonds."""

from itertools import pairwise

import mdtraj
import numpy as np
import pytest
import torch

from openmm_tsf.analysis import load_run
from openmm_tsf.analysis.frame_checks import (
    is_mirrored,
    measure_leak,
    peptide_bonds,
    read_branches,
    tetrahedral_centres,
)
from openmm_tsf.analysis.monitor import monitor
from openmm_tsf.coordinates.chirality import triple_volumes
from openmm_tsf.coordinates.internal import InternalCoordinates
from openmm_tsf.flows.serialization import FILE_FORMAT, write_flow_file
from tests.support.examples import EXAMPLES
from tests.support.fabricate import chain_positions, four_atoms, write_frames, write_run

RUNGS = [300.0, 600.0]


def write_flow(path, layer):
    """A flow file as far as the monitor reads it."""
    write_flow_file({"format": FILE_FORMAT, "kind": "tsf", "coordinates": layer.to_config()}, path)


def run_of_chain(path, angles, cut):
    """The monitor's result for a chain of four atoms: dihedrals [n, W], their branch cut in rad."""
    positions = chain_positions(angles)[:, :, None]
    energy = np.random.default_rng(8).normal(size=(*angles.shape, 1))
    write_run(path, [300.0], energy, positions=positions)
    topology = four_atoms()
    for first, second in pairwise(list(topology.atoms)):
        topology.add_bond(first, second)
    layer = InternalCoordinates.from_topology(topology.to_openmm(), chain_positions(1.0))
    layer.set_branch_cuts(torch.tensor([cut]))
    write_flow(path / "flow.pt", layer)
    return monitor(load_run(path))


def test_cuts_in_a_gap_and_on_the_flank_of_the_peak(tmp_path):
    angles = 0.3 * np.random.default_rng(10).normal(size=(300, 8))
    result = run_of_chain(tmp_path / "gap", angles, 2.9)
    assert (result["warnings"], result["leaking_branches"]) == ([], [])
    result = run_of_chain(tmp_path / "flank", angles, 0.4)
    (words,) = result["warnings"]
    assert "place the cut there" in words
    (entry,) = result["leaking_branches"]
    assert entry["cut_degrees"] == pytest.approx(np.degrees(0.4))
    assert entry["emptiest_density"] == 0.0


def test_a_cut_that_walkers_do_not_cross(tmp_path):
    """All angles on one side of the cut, densest next to it."""
    angles = np.abs(0.5 * np.random.default_rng(11).normal(size=(300, 8)))
    result = run_of_chain(tmp_path / "run", angles, 0.0)
    assert "do not cross the cut" in result["warnings"][0]
    assert result["leaking_branches"][0]["frames_below"] == 0


def test_a_cut_of_a_free_rotor_is_a_note(tmp_path):
    angles = np.random.default_rng(12).uniform(-np.pi, np.pi, (300, 8))
    result = run_of_chain(tmp_path / "run", angles, 1.0)
    assert result["warnings"] == []
    assert "not much lower anywhere" in result["notes"][0]


def test_leak_of_a_density_that_is_known():
    """p = (1 + a cos x) / 2 pi, cut at its minimum: (1 - a)/(1 + a) of the peak, even sides."""
    rng = np.random.default_rng(13)
    x = rng.uniform(-np.pi, np.pi, (40_000, 8))
    kept = rng.random(x.shape) < 0.5 * (1 + 0.8 * np.cos(x))
    angles = np.stack([c[k][:15_000] for c, k in zip(x.T, kept.T, strict=True)], axis=1)
    result = measure_leak(angles, np.pi)
    window = np.sinc(np.radians(5.0) / np.pi)  # mean of the cosine over 5 degrees at its extremum
    expected = (1 - 0.8 * window) / (1 + 0.8 * window)
    assert result.density == pytest.approx(expected, rel=0.15)
    assert abs(result.z) < 4


def test_dihedrals_of_the_file_are_those_of_the_layer(tmp_path, molecule):
    molecule_of = (molecule.topology, molecule.positions)
    layer = InternalCoordinates.from_topology(*molecule_of, equivalent=[[0, 2, 3]])
    write_flow(tmp_path / "flow.pt", layer)
    branches = read_branches(tmp_path / "flow.pt")
    x = molecule.positions + 0.01 * np.random.default_rng(14).normal(size=(5, 22, 3))
    frames = mdtraj.Trajectory(x, molecule.mdtraj_topology)
    angles = mdtraj.compute_dihedrals(frames, branches.atoms, periodic=False)
    expected = layer.bonds_angles_torsions(torch.tensor(x))[2].numpy()
    names = [" ".join(name.split()[1:]) for name in layer.names[-19:]]
    columns = [names.index(name) for name in branches.names]
    assert len(columns) == 18  # all but the rotation of one methyl group
    np.testing.assert_allclose(np.cos(angles - expected[:, columns]), 1.0, atol=1e-8)
    np.testing.assert_allclose(branches.cuts, layer.branch_cuts[columns])


def write_molecule_run(path, molecule, positions):
    """A run directory of alanine dipeptide with given frames [n, W, 2, 22, 3]."""
    energy = np.random.default_rng(15).normal(size=positions.shape[:3])
    write_run(path, RUNGS, energy)
    write_frames(path, RUNGS, positions, molecule.mdtraj_topology)
    return load_run(path)


def test_mirrored_frames_and_cis_bonds(tmp_path, molecule):
    noise = np.random.default_rng(16).normal(size=(5, 4, 2, molecule.n_atoms, 3))
    positions = molecule.positions + 0.003 * noise
    result = monitor(write_molecule_run(tmp_path / "good", molecule, positions))
    assert result["warnings"] == []
    assert result["wrong_handedness"] == {"frames": {"300.00": 0, "600.00": 0}, "centres": []}
    assert result["cis_peptide_bonds"].keys() == {"ACE1-ALA2", "ALA2-NME3"}
    assert result["frames_checked"] == {"300.00": 20, "600.00": 20}

    mirrored = positions.copy()
    mirrored[2, 1, 1] *= [1, 1, -1]
    result = monitor(write_molecule_run(tmp_path / "turned", molecule, mirrored))
    assert result["wrong_handedness"]["frames"] == {"300.00": 0, "600.00": 1}
    assert {"ALA2-CA", "ALA2-CB"} <= set(result["wrong_handedness"]["centres"])
    assert result["warnings"] == [
        "600.00 K: 1 of 20 frames have a centre of the opposite handedness to topology.pdb"
    ]

    names, quartets = peptide_bonds(molecule.mdtraj_topology)
    assert names == ("ACE1-ALA2", "ALA2-NME3")
    assert quartets.tolist() == [[1, 4, 6, 8], [8, 14, 16, 18]]
    swapped = positions.copy()  # exchanging H and the methyl carbon makes the bond cis
    swapped[3:, :, 0, [17, 18]] = swapped[3:, :, 0, [18, 17]]
    result = monitor(write_molecule_run(tmp_path / "cis", molecule, swapped))
    assert result["cis_peptide_bonds"]["ALA2-NME3"] == {"300.00": 8, "600.00": 0}
    words = "300.00 K: the peptide bond ALA2-NME3 is cis in 8 of 20 frames"
    assert words in " ".join(result["warnings"])


@pytest.mark.parametrize("form", ["trans", "cis"])
def test_proline_that_never_turned(tmp_path, form):
    """Only the amide without a hydrogen is told of, and only if all frames have one form."""
    pdb = mdtraj.load(EXAMPLES / "benchmarks/molecules/ace_pro_nme.pdb")
    start = pdb.xyz[0].astype(float)
    other = start.copy()  # exchanging CA and CD turns the bond
    index = {str(atom): atom.index for atom in pdb.topology.atoms}
    pair = [index["PRO2-CA"], index["PRO2-CD"]]
    other[pair] = start[pair[::-1]]
    forms = {"trans": start, "cis": other}
    noise = 0.001 * np.random.default_rng(18).normal(size=(5, 4, 2, pdb.n_atoms, 3))

    def run_of(name, positions):
        write_run(tmp_path / name, RUNGS, noise[..., 0, 0])
        structure = mdtraj.Trajectory(positions[0, :1, 0], pdb.topology)
        write_frames(tmp_path / name, RUNGS, positions, pdb.topology)
        structure.save_pdb(str(tmp_path / name / "topology.pdb"))
        return monitor(load_run(tmp_path / name))

    result = run_of("same", forms[form] + noise)
    (note,) = result["notes"]
    assert note.startswith(f"the peptide bond ACE1-PRO2 is {form} in all frames; its nitrogen has")
    mixed = forms[form] + noise
    mixed[3:] += forms["cis" if form == "trans" else "trans"] - forms[form]
    assert run_of("mixed", mixed)["notes"] == []


def test_a_bent_centre_is_not_mirrored(molecule):
    """CA pushed through the plane of its three lowest neighbours: one of four triples flips.

    The bent centre is not mirrored, its mirror image is.
    """
    topology, x = molecule.mdtraj_topology, np.asarray(molecule.positions)
    centres = tetrahedral_centres(topology, x)
    k = centres.names.index("ALA2-CA")
    centre, *neighbours = centres.chirality.centres[k].tolist()
    lowest = neighbours[:3]
    bent = x.copy()
    normal = np.cross(x[lowest[1]] - x[lowest[0]], x[lowest[2]] - x[lowest[0]])
    normal *= np.sign(normal @ (x[centre] - x[lowest[0]])) / np.linalg.norm(normal)
    height = normal @ (x[centre] - x[lowest[0]])
    bent[centre] -= (height + 0.005) * normal
    bonds = np.stack([x, bent])[:, neighbours] - np.stack([x, bent])[:, [centre]]
    volumes = triple_volumes(torch.tensor(bonds.transpose(2, 1, 0)[:, :, None]))[:, 0]
    flipped = volumes.prod(dim=1) < 0
    assert flipped.tolist() == [True, False, False, False]
    frames = np.stack([x, bent, x * [1, 1, -1], bent * [1, 1, -1]])
    assert is_mirrored(frames, centres)[:, k].tolist() == [False, False, True, True]
    exchanged = x.copy()  # exchanging two neighbours inverts the handedness
    exchanged[lowest[:2]] = x[lowest[1::-1]]
    assert is_mirrored(exchanged[None], centres)[0, k]


def test_few_of_many_frames_and_frames_that_are_missing(tmp_path, molecule):
    positions = np.broadcast_to(molecule.positions, (30, 2, 2, molecule.n_atoms, 3))
    run = write_molecule_run(tmp_path / "run", molecule, positions)
    assert monitor(run, max_frames=20)["frames_checked"] == {"300.00": 20, "600.00": 20}
    (run.path / "T300.00K.dcd").unlink()
    with open(run.path / "T600.00K.dcd", "r+b") as file:  # its frames have not been written yet
        file.truncate(276)
    result = monitor(run)
    assert result["frames_checked"] == {"300.00": 0, "600.00": 0}
    assert result["wrong_handedness"]["frames"] == {}
