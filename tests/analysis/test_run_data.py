"""Reading run directories: complete, still growing, damaged."""

import subprocess
import sys

import mdtraj
import numpy as np
import openmm.unit as unit
import pytest

from openmm_tsf.analysis import load_run, write_summary
from tests.support.analysis_runs import BETAS, TEMPERATURES, phi_of, small_run
from tests.support.fabricate import four_atoms, write_run


def test_numbers_of_a_run(shared):
    path, energy, phi, psi = shared
    run = load_run(str(path))
    np.testing.assert_allclose(run.temperatures, TEMPERATURES)
    assert (run.n_iterations, run.n_walkers, run.n_rungs) == (60, 4, 3)
    np.testing.assert_array_equal(run.energies(424.265), energy[:, :, 1])
    np.testing.assert_array_equal(run.energies(600 * unit.kelvin), energy[:, :, 2])
    np.testing.assert_allclose(run.dihedral("psi", 300), psi[:, :, 0], rtol=1e-6)
    for angles, exact in zip(run.ramachandran(300), (phi, psi), strict=True):
        np.testing.assert_allclose(angles, exact[:, :, 0].ravel(), rtol=1e-6)
    u_kn, n_k = run.u_kn()
    assert (u_kn.shape, n_k.tolist()) == ((3, 720), [240] * 3)
    np.testing.assert_allclose(u_kn[2, 240:480], energy[:, :, 1].ravel() * BETAS[2])
    table = run.acceptance()
    assert table.keys() == {"local", "flow_walk", "swap_plain"}
    np.testing.assert_allclose(table["flow_walk"], [0.3] * 3)
    np.testing.assert_allclose(table["swap_plain"], [0.4] * 2)
    np.testing.assert_array_equal(run.mixing_matrix(), np.eye(3))
    assert run.round_trips().shape == (4, 3)


