"""The run directory, read by mdtraj, OpenMM and the analysis."""

import json

import mdtraj
import numpy as np
import openmm.app as app
import pytest
import torch

from openmm_tsf.analysis import load_run
from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.io.run_config import CONFIG_FORMAT, read_run_config
from openmm_tsf.potentials.toy import DoubleWell
from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.sampling.tempering import ParallelTempering
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.systems.slow_torsions import dihedral_angles
from openmm_tsf.units import KB
from openmm_tsf.utils.versions import package_versions
from tests.support.molecules import capped, force_field

LADDER = (300.0, 424.264)
W = 3
MOVES = {"accepted_flow_walk": [1, 2], "proposed_flow_walk": [5, 5], "wall_seconds": 0.5}
COUNTS = {"rejected_non_finite": 1, "outside_domain": 0, "mirror_images": 0, "n_evaluations": 10}


def numbers(n, iteration=0, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "energy": rng.normal(size=(n, W, 2)),
        "replica": np.tile(np.arange(2, dtype=np.int16), (n, W, 1)),
        "iteration": np.arange(iteration + 1, iteration + n + 1),
        **{name: np.array(value) for name, value in (MOVES | COUNTS).items()},
    }


@pytest.fixture
def x(molecule):
    """The positions [7, W, 2, N, 3] in the run."""
    noise = np.random.default_rng(1).normal(size=(7, W, 2, molecule.n_atoms, 3))
    return molecule.positions + 0.01 * noise


@pytest.fixture
def writer(molecule, x, tmp_path):
    """The writer of a run of two segments, of four and three iterations."""
    writer = RunWriter(tmp_path / "run", molecule, LADDER, W)
    writer.create(7, KB, {"kernels": []})
    writer.write(numbers(4), x[:4], {"seed": 7})
    writer.write(numbers(3, 4), x[4:], {"seed": 7})
    return writer


def test_config_is_complete(writer, molecule):
    config = json.loads((writer.directory / "config.json").read_text())
    assert config["format"] == CONFIG_FORMAT
    assert config["temperatures_K"] == list(LADDER)
    assert (config["n_walkers"], config["seed"]) == (W, 7)
    assert config["dihedrals"] == {"phi": [4, 6, 8, 14], "psi": [6, 8, 14, 16]}
    assert config["boltzmann_constant"] == KB
    assert config["versions"] == package_versions()
    assert {"python", "openmm", "torch", "openmm-tsf"} <= config["versions"].keys()
    topology = mdtraj.load_topology(str(writer.directory / "topology.pdb"))
    assert [a.name for a in topology.atoms] == [a.name for a in molecule.mdtraj_topology.atoms]


def test_mdtraj_reads_the_frames(writer, x):
    for rung, name in enumerate(("T300.00K.dcd", "T424.26K.dcd")):
        read = mdtraj.load(str(writer.directory / name), top=str(writer.directory / "topology.pdb"))
        assert read.unitcell_lengths is None
        expected = x[:, :, rung].reshape(-1, *x.shape[3:])  # iterations, walkers inside
        np.testing.assert_allclose(read.xyz, expected, rtol=0, atol=2e-7)


def test_openmm_can_append_to_the_dcd(writer, x, molecule, tmp_path):
    path = tmp_path / "appended.dcd"
    path.write_bytes((writer.directory / "T300.00K.dcd").read_bytes())
    with open(path, "r+b") as file:
        dcd = app.DCDFile(file, molecule.topology, 0.001, append=True)
        dcd.writeModel(x[0, 0, 1])
    read = mdtraj.load(str(path), top=molecule.mdtraj_topology)
    assert len(read) == 7 * W + 1
    np.testing.assert_allclose(read.xyz[-1], x[0, 0, 1], rtol=0, atol=2e-7)


def test_analysis_reads_the_run(writer, x):
    result = load_run(writer.directory)
    assert result.n_iterations == 7
    np.testing.assert_allclose(result.trajectory(300).xyz[W], x[1, 0, 0], rtol=0, atol=2e-7)
    assert result.segments.accepted["flow_walk"].tolist() == [2, 4]
    _, expected = mdtraj.compute_phi(result.trajectory(424.264))
    phi, _ = result.ramachandran(424.264)
    np.testing.assert_allclose(phi.reshape(-1), expected.reshape(-1), rtol=0, atol=1e-4)


