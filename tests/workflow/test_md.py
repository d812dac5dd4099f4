"""Molecular dynamics with its files: frames, costs, interruption, continuation."""

import json
import shutil
import signal
from dataclasses import asdict, replace
from itertools import count

import mdtraj
import numpy as np
import openmm
import openmm.app as app
import pytest

from openmm_tsf.systems.files import load_molecule, read_molecule, write_molecule
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.workflow import md_simulation
from openmm_tsf.workflow.frames import load_trajectory
from openmm_tsf.workflow.md import run_md
from openmm_tsf.workflow.md_simulation import fastest_platform
from openmm_tsf.workflow.settings import MDSettings
from tests.workflow.tiny import QUIET, RESUME

SHORT = MDSettings(n_frames=8, steps_per_frame=5, n_equilibration_steps=20, seed=3)


@pytest.fixture(scope="module")
def run(molecule, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "md"
    return run_md(molecule, folder, SHORT, options=QUIET), folder


def test_frames_and_costs(molecule, run):
    result, folder = run
    assert (result.interrupted, result.n_frames) == (False, 8)
    config = json.loads((folder / "config.json").read_text())
    choices, progress = config["choices"], config["progress"]
    assert (minimizer := progress["n_minimizer_iterations"]) > 0
    assert result.n_evaluations == progress["n_evaluations"] == 20 + 8 * 5 + minimizer
    assert (choices["platform"], choices["threads"]) == ("Reference", 1)
    assert choices["settings"] == asdict(SHORT.completed_for(molecule))
    frames = mdtraj.load(str(result.trajectory), top=str(folder / "topology.pdb"))
    assert frames.xyz.shape == (8, 22, 3)
    dataset = load_trajectory(folder, molecule)
    assert (len(dataset), dataset.temperature) == (8, 600)
    assert dataset.n_evaluations == result.n_evaluations
    assert len(load_trajectory(folder, molecule, stride=3)) == 3


@pytest.mark.parametrize("changed", ["nothing", "long names", "no names", "bonds"])
def test_a_directory_keeps_what_a_pdb_file_would_lose(molecule, tmp_path, changed):
    residue_names = {"long names": "LIGAND", "no names": ""}
    topology, atoms, residues = app.Topology(), [], {}
    chain = topology.addChain()
    for atom in molecule.topology.atoms():
        if atom.residue.index not in residues:
            name = residue_names.get(changed, atom.residue.name)
            residues[atom.residue.index] = topology.addResidue(name, chain)
        name = {"long names": f"LONG{atom.index}", "no names": ""}.get(changed, atom.name)
        atoms.append(topology.addAtom(name, atom.element, residues[atom.residue.index]))
    bonds = [(first.index, second.index) for first, second in molecule.topology.bonds()]
    if changed == "bonds":
        bonds = [(j, i) for i, j in reversed(bonds)]
    for i, j in bonds:
        topology.addBond(atoms[i], atoms[j])
    positions = molecule.positions + 1e-9  # below the last digit of a PDB file
    written = MolecularSystem(molecule.system, topology, positions)
    write_molecule(written, tmp_path)
    again = read_molecule(tmp_path)
    assert again.fingerprint == written.fingerprint
    np.testing.assert_array_equal(again.positions, positions)
    (tmp_path / "topology.json").write_text('{"chains": [], "bonds": [[0, 1]]}')
    with pytest.raises(ValueError, match=r"topology\.json: not a readable topology"):
        read_molecule(tmp_path)


def test_fewer_frames_and_other_formats_are_refused(molecule, run, tmp_path):
    folder = tmp_path / "md"
    shutil.copytree(run[1], folder)
    with pytest.raises(ValueError, match=r"n_frames: the run in .* has 8, which can grow, got 2"):
        run_md(molecule, folder, replace(SHORT, n_frames=2), options=RESUME)
    config = json.loads((folder / "config.json").read_text())
    for number, age in ((1, "an older version, which this one does not read"), (3, "a newer")):
        (folder / "config.json").write_text(json.dumps(config | {"format": number}))
        for read in (load_trajectory, lambda *given: run_md(*given[::-1], options=RESUME)):
            with pytest.raises(ValueError, match=f"written in format {number} by {age}"):
                read(folder, molecule)


def test_resuming_appends(molecule, tmp_path):
    folder = tmp_path / "md"
    first = run_md(molecule, folder, SHORT, options=QUIET)
    before = first.trajectory.read_bytes()
    # A killed run has frames, and half a frame, that its checkpoint does not know.
    with open(first.trajectory, "ab") as file:
        file.write(before[-500:])
    longer = run_md(molecule, folder, replace(SHORT, n_frames=11), options=RESUME)
    assert longer.n_frames == 11
    assert longer.n_evaluations == first.n_evaluations + 3 * 5
    after = longer.trajectory.read_bytes()
    assert after[276 : len(before)] == before[276:]
    frames = mdtraj.load(str(longer.trajectory), top=molecule.mdtraj_topology)
    assert len(frames) == 11
    steps = np.abs(np.diff(frames.xyz, axis=0)).max(axis=(1, 2))
    assert ((steps > 0) & (steps < 0.1)).all()  # it continued where it was
    other = replace(SHORT, n_frames=11, timestep=0.002)
    with pytest.raises(ValueError, match=r"timestep: what is in .* made with 0\.001, got 0\.002"):
        run_md(molecule, folder, other, options=RESUME)


def test_nothing_to_resume(molecule, tmp_path):
    """An empty directory is started; one with other files is refused and left as it was."""
    run_md(molecule, tmp_path / "new", SHORT, options=RESUME)
    assert len(load_trajectory(tmp_path / "new", molecule)) == 8
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds nothing to resume"):
        run_md(molecule, other, SHORT, options=RESUME)
    assert (other / "notes.txt").read_text() == "mine"


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 7 steps: frames, checkpoints and blocks begin at different steps."""
    monkeypatch.setitem(md_simulation.BLOCK_STEPS, "Reference", 7)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("stop", [1, 3, 12, 30, 55])
def test_a_killed_run_continues_bit_by_bit(molecule, tmp_path, monkeypatch, stop):
    """The same frames as without a stop, wherever it was killed and however often saved."""
    whole = run_md(molecule, tmp_path / "whole", SHORT, options=QUIET)
    step, made = openmm.LangevinMiddleIntegrator.step, 0

    def killed(self, n):
        nonlocal made
        made += n
        if made > stop:
            raise SystemExit  # nothing more is written, as after kill -9
        step(self, n)

    for seconds in (0.0, 1000.0):
        folder, made = tmp_path / f"{seconds}", 0
        options = replace(QUIET, checkpoint_seconds=seconds)
        with monkeypatch.context() as patch:
            patch.setattr(openmm.LangevinMiddleIntegrator, "step", killed)
            with pytest.raises(SystemExit):
                run_md(molecule, folder, SHORT, options=options)
        done = run_md(molecule, folder, options=RESUME)
        assert done.trajectory.read_bytes() == whole.trajectory.read_bytes()
        assert done.n_evaluations == whole.n_evaluations


@pytest.mark.usefixtures("small_blocks")
def test_interruption_leaves_whole_frames(molecule, tmp_path, monkeypatch):
    whole = run_md(molecule, tmp_path / "whole", SHORT, options=QUIET)
    step, calls = openmm.LangevinMiddleIntegrator.step, count(1)

    def interrupted(self, n):
        step(self, n)
        if next(calls) == 9:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(openmm.LangevinMiddleIntegrator, "step", interrupted)
        result = run_md(molecule, tmp_path / "md", SHORT, options=QUIET)
    assert result.interrupted
    assert 0 < result.n_frames < 8
    assert len(load_trajectory(tmp_path / "md", molecule)) == result.n_frames
    done = run_md(molecule, tmp_path / "md", SHORT, options=RESUME)
    assert (done.n_frames, done.n_evaluations) == (8, whole.n_evaluations)
    assert done.trajectory.read_bytes() == whole.trajectory.read_bytes()


def test_a_longer_run_starts_like_a_shorter_one(molecule, tmp_path):
    """Frames do not depend on how often the run was lengthened."""
    whole = run_md(molecule, tmp_path / "a", replace(SHORT, n_frames=12), options=QUIET)
    for n in (3, 7, 12):
        grown = run_md(molecule, tmp_path / "b", replace(SHORT, n_frames=n), options=RESUME)
    assert grown.trajectory.read_bytes() == whole.trajectory.read_bytes()
    same = run_md(molecule, tmp_path / "b", options=RESUME)  # nothing is left to do
    assert (same.n_frames, same.n_evaluations) == (12, whole.n_evaluations)


def test_blow_up_is_an_error(molecule, tmp_path):
    wild = replace(SHORT, timestep=1.0)
    with pytest.raises(RuntimeError, match="blew up"):
        run_md(molecule, tmp_path / "md", wild, options=QUIET)


def test_platform_is_measured(molecule):
    assert fastest_platform(molecule, n_steps=5) in {"Reference", "CPU", "OpenCL", "CUDA"}


def test_time_of_a_step_without_other_programs(molecule, monkeypatch):
    """Another program runs for a second in every part but the second."""
    now = iter(np.cumsum([0.0, 1.003, 1.0, 0.004, 1.0, 1.003]))
    monkeypatch.setattr(md_simulation.time, "perf_counter", lambda: next(now))
    seconds = md_simulation.seconds_per_step(molecule, "Reference", n_steps=6, n_parts=3)
    assert seconds == pytest.approx(0.004 / 2)


def test_molecules_from_files(molecule, tmp_path):
    write_molecule(molecule, tmp_path)
    pdb, system = tmp_path / "topology.pdb", tmp_path / "system.xml"
    for given in ({"system": system}, {"force_field": ["amber99sbildn.xml", "amber96_obc.xml"]}):
        again = load_molecule(pdb, **given)
        assert again.fingerprint == molecule.fingerprint
        np.testing.assert_allclose(again.positions, molecule.positions, atol=1e-4)
    (tmp_path / "empty.pdb").write_text("END\n")
    for given, message in (
        ((None, system), "expected a PDB file"),
        ((pdb,), "exactly one of the two with a PDB file, got none"),
        ((pdb, system, ["amber14-all.xml"]), "got both"),
        ((pdb, None, ["nosuch.xml"]), "force_field: OpenMM cannot build"),
        ((pdb, pdb), "system: OpenMM cannot read"),
        ((tmp_path / "empty.pdb", system), "there are no atoms in it"),
    ):
        with pytest.raises(ValueError, match=message):
            load_molecule(*given)
    with pytest.raises(FileNotFoundError, match="pdb: no such file"):
        load_molecule(tmp_path / "no.pdb", system)


def test_trajectories_from_files(molecule, run, tmp_path):
    result, folder = run
    assert len(load_trajectory(result.trajectory, molecule, temperature=600)) == 8
    for path, temperature, message in (
        (result.trajectory, None, r"temperature: expected the temperature of .*md\.dcd"),
        (folder, 500, r"was run at 600\.0 K, got 500 K"),
        (tmp_path, None, "is not a directory of the md stage"),
    ):
        with pytest.raises(ValueError, match=message):
            load_trajectory(path, molecule, temperature)
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        load_trajectory(tmp_path / "no.dcd", molecule)