def test_trajectory(shared):
    path, _, phi, _ = shared
    run = load_run(path)
    frames = run.trajectory(424.26)
    assert len(frames) == 240
    np.testing.assert_allclose(phi_of(frames), run.ramachandran(424.26)[0], atol=1e-5)
    one = run.trajectory(600, walker=3)
    np.testing.assert_allclose(phi_of(one), phi[:, 3, 2], atol=1e-5)
    np.testing.assert_array_equal(one.time, np.arange(60))
    whole = mdtraj.load(str(path / "T600.00K.dcd"), top=str(path / "topology.pdb"))
    np.testing.assert_allclose(whole.xyz, run.trajectory(600).xyz, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("energies", (350,), r"rungs at 300\.00, 424\.26, 600\.00 K, got 350 K"),
        ("dihedral", ("omega", 300), "omega"),
        ("trajectory", (600, 4), "walker: expected an integer of at most 3, got 4"),
        ("trajectory", (600, 1.5), r"walker: expected an integer of at least 0, got 1\.5"),
        ("trajectory", (599,), "rungs at"),
        ("trajectory", (300, None, 0), "stride: expected an integer of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(shared, method, arguments, words):
    with pytest.raises(ValueError, match=words):
        getattr(load_run(shared[0]), method)(*arguments)


def test_a_run_still_writing(tmp_path):
    path = tmp_path / "run"
    small_run(path)
    dcd = path / "T300.00K.dcd"
    whole = dcd.read_bytes()
    # Frames ahead of the numbers: the last segment is not complete.
    last = path / "segments" / "segment_000002.npz"
    numbers = last.read_bytes()
    last.write_bytes(numbers[: len(numbers) // 2])
    (path / "segments" / "segment_000003.npz.tmp").write_bytes(b"half")
    assert len(load_run(path).trajectory(300)) == 4 * 50
    # A truncated last frame, and numbers ahead of the frames.
    last.write_bytes(numbers)
    dcd.write_bytes(whole[:-10])
    run = load_run(path)
    assert run.n_iterations == 60
    assert len(run.trajectory(300)) == 4 * 59
    assert len(run.trajectory(300, walker=3)) == 59
    assert len(run.trajectory(600)) == 4 * 60
    assert np.isfinite(run.free_energy_difference(lambda t: phi_of(t) > 0, 300)).all()
    # A file that was just created.
    for size in (0, 50, 95, 200):
        dcd.write_bytes(whole[:size])
        assert len(load_run(path).trajectory(300)) == 0
    with pytest.raises(ValueError, match="no complete iteration"):
        load_run(path).free_energy_difference(lambda t: phi_of(t) > 0, 300)


def test_before_the_first_segment(tmp_path):
    none = np.empty((0, 4, 3))
    run = load_run(write_run(tmp_path / "run", TEMPERATURES, none, {"phi": none}))
    assert run.n_iterations == 0
    assert run.energies(300).shape == (0, 4)
    with pytest.raises(ValueError, match="no complete segment yet"):
        run.mean_energy(300)
    assert write_summary(run, tmp_path / "summary.json")["n_iterations"] == 0


def test_trajectory_with_a_stride(shared):
    run = load_run(shared[0])
    whole, w = run.trajectory(300), run.n_walkers
    for stride in (1, 7, 1000):
        kept = np.arange(0, run.n_iterations, stride)
        rows = (kept[:, None] * w + np.arange(w)).ravel()
        part = run.trajectory(300, stride=stride)
        np.testing.assert_array_equal(part.xyz, whole.xyz[rows])
        np.testing.assert_array_equal(part.time, whole.time[rows])
        one = run.trajectory(300, walker=1, stride=stride)
        np.testing.assert_array_equal(one.xyz, whole.xyz[kept * w + 1])


def test_damaged_directories_are_named(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="no such run directory"):
        load_run(path)
    path.mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_run(path)
    for content, words in (
        ("{", r"config\.json: not a readable JSON"),
        ('{"format": 99}', "written in format 99 by a newer version"),
        ('{"format": 2}', "has no 'temperatures_K'"),
    ):
        (path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=words):
            load_run(path)


def test_damaged_segments_are_named(tmp_path):
    path = tmp_path / "run"
    small_run(path, positions=None)
    segment = path / "segments" / "segment_000001.npz"
    whole = segment.read_bytes()
    with np.load(segment) as data:
        arrays = dict(data)
    segment.unlink()
    with pytest.raises(FileNotFoundError, match=r"segment_000001\.npz is missing"):
        load_run(path)
    segment.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"segment_000001\.npz: cannot be read"):
        load_run(path)
    np.savez(segment, **arrays | {"energy": arrays["energy"][:, :2]})
    with pytest.raises(ValueError, match=r"segment_000001\.npz: energy: expected shape"):
        load_run(path)
    np.savez(segment, **{k: v for k, v in arrays.items() if k != "replica"})
    with pytest.raises(ValueError, match=r"segment_000001\.npz: has no array 'replica'"):
        load_run(path)
    np.savez(segment, **arrays | {"energy": arrays["energy"] * np.inf})
    with pytest.raises(ValueError, match=r"segment_000001\.npz: energy: expected finite"):
        load_run(path).energies(300)  # checked when read, not when opened
    damaged = bytearray(whole)
    damaged[damaged.index(b"energy.npy") + 300] ^= 1  # one bit, in the middle of the numbers
    segment.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"segment_000001\.npz: .*Bad CRC"):
        load_run(path).energies(300)
    segment.write_bytes(whole)
    with pytest.raises(FileNotFoundError, match=r"T300\.00K\.dcd is missing"):
        load_run(path).trajectory(300)


def test_damaged_trajectories_are_named(tmp_path):
    path = tmp_path / "run"
    small_run(path, n=10)
    dcd = path / "T300.00K.dcd"
    whole = dcd.read_bytes()
    run = load_run(path)
    middle = len(whole) // 2
    for content, words in (
        (b"x" * 500, "not a DCD file"),
        (whole[:middle] + whole[middle + 4 :], "corrupt"),
    ):
        dcd.write_bytes(content)
        with pytest.raises(ValueError, match=rf"T300\.00K\.dcd: {words}"):
            run.trajectory(300)
    dcd.unlink()
    with pytest.raises(FileNotFoundError, match=r"T300\.00K\.dcd is missing"):
        run.trajectory(300)
    five = four_atoms()
    five.add_atom("X", mdtraj.element.carbon, next(five.residues))
    mdtraj.Trajectory(np.zeros((1, 5, 3)), five).save_pdb(str(path / "topology.pdb"))
    with pytest.raises(ValueError, match="expected 5 atoms as in the topology, got 4"):
        load_run(path).trajectory(600)


def test_analysis_does_not_import_torch_or_pyplot():
    code = "import openmm_tsf.analysis, openmm_tsf.analysis.plots.ramachandran, sys; "
    code += "sys.exit(len({'torch', 'matplotlib.pyplot'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
