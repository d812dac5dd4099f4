"""Molecular dynamics with its files: frames, accounts, interruption, continuation."""

import json
from dataclasses import replace

import mdtraj
import numpy as np
import openmm.app as app
import pytest

from openmm_tsf.inputs import (
    claim_directory,
    load_molecule,
    load_trajectory,
    write_molecule,
)
from openmm_tsf.md import MDSettings, fastest_platform, run_md

SHORT = MDSettings(n_frames=8, steps_per_frame=5, n_equilibration_steps=20, seed=3)
REFERENCE = {"platform": "Reference", "progress": False}


@pytest.fixture(scope="module")
def run(molecule, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "md"
    return run_md(molecule, folder, SHORT, **REFERENCE), folder


def test_frames_and_accounts(molecule, run):
    result, folder = run
    assert not result.interrupted
    assert result.n_frames == 8
    config = json.loads((folder / "config.json").read_text())
    steps = 20 + 8 * 5
    minimizer = config["progress"]["n_minimizer_iterations"]
    assert minimizer > 0
    assert result.n_evaluations == config["progress"]["n_evaluations"] == steps + minimizer
    assert config["choices"] == {"platform": "Reference"}
    frames = mdtraj.load(str(result.trajectory), top=str(folder / "topology.pdb"))
    assert frames.xyz.shape == (8, 22, 3)
    dataset = load_trajectory(folder, molecule)
    assert len(dataset) == 8
    assert dataset.temperature == 600
    assert dataset.n_evaluations == result.n_evaluations
    assert len(load_trajectory(folder, molecule, stride=3)) == 3


def test_directory_reads_back_as_the_same_molecule(molecule, run):
    _, folder = run
    again = load_molecule(folder / "topology.pdb", system=folder / "system.xml")
    assert again.fingerprint == molecule.fingerprint
    np.testing.assert_allclose(again.positions, molecule.positions, atol=1e-4)


def test_same_seed_same_frames_on_the_reference_platform(molecule, run, tmp_path):
    again = run_md(molecule, tmp_path / "again", SHORT, **REFERENCE)
    assert again.trajectory.read_bytes()[276:] == run[0].trajectory.read_bytes()[276:]


def test_a_used_directory_is_refused_and_resuming_appends(molecule, run, tmp_path):
    folder = tmp_path / "md"
    first = run_md(molecule, folder, SHORT, **REFERENCE)
    with pytest.raises(FileExistsError, match="is not empty; choose another"):
        run_md(molecule, folder, SHORT, **REFERENCE)
    before = first.trajectory.read_bytes()
    # A killed run has frames, and half a frame, that its checkpoint does not know.
    with open(first.trajectory, "ab") as file:
        file.write(before[-500:])
    longer = run_md(molecule, folder, replace(SHORT, n_frames=11), resume=True, **REFERENCE)
    assert longer.n_frames == 11
    assert longer.n_evaluations == first.n_evaluations + 3 * 5
    after = longer.trajectory.read_bytes()
    assert after[276 : len(before)] == before[276:]
    frames = mdtraj.load(str(longer.trajectory), top=molecule.mdtraj_topology)
    assert len(frames) == 11
    steps = np.abs(np.diff(frames.xyz, axis=0)).max(axis=(1, 2))
    assert (steps > 0).all()
    assert (steps < 0.1).all()  # it went on where it was
    with pytest.raises(ValueError, match=r"timestep: the run in .* has 0\.001, got 0\.002"):
        run_md(molecule, folder, replace(SHORT, timestep=0.002), resume=True, **REFERENCE)


def test_nothing_to_resume(molecule, tmp_path):
    with pytest.raises(ValueError, match="no MD run to resume"):
        run_md(molecule, tmp_path, SHORT, resume=True, **REFERENCE)


def test_interruption_leaves_whole_frames(molecule, tmp_path, monkeypatch):
    written = app.DCDFile.writeModel

    def interrupted(self, positions, *rest):
        written(self, positions, *rest)
        if self._modelCount == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(app.DCDFile, "writeModel", interrupted)
        result = run_md(molecule, tmp_path / "md", SHORT, **REFERENCE)
    assert result.interrupted
    assert result.n_frames == 3
    assert len(load_trajectory(tmp_path / "md", molecule)) == 3
    done = run_md(molecule, tmp_path / "md", SHORT, resume=True, **REFERENCE)
    assert done.n_frames == 8
    assert done.n_evaluations == result.n_evaluations + 4 * 5  # the fourth frame's steps were made
    assert len(load_trajectory(tmp_path / "md", molecule)) == 8


def test_blow_up_is_an_error(molecule, tmp_path):
    wild = replace(SHORT, timestep=1.0)
    with pytest.raises(RuntimeError, match="blew up"):
        run_md(molecule, tmp_path / "md", wild, **REFERENCE)


@pytest.mark.parametrize(
    "wrong",
    [{"n_frames": 0}, {"steps_per_frame": 0}, {"timestep": 0.0}, {"friction": -1.0},
     {"temperature": -5.0}, {"seed": -1}],
)  # fmt: skip
def test_settings_at_the_door(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}: expected"):
        MDSettings(**wrong)


def test_platform_is_measured(molecule):
    assert fastest_platform(molecule, n_steps=5) in {"Reference", "CPU", "OpenCL", "CUDA"}


def test_molecules_from_files(molecule, tmp_path):
    write_molecule(molecule, tmp_path)
    pdb, system = tmp_path / "topology.pdb", tmp_path / "system.xml"
    built = load_molecule(pdb, force_field=["amber99sbildn.xml", "amber96_obc.xml"])
    assert built.fingerprint == molecule.fingerprint
    with pytest.raises(ValueError, match="expected a PDB file"):
        load_molecule(system=system)
    with pytest.raises(ValueError, match="exactly one of the two with a PDB file, got none"):
        load_molecule(pdb)
    with pytest.raises(ValueError, match="got both"):
        load_molecule(pdb, system, ["amber14-all.xml"])
    with pytest.raises(FileNotFoundError, match="pdb: no such file"):
        load_molecule(tmp_path / "no.pdb", system)
    with pytest.raises(ValueError, match="force_field: OpenMM cannot build"):
        load_molecule(pdb, force_field=["nosuch.xml"])
    with pytest.raises(ValueError, match="system: OpenMM cannot read"):
        load_molecule(pdb, system=pdb)
    (tmp_path / "empty.pdb").write_text("END\n")
    with pytest.raises(ValueError, match="there are no atoms in it"):
        load_molecule(tmp_path / "empty.pdb", system)


def test_trajectories_from_files(molecule, run, tmp_path):
    result, folder = run
    assert len(load_trajectory(result.trajectory, molecule, temperature=600)) == 8
    with pytest.raises(ValueError, match=r"temperature: expected the temperature of .*md\.dcd"):
        load_trajectory(result.trajectory, molecule)
    with pytest.raises(ValueError, match=r"was run at 600\.0 K, got 500 K"):
        load_trajectory(folder, molecule, temperature=500)
    with pytest.raises(ValueError, match="no directory of the md stage"):
        load_trajectory(tmp_path, molecule)
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        load_trajectory(tmp_path / "no.dcd", molecule)


def test_output_directories(tmp_path):
    fresh = claim_directory(tmp_path / "a" / "b")
    assert fresh.is_dir()
    assert claim_directory(fresh) == fresh
    (fresh / "something").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        claim_directory(fresh)
    with pytest.raises(NotADirectoryError, match="is a file"):
        claim_directory(fresh / "something")
