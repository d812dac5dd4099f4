"""Runs of molecules with constrained bonds: from the System to samples, resumed, in the shell."""

from dataclasses import replace

import numpy as np
import openmm
import openmm.app as app
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.cli.main import main
from openmm_tsf.io.files import read_json
from openmm_tsf.systems.files import read_molecule
from openmm_tsf.workflow.md import run_md
from openmm_tsf.workflow.run import run
from openmm_tsf.workflow.settings import MDSettings, SamplingSettings
from tests.support.molecules import alanine, force_field
from tests.workflow.tiny import QUIET, RESUME, SETTINGS

MD = MDSettings(n_frames=400, steps_per_frame=5, n_equilibration_steps=100)


def constrained_alanine(measure="rigid", constraints=app.HBonds):
    """Return alanine dipeptide in vacuum."""
    topology, positions = alanine()
    system = force_field("amber14/protein.ff14SB.xml").createSystem(
        topology, nonbondedMethod=app.NoCutoff, constraints=constraints
    )
    return tsf.MolecularSystem(system, topology, positions, measure)


def largest_deviation(molecule, positions):
    frames = torch.from_numpy(np.asarray(positions, dtype=np.float64))
    return float(molecule.constraints.deviations(frames).abs().max())


def test_md_holds_the_constraints(tmp_path):
    molecule = constrained_alanine()
    settings = replace(MD, n_frames=12)
    result = run_md(molecule, tmp_path / "md", settings, options=QUIET)
    config = read_json(tmp_path / "md" / "config.json")
    assert config["choices"]["settings"]["timestep"] == 0.002
    assert config["choices"]["measure"] == "rigid"
    assert read_molecule(tmp_path / "md").fingerprint == molecule.fingerprint
    frames = tsf.MDDataset.load(result.trajectory, molecule, 600.0)
    assert largest_deviation(molecule, frames.positions) < 1e-14
    other = constrained_alanine("stiff")
    with pytest.raises(ValueError, match="is of another measure, rigid"):
        run_md(other, tmp_path / "md", settings, options=RESUME)
    with pytest.raises(ValueError, match="is of another molecule"):
        run_md(tsf.systems.alanine_dipeptide(), tmp_path / "md", settings, options=RESUME)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "constraints"),
    [("rigid", app.HBonds), ("stiff", app.HBonds), ("rigid", app.AllBonds)],
)
def test_from_system_to_samples(tmp_path, measure, constraints):
    molecule, folder = constrained_alanine(measure, constraints), tmp_path / "run"
    sampling = SamplingSettings(
        temperatures=(450.0, 600.0), n_walkers=4, n_iterations=6, n_tuning=2, local_interval=1
    )
    settings = replace(SETTINGS, md=MD, sampling=sampling)
    summary = run(folder, settings, molecule=molecule, options=QUIET)
    assert summary["acceptance"]["local"]["450.00"] > 0.5
    config = read_json(folder / "config.json")
    assert config["choices"]["measure"] == measure
    assert read_molecule(folder).fingerprint == molecule.fingerprint
    more = replace(settings, sampling=replace(sampling, n_iterations=9))
    assert run(folder, more, options=RESUME)["n_samples_per_rung"] == 36
    result = tsf.load_run(folder)
    for kelvin in sampling.temperatures:
        # To the single precision of DCD files.
        assert largest_deviation(molecule, result.trajectory(kelvin).xyz) < 1e-6
    samples = tsf.sample_at(folder, 500.0, tmp_path / "500.dcd", n_frames=8, options=QUIET)
    assert largest_deviation(molecule, samples.trajectory.xyz) < 1e-6


@pytest.mark.slow
def test_the_measure_from_the_shell(tmp_path):
    molecule = constrained_alanine()
    with open(tmp_path / "a.pdb", "w") as file:
        app.PDBFile.writeFile(molecule.topology, 10 * molecule.positions, file)
    (tmp_path / "a.xml").write_text(openmm.XmlSerializer.serialize(molecule.system))
    given = ["--pdb", str(tmp_path / "a.pdb"), "--system", str(tmp_path / "a.xml"), "--quiet"]
    short = ["--frames", "2", "--steps-per-frame", "2", "--equilibration-steps", "2"]
    command = ["md", "--output", str(tmp_path / "md"), *given, *short, "--measure", "stiff"]
    assert main(command) == 0
    assert read_molecule(tmp_path / "md").measure == "stiff"
    other = ["md", "--output", str(tmp_path / "other"), "--quiet", *short, "--measure", "stiff"]
    assert main(other) == 2