def test_dihedral_angles_agree_with_mdtraj():
    x = np.random.default_rng(2).normal(size=(50, 9, 3))
    quartets = np.array([[0, 1, 2, 3], [8, 3, 5, 1], [4, 2, 7, 6]])
    topology = mdtraj.Topology()
    residue = topology.add_residue("X", topology.add_chain())
    for _ in range(9):
        topology.add_atom("C", mdtraj.element.carbon, residue)
    expected = mdtraj.compute_dihedrals(mdtraj.Trajectory(x, topology), quartets, opt=False)
    np.testing.assert_allclose(dihedral_angles(x, quartets), expected, rtol=0, atol=1e-5)


def test_all_slow_torsions_are_recorded(tmp_path):
    """Side chains too; a run that recorded fewer is continued with these."""
    topology, positions = capped("TRP")
    system = force_field("amber14/protein.ff14SB.xml").createSystem(topology)
    molecule = MolecularSystem(system, topology, positions)
    writer = RunWriter(tmp_path / "run", molecule, LADDER, W)
    writer.create(7, KB, {})
    x = positions + 0.001 * np.random.default_rng(4).normal(size=(4, W, 2, len(positions), 3))
    writer.write(numbers(4), x, {"seed": 7})
    run = load_run(tmp_path / "run")
    assert list(run.dihedral_atoms) == ["phi", "psi", "chi1", "chi2"]
    _, expected = mdtraj.compute_chi2(run.trajectory(300.0))
    np.testing.assert_allclose(run.dihedral("chi2", 300.0).ravel(), expected[:, 0], atol=1e-3)
    assert run.summary()["dihedral_positive"].keys() == {"phi", "psi"}


def test_used_directories_are_refused(writer, molecule, tmp_path):
    for config in (None, {}):
        with pytest.raises(FileExistsError, match="output: expected an empty or new directory"):
            RunWriter(writer.directory, molecule, LADDER, W).create(7, KB, {}, config)
    other = tmp_path / "other"
    other.mkdir()
    (other / "training.csv").write_text("step\n")
    with pytest.raises(FileExistsError, match=r"has training\.csv"):
        RunWriter(other, molecule, LADDER, W).create(7, KB, {})
    RunWriter(other, molecule, LADDER, W).create(7, KB, {}, config={})
    assert (other / "T300.00K.dcd").exists()


def test_rungs_must_have_different_names(molecule, tmp_path):
    with pytest.raises(ValueError, match=r"temperatures: expected rungs that differ by more"):
        RunWriter(tmp_path, molecule, (300.0, 300.001), W)


def test_a_newer_format_is_refused(writer):
    path = writer.directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    with pytest.raises(ValueError, match="written in format 3 by a newer version"):
        read_run_config(writer.directory)


def test_checkpoint_is_plain_and_counts(writer):
    content = torch.load(writer.directory / "checkpoint.pt", weights_only=True)
    assert (content["n_frames_written"], content["n_segments"]) == (7 * W, 2)
    assert not list(writer.directory.rglob("*.tmp"))
    (writer.directory / "checkpoint.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint\.pt"):
        writer.read_checkpoint()


def test_writing_again_after_a_failure_leaves_no_trace(writer, x):
    writer.dcds[0].append(x[:2, :, 0].reshape(-1, *x.shape[3:]), writer.n_frames)
    writer.write(numbers(1, 7), x[:1], {"seed": 7})
    assert load_run(writer.directory).n_iterations == 8
    assert len(load_run(writer.directory).trajectory(300)) == 8 * W


def test_toy_runs_keep_positions_in_their_segments(tmp_path):
    potential, flow = DoubleWell(0.1, -1.0, 0.3), TemperatureSteerableFlow(1, 2, 1, (4,))
    sampler = ParallelTempering(None, flow, [1.0, 2.0], W, potential=potential, seed=1)
    sampler.set_positions(torch.zeros(W, 2, 1))
    x = sampler.run(4, output=tmp_path / "toy", save_interval=2, collect=True, progress=False)
    with np.load(tmp_path / "toy" / "segments" / "segment_000000.npz") as data:
        np.testing.assert_array_equal(data["positions"], x.numpy())
        assert data["iteration"].tolist() == [2, 4]
        assert data["dihedrals"].shape == (2, W, 2, 0)
    assert load_run(tmp_path / "toy").n_iterations == 2
    config = json.loads((tmp_path / "toy" / "config.json").read_text())
    assert config["choices"]["save_interval"] == 2
    assert not list((tmp_path / "toy").glob("*.dcd"))
